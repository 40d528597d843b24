// Decoding on a CPU: a few rows times matrices that come from memory once a token, and attention over pages of the
// cache.
//
// At such sizes a matrix is used for a few rows only, so what counts is that memory is read without a pause. A thread
// takes some rows of a matrix at a time, reads them as eight streams, an eighth of them each, and asks for what comes
// next (software prefetch): that is 1.4 times as fast as from beginning to end, since the processor's own prefetcher stops at every
// page. A vector of weights that is loaded serves all rows of x.
//
// A result does not depend on threads, nor on which of them takes what: every output is summed by one, in one order. Subjects, one
// after the other: vectors; matrices as they are stored (BF16, FP32, packed int8 and int4); linear; experts; absorbing;
// attention. kernels/native.py says what each function computes and in which shapes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "native_tape.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

// Vectors -------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
#elif defined(__AVX__)
constexpr int64_t lanes = 8;
#else
constexpr int64_t lanes = 4;  // NEON, SSE
#endif

typedef float vec __attribute__((vector_size(4 * lanes)));
typedef uint32_t bits __attribute__((vector_size(4 * lanes)));
typedef uint16_t halves __attribute__((vector_size(2 * lanes)));

struct bf16 {
    uint16_t number;
};

inline vec load(const float* from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline vec load(const bf16* from) {
    halves x;
    std::memcpy(&x, from, sizeof x);
    return vec(__builtin_convertvector(x, bits) << 16);
}

template <typename T>
inline vec load(const T* from, int64_t count) {  // zeros behind the first `count`
    T some[lanes] = {};
    std::memcpy(some, from, size_t(count) * sizeof(T));
    return load(some);
}

inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }

inline void store(bf16* to, vec x) {  // to the nearest, ties to even; a NaN stays one
    bits b = bits(x);
    b = x == x ? (b + 0x7fff + ((b >> 16) & 1)) >> 16 : (b >> 16) | 0x40;
    halves h = __builtin_convertvector(b, halves);
    std::memcpy(to, &h, sizeof h);
}

// `count` numbers from one type to the other.
template <typename From, typename To>
void convert(const From* from, int64_t count, To* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
    if (i == count) return;
    To some[lanes];
    store(some, load(from + i, count - i));
    std::memcpy(to + i, some, size_t(count - i) * sizeof(To));
}

inline vec all(float x) { return x - vec{}; }

inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#endif
    float some[lanes];
    store(some, x);
    for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) some[i] += some[i + half];
    return some[0];
}

// e^x as in native.cpp: within 2 units in the last place, finite at both ends, and a NaN goes through.
inline vec exponential(vec x) {
    x = x < -87.0f ? all(-87.0f) : (x > 88.0f ? all(88.0f) : x);
    constexpr float round = 12582912.0f;  // 1.5 · 2^23: added and taken away, it leaves the nearest integer
    vec n = (x * 1.44269504f + round) - round;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    n = n == n ? n : all(0.0f);
    typedef int32_t integers __attribute__((vector_size(4 * lanes)));
    return p * vec((__builtin_convertvector(n, integers) + 127) << 23);
}

// Working memory that a thread keeps; `which` tells apart what is in use at the same time.
template <int which>
char* space(int64_t size) {
    static thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < size + 64) memory.resize(size_t(size + 64));
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Matrices as they are stored -----------------------------------------------------------------------------------------

// A format says how a matrix is stored, brings rows of x into the form that goes with it ("inputs": prepare, a piece of
// up to 32 numbers at a time), and multiplies R rows of the matrix, which are `apart`, with N inputs:
// out[n * stride + r * apart]. R is streams(N): as many rows as there are registers for sums.

constexpr int64_t piece = 32;
constexpr int64_t ahead = 1024;  // bytes further on, memory is asked for
constexpr int64_t few = 4;       // inputs up to which a vector of weights serves them all; above, tiles do

struct Matrix {
    const char* data;
    const bf16* scales;
    int64_t rows, columns;
};

template <typename W>
struct Single {  // weight by weight in FP32
    using Weight = W;
    using Input = float;
    using Numbers = vec;
    static constexpr int64_t step = lanes;
    static vec weights(const W* from) { return load(from); }
    static vec weights(const W* from, int64_t count) { return load(from, count); }
    static vec inputs(const float* from) { return load(from); }
    static vec inputs(const float* from, int64_t count) { return load(from, count); }
    static vec add(vec sum, vec w, vec x) { return sum + w * x; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct Pairs {  // two BF16 products at a time, summed in FP32
    using Weight = bf16;
    using Input = bf16;
    using Numbers = __m512i;
    static constexpr int64_t step = 32;
    static __m512i weights(const bf16* from) { return _mm512_loadu_si512(from); }
    static __m512i weights(const bf16* from, int64_t count) {
        return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from);
    }
    static __m512i inputs(const bf16* from) { return weights(from); }
    static __m512i inputs(const bf16* from, int64_t count) { return weights(from, count); }
    static vec add(vec sum, __m512i w, __m512i x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh&>(w), reinterpret_cast<__m512bh&>(x));
    }
};
#else
using Pairs = Single<bf16>;
#endif

template <class Way>
struct Dense {
    using Weight = typename Way::Weight;
    using Input = typename Way::Input;

    static constexpr bool in_tiles = false;
    static constexpr int streams(int n) { return lanes < 16 ? 8 / n : n < 4 ? 8 : 4; }
    static int64_t row_bytes(int64_t columns) { return columns * int64_t(sizeof(Weight)); }
    static int64_t scales(int64_t) { return 0; }
    static int64_t input_bytes(int64_t columns) { return round_up(columns * int64_t(sizeof(Input)), 64); }
    static void prepare(const float* x, int64_t count, int64_t start, int64_t, char* input) {
        convert(x, count, reinterpret_cast<Input*>(input) + start);
    }

    template <int R, int N>
    static void dots(const Matrix& m, int64_t row, int64_t apart, const char* const* x, float* out,
                     int64_t stride) {
        const Weight* w = reinterpret_cast<const Weight*>(m.data) + row * m.columns;
        const Input* in[N];
        vec sums[R][N];
        UNROLL for (int n = 0; n < N; n++) {
            in[n] = reinterpret_cast<const Input*>(x[n]);
            UNROLL for (int r = 0; r < R; r++) sums[r][n] = vec{};
        }
        int64_t k = 0;
        for (; k + Way::step <= m.columns; k += Way::step) {
            typename Way::Numbers xs[N];
            UNROLL for (int n = 0; n < N; n++) xs[n] = Way::inputs(in[n] + k);
            UNROLL for (int r = 0; r < R; r++) {
                const Weight* from = w + r * apart * m.columns + k;
                __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead);
                auto ws = Way::weights(from);
                UNROLL for (int n = 0; n < N; n++) sums[r][n] = Way::add(sums[r][n], ws, xs[n]);
            }
        }
        if (int64_t rest = m.columns - k; rest > 0) {
            UNROLL for (int r = 0; r < R; r++) {
                auto ws = Way::weights(w + r * apart * m.columns + k, rest);
                UNROLL for (int n = 0; n < N; n++) sums[r][n] = Way::add(sums[r][n], ws, Way::inputs(in[n] + k, rest));
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int n = 0; n < N; n++) out[n * stride + r * apart] = sum(sums[r][n]);
    }
};

