// What a decoding step needs beside its matrices (native_decode.cpp): the small operations between them, for a few rows,
// and the tape, which runs a whole step's calls one after the other.
//
// For a few rows each of these but the router's product takes a microsecond or less and wakes no second thread.
// kernels/native.py says what each function computes and in which shapes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_tape.h"

struct Matrix {  // as in native_decode.cpp
    const void *data, *scales;
    int64_t rows, columns;
};

extern "C" void linear_ff(const Matrix* m, const float* x, float* out, int64_t rows, int threads);
extern "C" void linear_fb(const Matrix* m, const float* x, float* out, int64_t rows, int threads);

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

float* space(int64_t size) {
    static thread_local std::vector<float> memory;
    if (int64_t(memory.size()) < size) memory.resize(size_t(size));
    return memory.data();
}

template <typename T, typename W>
void norm_row(const T* x, const W* weight, float eps, int64_t width, T* out) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += get(x[i]) * get(x[i]);
    float scale = 1.0f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(out[i], get(x[i]) * scale * get(weight[i]));
}

// Router --------------------------------------------------------------------------------------------------------------

struct Router {  // kernels/native.py has the same
    int64_t hidden, experts, choices, groups, kept;  // groups 1: all experts compete
    int32_t sigmoid, best_two, normalized;           // best_two: a group counts by the sum of its two best
    float scale;
};

// What stands higher when experts are ranked; a NaN above everything, as torch.topk has it.
inline bool above(float a, float b) { return a > b || (a != a && b == b); }

// The best of `count`, the first of equals; -1 where all are taken.
inline int64_t best(const float* x, const char* taken, int64_t count) {
    int64_t found = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (found < 0 || above(x[i], x[found]))) found = i;
    return found;
}

// What a group of experts counts by.
float strength_of(const float* x, int64_t count, bool best_two) {
    float first = x[0], second = -INFINITY;
    for (int64_t i = 1; i < count; i++) {
        if (above(x[i], first)) second = first, first = x[i];
        else if (above(x[i], second)) second = x[i];
    }
    return best_two ? first + second : first;
}

// x · weightᵀ in FP32, in the way that fits the weight's type.
void product(const Matrix* m, const float* x, float* out, int64_t rows, int threads, const float*) {
    linear_ff(m, x, out, rows, threads);
}
void product(const Matrix* m, const float* x, float* out, int64_t rows, int threads, const bf16*) {
    linear_fb(m, x, out, rows, threads);
}

void score(const Router& r, float* s) {  // logits -> scores
    if (r.sigmoid) {
        for (int64_t i = 0; i < r.experts; i++) s[i] = 1.0f / (1.0f + std::exp(-s[i]));
        return;
    }
    float top = *std::max_element(s, s + r.experts), sum = 0.0f;
    for (int64_t i = 0; i < r.experts; i++) sum += s[i] = std::exp(s[i] - top);
    for (int64_t i = 0; i < r.experts; i++) s[i] /= sum;
}

void choose(const Router& r, const float* scores, const float* bias, int64_t* indices, float* weights) {
    int64_t size = r.experts / r.groups;
    std::vector<float> choice(scores, scores + r.experts), strength(static_cast<size_t>(r.groups));
    for (int64_t i = 0; bias && i < r.experts; i++) choice[size_t(i)] += bias[i];
    std::vector<char> taken(size_t(r.experts), r.groups > 1);
    if (r.groups > 1) {
        std::vector<char> in(static_cast<size_t>(r.groups));
        for (int64_t g = 0; g < r.groups; g++)
            strength[size_t(g)] = strength_of(choice.data() + g * size, size, r.best_two);
        for (int64_t k = 0; k < r.kept; k++) {
            int64_t g = best(strength.data(), in.data(), r.groups);
            in[size_t(g)] = 1;
            std::fill(taken.begin() + g * size, taken.begin() + (g + 1) * size, 0);
        }
    }
    float sum = 0.0f;
    for (int64_t k = 0; k < r.choices; k++) {
        int64_t i = best(choice.data(), taken.data(), r.experts);
        taken[size_t(i)] = 1;
        indices[k] = i;
        sum += weights[k] = scores[i];
    }
    float factor = r.normalized ? r.scale / (sum + 1e-20f) : r.scale;
    for (int64_t k = 0; k < r.choices; k++) weights[k] *= factor;
}

template <typename T, typename W>
void route(const T* x, const W* weight, const float* bias, int64_t* indices, float* weights, float* scores,
           const Router& r, int64_t rows, int threads) {
    float* numbers = space(rows * r.hidden);
    for (int64_t i = 0; i < rows * r.hidden; i++) numbers[i] = get(x[i]);
    Matrix m = {weight, nullptr, r.experts, r.hidden};
    product(&m, numbers, scores, rows, threads, weight);
    for (int64_t n = 0; n < rows; n++) {
        score(r, scores + n * r.experts);
        choose(r, scores + n * r.experts, bias, indices + n * r.choices, weights + n * r.choices);
    }
}

