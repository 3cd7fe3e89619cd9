// A sparse feed-forward layer: norm, route, the chosen experts' two products over the rows that chose them, and
// residual plus the sum over each row's experts.
#include "product.h"

namespace ds {

struct Experts {
    int64_t experts, top_k, normalise;
    Weight router;           // fp32
    const float* bias;       // [experts], for the choice only
    Weight up, down;         // of the first expert; the others' follow
};

namespace {

Weight of(const Weight& first, int64_t e) {
    Weight w = first;
    w.data += e * w.blocks * w.words * 64;
    if (w.scale) {
        w.scale += e * w.blocks * LANES;
        w.sums += e * w.blocks * LANES;
    }
    return w;
}

int64_t first_left(const int64_t* chosen, int64_t count, int64_t experts) {
    for (int64_t e = 0; e < experts; e++) {
        bool taken = false;
        for (int64_t j = 0; j < count; j++) taken |= chosen[j] == e;
        if (!taken) return e;
    }
    return 0;
}

// Probabilities of a row (and scratch for as many scores), its top_k experts by probability plus bias (the lower index first of equals), and gates.
void route(const Experts& m, const float* h, float* prob, int64_t* chosen, float* gate) {
    const uint32_t* row[1] = {reinterpret_cast<const uint32_t*>(h)};
    const float one = 1;
    float top = -INFINITY;
    for (int64_t b = 0; b < m.router.blocks; b += TILE_BLOCKS) {
        const int blocks = (int)(m.router.blocks - b < TILE_BLOCKS ? m.router.blocks - b : TILE_BLOCKS);
        Vf out[TILE_BLOCKS];
        multiply(m.router, row, &one, 1, b, blocks, out);
        for (int i = 0; i < blocks; i++) store(prob + (b + i) * LANES, out[i]);
    }
    const int64_t E = m.experts, padded = m.router.blocks * LANES;
    for (int64_t e = 0; e < E; e++) top = prob[e] > top ? prob[e] : top;
    for (int64_t e = E; e < padded; e++) prob[e] = -INFINITY;
    Vf total{};
    for (int64_t e = 0; e < padded; e += LANES) {
        Vf lane = load<Vf>(prob + e), p = exponential(lane - top);
        p = select(lane == all(-INFINITY), Vf{}, p);
        store(prob + e, p);
        total = total + p;
    }
    const float inverse = 1 / sum(total);
    for (int64_t e = 0; e < E; e++) prob[e] *= inverse;
    float* score = prob + padded;
    for (int64_t e = 0; e < E; e++) score[e] = prob[e] + m.bias[e];
    float added = 0;
    for (int64_t k = 0; k < m.top_k; k++) {
        int64_t best = -1;
        float most = -INFINITY;
        for (int64_t e = 0; e < E; e++)
            if (score[e] > most) best = e, most = score[e];
        if (best < 0) best = first_left(chosen, k, E);  // nothing but NaN is left
        score[best] = -INFINITY;
        chosen[k] = best;
        gate[k] = prob[best];
        added += prob[best];
    }
    if (m.normalise)
        for (int64_t k = 0; k < m.top_k; k++) gate[k] /= added;
}

thread_local Scratch h_scratch, word_scratch, scale_scratch, prob_scratch, group_scratch, hidden_scratch, inner_scratch,
    inner_scale_scratch, y_scratch;

}  // namespace

// expert [n, top_k] and gate [n, top_k] are written, too.
extern "C" void ds_experts(
    const Experts* layer, const float* x, const float* norm, float eps, const float* residual, float* y,
    int64_t* expert, float* gate, int64_t n, int64_t threads) {
    const Experts& m = *layer;
    const int64_t C = m.up.inputs, F = m.down.inputs, K = m.top_k, A = n * K, E = m.experts;
    const int64_t padded = m.router.blocks * LANES;
    float* h = h_scratch.take<float>(n * C);
    uint32_t* words = word_scratch.take<uint32_t>(n * m.up.words);
    float* scale = scale_scratch.take<float>(n);
    float* prob = prob_scratch.take<float>(n * 2 * padded);
    int64_t* group = group_scratch.take<int64_t>(3 * E + 2 + 2 * A);
    int64_t *first = group, *fill = first + E + 1, *active = fill + E + 1, *order = active + E, *place = order + A;
    int64_t used = 0;  // experts that somebody chose
    float* hidden = hidden_scratch.take<float>(A * F);
    uint32_t* inner = inner_scratch.take<uint32_t>(A * m.down.words);
    float* inner_scale = inner_scale_scratch.take<float>(A);
    float* parts = y_scratch.take<float>(A * C);
    const int64_t up_panels = ceil_div(m.up.blocks, TILE_BLOCKS), down_panels = ceil_div(m.down.blocks, TILE_BLOCKS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; r++) {
            normed(x + r * C, norm, eps, C, h + r * C);
            scale[r] = to_words(m.up.format, h + r * C, C, m.up.words, words + r * m.up.words);
            route(m, h + r * C, prob + r * 2 * padded, expert + r * K, gate + r * K);
        }
#pragma omp single
        {
            std::memset(first, 0, (E + 1) * sizeof(int64_t));
            for (int64_t a = 0; a < A; a++) first[expert[a] + 1]++;
            for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
            std::memcpy(fill, first, (E + 1) * sizeof(int64_t));
            for (int64_t e = 0; e < E; e++)
                if (first[e] < first[e + 1]) active[used++] = e;
            for (int64_t a = 0; a < A; a++) {
                const int64_t p = fill[expert[a]]++;
                order[p] = a;
                place[a] = p;
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < used * up_panels; task++) {
            const int64_t e = active[task / up_panels], block = task % up_panels * TILE_BLOCKS;
            const Weight w = of(m.up, e);
            const int blocks = (int)(w.blocks - block < TILE_BLOCKS ? w.blocks - block : TILE_BLOCKS);
            for (int64_t p = first[e]; p < first[e + 1]; p += TILE_ROWS) {
                const int some = (int)(first[e + 1] - p < TILE_ROWS ? first[e + 1] - p : TILE_ROWS);
                const uint32_t* rows[TILE_ROWS];
                float scales[TILE_ROWS];
                for (int i = 0; i < some; i++) {
                    const int64_t r = order[p + i] / K;
                    rows[i] = words + r * w.words;
                    scales[i] = scale[r];
                }
                Vf out[TILE_ROWS * TILE_BLOCKS];
                multiply(w, rows, scales, some, block, blocks, out);
                for (int i = 0; i < some; i++) {
                    const float g = gate[order[p + i]];
                    for (int b = 0; b < blocks; b += 2) {
                        const int64_t at = (block + b) / 2 * LANES, real = F - at < LANES ? F - at : LANES;
                        Vf v = silu(out[i * blocks + b]) * out[i * blocks + b + 1] * g;
                        float* to = hidden + (p + i) * F + at;
                        if (real == LANES) store(to, v);
                        else for (int64_t l = 0; l < real; l++) to[l] = v[l];
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < A; p++)
            inner_scale[p] = to_words(m.down.format, hidden + p * F, F, m.down.words, inner + p * m.down.words);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < used * down_panels; task++) {
            const int64_t e = active[task / down_panels], block = task % down_panels * TILE_BLOCKS;
            const Weight w = of(m.down, e);
            const int blocks = (int)(w.blocks - block < TILE_BLOCKS ? w.blocks - block : TILE_BLOCKS);
            for (int64_t p = first[e]; p < first[e + 1]; p += TILE_ROWS) {
                const int some = (int)(first[e + 1] - p < TILE_ROWS ? first[e + 1] - p : TILE_ROWS);
                const uint32_t* rows[TILE_ROWS];
                for (int i = 0; i < some; i++) rows[i] = inner + (p + i) * w.words;
                Vf out[TILE_ROWS * TILE_BLOCKS];
                multiply(w, rows, inner_scale + p, some, block, blocks, out);
                for (int i = 0; i < some; i++)
                    for (int b = 0; b < blocks; b++) {
                        const int64_t at = (block + b) * LANES, real = real_outputs(w, block + b);
                        float* to = parts + (p + i) * C + at;
                        Vf v = out[i * blocks + b];
                        if (real == LANES) store(to, v);
                        else for (int64_t l = 0; l < real; l++) to[l] = v[l];
                    }
            }
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n; r++) {
            float* to = y + r * C;
            for (int64_t k = 0; k < K; k++) {
                const float* part = parts + place[r * K + k] * C;
                if (k == 0) std::memcpy(to, part, C * sizeof(float));
                else for (int64_t c = 0; c < C; c++) to[c] += part[c];
            }
            if (residual)
                for (int64_t c = 0; c < C; c++) to[c] += residual[r * C + c];
        }
    }
}

}  // namespace ds