// kernels/packed.py describes the format. Inputs are rounded to int8 too, with an FP32 scale a group, so that a product
// of 32 numbers is exact integer work: for each group (Σ (stored - middle) · x) · scale · scale of x.
template <int width>
struct Packed {
    static constexpr int64_t group = 32, middle = width == 8 ? 128 : 8, block = width == 8 ? 64 : 128;

    struct Input {  // of `size` numbers, the columns in whole spans of 16 groups
        int8_t* numbers;
        int32_t* shift;  // -middle · the sum of four numbers: where a lane's sum begins, as stored weights are unsigned
        float* scales;
        Input(const char* memory, int64_t columns) {
            int64_t size = round_up(columns, 16 * group);
            numbers = reinterpret_cast<int8_t*>(const_cast<char*>(memory));
            shift = reinterpret_cast<int32_t*>(numbers + size);
            scales = reinterpret_cast<float*>(shift + size / 4);
        }
    };

    static constexpr bool in_tiles = false;
    static constexpr int streams(int n) { return n < 3 ? 8 / n : 2; }
    static int64_t scales(int64_t columns) { return round_up(columns, block) / group; }
    static int64_t row_bytes(int64_t columns) { return round_up(columns, block) * width / 8; }
    static int64_t input_bytes(int64_t columns) {
        int64_t size = round_up(columns, 16 * group);
        return size + size + round_up(size / group * 4, 64);
    }

    static void prepare(const float* x, int64_t count, int64_t start, int64_t columns, char* memory) {
        Input input(memory, columns);
        uint32_t top = 0;  // as bits: so a NaN is larger than every number
        for (int64_t i = 0; i < count; i++) {
            uint32_t b;
            std::memcpy(&b, x + i, 4);
            top = std::max(top, b & 0x7fffffff);
        }
        float largest;
        std::memcpy(&largest, &top, 4);
        // What is not finite makes the scale so, and with it every product.
        float inverse = largest > 1e-30f && largest <= 3.4028235e38f ? 127.0f / largest : 0.0f;
        int8_t* to = input.numbers + start;
        for (int64_t i = 0; i < count; i++) to[i] = int8_t(inverse == 0.0f ? 0.0f : std::nearbyint(x[i] * inverse));
        for (int64_t i = count; i < group; i++) to[i] = 0;
        for (int64_t i = 0; i < group; i += 4)
            input.shift[(start + i) / 4] = -int32_t(middle) * (to[i] + to[i + 1] + to[i + 2] + to[i + 3]);
        input.scales[start / group] = largest / 127.0f;
        if (start + count < columns) return;
        int64_t size = round_up(columns, 16 * group), done = start + group;  // the rest of the last span is zeros
        std::memset(input.numbers + done, 0, size_t(size - done));
        std::memset(input.shift + done / 4, 0, size_t(size - done));
        std::memset(input.scales + done / group, 0, size_t((size - done) / group) * 4);
    }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    template <int R, int N>
    static void dots(const Matrix& m, int64_t row, int64_t apart, const char* const* x, float* out,
                     int64_t stride) {
        int64_t bytes = row_bytes(m.columns), groups = scales(m.columns);
        const char* w = m.data + row * bytes;
        const bf16* scale = m.scales + row * groups;
        const int8_t* numbers[N];
        const int32_t* shift[N];
        const float* x_scale[N];
        __m512 sums[R][N];
        UNROLL for (int n = 0; n < N; n++) {
            Input input(x[n], m.columns);
            numbers[n] = input.numbers, shift[n] = input.shift, x_scale[n] = input.scales;
            UNROLL for (int r = 0; r < R; r++) sums[r][n] = _mm512_setzero_ps();
        }
        const __m512i low = _mm512_set1_epi8(15);
        const __m512i both = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
        for (int64_t span = 0; span < groups; span += 16) {  // 16 scales are one vector
            int64_t count = std::min<int64_t>(16, groups - span);
            __m512 factor[R][N];
            UNROLL for (int r = 0; r < R; r++) {
                __mmask16 mask = __mmask16((1u << count) - 1);
                __m512i some = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, scale + r * apart * groups + span));
                __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(some, 16));
                UNROLL for (int n = 0; n < N; n++) factor[r][n] = _mm512_mul_ps(s, _mm512_loadu_ps(x_scale[n] + span));
            }
            __m512i which = both;  // the scales of 64 numbers: of the first group eight times, then of the second
            auto add = [&](const __m512i* weights, int64_t at) __attribute__((always_inline)) {
                UNROLL for (int n = 0; n < N; n++) {
                    __m512i q = _mm512_loadu_si512(numbers[n] + at), begin = _mm512_loadu_si512(shift[n] + at / 4);
                    UNROLL for (int r = 0; r < R; r++) {
                        __m512 products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(begin, weights[r], q));
                        __m512 f = _mm512_permutexvar_ps(which, factor[r][n]);
                        sums[r][n] = _mm512_fmadd_ps(products, f, sums[r][n]);
                    }
                }
                which = _mm512_add_epi32(which, _mm512_set1_epi32(2));
            };
            for (int64_t at = span * group; at < (span + count) * group; at += block) {
                __m512i first[R], second[R];
                UNROLL for (int r = 0; r < R; r++) {
                    const char* from = w + r * apart * bytes + at * width / 8;
                    __builtin_prefetch(from + ahead);
                    first[r] = _mm512_loadu_si512(from);
                    if (width == 4) {
                        second[r] = _mm512_and_si512(_mm512_srli_epi16(first[r], 4), low);
                        first[r] = _mm512_and_si512(first[r], low);
                    }
                }
                add(first, at);
                if (width == 4) add(second, at + 64);
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int n = 0; n < N; n++) out[n * stride + r * apart] = sum(sums[r][n]);
    }
#else
    template <int R, int N>
    static void dots(const Matrix& m, int64_t row, int64_t apart, const char* const* x, float* out,
                     int64_t stride) {
        int64_t groups = scales(m.columns);
        for (int r = 0; r < R; r++) {
            const uint8_t* w = reinterpret_cast<const uint8_t*>(m.data) + (row + r * apart) * row_bytes(m.columns);
            const bf16* scale = m.scales + (row + r * apart) * groups;
            float sums[N] = {};
            for (int64_t g = 0; g < groups; g++) {
                uint32_t b = uint32_t(scale[g].number) << 16;
                float s;
                std::memcpy(&s, &b, 4);
                int64_t at = g * group;
                // Of 128 numbers of int4, 64 bytes hold the first half in their lower bits.
                const uint8_t* from = width == 8 ? w + at : w + at / 128 * 64 + at % 64;
                int down = width == 4 && at % 128 >= 64 ? 4 : 0, keep = width == 8 ? 255 : 15;
                for (int n = 0; n < N; n++) {
                    Input input(x[n], m.columns);
                    const int8_t* q = input.numbers + at;
                    int32_t total = 0;
                    for (int64_t i = 0; i < group; i++)
                        total += (int32_t((from[i] >> down) & keep) - int32_t(middle)) * q[i];
                    sums[n] += float(total) * (s * input.scales[g]);
                }
            }
            for (int n = 0; n < N; n++) out[n * stride + r * apart] = sums[n];
        }
    }
