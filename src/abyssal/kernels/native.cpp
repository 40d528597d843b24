// The hot operations of a training step on a CPU, each in one pass over memory where PyTorch's operations take several.
//
// Plain C++ without PyTorch's headers, called through kernels/native.py, which says for each function what it computes
// and in which shapes. Everything is worked out in FP32, whatever is stored; rows are shared out over threads in fixed
// pieces, so results do not change from run to run. The loops are written for the compiler to vectorise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_tape.h"

namespace {

struct bf16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float get(float x) { return x; }
inline float get(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

// e^x by 2^n · e^r with |r| ≤ ln(2)/2 and a polynomial for e^r: within 2 units in the last place. It stays finite at both
// ends, and a NaN goes through.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = std::nearbyint(x * 1.44269504f);
    float r = std::fma(n, -0.693359375f, x);
    r = std::fma(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = std::fma(p, r, 1.3981999507e-3f);
    p = std::fma(p, r, 8.3334519073e-3f);
    p = std::fma(p, r, 4.1665795894e-2f);
    p = std::fma(p, r, 1.6666665459e-1f);
    p = std::fma(p, r, 5.0000001201e-1f);
    p = std::fma(p, r * r, r + 1.0f);
    int32_t exponent = int32_t(n == n ? n : 0.0f);
    return p * as_float(uint32_t(exponent + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// SwiGLU ---------------------------------------------------------------------------------------------------------------

template <typename T>
void swiglu(const T* gate_up, const float* row_weight, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < rows; p++) {
        const T *gate = gate_up + p * 2 * width, *up = gate + width;
        float w = row_weight ? row_weight[p] : 1.0f;
        T* to = out + p * width;
#pragma omp simd
        for (int64_t f = 0; f < width; f++) {
            float g = get(gate[f]);
            put(to[f], w * (g * sigmoid(g) * get(up[f])));
        }
    }
}

template <typename T>
void swiglu_backward(const T* grad, const T* gate_up, const float* row_weight, T* grad_gate_up, float* grad_weight,
                     int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < rows; p++) {
        const T *gate = gate_up + p * 2 * width, *up = gate + width, *dy = grad + p * width;
        T *to_gate = grad_gate_up + p * 2 * width, *to_up = to_gate + width;
        float w = row_weight ? row_weight[p] : 1.0f, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t f = 0; f < width; f++) {
            float g = get(gate[f]), u = get(up[f]), d = get(dy[f]), s = sigmoid(g), silu = g * s;
            sum += d * silu * u;
            d *= w;
            put(to_gate[f], d * u * (s + silu * (1.0f - s)));
            put(to_up[f], d * silu);
        }
        if (grad_weight) grad_weight[p] = sum;
    }
}

// Rows into expert order and back --------------------------------------------------------------------------------------

void count(const int64_t* experts, int64_t n, int64_t* counts) {
    for (int64_t i = 0; i < n; i++) counts[experts[i]]++;
}

// next: [E] the first row of each expert; moved on to the end of its rows.
void place(const int64_t* experts, int64_t n, int64_t* next, int32_t* slot, int32_t* assignment) {
    for (int64_t i = 0; i < n; i++) {
        int64_t row = next[experts[i]]++;
        slot[i] = int32_t(row);
        assignment[row] = int32_t(i);
    }
}

template <typename T>
void gather_rows(const T* x, const int32_t* assignment, int64_t k, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < rows; p++) {
        if (assignment[p] < 0)
            std::memset(out + p * width, 0, size_t(width) * sizeof(T));
        else
            std::memcpy(out + p * width, x + (assignment[p] / k) * width, size_t(width) * sizeof(T));
    }
}

template <typename T>
void sum_rows(const T* rows, const int32_t* slot, int64_t k, T* out, int64_t tokens, int64_t width, int threads) {
    constexpr int64_t piece = 256;  // columns whose sums stay in registers and the first cache
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++) {
        for (int64_t start = 0; start < width; start += piece) {
            int64_t size = width - start < piece ? width - start : piece;
            float sums[piece] = {};
            for (int64_t i = 0; i < k; i++) {
                const T* row = rows + int64_t(slot[n * k + i]) * width + start;
#pragma omp simd
                for (int64_t d = 0; d < size; d++) sums[d] += get(row[d]);
            }
            T* to = out + n * width + start;
#pragma omp simd
            for (int64_t d = 0; d < size; d++) put(to[d], sums[d]);
        }
    }
}

