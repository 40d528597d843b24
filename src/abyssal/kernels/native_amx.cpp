// Matrix products of routed experts in BF16 on processors with AMX: every expert's rows times its matrix.
//
// A library's product of one expert is too small to be shared out over threads, and its operands are brought into the
// order that the tile unit wants once a thread; here threads take whole experts (pieces of their columns, where there
// are few experts). kernels/native.py says what each function computes.
//
// How AMX multiplies: a tile holds 16 rows of 64 bytes. tdpbf16ps adds to a tile of 16 x 16 FP32 numbers the product of
// a tile of A, 16 rows of 32 numbers along k, and a tile of B, 16 rows each of which holds for 16 columns two numbers
// that follow each other along k. Four tiles of the result are worked on at once (32 x 32), so that each tile of A and B
// that is loaded serves twice. Operands are copied into that order first ("packed"), a piece that the second cache
// holds. All sizes here are multiples of 32; the caller sees to that.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using number = uint16_t;  // BF16, as bits

constexpr int64_t block = 32;           // rows and columns of the result at a time, and numbers along k
constexpr int64_t piece = 1 << 19;      // numbers of B that are packed at a time: 1 MB

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Makes the compiler finish writing before tiles are loaded: to GCC the loads do not read memory.
inline void written(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

void configure_tiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = 16;
    }
    written(&config);
    _tile_loadconfig(&config);
}

// 16 vectors of 16 32-bit numbers, rows into columns.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

// 16 numbers each of two rows, taken in turn: what a tile of B has in a row.
inline __m512i pairs(const number* first, const number* second) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 numbers as FP32.
inline __m512 widened(const number* from) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
}

// An operand in memory: along_k says that its numbers follow each other along k (rows are m or n); else rows are k.
struct Operand {
    const number* data;
    int64_t stride;
    bool along_k;
};

// 32 columns of B -> [k / 2][32][2].
void pack_b(const Operand& b, int64_t column, int64_t depth, number* out) {
    for (int64_t k = 0; k < depth; k += block, out += block * block) {
        for (int64_t half = 0; half < 2; half++) {
            if (b.along_k) {
                __m512i r[16];
                for (int64_t n = 0; n < 16; n++)
                    r[n] = _mm512_loadu_si512(b.data + (column + half * 16 + n) * b.stride + k);
                transpose(r);
                for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(out + i * 64 + half * 32, r[i]);
            } else {
                const number* from = b.data + k * b.stride + column + half * 16;
                for (int64_t i = 0; i < 16; i++, from += 2 * b.stride)
                    _mm512_storeu_si512(out + i * 64 + half * 32, pairs(from, from + b.stride));
            }
        }
    }
}

// 32 rows of A -> [k / 32][32 rows][32].
void pack_a(const Operand& a, int64_t row, int64_t depth, number* out) {
    for (int64_t k = 0; k < depth; k += block, out += block * block) {
        if (a.along_k) {
            for (int64_t m = 0; m < block; m++)
                _mm512_storeu_si512(out + m * block, _mm512_loadu_si512(a.data + (row + m) * a.stride + k));
            continue;
        }
        for (int64_t half = 0; half < 2; half++) {
            __m512i r[16];
            const number* from = a.data + k * a.stride + row + half * 16;
            for (int64_t i = 0; i < 16; i++, from += 2 * a.stride) r[i] = pairs(from, from + a.stride);
            transpose(r);
            for (int64_t m = 0; m < 16; m++) _mm512_storeu_si512(out + (half * 16 + m) * block, r[m]);
        }
    }
}