#endif
};

template <class F>
Matrix part(const Matrix& m, int64_t row, int64_t rows) {
    return {m.data + row * F::row_bytes(m.columns), m.scales + row * F::scales(m.columns), rows, m.columns};
}

// x [rows, columns] -> inputs, one after the other.
template <class F, typename T>
void prepare(const T* x, int64_t rows, int64_t columns, char* inputs) {
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t start = 0; start < columns; start += piece) {
            float some[piece];
            int64_t count = std::min(piece, columns - start);
            convert(x + n * columns + start, count, some);
            F::prepare(some, count, start, columns, inputs + n * F::input_bytes(columns));
        }
    }
}

// The tile unit -------------------------------------------------------------------------------------------------------

// native_amx.cpp explains how AMX multiplies. Here rows of the matrix are a tile of A, read where they lie, and inputs
// are brought into the order of a tile of B; so from five inputs on, sixteen cost what one does.

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES

extern "C" int amx_usable();

bool has_tiles() {
    static const bool usable = amx_usable();
    return usable;
}

constexpr int64_t tile = 16;  // rows, and 32-bit numbers in a row

// Makes the compiler finish writing before tiles are loaded: to GCC the loads do not read memory.
inline void written(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    std::fill(config.row_bytes, config.row_bytes + 8, 64);
    std::fill(config.rows, config.rows + 8, 16);
    written(&config);
    _tile_loadconfig(&config);
}

// Rows of BF16 numbers, `pairs` pairs each -> [pairs][16 rows][2], zeros where there is no row.
void interleave(const bf16* const* rows, int64_t count, int64_t pairs, uint32_t* out) {
    for (int64_t k = 0; k < pairs; k++, out += tile) {
        for (int64_t i = 0; i < count; i++) std::memcpy(out + i, rows[i] + 2 * k, 4);
        for (int64_t i = count; i < tile; i++) out[i] = 0;
    }
}

// 16 rows of a matrix, `step` bytes from one to the next, times 16 inputs, or 32.
void multiply_tile(const char* w, int64_t step, int64_t columns, const uint32_t* x, int64_t groups, float* sums) {
    int64_t size = columns / 2 * tile;
    written(x);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < columns * 2; k += 64, x += tile * tile) {
        for (int64_t r = 0; r < tile; r++) __builtin_prefetch(w + r * step + k + ahead, 0, 2);
        _tile_loadd(4, w + k, step);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (groups == 1) continue;
        _tile_loadd(6, x + size, 64);
        _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, sums, 64);
    if (groups > 1) _tile_stored(1, sums + tile * tile, 64);
}

// How 16 rows become a tile of A. BF16 lies right as it is; what is over is copied together.
struct TileRows {
    static constexpr int64_t multiple = 32;  // of columns
    static int64_t row_bytes(int64_t columns) { return columns * 2; }
    static const char* get(const Matrix& m, int64_t row, int64_t apart, int64_t count, char* spare, int64_t& step) {
        int64_t bytes = row_bytes(m.columns);
        step = apart * bytes;
        if (count == tile) return m.data + row * bytes;
        step = bytes;
        for (int64_t r = 0; r < count; r++) std::memcpy(spare + r * bytes, m.data + (row + r * apart) * bytes, size_t(bytes));
        return spare;
    }
};

// Packed numbers are turned into BF16 on the way, scale included: about three operations for each 16 of them, which from
// five inputs on costs less than multiplying in int8 and scaling each group's sum.
template <int width>
struct Unpacked {
    using Stored = Packed<width>;
    static constexpr bool in_tiles = true;
    static constexpr int64_t multiple = Stored::block;
    static int64_t row_bytes(int64_t columns) { return Stored::row_bytes(columns); }
    static int64_t scales(int64_t columns) { return Stored::scales(columns); }
    static int64_t input_bytes(int64_t columns) { return round_up(columns, multiple) * 2; }

    static void prepare(const float* x, int64_t count, int64_t start, int64_t columns, char* input) {
        bf16* to = reinterpret_cast<bf16*>(input);
        convert(x, count, to + start);
        if (start + count == columns)  // what rows are filled up with
            std::memset(static_cast<void*>(to + columns), 0, size_t(round_up(columns, multiple) - columns) * 2);
    }

    // 32 unsigned bytes of one group, less the middle, times the scale
    static void group(__m256i bytes, float scale, bf16* to) {
        __m512 s = _mm512_set1_ps(scale), middle = _mm512_set1_ps(float(Stored::middle) * scale);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmsub_ps(high, s, middle), _mm512_fmsub_ps(low, s, middle));
        _mm512_storeu_si512(to, reinterpret_cast<__m512i&>(both));
    }

    static float at(const bf16* scale) {
        uint32_t b = uint32_t(scale->number) << 16;
        float x;
        std::memcpy(&x, &b, 4);
        return x;
    }

    static void row(const char* from, const bf16* scale, int64_t columns, bf16* to) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int64_t c = 0; c < columns; c += multiple, from += 64, scale += multiple / 32, to += multiple) {
            __builtin_prefetch(from + ahead);
            __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
            if (width == 8) {
                group(a, at(scale), to);
                group(b, at(scale + 1), to + 32);
            } else {
                group(_mm256_and_si256(a, low), at(scale), to);
                group(_mm256_and_si256(b, low), at(scale + 1), to + 32);
                group(_mm256_and_si256(_mm256_srli_epi16(a, 4), low), at(scale + 2), to + 64);
                group(_mm256_and_si256(_mm256_srli_epi16(b, 4), low), at(scale + 3), to + 96);
            }
        }
    }

    static const char* get(const Matrix& m, int64_t row_, int64_t apart, int64_t count, char* spare, int64_t& step) {
        int64_t columns = round_up(m.columns, multiple);
        step = columns * 2;
        for (int64_t r = 0; r < count; r++) {
            int64_t at = row_ + r * apart;
            row(m.data + at * row_bytes(m.columns), m.scales + at * scales(m.columns), columns,
                reinterpret_cast<bf16*>(spare + r * step));
        }
        return spare;
    }
};

// As `multiply` below.
template <class Rows>
void multiply_tiles(const Matrix& m, int64_t first, int64_t last, const char* const* x, int64_t n, float* out,
                    int64_t stride) {
    int64_t columns = round_up(m.columns, Rows::multiple), groups = (n + tile - 1) / tile, size = columns / 2 * tile;
    uint32_t* inputs = reinterpret_cast<uint32_t*>(space<2>(groups * size * 4 + tile * columns * 2));
    char* spare = reinterpret_cast<char*>(inputs + groups * size);
    for (int64_t g = 0; g < groups; g++)
        interleave(reinterpret_cast<const bf16* const*>(x) + g * tile, std::min(tile, n - g * tile), columns / 2,
                   inputs + g * size);
    configure_tiles();
    // `count` rows that are `apart`
    auto rows = [&](int64_t row, int64_t count, int64_t apart, float* to) {
        if (count < tile) std::memset(spare, 0, size_t(tile * columns) * 2);
        int64_t step;
        const char* from = Rows::get(m, row, apart, count, spare, step);
        for (int64_t g = 0; g < groups; g += 2) {
            float sums[2 * tile * tile];
            multiply_tile(from, step, columns, inputs + g * size, std::min<int64_t>(2, groups - g), sums);
            for (int64_t i = 0; i < std::min(2 * tile, n - g * tile); i++)
                for (int64_t r = 0; r < count; r++)
                    to[(g * tile + i) * stride + r * apart] = sums[i / tile * tile * tile + r * tile + i % tile];
        }
    };
    int64_t apart = (last - first) / tile, left = (last - first) % tile;
    for (int64_t row = 0; row < apart; row++) rows(first + row, tile, apart, out + row);
    // What is over is filled up with zeros, so that a row's sum is the same wherever it stands.
    if (left) rows(last - left, left, 1, out + apart * tile);
    _tile_release();
}