// RMSNorm --------------------------------------------------------------------------------------------------------------

template <typename X, typename Y>
void rms_norm(const X* x, const float* weight, float eps, Y* y, float* rstd, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 16384)
    for (int64_t n = 0; n < rows; n++) {
        const X* from = x + n * width;
        Y* to = y + n * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; d++) sum += get(from[d]) * get(from[d]);
        float r = 1.0f / std::sqrt(sum / float(width) + eps);
        rstd[n] = r;
#pragma omp simd
        for (int64_t d = 0; d < width; d++) put(to[d], get(from[d]) * r * weight[d]);
    }
}

// partial: [threads, width], zeros; one row of weight gradients a thread, added up by the caller in order.
template <typename X, typename Y>
void rms_norm_backward(const Y* grad, const X* x, const float* weight, const float* rstd, X* grad_x, float* partial,
                       int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        float* sums = partial + part * width;
        for (int64_t n = rows * part / threads; n < rows * (part + 1) / threads; n++) {
            const Y* dy = grad + n * width;
            const X* from = x + n * width;
            X* to = grad_x + n * width;
            float r = rstd[n], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < width; d++) dot += get(dy[d]) * weight[d] * get(from[d]);
            float c = dot * r * r * r / float(width);
#pragma omp simd
            for (int64_t d = 0; d < width; d++) {
                float g = get(dy[d]), v = get(from[d]);
                sums[d] += g * v * r;
                put(to[d], g * weight[d] * r - v * c);
            }
        }
    }
}

// Softmax --------------------------------------------------------------------------------------------------------------

constexpr int64_t lanes = 16;

// exp(scale · x − its maximum over the first `seen`) into `out`, of which lanes are filled up with zeros. Returns the
// logarithm of Σ exp(scale · x), and in `inverse` what `out` must be multiplied by to be the softmax.
template <typename T>
inline float exponentials(const T* x, int64_t seen, float scale, float* out, float& inverse) {
    float top = -INFINITY, sum = 0.0f;
    int64_t whole = seen / lanes * lanes;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < whole; j++) top = get(x[j]) > top ? get(x[j]) : top;
    for (int64_t j = whole; j < seen; j++) top = get(x[j]) > top ? get(x[j]) : top;
    top *= scale;
    for (int64_t j = whole; j < seen; j++) out[j] = get(x[j]) * scale - top;
    for (int64_t j = seen; j < whole + lanes; j++) out[j] = -INFINITY;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < whole; j++) {
        out[j] = exponential(get(x[j]) * scale - top);
        sum += out[j];
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = whole; j < whole + lanes; j++) {
        out[j] = out[j] == -INFINITY ? 0.0f : exponential(out[j]);
        sum += out[j];
    }
    inverse = 1.0f / sum;
    return top + std::log(sum);
}

// nats: [rows], one a row, added up by the caller in order.
template <typename T>
void cross_entropy(T* logits, const int64_t* targets, int64_t ignored, float* nats, int64_t rows, int64_t width,
                   int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row_exponentials(size_t(width + lanes));
        float* e = row_exponentials.data();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            T* row = logits + n * width;
            nats[n] = 0.0f;
            if (targets[n] == ignored) {
                std::memset(row, 0, size_t(width) * sizeof(T));
                continue;
            }
            float inverse, log_sum = exponentials(row, width, 1.0f, e, inverse), target = get(row[targets[n]]);
            nats[n] = log_sum - target;
#pragma omp simd
            for (int64_t v = 0; v < width; v++) put(row[v], e[v] * inverse);
            put(row[targets[n]], std::expm1(target - log_sum));  // p − 1
        }
    }
}

// scores: [heads, queries, keys] q·k without scale; query t sees keys lows[t] … first + t (without lows: from key 0 on).
// They become probabilities, 0 elsewhere.
template <typename T>
void causal_softmax(T* scores, float scale, int64_t first, const int32_t* lows, float* log_sums, int64_t heads,
                    int64_t queries, int64_t keys, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row_exponentials(size_t(keys + lanes));
        float* e = row_exponentials.data();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * queries; i++) {
            int64_t low = lows == nullptr ? 0 : lows[i % queries], above = keys - low;
            T* row = scores + i * keys;
            std::memset(row, 0, size_t(low) * sizeof(T));
            row += low;
            int64_t seen = first + i % queries + 1 - low;
            seen = seen < above ? seen : above;
            float inverse;
            log_sums[i] = exponentials(row, seen, scale, e, inverse);
            std::memset(e + seen, 0, size_t(above - seen) * sizeof(float));
#pragma omp simd
            for (int64_t j = 0; j < above; j++) put(row[j], e[j] * inverse);
        }
    }
}

