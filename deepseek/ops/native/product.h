// Products of a few rows with a weight that is read once, in the order in which it lies in memory.
//
// A weight [F, C] is cut into blocks of 16 outputs. A block holds, for one *word* of inputs after the other, 64 bytes:
// the word's inputs for each of its 16 outputs. A word is 32 bits of inputs: one fp32, two bf16 or four int8. So all
// formats run through one loop: broadcast a word of a row, multiply, add to sixteen sums. A row's sums are taken in the
// order of its inputs, however many rows there are and wherever the row lies among them.
#pragma once
#include "vector.h"

namespace ds {

enum Format : int64_t { FP32 = 0, BF16 = 1, INT8 = 2 };

// A weight as Python lays it out (native_linear.py has the same fields).
struct Weight {
    int64_t format;
    int64_t inputs, outputs, words, blocks;
    const char* data;       // [blocks][words][64 bytes]
    const float* bias;      // [outputs] or null
    const float* scale;     // int8: [blocks * 16]
    const int32_t* sums;    // int8: 128 * sum of an output's weights, [blocks * 16]
};

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

// --- rows ------------------------------------------------------------------------------------------------------------

inline float inverse_rms(const float* x, int64_t n, float eps) {
    Vf total{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vf v = loadf(x + i);
        total = fma(v, v, total);
    }
    float rest = 0;
    for (; i < n; i++) rest += x[i] * x[i];
    return 1.0f / std::sqrt((sum(total) + rest) / n + eps);
}

// x, or x / rms(x) * norm, into a row of floats.
inline void normed(const float* x, const float* norm, float eps, int64_t n, float* y) {
    if (norm == nullptr) {
        std::memcpy(y, x, n * sizeof(float));
        return;
    }
    const float r = inverse_rms(x, n, eps);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, loadf(x + i) * r * loadf(norm + i));
    for (; i < n; i++) y[i] = x[i] * r * norm[i];
}

inline uint16_t narrow_one(float x) {
    uint16_t h[LANES];
    store(h, all(x));
    return h[0];
}

// A row of floats as words of a format; what is left of the last word is zero. The row's scale (int8; else 1).
inline float to_words(int64_t format, const float* x, int64_t n, int64_t words, uint32_t* out) {
    if (format == FP32) {
        std::memcpy(out, x, n * sizeof(float));
        return 1;
    }
    int64_t i = 0;
    if (format == BF16) {
        uint16_t* h = reinterpret_cast<uint16_t*>(out);
        for (; i + LANES <= n; i += LANES) store(h + i, loadf(x + i));
        for (; i < n; i++) h[i] = narrow_one(x[i]);
        for (; i < words * 2; i++) h[i] = 0;
        return 1;
    }
    Vf most{};
    float top = 0;
    for (; i + LANES <= n; i += LANES) {
        Vf v = loadf(x + i);
        most = larger((Vf)((Vu)v & 0x7fffffffu), most);
    }
    for (; i < n; i++) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    const float m = largest(most);
    top = m > top ? m : top;
    const float scale = top > 0 ? top / 127 : 1, inverse = 1 / scale;
    uint8_t* q = reinterpret_cast<uint8_t*>(out);
    const Vf magic = all(12582912.0f);
    for (i = 0; i + LANES <= n; i += LANES) {
        Vi v = (Vi)(loadf(x + i) * inverse + magic) - (Vi)magic + 128;
        typedef uint8_t Vb __attribute__((vector_size(16)));
        Vb b = __builtin_convertvector(v, Vb);
        std::memcpy(q + i, &b, 16);
    }
    for (; i < n; i++) q[i] = (uint8_t)((int)std::nearbyint(x[i] * inverse) + 128);
    for (; i < words * 4; i++) q[i] = 128;
    return scale;
}

// --- tiles -----------------------------------------------------------------------------------------------------------

constexpr int TILE_ROWS = 6, TILE_BLOCKS = 4;  // 24 sums, four weights and a broadcast fill AVX-512's 32 registers

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

// Sums of up to TILE_ROWS rows with up to TILE_BLOCKS blocks from `block` on: out[row * blocks + i].
inline void multiply(
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

// `outputs` of the block's sixteen that exist.
inline int64_t real_outputs(const Weight& w, int64_t block) {
    const int64_t left = w.outputs - block * LANES;
    return left < LANES ? left : LANES;
}

}  // namespace ds