// The format for many inputs.
template <class F>
struct Many {
    using type = F;
};

template <int width>
struct Many<Packed<width>> {
    using type = Unpacked<width>;
};

#else

bool has_tiles() { return false; }

template <class F>
struct Many {
    using type = F;
};

template <class Rows>
void multiply_tiles(const Matrix&, int64_t, int64_t, const char* const*, int64_t, float*, int64_t) {}

#endif

// Rows of a matrix times inputs ---------------------------------------------------------------------------------------

// Rows [first, last) of the matrix times N inputs, as streams; what is left over row by row.
template <class F, int N>
void multiply(const Matrix& m, int64_t first, int64_t last, const char* const* x, float* out, int64_t stride) {
    constexpr int streams = F::streams(N);
    int64_t apart = (last - first) / streams, row = first;
    for (; row < first + apart; row++) F::template dots<streams, N>(m, row, apart, x, out + row - first, stride);
    for (row = first + apart * streams; row < last; row++)
        F::template dots<1, N>(m, row, 0, x, out + row - first, stride);
}

// The same for n inputs: out[i * stride + row - first].
template <class F>
void multiply(const Matrix& m, int64_t first, int64_t last, const char* const* x, int64_t n, float* out,
              int64_t stride) {
    if constexpr (F::in_tiles) {
        multiply_tiles<F>(m, first, last, x, n, out, stride);
    } else {
#if defined(TILES)
        if (std::is_same<F, Dense<Pairs>>::value && n > few && m.columns % TileRows::multiple == 0 && has_tiles())
            return multiply_tiles<TileRows>(m, first, last, x, n, out, stride);
#endif
        // Pieces that stay in the second cache while the inputs are worked through, four at a time.
        int64_t rows = n <= few ? last - first : std::max<int64_t>(8, (1 << 19) / F::row_bytes(m.columns));
        for (int64_t row = first; row < last; row += rows) {
            int64_t end = std::min(last, row + rows);
            for (int64_t i = 0; i < n; i += 4) {
                float* to = out + i * stride + row - first;
                if (n - i == 1) multiply<F, 1>(m, row, end, x + i, to, stride);
                else if (n - i == 2) multiply<F, 2>(m, row, end, x + i, to, stride);
                else if (n - i == 3) multiply<F, 3>(m, row, end, x + i, to, stride);
                else multiply<F, 4>(m, row, end, x + i, to, stride);
            }
        }
    }
}

// Threads are worth waking from here on (weights).
inline int shared_out(int64_t weights, int threads) { return weights < (1 << 15) ? 1 : threads; }

// Rows of a matrix that a thread takes at a time. Threads take what is next, not a fixed share: where others use the
// machine too, one of them is often away. Tiles begin by bringing their inputs in order, so they take more.
template <class F>
int64_t rows_at_a_time(int64_t rows, int64_t inputs, int threads) {
    int64_t most = F::in_tiles || inputs > few ? 256 : 64;
    return std::max<int64_t>(16, std::min(most, round_up(rows / (4 * threads), 8)));
}

// Linear --------------------------------------------------------------------------------------------------------------

template <class F, typename T>
void linear(const T* x, const Matrix& m, T* out, int64_t rows, int threads) {
    char* inputs = space<0>(rows * F::input_bytes(m.columns));
    prepare<F>(x, rows, m.columns, inputs);
    std::vector<const char*> each(static_cast<size_t>(rows));
    for (int64_t n = 0; n < rows; n++) each[size_t(n)] = inputs + n * F::input_bytes(m.columns);
    threads = shared_out(m.rows * m.columns, threads);
    int64_t many = rows_at_a_time<F>(m.rows, rows, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t begin = 0; begin < m.rows; begin += many) {
        int64_t end = std::min(m.rows, begin + many);
        float* sums = reinterpret_cast<float*>(space<1>(rows * many * 4));
        multiply<F>(m, begin, end, each.data(), rows, sums, end - begin);
        for (int64_t n = 0; n < rows; n++) convert(sums + n * (end - begin), end - begin, out + n * m.rows + begin);
    }
}

// Experts -------------------------------------------------------------------------------------------------------------

struct Experts {  // kernels/native.py has the same; a number of rows of 0 says that there is none
    Matrix gate_up, down;     // [experts · 2 width, hidden], [experts · hidden, width]
    Matrix gate, up, closing; // an expert that sees every row with weight 1
};

struct Routing {
    const int64_t* indices;  // [rows, choices]
    const float* weights;
    int64_t rows, choices;
};

struct Expert {  // one that occurs
    Matrix gate, up, down;
    int64_t begin, end;  // its places in the list of assignments
    int64_t hidden;      // bytes at which its inputs of the second product begin
};

// The experts that occur, in their order; `token` and `weight` list their rows of x. False where an index is no
// expert's.
template <class F>
bool occurring(const Experts& e, const Routing& r, int64_t hidden, std::vector<Expert>& found,
               std::vector<int32_t>& token, std::vector<float>& weight) {
    int64_t width = e.down.columns, experts = e.down.rows / hidden, assignments = r.rows * r.choices, bytes = 0;
    std::vector<int32_t> next(size_t(experts + 1));
    for (int64_t i = 0; i < assignments; i++) {
        if (r.indices[i] < 0 || r.indices[i] >= experts) return false;
        next[size_t(r.indices[i] + 1)]++;
    }
    for (int64_t i = 0; i < experts; i++) next[size_t(i + 1)] += next[size_t(i)];
    for (int64_t i = 0; i < experts; i++) {
        int64_t begin = next[size_t(i)], end = next[size_t(i + 1)];
        if (begin == end) continue;
        found.push_back({part<F>(e.gate_up, 2 * i * width, width), part<F>(e.gate_up, (2 * i + 1) * width, width),
                         part<F>(e.down, i * hidden, hidden), begin, end, bytes});
        bytes += (end - begin) * F::input_bytes(width);
    }
    token.resize(size_t(assignments));
    weight.resize(size_t(assignments));
    for (int64_t i = 0; i < assignments; i++) {
        size_t place = size_t(next[size_t(r.indices[i])]++);
        token[place] = int32_t(i / r.choices);
        weight[place] = r.weights[i];
    }
    if (e.gate.rows) {
        found.push_back({e.gate, e.up, e.closing, assignments, assignments + r.rows, bytes});
        for (int64_t n = 0; n < r.rows; n++) token.push_back(int32_t(n)), weight.push_back(1.0f);
    }
    return true;
}