// scores become probabilities again; grad, the gradient of the probabilities, becomes that of q·k.
template <typename T>
void causal_softmax_backward(T* scores, T* grad, float scale, int64_t first, const int32_t* lows, const float* log_sums,
                             int64_t heads, int64_t queries, int64_t keys, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row_probabilities(size_t(keys + lanes));
        float* p = row_probabilities.data();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * queries; i++) {
            int64_t low = lows == nullptr ? 0 : lows[i % queries], above = keys - low;
            T *row = scores + i * keys, *g = grad + i * keys;
            std::memset(row, 0, size_t(low) * sizeof(T));
            std::memset(g, 0, size_t(low) * sizeof(T));
            row += low, g += low;
            int64_t seen = first + i % queries + 1 - low;
            seen = seen < above ? seen : above;
            // Whole vectors, where the row has room for them: what is beyond `seen` is zeroed below.
            int64_t until = (seen + lanes - 1) / lanes * lanes;
            until = until < above ? until : above;
            float log_sum = log_sums[i], dot = 0.0f;
#pragma omp simd
            for (int64_t j = 0; j < until; j++) p[j] = exponential(get(row[j]) * scale - log_sum);
            std::memset(p + seen, 0, size_t(above - seen) * sizeof(float));
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < until; j++) dot += p[j] == 0.0f ? 0.0f : p[j] * get(g[j]);
#pragma omp simd
            for (int64_t j = 0; j < above; j++) {
                put(row[j], p[j]);
                put(g[j], p[j] == 0.0f ? 0.0f : p[j] * (get(g[j]) - dot) * scale);
            }
        }
    }
}

// Heads of latent attention: rotary position, and [B, T, H, …] to [B, H, T, …] ------------------------------------------

// Turns one vector of size 2·half by the angles whose cosine and sine are given; sign −1 turns it back.
template <typename From, typename To>
inline void turn(const From* x, const float* cosine, const float* sine, float sign, bool interleaved, int64_t half, To* to) {
    int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = get(x[i * step]), b = get(x[i * step + other]), c = cosine[i], s = sign * sine[i];
        put(to[i * step], a * c - b * s);
        put(to[i * step + other], a * s + b * c);
    }
}

struct Heads {
    int64_t batch, length, heads, nope, rope, value;
    int64_t tables;  // 1 where all sequences share their positions, else batch
    int32_t interleaved, threads;
};

// x: [B, T, H, nope + rope] -> out [B, H, T, nope + rope], the last `rope` turned; with back, the gradient the other way.
template <typename T>
void turn_heads(const T* x, const float* cosine, const float* sine, T* out, const Heads& h, bool back) {
    int64_t size = h.nope + h.rope, half = h.rope / 2;
#pragma omp parallel for num_threads(h.threads) schedule(static)
    for (int64_t i = 0; i < h.batch * h.length; i++) {
        int64_t b = i / h.length, t = i % h.length, table = ((b % h.tables) * h.length + t) * half;
        for (int64_t head = 0; head < h.heads; head++) {
            int64_t outer = (i * h.heads + head) * size, inner = ((b * h.heads + head) * h.length + t) * size;
            const T* from = x + (back ? inner : outer);
            T* to = out + (back ? outer : inner);
            std::memcpy(to, from, size_t(h.nope) * sizeof(T));
            turn(from + h.nope, cosine + table, sine + table, back ? -1.0f : 1.0f, h.interleaved, half, to + h.nope);
        }
    }
}

// kv: [B, T, H, nope + value]; rotary [B, T, rope]: one key a token, shared by all heads
// -> k [B, H, T, nope + rope], v [B, H, T, value].
template <typename T>
void keys_values(const T* kv, const T* rotary, T* k, T* v, const Heads& h) {
    int64_t size = h.nope + h.rope, both = h.nope + h.value;
#pragma omp parallel for num_threads(h.threads) schedule(static)
    for (int64_t i = 0; i < h.batch * h.length; i++) {
        int64_t b = i / h.length, t = i % h.length;
        for (int64_t head = 0; head < h.heads; head++) {
            int64_t inner = (b * h.heads + head) * h.length + t;
            const T* from = kv + (i * h.heads + head) * both;
            std::memcpy(k + inner * size, from, size_t(h.nope) * sizeof(T));
            std::memcpy(k + inner * size + h.nope, rotary + i * h.rope, size_t(h.rope) * sizeof(T));
            std::memcpy(v + inner * h.value, from + h.nope, size_t(h.value) * sizeof(T));
        }
    }
}