// The cache -----------------------------------------------------------------------------------------------------------

// kv [rows, latent + rope]: the latents with their norm and the keys turned by position, into the pool's `slots`.
template <typename T, typename W>
int write_latents(const T* kv, const W* weight, float eps, const float* cosine, const float* sine, const int64_t* slots,
                  T* pool, int64_t rows, int64_t latent, int64_t rope, int64_t places, bool interleaved, int threads) {
    int64_t half = rope / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t n = 0; n < rows; n++)
        if (slots[n] < 0 || slots[n] >= places) return 1;
    if (rows <= 32) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const T* from = kv + n * (latent + rope);
        T* to = pool + slots[n] * (latent + rope);
        norm_row(from, weight, eps, latent, to);
        from += latent, to += latent;
        for (int64_t i = 0; i < half; i++) {
            float a = get(from[i * step]), b = get(from[i * step + other]);
            float c = cosine[n * half + i], s = sine[n * half + i];
            put(to[i * step], a * c - b * s);
            put(to[i * step + other], a * s + b * c);
        }
    }
    return 0;
}

template <typename T>
int write_rows(const T* x, const int64_t* slots, T* pool, int64_t rows, int64_t width, int64_t places) {
    for (int64_t n = 0; n < rows; n++)
        if (slots[n] < 0 || slots[n] >= places) return 1;
    for (int64_t n = 0; n < rows; n++) std::memcpy(pool + slots[n] * width, x + n * width, size_t(width) * sizeof(T));
    return 0;
}

// The tape ------------------------------------------------------------------------------------------------------------

struct Call {
    int64_t (*function)(const int64_t*);
    const int64_t* cells;
};

}  // namespace

extern "C" {

// Runs the calls in their order; the number of the first that refuses its arguments, from 1, ends it. 0: none did.
int64_t play(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (calls[i].function(calls[i].cells)) return i + 1;
    return 0;
}

#define ONE_TYPE(s, T)                                                                                                 \
    void add_##s(const T* a, const T* b, T* out, int64_t n, int64_t width) {                                           \
        for (int64_t first = 0; first < n; first += width)                                                             \
            _Pragma("omp simd") for (int64_t i = 0; i < width; i++)                                                    \
                put(out[first + i], get(a[first + i]) + get(b[i]));                                                    \
    }                                                                                                                  \
    ON_TAPE(add_##s)                                                                                                   \
    void join_##s(const T* a, const T* b, T* out, int64_t rows, int64_t width) {                                       \
        for (int64_t n = 0; n < rows; n++) {                                                                           \
            std::memcpy(out + 2 * n * width, a + n * width, size_t(width) * sizeof(T));                                \
            std::memcpy(out + (2 * n + 1) * width, b + n * width, size_t(width) * sizeof(T));                          \
        }                                                                                                              \
    }                                                                                                                  \
    ON_TAPE(join_##s)                                                                                                  \
    int write_rows_##s(const T* x, const int64_t* slots, T* pool, int64_t rows, int64_t width, int64_t places) {       \
        return write_rows(x, slots, pool, rows, width, places);                                                        \
    }                                                                                                                  \
    ON_TAPE(write_rows_##s)

#define TWO_TYPES(s, T, W)                                                                                             \
    void norm_##s(const T* x, const W* weight, float eps, T* out, int64_t rows, int64_t width) {                       \
        for (int64_t n = 0; n < rows; n++) norm_row(x + n * width, weight, eps, width, out + n * width);               \
    }                                                                                                                  \
    ON_TAPE(norm_##s)                                                                                                  \
    void route_##s(const T* x, const W* weight, const float* bias, int64_t* indices, float* weights, float* scores,    \
                   const Router* r, int64_t rows, int threads) {                                                       \
        route(x, weight, bias, indices, weights, scores, *r, rows, threads);                                           \
    }                                                                                                                  \
    ON_TAPE(route_##s)                                                                                                 \
    int write_latents_##s(const T* kv, const W* weight, float eps, const float* cosine, const float* sine,             \
                          const int64_t* slots, T* pool, int64_t rows, int64_t latent, int64_t rope, int64_t places,   \
                          int interleaved, int threads) {                                                              \
        return write_latents(kv, weight, eps, cosine, sine, slots, pool, rows, latent, rope, places,                   \
                             interleaved != 0, threads);                                                               \
    }                                                                                                                  \
    ON_TAPE(write_latents_##s)

ONE_TYPE(f, float)
ONE_TYPE(b, bf16)
TWO_TYPES(ff, float, float)
TWO_TYPES(fb, float, bf16)
TWO_TYPES(bf, bf16, float)
TWO_TYPES(bb, bf16, bf16)
}