// Rows [first, last) of an expert's gate and up, weight · silu(gate) · up, and that as inputs of the second product.
template <class F>
void first_product(const Expert& e, const float* weight, int64_t first, int64_t last, const char* const* x,
                   char* hidden) {
    int64_t n = e.end - e.begin, width = e.gate.rows, count = last - first, stride = round_up(count, piece);
    float* gate = reinterpret_cast<float*>(space<1>(2 * n * stride * 4));
    float* up = gate + n * stride;
    std::fill(gate, up + n * stride, 0.0f);
    multiply<F>(e.gate, first, last, x, n, gate, stride);
    multiply<F>(e.up, first, last, x, n, up, stride);
    for (int64_t i = 0; i < n; i++) {
        char* to = hidden + e.hidden + i * F::input_bytes(width);
        for (int64_t f = 0; f < count; f += piece) {
            float out[piece];
            for (int64_t j = 0; j < piece; j += lanes) {
                vec g = load(gate + i * stride + f + j), u = load(up + i * stride + f + j);
                store(out + j, weight[e.begin + i] * (g / (1.0f + exponential(-g)) * u));
            }
            F::prepare(out, std::min(piece, count - f), first + f, width, to);
        }
    }
}

// How many inputs a matrix has: on average over the experts that occur, or those of the one that sees every row.
int64_t inputs_each(const Routing& r) {
    if (r.choices == 0) return r.rows;
    std::vector<int64_t> all(r.indices, r.indices + r.rows * r.choices);
    std::sort(all.begin(), all.end());
    return int64_t(all.size()) / std::max<int64_t>(1, std::unique(all.begin(), all.end()) - all.begin());
}

template <class F, typename T>
int experts(const T* x, const Experts& e, const Routing& r, T* out, int threads) {
    std::vector<Expert> found;
    std::vector<int32_t> token;
    std::vector<float> weight;
    int64_t size = std::max(e.gate_up.columns, e.gate.columns);
    if (!occurring<F>(e, r, size, found, token, weight)) return 1;
    int64_t in_bytes = r.rows * F::input_bytes(size), hidden_bytes = 0, weights = 0;
    std::vector<int64_t> units = {0};  // pieces of each expert's width, counted on
    for (const Expert& one : found) {
        hidden_bytes = one.hidden + (one.end - one.begin) * F::input_bytes(one.gate.rows);
        units.push_back(units.back() + (one.gate.rows + piece - 1) / piece);
        weights += 3 * one.gate.rows * size;
    }
    char* inputs = space<0>(in_bytes + hidden_bytes + r.rows * size * 4);
    char* hidden = inputs + in_bytes;
    float* sums = reinterpret_cast<float*>(hidden + hidden_bytes);  // [rows, size]
    prepare<F>(x, r.rows, size, inputs);
    std::vector<const char*> first, second;  // inputs of each assignment
    for (const Expert& one : found) {
        for (int64_t i = one.begin; i < one.end; i++) {
            first.push_back(inputs + token[size_t(i)] * F::input_bytes(size));
            second.push_back(hidden + one.hidden + (i - one.begin) * F::input_bytes(one.gate.rows));
        }
    }
    threads = shared_out(weights, threads);
    int64_t many = rows_at_a_time<F>(size, 1, threads), some_units = std::max<int64_t>(1, many / piece);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < units.back(); begin += some_units) {
            int64_t end = std::min(units.back(), begin + some_units);
            for (size_t i = 0; i < found.size(); i++) {
                const Expert& one = found[i];
                int64_t from = std::max(begin, units[i]) - units[i], to = std::min(end, units[i + 1]) - units[i];
                if (from < to)
                    first_product<F>(one, weight.data(), from * piece, std::min(one.gate.rows, to * piece),
                                     first.data() + one.begin, hidden);
            }
        }
        // Columns of the result, in which experts are added up in their order.
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < size; begin += many) {
            int64_t end = std::min(size, begin + many), count = end - begin;
            for (int64_t n = 0; n < r.rows; n++) std::fill(sums + n * size + begin, sums + n * size + end, 0.0f);
            for (const Expert& one : found) {
                int64_t n = one.end - one.begin;
                float* some = reinterpret_cast<float*>(space<1>(n * count * 4));
                multiply<F>(one.down, begin, end, second.data() + one.begin, n, some, count);
                for (int64_t i = 0; i < n; i++) {
                    float* to = sums + token[size_t(one.begin + i)] * size + begin;
                    for (int64_t d = 0; d < count; d++) to[d] += some[i * count + d];
                }
            }
            for (int64_t n = 0; n < r.rows; n++) convert(sums + n * size + begin, count, out + n * size + begin);
        }
    }
    return 0;
}

// Absorbing kv_b_proj into query and output ---------------------------------------------------------------------------

// kv_b [heads · (nope + value), latent] holds W^UK above W^UV, head by head, and is read where it lies.

// q [rows, heads, nope + rope] -> [rows, heads, latent + rope]: (W^UK)ᵀ q, the rotary part copied.
template <typename T, typename W>
void absorb(const T* q, const W* kv_b, T* out, int64_t rows, int64_t heads, int64_t nope, int64_t rope, int64_t value,
            int64_t latent, int threads) {
    int64_t from_size = nope + rope, to_size = latent + rope;
    threads = shared_out(heads * nope * latent, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; head++) {
        const W* w = kv_b + head * (nope + value) * latent;
        float* numbers = reinterpret_cast<float*>(space<0>((rows * nope + round_up(latent, lanes)) * 4));
        for (int64_t n = 0; n < rows; n++)
            convert(q + (n * heads + head) * from_size, nope, numbers + n * nope);
        constexpr int wide = 8;
        for (int64_t c = 0; c < latent; c += wide * lanes) {
            for (int64_t n = 0; n < rows; n++) {
                T* to = out + (n * heads + head) * to_size + c;
                int64_t count = std::min(wide * lanes, latent - c);
                vec sums[wide] = {};
                if (count == wide * lanes) {
                    for (int64_t j = 0; j < nope; j++) {
                        UNROLL for (int i = 0; i < wide; i++)
                            sums[i] += load(w + j * latent + c + i * lanes) * numbers[n * nope + j];
                    }
                } else {
                    for (int64_t i = 0; i * lanes < count; i++)
                        for (int64_t j = 0; j < nope; j++)
                            sums[i] += load(w + j * latent + c + i * lanes, std::min(lanes, count - i * lanes)) *
                                       numbers[n * nope + j];
                }
                float some[wide * lanes];
                UNROLL for (int i = 0; i < wide; i++) store(some + i * lanes, sums[i]);
                convert(some, count, to);
            }
        }
        for (int64_t n = 0; n < rows; n++)
            std::memcpy(out + (n * heads + head) * to_size + latent, q + (n * heads + head) * from_size + nope,
                        size_t(rope) * sizeof(T));
    }
}