// The gradient of keys_values: grad_kv [B, T, H, nope + value], grad_rotary [B, T, rope], added up over heads in FP32.
template <typename T>
void keys_values_backward(const T* grad_k, const T* grad_v, T* grad_kv, T* grad_rotary, const Heads& h) {
    int64_t size = h.nope + h.rope, both = h.nope + h.value;
#pragma omp parallel num_threads(h.threads)
    {
        std::vector<float> sums(size_t(h.rope));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < h.batch * h.length; i++) {
            int64_t b = i / h.length, t = i % h.length;
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t head = 0; head < h.heads; head++) {
                int64_t inner = (b * h.heads + head) * h.length + t;
                const T* from = grad_k + inner * size;
                T* to = grad_kv + (i * h.heads + head) * both;
                std::memcpy(to, from, size_t(h.nope) * sizeof(T));
                std::memcpy(to + h.nope, grad_v + inner * h.value, size_t(h.value) * sizeof(T));
                for (int64_t r = 0; r < h.rope; r++) sums[size_t(r)] += get(from[h.nope + r]);
            }
            for (int64_t r = 0; r < h.rope; r++) put(grad_rotary[i * h.rope + r], sums[size_t(r)]);
        }
    }
}

// AdamW ----------------------------------------------------------------------------------------------------------------

struct Adam {
    float lr, beta1, beta2, eps, weight_decay, bias1, bias2, scale;
};

// low: the 16 bits that a BF16 weight lacks to the FP32 number: bits = (weight << 16) + low; unused for an FP32 weight.
template <typename W, typename G, typename M>
void adamw(W* weight, int16_t* low, const G* grad, M* m, M* v, int64_t n, const Adam& a, int threads) {
    float keep = 1.0f - a.lr * a.weight_decay, rate = a.lr / a.bias1, root = 1.0f / std::sqrt(a.bias2);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float w;
        if constexpr (sizeof(W) == 2)
            w = as_float((uint32_t(weight[i].bits) << 16) + uint32_t(int32_t(low[i])));
        else
            w = get(weight[i]);
        float g = get(grad[i]) * a.scale;
        float first = a.beta1 * get(m[i]) + (1.0f - a.beta1) * g, second = a.beta2 * get(v[i]) + (1.0f - a.beta2) * g * g;
        put(m[i], first);
        put(v[i], second);
        w = w * keep - rate * first / (std::sqrt(second) * root + a.eps);
        if constexpr (sizeof(W) == 2) {
            uint32_t bits = as_bits(w);
            low[i] = int16_t(bits);  // the lower half, as a signed number
            weight[i].bits = uint16_t((bits - uint32_t(int32_t(low[i]))) >> 16);
        } else {
            put(weight[i], w);
        }
    }
}

// partial: [threads] in double; added up by the caller in order.
template <typename T>
void sum_of_squares(const T* x, int64_t n, double* partial, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++) {
        double total = 0.0;
        int64_t end = n * (part + 1) / threads;
        for (int64_t start = n * part / threads; start < end; start += 4096) {
            float sum = 0.0f;
            int64_t stop = start + 4096 < end ? start + 4096 : end;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < stop; i++) sum += get(x[i]) * get(x[i]);
            total += sum;
        }
        partial[part] = total;
    }
}

}  // namespace

// What kernels/native.py calls: a suffix for each combination of types, f for FP32 and b for BF16.

