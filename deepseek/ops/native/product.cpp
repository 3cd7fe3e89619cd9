// The loop over a weight, for every format, number of rows and number of blocks.
#include "product.h"

namespace ds {
namespace {

struct Fp32 {
    using Acc = Vf;
    static constexpr int PER_WORD = 1;
    static inline Acc dot(Acc acc, uint32_t word, const char* w) {
        float a;
        std::memcpy(&a, &word, 4);
        return fma(a, load<Vf>(w), acc);
    }
};

struct Bf16 {
    using Acc = Vf;
    static constexpr int PER_WORD = 2;
    static inline Acc dot(Acc acc, uint32_t word, const char* w) {
#if defined(__AVX512BF16__)
        return (Vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)load<__m512i>(w));
#else
        Vu pair = load<Vu>(w);
        Vf even = (Vf)(pair << 16), odd = (Vf)(pair & 0xffff0000u);
        uint32_t low = word << 16, high = word & 0xffff0000u;
        float a, b;
        std::memcpy(&a, &low, 4);
        std::memcpy(&b, &high, 4);
        return fma(a, even, fma(b, odd, acc));
#endif
    }
};

#if defined(__AVX512VNNI__)
// Inputs are unsigned (value + 128), weights signed; the 128s are taken off at the end.
struct Int8 {
    using Acc = Vi;
    static constexpr int PER_WORD = 4;
    static inline Acc dot(Acc acc, uint32_t word, const char* w) {
        return (Vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32((int)word), load<__m512i>(w));
    }
};
#endif

// Sums of R rows with B blocks: out[r * B + b], as floats.
template <class F, int R, int B>
inline void tile(const Weight& w, const uint32_t* const* rows, const float* row_scale, int64_t block, Vf* out) {
    typename F::Acc acc[R][B] = {};
    const int64_t step = w.words * 64;
    const char* data = w.data + block * step;
    for (int64_t k = 0; k < w.words; k++) {
        for (int b = 0; b < B; b++) __builtin_prefetch(data + b * step + k * 64 + 1024);
        for (int r = 0; r < R; r++) {
            const uint32_t word = rows[r][k];
            for (int b = 0; b < B; b++) acc[r][b] = F::dot(acc[r][b], word, data + b * step + k * 64);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            if constexpr (F::PER_WORD == 4) {
                const int64_t at = (block + b) * LANES;
                Vi exact = (Vi)acc[r][b] - load<Vi>(w.sums + at);
                out[r * B + b] = __builtin_convertvector(exact, Vf) * row_scale[r] * loadf(w.scale + at);
            } else {
                out[r * B + b] = (Vf)acc[r][b];
            }
        }
}

template <class F, int B>
inline void tile_rows(
    const Weight& w, const uint32_t* const* rows, const float* scale, int count, int64_t block, Vf* out) {
    switch (count) {
        case 1: return tile<F, 1, B>(w, rows, scale, block, out);
        case 2: return tile<F, 2, B>(w, rows, scale, block, out);
        case 3: return tile<F, 3, B>(w, rows, scale, block, out);
        case 4: return tile<F, 4, B>(w, rows, scale, block, out);
        case 5: return tile<F, 5, B>(w, rows, scale, block, out);
        default: return tile<F, 6, B>(w, rows, scale, block, out);
    }
}

template <class F>
inline void tile_any(
    const Weight& w, const uint32_t* const* rows, const float* scale, int count, int64_t block, int blocks, Vf* out) {
    if (blocks == TILE_BLOCKS) return tile_rows<F, TILE_BLOCKS>(w, rows, scale, count, block, out);
    Vf one[TILE_ROWS];
    for (int b = 0; b < blocks; b++) {
        tile_rows<F, 1>(w, rows, scale, count, block + b, one);
        for (int r = 0; r < count; r++) out[r * blocks + b] = one[r];
    }
}

}  // namespace

void multiply(
    const Weight& w, const uint32_t* const* rows, const float* scale, int count, int64_t block, int blocks, Vf* out) {
    switch (w.format) {
        case FP32: return tile_any<Fp32>(w, rows, scale, count, block, blocks, out);
        case BF16: return tile_any<Bf16>(w, rows, scale, count, block, blocks, out);
#if defined(__AVX512VNNI__)
        case INT8: return tile_any<Int8>(w, rows, scale, count, block, blocks, out);
#endif
        default: std::abort();
    }
}

}  // namespace ds