// o [rows, heads, latent] -> [rows, heads, value]: W^UV o.
template <class F, typename T>
void expand(const T* o, const typename F::Weight* kv_b, T* out, int64_t rows, int64_t heads, int64_t nope,
            int64_t value, int64_t latent, int threads) {
    threads = shared_out(heads * value * latent, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; head++) {
        const auto* from = reinterpret_cast<const char*>(kv_b + (head * (nope + value) + nope) * latent);
        Matrix w = {from, nullptr, value, latent};
        int64_t bytes = F::input_bytes(latent);
        char* inputs = space<0>(rows * bytes);
        float* sums = reinterpret_cast<float*>(space<1>(rows * value * 4));
        std::vector<const char*> each;
        for (int64_t n = 0; n < rows; n++) {
            prepare<F>(o + (n * heads + head) * latent, 1, latent, inputs + n * bytes);
            each.push_back(inputs + n * bytes);
        }
        multiply<F>(w, 0, value, each.data(), rows, sums, value);
        for (int64_t n = 0; n < rows; n++) convert(sums + n * value, value, out + (n * heads + head) * value);
    }
}

// Attention over pages ------------------------------------------------------------------------------------------------

// A sequence's keys are shared out in spans, a task each; within a span keys come in blocks, with a running maximum
// (online softmax, arXiv 2112.05682). What a task leaves is its maximum, its sum of exponentials and its weighted sum
// of values; these are joined in the order of the spans. Spans depend on the sequence's length alone.

struct Paged {
    const void *q, *keys, *values;
    const int32_t *table, *lengths;
    void* out;
    int64_t sequences, heads, shared;  // heads of queries, of keys
    int64_t most, pages, page;         // pages in a row of the table, pages in the pool, tokens a page
    int64_t size, width;               // numbers of a key, of a value
    float scale;
    int threads;
};

constexpr int64_t block = 32;  // keys at a time

struct Span {
    int64_t sequence, begin, end;
};

// The tasks; `first` [sequences + 1] is where each sequence's begin. Empty `first`: lengths or pages that are not
// there.
std::vector<Span> spans(const Paged& a, std::vector<int64_t>& first) {
    std::vector<Span> all;
    first = {0};
    for (int64_t n = 0; n < a.sequences; n++) {
        int64_t length = a.lengths[n], used = (length + a.page - 1) / a.page;
        bool fits = length >= 0 && used <= a.most;
        for (int64_t i = 0; fits && i < used; i++) {
            int32_t page = a.table[n * a.most + i];
            fits = page >= 0 && page < a.pages;
        }
        if (!fits) return first.clear(), all;
        int64_t size = std::max<int64_t>(2 * block, round_up((length + 15) / 16, block));
        for (int64_t begin = 0; begin < length; begin += size)
            all.push_back({n, begin, std::min(length, begin + size)});
        first.push_back(int64_t(all.size()));
    }
    return all;
}

inline int64_t place(const Paged& a, int64_t sequence, int64_t token) {  // in the pool, in tokens
    return int64_t(a.table[sequence * a.most + token / a.page]) * a.page + token % a.page;
}

// What a task leaves; heads rounded up to whole vectors.
struct Partial {
    float *tops, *totals;  // [heads]
    float* values;         // [heads, width]
};

constexpr int64_t most_lanes = 16;

inline int64_t partial_size(const Paged& a) {
    int64_t heads = round_up(a.heads, most_lanes);
    return round_up(2 * heads + heads * a.width, 16);
}

inline Partial partial(const Paged& a, float* memory, int64_t task) {
    int64_t heads = round_up(a.heads, most_lanes);
    float* at = memory + task * partial_size(a);
    return {at, at + heads, at + 2 * heads};
}

// Moves the running maximum on to what `scores` [count] show, turns them into exponentials, and returns what earlier
// exponentials are to be multiplied by. Heads are in lanes.
inline vec move_on(vec* scores, int64_t count, float* tops, float* totals) {
    vec before = load(tops), top = before;
    for (int64_t i = 0; i < count; i++) top = larger(scores[i], top);
    vec fade = exponential(before - top), total = load(totals) * fade;
    for (int64_t i = 0; i < count; i++) {
        scores[i] = exponential(scores[i] - top);
        total += scores[i];
    }
    store(tops, top);
    store(totals, total);
    return fade;
}

// Latents: one key for all heads, whose first numbers are the value. Heads are in lanes, so that nothing has to be
// summed across a vector. q: [heads / lanes, size, lanes], scaled.
struct LatentLanes {
    static bool fits(const Paged&) { return true; }
    static void begin() {}
    static void end() {}
    static int64_t query_size(const Paged& a) { return round_up(a.heads, lanes) * a.size; }

    template <typename T>
    static void query(const Paged& a, int64_t sequence, float* to) {
        std::vector<float> row(static_cast<size_t>(a.size));
        std::fill(to, to + query_size(a), 0.0f);
        for (int64_t h = 0; h < a.heads; h++) {
            convert(static_cast<const T*>(a.q) + (sequence * a.heads + h) * a.size, a.size, row.data());
            for (int64_t i = 0; i < a.size; i++)
                to[(h / lanes * a.size + i) * lanes + h % lanes] = row[size_t(i)] * a.scale;
        }
    }

    template <typename T>
    static void run(const Paged& a, const Span& s, const float* q, Partial p) {
        constexpr int wide = 8;
        int64_t groups = (a.heads + lanes - 1) / lanes, width = round_up(a.width, wide);
        int64_t room = round_up(block * a.size + wide, 16);
        float* keys = reinterpret_cast<float*>(space<1>((room + groups * width * lanes) * 4));
        float* values = keys + room;  // [groups, width, lanes]
        std::fill(keys, values + groups * width * lanes, 0.0f);
        std::fill(p.tops, p.tops + groups * lanes, -INFINITY);
        std::fill(p.totals, p.totals + groups * lanes, 0.0f);
        for (int64_t t = s.begin; t < s.end; t += block) {
            int64_t count = std::min(block, s.end - t);
            for (int64_t i = 0; i < count; i++) {
                const T* key = static_cast<const T*>(a.keys) + place(a, s.sequence, t + i) * a.size;
                convert(key, a.size, keys + i * a.size);
            }
            for (int64_t g = 0; g < groups; g++) {
                vec scores[block];
                const float* query = q + g * a.size * lanes;
                for (int64_t i = 0; i < count; i += wide) {
                    vec sums[wide] = {};
                    for (int64_t k = 0; k < a.size; k++) {
                        vec x = load(query + k * lanes);
                        UNROLL for (int j = 0; j < wide; j++) sums[j] += x * keys[(i + j) * a.size + k];
                    }
                    UNROLL for (int j = 0; j < wide; j++) scores[i + j] = sums[j];
                }
                vec fade = move_on(scores, count, p.tops + g * lanes, p.totals + g * lanes);
                float* to = values + g * width * lanes;
                for (int64_t c = 0; c < width; c += wide) {
                    vec sums[wide];
                    UNROLL for (int j = 0; j < wide; j++) sums[j] = load(to + (c + j) * lanes) * fade;
                    for (int64_t i = 0; i < count; i++)
                        UNROLL for (int j = 0; j < wide; j++) sums[j] += scores[i] * keys[i * a.size + c + j];
                    UNROLL for (int j = 0; j < wide; j++) store(to + (c + j) * lanes, sums[j]);
                }
            }
        }
        for (int64_t h = 0; h < a.heads; h++)
            for (int64_t c = 0; c < a.width; c++)
                p.values[h * a.width + c] = values[(h / lanes * width + c) * lanes + h % lanes];
    }
};

