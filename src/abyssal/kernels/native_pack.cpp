// Packing weights in 8 or 4 bits, and back: the numbers of kernels/packed.py to the last bit, for every processor.
//
// A group's 32 numbers are all that a scale depends on, so everything is a loop over 32 that compilers turn into
// vectors. In int4 the time is that of seven divisions a number, one for each scale that is tried.
//
// A result that other code must give too leaves no freedom in rounding: numbers are divided, not multiplied by an
// inverse; a product and a sum are rounded each (no fused operations); squares are added up in halves, 16 and 16, then
// 8 and 8, and so on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

constexpr int64_t group = 32;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float widened(float x) { return x; }

inline float widened(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void narrowed(float x, float* to) { *to = x; }

inline void narrowed(float x, uint16_t* to) {  // to the nearest, ties to even; a NaN stays one
    uint32_t b = bits_of(x);
    *to = uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

inline float bf16(float x) {
    uint16_t out;
    narrowed(x, &out);
    return widened(out);
}

// Of the number farthest from zero (the first, where several are as far); NaN is farther than infinity.
inline uint32_t farthest_bits(const float* x) {
    uint32_t most = 0;
    for (int64_t i = 0; i < group; i++) most = std::max(most, bits_of(x[i]) & 0x7fffffff);
    return most;
}

inline float farthest(const float* x, uint32_t most) {
    int32_t first = group - 1;
    for (int32_t i = 0; i < group; i++) first = std::min(first, (bits_of(x[i]) & 0x7fffffff) == most ? i : 31);
    return x[first];
}

// The nearest multiples of `scale`, which is finite, that are from `low` to `high`; 0 where it is 0.
inline void rounded(const float* x, float scale, float low, float high, float* out) {
    float divisor = scale == 0 ? INFINITY : scale;
    for (int64_t i = 0; i < group; i++) out[i] = std::max(low, std::min(high, __builtin_rintf(x[i] / divisor)));
}

// Squared errors of 32 numbers, added up in halves to eight.
inline void squared_errors(const float* x, float scale, float* out) {
    float numbers[group], part[group];
    rounded(x, scale, -8, 7, numbers);
    for (int64_t i = 0; i < group; i++) {
        float error = numbers[i] * scale - x[i];
        part[i] = error * error;
    }
    for (int64_t i = 0; i < 16; i++) part[i] += part[i + 16];
    for (int64_t i = 0; i < 8; i++) out[i] = part[i] + part[i + 8];
}

inline float scale8(uint32_t most) {
    float largest;
    std::memcpy(&largest, &most, 4);
    return bf16(largest / 127);
}

inline float scale4(const float* x, uint32_t most) {
    constexpr int64_t tried = 8;  // the last one twice, for whole vectors
    constexpr float stored_as[tried] = {-8.0f, -7.5f, -7.0f, -8.5f, -9.0f, 7.0f, 7.5f, 7.5f};
    float number = farthest(x, most), scales[tried], parts[tried][8], errors[tried];
    for (int64_t c = 0; c < tried; c++) scales[c] = bf16(number / stored_as[c]);
    if (most >= 0x7f800000) return scales[0];
    for (int64_t c = 0; c < tried - 1; c++) squared_errors(x, scales[c], parts[c]);
    std::memcpy(parts[tried - 1], parts[tried - 2], sizeof parts[0]);
    float turned[8][tried];  // vectors over the scales: no sum within a vector
    for (int64_t i = 0; i < 8; i++)
        for (int64_t c = 0; c < tried; c++) turned[i][c] = parts[c][i];
    for (int64_t half = 4; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++)
            for (int64_t c = 0; c < tried; c++) turned[i][c] += turned[i + half][c];
    for (int64_t c = 0; c < tried; c++) errors[c] = turned[0][c];
    int64_t best = 0;
    for (int64_t c = 1; c < tried; c++) best = errors[c] < errors[best] ? c : best;
    return scales[best];
}

template <int bits, typename T>
void pack(const T* weight, int64_t rows, int64_t columns, uint8_t* data, uint16_t* scales, int threads) {
    constexpr int64_t block = bits == 8 ? 64 : 128, groups = block / group;
    constexpr float middle = bits == 8 ? 128 : 8;
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t b = 0; b < blocks; b++) {
            float x[block];
            uint8_t stored[block];
            const T* from = weight + row * columns + b * block;
            int64_t count = std::min(block, columns - b * block);
            if (count == block) {
                for (int64_t i = 0; i < block; i++) x[i] = widened(from[i]);
            } else {
                for (int64_t i = 0; i < block; i++) x[i] = i < count ? widened(from[i]) : 0.0f;
            }
            for (int64_t g = 0; g < groups; g++) {
                uint32_t most = farthest_bits(x + g * group);
                float scale = bits == 8 ? scale8(most) : scale4(x + g * group, most), numbers[group] = {};
                narrowed(scale, scales + (row * blocks + b) * groups + g);
                if (most < 0x7f800000)
                    rounded(x + g * group, scale, bits == 8 ? 1 - middle : -middle, middle - 1, numbers);
                for (int64_t i = 0; i < group; i++) stored[g * group + i] = uint8_t(int32_t(numbers[i] + middle));
            }
            uint8_t* to = data + (row * blocks + b) * 64;
            if (bits == 8)
                std::memcpy(to, stored, 64);
            else
                for (int64_t i = 0; i < 64; i++) to[i] = uint8_t(stored[i] | stored[(64 + i) % block] << 4);
        }
    }
}

template <int bits, typename T>
void unpack(const uint8_t* data, const uint16_t* scales, int64_t rows, int64_t columns, T* out, int threads) {
    constexpr int64_t block = bits == 8 ? 64 : 128, groups = block / group;
    int64_t blocks = (columns + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t* from = data + (row * blocks + b) * 64;
            const uint16_t* scale = scales + (row * blocks + b) * groups;
            T some[block];
            for (int64_t g = 0; g < groups; g++) {
                float factor = widened(scale[g]);
                const uint8_t* part = from + g * group % 64;
                for (int64_t i = 0; i < group; i++) {
                    int32_t number = bits == 8 ? part[i] - 128 : (g < 2 ? part[i] & 15 : part[i] >> 4) - 8;
                    narrowed(float(number) * factor, some + g * group + i);
                }
            }
            int64_t count = std::min(block, columns - b * block);
            std::memcpy(out + row * columns + b * block, some, size_t(count) * sizeof(T));
        }
    }
}

}  // namespace

#define TYPE_f float
#define TYPE_b uint16_t
#define EXPORTED(letter, bits)                                                                                \
    extern "C" void pack_##letter##bits(                                                                      \
        const TYPE_##letter* weight, int64_t rows, int64_t columns, uint8_t* data, uint16_t* scales, int threads) { \
        pack<bits>(weight, rows, columns, data, scales, threads);                                             \
    }                                                                                                         \
    extern "C" void unpack_##letter##bits(                                                                    \
        const uint8_t* data, const uint16_t* scales, int64_t rows, int64_t columns, TYPE_##letter* out, int threads) { \
        unpack<bits>(data, scales, rows, columns, out, threads);                                              \
    }

EXPORTED(f, 8)
EXPORTED(f, 4)
EXPORTED(b, 8)
EXPORTED(b, 4)
