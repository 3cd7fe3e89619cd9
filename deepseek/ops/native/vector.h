// Vectors of 16 floats that any compiler with GCC's vector extensions turns into what the machine has, and the few
// functions a decoder needs of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ds {

constexpr int64_t LANES = 16;
typedef float Vf __attribute__((vector_size(64)));
typedef int32_t Vi __attribute__((vector_size(64)));
typedef uint32_t Vu __attribute__((vector_size(64)));
typedef uint16_t Vh __attribute__((vector_size(32)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
inline Vf loadf(const float* p) { return load<Vf>(p); }
inline void store(float* p, Vf v) { std::memcpy(p, &v, sizeof(v)); }
inline Vf all(float x) { return Vf{} + x; }

// a * b + c, rounded once where the machine can; the compiler is told to fuse nothing itself, so that a row comes out the
// same from every loop that may compute it.
inline Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
    return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    struct Halves {
        __m256 x, y;
    };
    Halves p = load<Halves>(&a), q = load<Halves>(&b), r = load<Halves>(&c);
    r.x = _mm256_fmadd_ps(p.x, q.x, r.x);
    r.y = _mm256_fmadd_ps(p.y, q.y, r.y);
    return load<Vf>(&r);
#else
    return a * b + c;
#endif
}
inline Vf fma(float a, Vf b, Vf c) { return fma(all(a), b, c); }

// bf16: the upper half of a float.
inline Vf widen(Vh h) {
    Vu w = __builtin_convertvector(h, Vu) << 16;
    return (Vf)w;
}
inline Vf loadf(const uint16_t* p) { return widen(load<Vh>(p)); }

inline Vh narrow(Vf x) {
#if defined(__AVX512BF16__)
    return (Vh)_mm512_cvtneps_pbh((__m512)x);
#else
    Vu bits = (Vu)x;
    Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Vu nan = (bits >> 16) | 0x40;
    Vi is_nan = x != x;
    Vu chosen = ((Vu)is_nan & nan) | (~(Vu)is_nan & rounded);
    return __builtin_convertvector(chosen, Vh);
#endif
}
inline void store(uint16_t* p, Vf v) {
    Vh h = narrow(v);
    std::memcpy(p, &h, sizeof(h));
}

#if defined(__clang__) || __GNUC__ >= 12
#define DS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Vi){__VA_ARGS__})
#endif

template <class V>
inline V select(Vi yes, V a, V b) {
    return (V)(((Vi)a & yes) | ((Vi)b & ~yes));
}
inline Vf larger(Vf a, Vf b) { return select(a > b, a, b); }

// In a fixed order, so that a row's result never depends on how it was computed.
inline float sum(Vf v) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
inline float largest(Vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
inline Vf exponential(Vf x) {
    x = select(x < all(-87.3f), all(-87.3f), x);
    x = select(x > all(88.7f), all(88.7f), x);
    const Vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vf shifted = fma(1.44269504088896341f, x, magic);
    Vf n = shifted - magic;
    Vf r = fma(-0.693359375f, n, x);
    r = fma(2.12194440e-4f, n, r);
    Vf p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p * r, r, r) + 1.0f;
    Vi power = ((Vi)shifted - (Vi)magic) << 23;
    return (Vf)((Vi)p + power);
}
inline Vf silu(Vf x) { return x / (1.0f + exponential(-x)); }

// Memory of the calling thread that the next call overwrites: fresh pages from the system cost more than the work.
struct Scratch {
    char* at = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(at); }
    template <class T>
    T* take(int64_t count) {
        size_t need = (count * sizeof(T) + 63) / 64 * 64;
        if (need > size) {
            std::free(at);
            size = need + need / 2;
            size = (size + 63) / 64 * 64;
            at = static_cast<char*>(std::aligned_alloc(64, size));
            if (at == nullptr) std::abort();
        }
        return reinterpret_cast<T*>(at);
    }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ds