#if defined(TILES)
// The same for BF16 on the tile unit: keys times queries, 16 heads at a time, and probabilities times values.
struct LatentTiles {
    static void begin() { configure_tiles(); }
    static void end() { _tile_release(); }
    static bool fits(const Paged& a) { return has_tiles() && a.width % (2 * tile) == 0 && a.size % 2 == 0; }
    static int64_t depth(const Paged& a) { return round_up(a.size, 32); }
    static int64_t groups(const Paged& a) { return (a.heads + tile - 1) / tile; }
    static int64_t query_size(const Paged& a) { return groups(a) * depth(a) / 2 * tile; }

    // [groups][depth / 2][16 heads][2], as bits; the scale comes to the scores
    template <typename T>
    static void query(const Paged& a, int64_t sequence, float* to) {
        std::vector<const bf16*> rows;
        const bf16* first = static_cast<const bf16*>(a.q) + sequence * a.heads * a.size;
        for (int64_t h = 0; h < a.heads; h++) rows.push_back(first + h * a.size);
        uint32_t* out = reinterpret_cast<uint32_t*>(to);
        std::fill(out, out + query_size(a), 0u);
        for (int64_t g = 0; g < groups(a); g++)
            interleave(rows.data() + g * tile, std::min(tile, a.heads - g * tile), a.size / 2,
                       out + g * depth(a) / 2 * tile);
    }

    // Numbers of two keys in turn, 16 of them: a row of a tile of B.
    static __m512i in_turn(const bf16* first, const bf16* second) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }

    template <typename T>
    static void run(const Paged& a, const Span& s, const float* q, Partial p) {
        int64_t deep = depth(a), heads = groups(a) * tile;
        bf16* keys = reinterpret_cast<bf16*>(space<1>(block * deep * 2 + block / 2 * a.width * 4 + tile * block * 2));
        __m512i* values = reinterpret_cast<__m512i*>(keys + block * deep);  // [width / 16][16 pairs of keys][16][2]
        bf16* weights = reinterpret_cast<bf16*>(values + block / 2 * a.width / tile);  // [16 heads][32 keys]
        std::memset(keys, 0, size_t(block * deep) * 2);
        std::fill(p.tops, p.tops + heads, -INFINITY);
        std::fill(p.totals, p.totals + heads, 0.0f);
        std::fill(p.values, p.values + heads * a.width, 0.0f);
        for (int64_t t = s.begin; t < s.end; t += block) {
            int64_t count = std::min(block, s.end - t);
            for (int64_t i = 0; i < count; i++) {
                const bf16* key = static_cast<const bf16*>(a.keys) + place(a, s.sequence, t + i) * a.size;
                std::memcpy(keys + i * deep, key, size_t(a.size) * 2);
            }
            for (int64_t i = count; i < block; i++) std::memset(keys + i * deep, 0, size_t(deep) * 2);
            for (int64_t c = 0; c < a.width; c += tile)
                for (int64_t j = 0; j < block / 2; j++)
                    _mm512_store_si512(values + c + j, in_turn(keys + 2 * j * deep + c, keys + (2 * j + 1) * deep + c));
            for (int64_t g = 0; g < groups(a); g++) {
                vec scores[block];
                score(keys, deep, reinterpret_cast<const uint32_t*>(q) + g * deep / 2 * tile, scores);
                for (int64_t i = 0; i < count; i++) scores[i] *= a.scale;
                vec fade = move_on(scores, count, p.tops + g * tile, p.totals + g * tile);
                for (int64_t i = count; i < block; i++) scores[i] = vec{};
                turn(scores, weights);
                add(weights, values, fade, a.width, p.values + g * tile * a.width);
            }
        }
    }

    // scores [32 keys][16 heads]
    static void score(const bf16* keys, int64_t deep, const uint32_t* q, vec* scores) {
        written(keys);
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < deep; k += 32) {
            _tile_loadd(4, q + k / 2 * tile, 64);
            _tile_loadd(5, keys + k, deep * 2);
            _tile_loadd(6, keys + tile * deep + k, deep * 2);
            _tile_dpbf16ps(0, 5, 4);
            _tile_dpbf16ps(1, 6, 4);
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + tile, 64);
    }

    // [32 keys][16 heads] -> [16 heads][32 keys] in BF16
    static void turn(const vec* weights, bf16* out) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i heads = _mm512_mullo_epi32(_mm512_set1_epi32(block / 2), lane);
        for (int64_t i = 0; i < block; i += 2) {
            __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(weights[i])));
            __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(weights[i + 1])));
            _mm512_i32scatter_epi32(out + i, heads, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)), 4);
        }
    }

    // sums [16 heads][width] = sums · fade + weights · values
    static void add(const bf16* weights, const __m512i* values, vec fade, int64_t width, float* sums) {
        for (int64_t h = 0; h < tile; h++) {
            if (fade[h] == 1.0f) continue;
            float* row = sums + h * width;
            for (int64_t c = 0; c < width; c += lanes) store(row + c, load(row + c) * fade[h]);
        }
        written(weights);
        _tile_loadd(4, weights, 64);
        for (int64_t c = 0; c < width; c += 2 * tile) {
            _tile_loadd(0, sums + c, width * 4);
            _tile_loadd(1, sums + c + tile, width * 4);
            _tile_loadd(5, values + c, 64);
            _tile_loadd(6, values + c + tile, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_stored(0, sums + c, width * 4);
            _tile_stored(1, sums + c + tile, width * 4);
        }
    }
};
#endif

// Keys and values of their own for every head, or for some heads together. q: [heads, size], scaled.
struct Heads {
    static bool fits(const Paged&) { return true; }
    static void begin() {}
    static void end() {}
    static int64_t query_size(const Paged& a) { return a.heads * a.size; }

    template <typename T>
    static void query(const Paged& a, int64_t sequence, float* to) {
        convert(static_cast<const T*>(a.q) + sequence * query_size(a), query_size(a), to);
        for (int64_t i = 0; i < query_size(a); i++) to[i] *= a.scale;
    }

    template <typename T>
    static vec dot(const float* q, const T* k, int64_t size) {
        vec sums = {};
        int64_t i = 0;
        for (; i + lanes <= size; i += lanes) sums += load(q + i) * load(k + i);
        return i == size ? sums : sums + load(q + i, size - i) * load(k + i, size - i);
    }

    // out = out · fade + Σ weights[i] · rows[i], `some` vectors of it
    template <int some, typename T>
    static void add(const float* weights, const T* const* rows, int64_t count, int64_t at, float fade, float* out) {
        vec sums[some];
        UNROLL for (int j = 0; j < some; j++) sums[j] = load(out + at + j * lanes) * fade;
        for (int64_t i = 0; i < count; i++)
            UNROLL for (int j = 0; j < some; j++) sums[j] += load(rows[i] + at + j * lanes) * weights[i];
        UNROLL for (int j = 0; j < some; j++) store(out + at + j * lanes, sums[j]);
    }