// 32 x 32 numbers of the result from packed operands; onto: added to those that are there.
void multiply(const number* a, const number* b, int64_t depth, number* out, int64_t stride, bool onto) {
    alignas(64) float sums[block * block];
    written(a);
    written(b);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += block, a += block * block, b += block * block) {
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a + 16 * block, 64);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * block, 128);
    _tile_stored(3, sums + 16 * block + 16, 128);
    written(sums);
    for (int64_t m = 0; m < block; m++) {
        __m512 low = _mm512_load_ps(sums + m * block), high = _mm512_load_ps(sums + m * block + 16);
        if (onto) {
            low = _mm512_add_ps(low, widened(out + m * stride));
            high = _mm512_add_ps(high, widened(out + m * stride + 16));
        }
        __m512bh row = _mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(out + m * stride, reinterpret_cast<__m512i&>(row));
    }
}

// Columns [first, last) of out [m, n] = A [m, depth] · B [depth, n].
void product(const Operand& a, const Operand& b, number* out, int64_t stride, int64_t rows, int64_t first, int64_t last,
             int64_t depth, bool onto, std::vector<number>& space) {
    space.resize(size_t((last - first + block) * depth + 64));
    number* packed_b = reinterpret_cast<number*>((reinterpret_cast<uintptr_t>(space.data()) + 63) & ~uintptr_t(63));
    number* packed_a = packed_b + (last - first) * depth;
    for (int64_t n = first; n < last; n += block) pack_b(b, n, depth, packed_b + (n - first) * depth);
    for (int64_t m = 0; m < rows; m += block) {
        pack_a(a, m, depth, packed_a);
        for (int64_t n = first; n < last; n += block)
            multiply(packed_a, packed_b + (n - first) * depth, depth, out + m * stride + n, stride, onto);
    }
}

}  // namespace

extern "C" {

// Whether this processor has the tile unit and the system lets this process use it.
int amx_usable() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// kind 0: out [P, O] = x · weightᵀ of the row's expert. 1: out [P, I] = x [P, O] · weight. 2: out [E, O, I], each
// expert's gradᵀ · x over its rows, where grad [P, O] comes in the place of x and x [P, I] in that of weight.
// bounds [E + 1]: where each expert's rows begin. kind + 4: the result is added to what is in out.
void grouped_product(int kind, const number* x, const number* weight, number* out, const int64_t* bounds,
                     int64_t experts, int64_t outputs, int64_t inputs, int threads) {
    bool onto = kind >= 4;
    kind %= 4;
    int64_t columns = kind == 0 ? outputs : inputs;
    // Pieces of columns that are packed at once; several for each thread, where there are few experts.
    int64_t most = block;
    for (int64_t e = 0; e < experts; e++) most = std::max(most, kind == 2 ? bounds[e + 1] - bounds[e] : 0);
    int64_t depth = kind == 0 ? inputs : kind == 1 ? outputs : most;
    int64_t wide = std::max(block, piece / depth / block * block);
    int64_t parts = std::max((columns + wide - 1) / wide, (4 * threads + experts - 1) / experts);
    parts = std::min(parts, columns / block);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<number> space;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * parts; task++) {
            int64_t e = task / parts, part = task % parts, rows = bounds[e + 1] - bounds[e];
            int64_t first = columns / block * part / parts * block, last = columns / block * (part + 1) / parts * block;
            const number* w = weight + e * outputs * inputs;
            if (kind == 0) {
                product({x + bounds[e] * inputs, inputs, true}, {w, inputs, true}, out + bounds[e] * outputs, outputs,
                        rows, first, last, inputs, onto, space);
            } else if (kind == 1) {
                product({x + bounds[e] * outputs, outputs, true}, {w, inputs, false}, out + bounds[e] * inputs, inputs,
                        rows, first, last, outputs, onto, space);
            } else {
                product({x + bounds[e] * outputs, outputs, false}, {weight + bounds[e] * inputs, inputs, false},
                        out + e * outputs * inputs, inputs, outputs, first, last, rows, onto, space);
            }
        }
        _tile_release();
    }
}

}

#else

extern "C" {

int amx_usable() { return 0; }

void grouped_product(int, const uint16_t*, const uint16_t*, uint16_t*, const int64_t*, int64_t, int64_t, int64_t, int) {}

}

#endif
