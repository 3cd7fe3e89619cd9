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

// Sums of up to TILE_ROWS rows with up to TILE_BLOCKS blocks from `block` on: out[row * blocks + i].
void multiply(
    const Weight& w, const uint32_t* const* rows, const float* scale, int count, int64_t block, int blocks, Vf* out);

// How many of the block's sixteen outputs exist.
inline int64_t real_outputs(const Weight& w, int64_t block) {
    const int64_t left = w.outputs - block * LANES;
    return left < LANES ? left : LANES;
}

}  // namespace ds