    template <typename T>
    static void run(const Paged& a, const Span& s, const float* q, Partial p) {
        std::fill(p.tops, p.tops + a.heads, -INFINITY);
        std::fill(p.totals, p.totals + a.heads, 0.0f);
        std::fill(p.values, p.values + a.heads * a.width, 0.0f);
        for (int64_t t = s.begin; t < s.end; t += block) {
            int64_t count = std::min(block, s.end - t);
            for (int64_t h = 0; h < a.heads; h++) {
                int64_t shared = h / (a.heads / a.shared);
                const T *keys[block], *values[block];
                for (int64_t i = 0; i < count; i++) {
                    int64_t row = place(a, s.sequence, t + i) * a.shared + shared;
                    keys[i] = static_cast<const T*>(a.keys) + row * a.size;
                    values[i] = static_cast<const T*>(a.values) + row * a.width;
                }
                float scores[block], top = p.tops[h];
                for (int64_t i = 0; i < count; i++) {
                    scores[i] = sum(dot(q + h * a.size, keys[i], a.size));
                    top = scores[i] > top ? scores[i] : top;
                }
                for (int64_t i = count; i < block; i++) scores[i] = top;
                for (int64_t i = 0; i < block; i += lanes) store(scores + i, exponential(load(scores + i) - top));
                float fade = exponential(all(p.tops[h] - top))[0], total = 0.0f, *out = p.values + h * a.width;
                for (int64_t i = 0; i < count; i++) total += scores[i];
                p.tops[h] = top;
                p.totals[h] = p.totals[h] * fade + total;
                int64_t c = 0;
                for (; c + 4 * lanes <= a.width; c += 4 * lanes) add<4>(scores, values, count, c, fade, out);
                for (; c + lanes <= a.width; c += lanes) add<1>(scores, values, count, c, fade, out);
                for (; c < a.width; c++) {
                    float x = out[c] * fade;
                    for (int64_t i = 0; i < count; i++) {
                        float v;
                        convert(values[i] + c, 1, &v);
                        x += scores[i] * v;
                    }
                    out[c] = x;
                }
            }
        }
    }
};

// One head's result of one sequence, joined from its tasks in their order; zeros where there is none.
template <typename T>
void join(const Paged& a, float* memory, int64_t first, int64_t last, int64_t head, T* out) {
    float* sums = reinterpret_cast<float*>(space<1>(a.width * 4));
    std::fill(sums, sums + a.width, 0.0f);
    float top = -INFINITY, total = 0.0f;
    for (int64_t i = first; i < last; i++) top = std::max(top, partial(a, memory, i).tops[head]);
    for (int64_t i = first; i < last; i++) {
        Partial p = partial(a, memory, i);
        float factor = std::exp(p.tops[head] - top);
        total += p.totals[head] * factor;
        for (int64_t c = 0; c < a.width; c++) sums[c] += p.values[head * a.width + c] * factor;
    }
    for (int64_t c = 0; first < last && c < a.width; c++) sums[c] /= total;
    convert(sums, a.width, out);
}

// 1: a length or a page that is not there.
template <class Way, typename T>
int attention(const Paged& a) {
    std::vector<int64_t> first;
    std::vector<Span> tasks = spans(a, first);
    if (first.empty()) return 1;
    int64_t query = round_up(Way::query_size(a), 16);
    int64_t partials_size = partial_size(a) * int64_t(tasks.size());
    float* queries = reinterpret_cast<float*>(space<0>((query * a.sequences + partials_size) * 4));
    float* partials = queries + query * a.sequences;
    for (int64_t n = 0; n < a.sequences; n++) Way::template query<T>(a, n, queries + n * query);
    int threads = tasks.size() > 1 ? a.threads : 1;
#pragma omp parallel num_threads(threads)
    {
        Way::begin();
#pragma omp for schedule(dynamic, 1)  // tasks differ in length; which thread takes one changes no result
        for (int64_t i = 0; i < int64_t(tasks.size()); i++) {
            const Span& s = tasks[size_t(i)];
            Way::template run<T>(a, s, queries + s.sequence * query, partial(a, partials, i));
        }
        Way::end();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.sequences * a.heads; i++) {
            int64_t n = i / a.heads;
            T* out = static_cast<T*>(a.out) + i * a.width;
            join(a, partials, first[size_t(n)], first[size_t(n + 1)], i % a.heads, out);
        }
    }
    return 0;
}

}  // namespace

extern "C" {

#define FORMAT(name, T, F)                                                                                             \
    void linear_##name(const Matrix* m, const T* x, T* out, int64_t rows, int threads) {                               \
        if (rows > few && has_tiles()) return linear<Many<F>::type>(x, *m, out, rows, threads);                        \
        linear<F>(x, *m, out, rows, threads);                                                                          \
    }                                                                                                                  \
    ON_TAPE(linear_##name)                                                                                             \
    int experts_##name(const Experts* e, const T* x, const int64_t* indices, const float* weights, T* out,             \
                       int64_t rows, int64_t choices, int threads) {                                                   \
        Routing r = {indices, weights, rows, choices};                                                                 \
        if (inputs_each(r) > few && has_tiles()) return experts<Many<F>::type>(x, *e, r, out, threads);                \
        return experts<F>(x, *e, r, out, threads);                                                                     \
    }                                                                                                                  \
    ON_TAPE(experts_##name)

#define DENSE(name, T, W, F)                                                                                           \
    FORMAT(name, T, F)                                                                                                 \
    void absorb_##name(const T* q, const W* kv_b, T* out, int64_t rows, int64_t heads, int64_t nope, int64_t rope,     \
                       int64_t value, int64_t latent, int threads) {                                                   \
        absorb(q, kv_b, out, rows, heads, nope, rope, value, latent, threads);                                         \
    }                                                                                                                  \
    ON_TAPE(absorb_##name)                                                                                             \
    void expand_##name(const T* o, const W* kv_b, T* out, int64_t rows, int64_t heads, int64_t nope, int64_t value,    \
                       int64_t latent, int threads) {                                                                  \
        expand<F>(o, kv_b, out, rows, heads, nope, value, latent, threads);                                            \
    }                                                                                                                  \
    ON_TAPE(expand_##name)

DENSE(ff, float, float, Dense<Single<float>>)
DENSE(fb, float, bf16, Dense<Single<bf16>>)
DENSE(bf, bf16, float, Dense<Single<float>>)
DENSE(bb, bf16, bf16, Dense<Pairs>)
FORMAT(f8, float, Packed<8>)
FORMAT(b8, bf16, Packed<8>)
FORMAT(f4, float, Packed<4>)
FORMAT(b4, bf16, Packed<4>)

#if !defined(TILES)
using LatentTiles = LatentLanes;
#endif

#define ATTENTION(name, T, Way, Else)                                                                                  \
    int name(const void* q, const void* keys, const void* values, const int32_t* table, const int32_t* lengths,        \
             void* out, int64_t sequences, int64_t heads, int64_t shared, int64_t most, int64_t pages, int64_t page,   \
             int64_t size, int64_t width, float scale, int threads) {                                                  \
        Paged a = {q, keys, values, table, lengths, out, sequences, heads, shared, most, pages, page, size, width,     \
                   scale, threads};                                                                                    \
        return Way::fits(a) ? attention<Way, T>(a) : attention<Else, T>(a);                                            \
    }                                                                                                                  \
    ON_TAPE(name)

ATTENTION(latent_attention_f, float, LatentLanes, LatentLanes)
ATTENTION(latent_attention_b, bf16, LatentTiles, LatentLanes)
ATTENTION(paged_attention_f, float, Heads, Heads)
ATTENTION(paged_attention_b, bf16, Heads, Heads)
}