extern "C" {

void expert_counts(const int64_t* experts, int64_t n, int64_t* counts) { count(experts, n, counts); }

void expert_places(const int64_t* experts, int64_t n, int64_t* next, int32_t* slot, int32_t* assignment) {
    place(experts, n, next, slot, assignment);
}

#define ONE_TYPE(s, T)                                                                                                 \
    void swiglu_##s(const T* gate_up, const float* w, T* out, int64_t rows, int64_t width, int threads) {              \
        swiglu(gate_up, w, out, rows, width, threads);                                                                 \
    }                                                                                                                  \
    void swiglu_backward_##s(const T* grad, const T* gate_up, const float* w, T* out, float* grad_w, int64_t rows,     \
                             int64_t width, int threads) {                                                             \
        swiglu_backward(grad, gate_up, w, out, grad_w, rows, width, threads);                                          \
    }                                                                                                                  \
    void gather_rows_##s(const T* x, const int32_t* a, int64_t k, T* out, int64_t rows, int64_t width, int threads) {  \
        gather_rows(x, a, k, out, rows, width, threads);                                                               \
    }                                                                                                                  \
    void sum_rows_##s(const T* rows, const int32_t* slot, int64_t k, T* out, int64_t n, int64_t width, int threads) {  \
        sum_rows(rows, slot, k, out, n, width, threads);                                                               \
    }                                                                                                                  \
    void cross_entropy_##s(T* logits, const int64_t* targets, int64_t ignored, float* nats, int64_t rows,              \
                           int64_t width, int threads) {                                                               \
        cross_entropy(logits, targets, ignored, nats, rows, width, threads);                                           \
    }                                                                                                                  \
    void causal_softmax_##s(T* scores, float scale, int64_t first, const int32_t* lows, float* log_sums,               \
                            int64_t heads, int64_t queries, int64_t keys, int threads) {                               \
        causal_softmax(scores, scale, first, lows, log_sums, heads, queries, keys, threads);                           \
    }                                                                                                                  \
    void causal_softmax_backward_##s(T* scores, T* grad, float scale, int64_t first, const int32_t* lows,              \
                                     const float* log_sums, int64_t heads, int64_t queries, int64_t keys,              \
                                     int threads) {                                                                    \
        causal_softmax_backward(scores, grad, scale, first, lows, log_sums, heads, queries, keys, threads);            \
    }                                                                                                                  \
    void turn_heads_##s(const T* x, const float* cosine, const float* sine, T* out, const Heads* h, int back) {        \
        turn_heads(x, cosine, sine, out, *h, back != 0);                                                               \
    }                                                                                                                  \
    ON_TAPE(turn_heads_##s)                                                                                            \
    void keys_values_##s(const T* kv, const T* rotary, T* k, T* v, const Heads* h) {                                   \
        keys_values(kv, rotary, k, v, *h);                                                                             \
    }                                                                                                                  \
    void keys_values_backward_##s(const T* grad_k, const T* grad_v, T* grad_kv, T* grad_rotary, const Heads* h) {      \
        keys_values_backward(grad_k, grad_v, grad_kv, grad_rotary, *h);                                                \
    }                                                                                                                  \
    void sum_of_squares_##s(const T* x, int64_t n, double* partial, int threads) {                                     \
        sum_of_squares(x, n, partial, threads);                                                                        \
    }

#define TWO_TYPES(s, X, Y)                                                                                             \
    void rms_norm_##s(const X* x, const float* weight, float eps, Y* y, float* rstd, int64_t rows, int64_t width,      \
                      int threads) {                                                                                   \
        rms_norm(x, weight, eps, y, rstd, rows, width, threads);                                                       \
    }                                                                                                                  \
    void rms_norm_backward_##s(const Y* grad, const X* x, const float* weight, const float* rstd, X* grad_x,           \
                               float* partial, int64_t rows, int64_t width, int threads) {                             \
        rms_norm_backward(grad, x, weight, rstd, grad_x, partial, rows, width, threads);                               \
    }

// Weight, gradient, moments.
#define THREE_TYPES(s, W, G, M)                                                                                        \
    void adamw_##s(W* weight, int16_t* low, const G* grad, M* m, M* v, int64_t n, const Adam* a, int threads) {        \
        adamw(weight, low, grad, m, v, n, *a, threads);                                                                \
    }

ONE_TYPE(f, float)
ONE_TYPE(b, bf16)
TWO_TYPES(ff, float, float)
TWO_TYPES(fb, float, bf16)
TWO_TYPES(bb, bf16, bf16)
THREE_TYPES(fff, float, float, float)
THREE_TYPES(ffb, float, float, bf16)
THREE_TYPES(bbf, bf16, bf16, float)
THREE_TYPES(bbb, bf16, bf16, bf16)
THREE_TYPES(bff, bf16, float, float)
THREE_TYPES(bfb, bf16, float, bf16)
}
