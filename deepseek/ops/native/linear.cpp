// y = residual + W norm(x) + b, and the same around a SwiGLU feed-forward layer.
#include "product.h"

namespace ds {
namespace {

thread_local Scratch rows_scratch, scale_scratch, inner_scratch;

constexpr int64_t CHUNK_BYTES = 256 << 10;  // rows that stay in a core's second-level cache while a weight passes by

// Rows of words that one pass over the weight takes, a multiple of the tile's.
int64_t chunk_rows(const Weight& w) {
    const int64_t fit = CHUNK_BYTES / (w.words * 4) / TILE_ROWS * TILE_ROWS;
    return fit > TILE_ROWS ? fit : TILE_ROWS;
}

// Called by all threads of a region: rows, through the norm if there is one, as words.
void prepare(
    const Weight& w, const float* x, const float* norm, float eps, int64_t n, float* normed_rows, uint32_t* words,
    float* scale) {
    const int64_t C = w.inputs;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n; r++) {
        const float* from = x + r * C;
        if (norm) {
            normed(from, norm, eps, C, normed_rows + r * C);
            from = normed_rows + r * C;
        }
        scale[r] = to_words(w.format, from, C, w.words, words + r * w.words);
    }
}

// Called by all threads of a region: panels of four blocks are dealt out in turn.
template <class Write>
void panels(const Weight& w, const uint32_t* words, const float* scale, int64_t n, Write write) {
    const int64_t count = ceil_div(w.blocks, TILE_BLOCKS), chunk = chunk_rows(w);
    for (int64_t first = 0; first < n; first += chunk) {
        const int64_t end = first + chunk < n ? first + chunk : n;
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < count; p++) {
            const int64_t block = p * TILE_BLOCKS;
            const int blocks = (int)(w.blocks - block < TILE_BLOCKS ? w.blocks - block : TILE_BLOCKS);
            for (int64_t r = first; r < end; r += TILE_ROWS) {
                const int some = (int)(end - r < TILE_ROWS ? end - r : TILE_ROWS);
                const uint32_t* rows[TILE_ROWS];
                for (int i = 0; i < some; i++) rows[i] = words + (r + i) * w.words;
                Vf out[TILE_ROWS * TILE_BLOCKS];
                multiply(w, rows, scale + r, some, block, blocks, out);
                write(r, some, block, blocks, out);
            }
        }
    }
}

void write_out(
    const Weight& w, const float* residual, float* y, int64_t r, int some, int64_t block, int blocks, const Vf* out) {
    for (int i = 0; i < some; i++)
        for (int b = 0; b < blocks; b++) {
            const int64_t at = (block + b) * LANES, to = (r + i) * w.outputs + at, real = real_outputs(w, block + b);
            Vf v = out[i * blocks + b];
            if (real == LANES) {
                if (w.bias) v = v + loadf(w.bias + at);
                if (residual) v = v + loadf(residual + to);
                store(y + to, v);
            } else {
                for (int64_t l = 0; l < real; l++)
                    y[to + l] = v[l] + (w.bias ? w.bias[at + l] : 0) + (residual ? residual[to + l] : 0);
            }
        }
}

}  // namespace

extern "C" void ds_linear(
    const Weight* w, const float* x, const float* norm, float eps, const float* residual, float* y, int64_t n,
    int64_t threads) {
    uint32_t* words = rows_scratch.take<uint32_t>(n * w->words);
    float* scale = scale_scratch.take<float>(n);
    float* all_rows = norm ? inner_scratch.take<float>(n * w->inputs) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        prepare(*w, x, norm, eps, n, all_rows, words, scale);
        panels(*w, words, scale, n, [&](int64_t r, int some, int64_t block, int blocks, const Vf* out) {
            write_out(*w, residual, y, r, some, block, blocks, out);
        });
    }
}

// residual + down(silu(gate) * up): in `up`'s weight a block of the gate lies before each block of the other half.
extern "C" void ds_swiglu(
    const Weight* up, const Weight* down, const float* x, const float* norm, float eps, const float* residual, float* y,
    int64_t n, int64_t threads) {
    static thread_local Scratch hidden_scratch;
    const int64_t F = down->inputs;
    const int64_t most = up->words > down->words ? up->words : down->words;
    uint32_t* words = rows_scratch.take<uint32_t>(n * most);
    float* scale = scale_scratch.take<float>(n);
    float* all_rows = norm ? inner_scratch.take<float>(n * up->inputs) : nullptr;
    float* hidden = hidden_scratch.take<float>(n * F);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        prepare(*up, x, norm, eps, n, all_rows, words, scale);
        panels(*up, words, scale, n, [&](int64_t r, int some, int64_t block, int blocks, const Vf* out) {
            for (int i = 0; i < some; i++)
                for (int b = 0; b < blocks; b += 2) {
                    Vf g = out[i * blocks + b], u = out[i * blocks + b + 1];
                    const int64_t at = (block + b) / 2 * LANES, real = F - at < LANES ? F - at : LANES;
                    if (up->bias) {
                        g = g + loadf(up->bias + (block + b) * LANES);
                        u = u + loadf(up->bias + (block + b + 1) * LANES);
                    }
                    Vf v = silu(g) * u;
                    float* to = hidden + (r + i) * F + at;
                    if (real == LANES) store(to, v);
                    else for (int64_t l = 0; l < real; l++) to[l] = v[l];
                }
        });
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; r++)
            scale[r] = to_words(down->format, hidden + r * F, F, down->words, words + r * down->words);
        panels(*down, words, scale, n, [&](int64_t r, int some, int64_t block, int blocks, const Vf* out) {
            write_out(*down, residual, y, r, some, block, blocks, out);
        });
    }
}

extern "C" int ds_version() { return 1; }
extern "C" int ds_has_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
extern "C" int ds_has_int8() {
#if defined(__AVX512VNNI__)
    return 1;
#else
    return 0;
#endif
}

}  // namespace ds
