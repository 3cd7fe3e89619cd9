// Attention of a step's rows over paged keys and values, and what writes those pages.
//
// A task is some rows of one sequence and one key head: their query heads, at most 32 vectors, pass over the keys 64 at
// a time with a running maximum and sum (online softmax, arXiv 1805.02867). Keys of a block are turned once so that 16
// of them fill a vector; then scores are products with a broadcast, and nothing is ever summed across a vector.
#include "vector.h"

namespace ds {

// One branch of attention (native_attention.py has the same fields).
struct Branch {
    const char *k, *v;          // [pages, slots, K, D]
    int64_t bf16;               // of the pages; else fp32
    const int32_t* table;       // [S, width]
    int64_t width, slots;       // slots of a page
    const int64_t *low, *high;  // [N]: a row sees slots low <= i < high of its sequence
    const float* sink;          // [2, K, D], seen by all rows, or null
    const float* share;         // [N, H] that this branch has in the result, or null: all of it
    int64_t flip;               // one minus the share
    int64_t add;                // to what is there
};

struct Shape {
    int64_t rows, sequences, heads, kv_heads, dim;
    const int32_t* ends;  // [S + 1]
};

namespace {

constexpr int64_t MOST = 32, KEYS = 64;
const float FAR = -INFINITY;

thread_local Scratch task_scratch;

struct Task {
    int64_t sequence, row, rows, head, heads;  // key heads from `head` on
};

inline void turn(const Vf* in, Vf* out) {  // 16 x 16
    Vf a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = DS_SHUFFLE(in[i], in[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        a[i + 1] = DS_SHUFFLE(in[i], in[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = DS_SHUFFLE(
                a[i + j], a[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            b[i + j + 2] = DS_SHUFFLE(
                a[i + j], a[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = DS_SHUFFLE(
                b[i + j], b[i + j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            a[i + j + 4] = DS_SHUFFLE(
                b[i + j], b[i + j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int j = 0; j < 8; j++) {
        out[j] = DS_SHUFFLE(a[j], a[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        out[j + 8] =
            DS_SHUFFLE(a[j], a[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
}

template <class T>
struct Attention {
    const Branch& branch;
    const Shape& shape;
    const float* q;  // [N, H, D]
    float* y;        // [N, H, D]

    void run(Task task) const {
        for (int64_t end = task.head + task.heads; task.head < end; task.head++, task.heads--) one_head(task);
    }

    void one_head(const Task& task) const {
        const int64_t D = shape.dim, H = shape.heads, G = H / shape.kv_heads, M = task.rows * G;
        static thread_local Scratch scratch;
        float* qs = scratch.take<float>(MOST * D * 2 + KEYS * D + MOST * KEYS);
        float *acc = qs + MOST * D, *turned = acc + MOST * D, *score = turned + KEYS * D;
        float top[MOST], total[MOST];
        int64_t low[MOST], high[MOST], least = INT64_MAX, most = 0;
        const float scale = 1 / std::sqrt((float)D);
        for (int64_t m = 0; m < M; m++) {
            const int64_t row = task.row + m / G, head = task.head * G + m % G;
            const float* from = q + (row * H + head) * D;
            for (int64_t d = 0; d < D; d++) qs[m * D + d] = from[d] * scale;
            low[m] = branch.low[row];
            high[m] = branch.high[row];
            least = low[m] < least ? low[m] : least;
            most = high[m] > most ? high[m] : most;
            top[m] = FAR;
            total[m] = 0;
        }
        std::memset(acc, 0, M * D * sizeof(float));
        if (branch.sink) see_sink(task.head, M, qs, acc, top, total);
        const T *keys[2][KEYS], *values[2][KEYS];  // of this block, and of the next one, which is fetched meanwhile
        int64_t next = fetch(task, least, most, keys[0], values[0]);
        for (int64_t first = least, turn = 0; first < most; first += KEYS, turn ^= 1) {
            const int64_t count = next;
            next = fetch(task, first + KEYS, most, keys[turn ^ 1], values[turn ^ 1]);
            const int64_t groups = ceil_div(count, LANES);
            turn_keys(keys[turn], count, turned);
            for (int64_t m = 0; m < M; m += 4)
                for (int64_t g = 0; g < groups; g++) scores(qs + m * D, M - m, turned + g * D * LANES, score + m * KEYS + g * LANES);
            for (int64_t m = 0; m < M; m++)
                weigh(score + m * KEYS, first, count, groups, low[m], high[m], acc + m * D, top[m], total[m]);
            for (int64_t m = 0; m < M; m += 4)
                for (int64_t d = 0; d < D; d += 4 * LANES) add_values(values[turn], count, score + m * KEYS, M - m, d, acc + m * D);
        }
        for (int64_t m = 0; m < M; m++) {
            const int64_t row = task.row + m / G, head = task.head * G + m % G;
            float part = total[m] > 0 ? 1 / total[m] : (total[m] == 0 ? 0 : total[m]);
            if (branch.share) {
                const float share = branch.share[row * H + head];
                part *= branch.flip ? 1 - share : share;
            }
            float* to = y + (row * H + head) * D;
            for (int64_t d = 0; d < D; d++) to[d] = acc[m * D + d] * part + (branch.add ? to[d] : 0);
        }
    }

    // Where the keys and values of a block are, on their way into the cache; how many there are.
    int64_t fetch(const Task& task, int64_t first, int64_t most, const T** keys, const T** values) const {
        const int64_t count = most - first < KEYS ? (most > first ? most - first : 0) : KEYS;
        const int64_t step = shape.kv_heads * shape.dim, row = task.head * shape.dim;
        const int32_t* table = branch.table + task.sequence * branch.width;
        for (int64_t i = 0; i < count;) {
            const int64_t page = (first + i) / branch.slots, slot = (first + i) % branch.slots;
            const int64_t at = (table[page] * branch.slots + slot) * step + row;
            const T* k = reinterpret_cast<const T*>(branch.k) + at;
            const T* v = reinterpret_cast<const T*>(branch.v) + at;
            for (int64_t s = slot; s < branch.slots && i < count; s++, i++, k += step, v += step) {
                keys[i] = k;
                values[i] = v;
                for (int64_t d = 0; d < shape.dim * task.heads; d += 64 / (int64_t)sizeof(T)) {
                    __builtin_prefetch(k + d);
                    __builtin_prefetch(v + d);
                }
            }
        }
        return count;
    }

    void see_sink(int64_t head, int64_t M, const float* qs, float* acc, float* top, float* total) const {
        const int64_t D = shape.dim;
        const float *k = branch.sink + head * D, *v = k + shape.kv_heads * D;
        for (int64_t m = 0; m < M; m++) {
            Vf s{};
            for (int64_t d = 0; d < D; d += LANES) s = fma(loadf(qs + m * D + d), loadf(k + d), s);
            top[m] = sum(s);
            total[m] = 1;
            std::memcpy(acc + m * D, v, D * sizeof(float));
        }
    }

    // Keys [count][D] to [groups][D][16].
    void turn_keys(const T* const* keys, int64_t count, float* turned) const {
        const int64_t D = shape.dim;
        for (int64_t g = 0; g * LANES < count; g++)
            for (int64_t d = 0; d < D; d += LANES) {
                Vf in[16], out[16];
                for (int64_t i = 0; i < LANES; i++) in[i] = g * LANES + i < count ? loadf(keys[g * LANES + i] + d) : Vf{};
                turn(in, out);
                for (int64_t i = 0; i < LANES; i++) store(turned + (g * D + d + i) * LANES, out[i]);
            }
    }

    // Four queries (or what is left of them) with sixteen keys.
    void scores(const float* qs, int64_t left, const float* turned, float* score) const {
        const int64_t D = shape.dim;
        if (left >= 4) {
            Vf s0{}, s1{}, s2{}, s3{};
            for (int64_t d = 0; d < D; d++) {
                const Vf k = loadf(turned + d * LANES);
                s0 = fma(qs[d], k, s0);
                s1 = fma(qs[D + d], k, s1);
                s2 = fma(qs[2 * D + d], k, s2);
                s3 = fma(qs[3 * D + d], k, s3);
            }
            store(score, s0);
            store(score + KEYS, s1);
            store(score + 2 * KEYS, s2);
            store(score + 3 * KEYS, s3);
            return;
        }
        for (int64_t m = 0; m < left; m++) {
            Vf s{};
            for (int64_t d = 0; d < D; d++) s = fma(qs[m * D + d], loadf(turned + d * LANES), s);
            store(score + m * KEYS, s);
        }
    }

    // Scores of one query to unnormalised probabilities; what was added up before is brought to the new maximum.
    void weigh(
        float* score, int64_t first, int64_t count, int64_t groups, int64_t low, int64_t high, float* acc, float& top,
        float& total) const {
        Vf most = all(FAR);
        const bool whole = low <= first && first + count <= high && count == groups * LANES;
        for (int64_t g = 0; g < groups; g++) {
            Vf s = loadf(score + g * LANES);
            if (!whole) {
                Vi at;
                for (int i = 0; i < LANES; i++) at[i] = i;
                const int32_t base = (int32_t)(g * LANES);
                Vi seen = (at + base >= (int32_t)(low - first > 0 ? low - first : 0)) &
                          (at + base < (int32_t)(high - first < count ? high - first : count));
                s = select(seen, s, all(FAR));
                store(score + g * LANES, s);
            }
            most = larger(s, most);
        }
        float peak = largest(most);
        peak = peak > top ? peak : top;
        if (peak == FAR) {  // nothing seen yet
            for (int64_t g = 0; g < groups; g++) store(score + g * LANES, Vf{});
            return;
        }
        Vf added{};
        for (int64_t g = 0; g < groups; g++) {
            Vf s = loadf(score + g * LANES), p = exponential(s - peak);
            p = select(s == all(FAR), Vf{}, p);
            store(score + g * LANES, p);
            added = added + p;
        }
        if (peak != top) {
            const float shrink = top == FAR ? 0 : std::exp(top - peak);
            for (int64_t d = 0; d < shape.dim; d += LANES) store(acc + d, loadf(acc + d) * shrink);
            total *= shrink;
            top = peak;
        }
        total += sum(added);
    }

    // acc[m] += p[m] * values, four queries and up to 64 dimensions at a time.
    void add_values(const T* const* values, int64_t count, const float* p, int64_t left, int64_t d, float* acc) const {
        const int64_t D = shape.dim, parts = (D - d < 4 * LANES ? D - d : 4 * LANES) / LANES;
        if (left >= 4 && parts == 4) {
            Vf s[4][4];
            for (int m = 0; m < 4; m++)
                for (int i = 0; i < 4; i++) s[m][i] = loadf(acc + m * D + d + i * LANES);
            for (int64_t j = 0; j < count; j++) {
                Vf v[4];
                for (int i = 0; i < 4; i++) v[i] = loadf(values[j] + d + i * LANES);
                for (int m = 0; m < 4; m++)
                    for (int i = 0; i < 4; i++) s[m][i] = fma(p[m * KEYS + j], v[i], s[m][i]);
            }
            for (int m = 0; m < 4; m++)
                for (int i = 0; i < 4; i++) store(acc + m * D + d + i * LANES, s[m][i]);
            return;
        }
        for (int64_t m = 0; m < (left < 4 ? left : 4); m++)
            for (int64_t i = 0; i < parts; i++) {
                Vf s = loadf(acc + m * D + d + i * LANES);
                for (int64_t j = 0; j < count; j++) s = fma(p[m * KEYS + j], loadf(values[j] + d + i * LANES), s);
                store(acc + m * D + d + i * LANES, s);
            }
    }
};

}  // namespace

// q, y: [N, H, D] floats; D a multiple of 16. Rows that belong to no sequence are left as they are.
extern "C" void ds_attention(
    const Shape* shape, const Branch* branches, int64_t count, const float* q_first, const float* q_second, float* y,
    int64_t threads) {
    const int64_t K = shape->kv_heads, G = shape->heads / K, tile = G < MOST ? MOST / G : 1;
    int64_t tiles = 0;
    for (int64_t s = 0; s < shape->sequences; s++) tiles += ceil_div(shape->ends[s + 1] - shape->ends[s], tile);
    // Heads of a position lie side by side: one thread should read them all, if there is enough to do for every thread.
    const int64_t heads = tiles >= 4 * threads ? K : 1, tasks = tiles * (K / heads);
    Task* task = task_scratch.take<Task>(tasks + 1);
    int64_t at = 0;
    for (int64_t s = 0; s < shape->sequences; s++)
        for (int64_t row = shape->ends[s]; row < shape->ends[s + 1]; row += tile)
            for (int64_t head = 0; head < K; head += heads) {
                const int64_t left = shape->ends[s + 1] - row;
                task[at++] = Task{s, row, left < tile ? left : tile, head, heads};
            }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks > 1)
    for (int64_t i = 0; i < tasks; i++)
        for (int64_t b = 0; b < count; b++) {
            const float* q = b ? q_second : q_first;
            if (branches[b].bf16) Attention<uint16_t>{branches[b], *shape, q, y}.run(task[tasks - 1 - i]);
            else Attention<float>{branches[b], *shape, q, y}.run(task[tasks - 1 - i]);
        }
}

// --- writing ---------------------------------------------------------------------------------------------------------

struct Append {
    int64_t heads, kv_heads, dim;
    const float* norm;  // [H + K, D] or null
    double eps;
    char *k, *v, *raw;  // pages; raw may be null
    int64_t bf16;
};

namespace {

void put(char* pages, int64_t bf16, int64_t row, int64_t D, const float* x) {
    if (!bf16) {
        std::memcpy(reinterpret_cast<float*>(pages) + row * D, x, D * sizeof(float));
        return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(pages) + row * D;
    for (int64_t d = 0; d < D; d += LANES) store(to + d, loadf(x + d));
}

}  // namespace

// Norm every head, turn queries and keys, write keys and values to their slots.
// qkv: [N, H + 2K, D], normed in place; cosine and sine: [N, D] (the sine's first half negated) or null; q: [N, H, D].
extern "C" void ds_append(
    const Append* a, float* qkv, const float* cosine, const float* sine, const int64_t* slots, float* q, int64_t n,
    int64_t threads) {
    const int64_t H = a->heads, K = a->kv_heads, D = a->dim, half = D / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 8)
    for (int64_t r = 0; r < n; r++)
        for (int64_t h = 0; h < H + 2 * K; h++) {
            float* x = qkv + (r * (H + 2 * K) + h) * D;
            const int64_t slot = slots[r] * K + (h - H) % K;
            if (h >= H + K) {
                put(a->v, a->bf16, slot, D, x);
                continue;
            }
            if (a->norm) {
                Vf total{};
                for (int64_t d = 0; d < D; d += LANES) total = fma(loadf(x + d), loadf(x + d), total);
                const float by = 1.0f / std::sqrt(sum(total) / D + (float)a->eps);
                for (int64_t d = 0; d < D; d += LANES) store(x + d, loadf(x + d) * by * loadf(a->norm + h * D + d));
            }
            float turned[1024];
            const float* out = x;
            if (cosine) {
                const float *c = cosine + r * D, *s = sine + r * D;
                for (int64_t d = 0; d < half; d++) {
                    turned[d] = x[d] * c[d] + x[d + half] * s[d];
                    turned[d + half] = x[d + half] * c[d + half] + x[d] * s[d + half];
                }
                out = turned;
            }
            if (h < H) {
                std::memcpy(q + (r * H + h) * D, out, D * sizeof(float));
                continue;
            }
            put(a->k, a->bf16, slot, D, out);
            if (a->raw) put(a->raw, a->bf16, slot, D, x);
        }
}

}  // namespace ds
