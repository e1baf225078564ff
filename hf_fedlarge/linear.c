/* A product with a matrix in NF4, which becomes dense in pieces that stay in a core's cache, on the matrix registers of
   a processor with AMX (amx.h). A dense matrix would go through memory twice, which is what such a product waits for.

   hf_fedlarge/kernels.py says what is computed. N tokens, K inner values, P columns of the result, R a rank; the left
   factor is (N, K), the right one (K, P), and its last rows may be those of a second, dense product: x W + u E is
   [x u] [W; E]. The right factor is divided into panels of columns, a thread's each, and those into parts of K. A sum
   goes through K in the same order whatever they are, so results don't depend on the number of threads. */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)
#include "amx.h"
#include "nf4.h"

#include <omp.h>

#define TILE (16 * 32)         /* values */
#define DEEPEST 2048           /* of a part; all sizes are multiples of 64 */
#define PANEL_VALUES (1 << 19) /* half of what a core's cache holds; the left factor comes by */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Turns 16 rows of 16 pairs. */
static inline void turn(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k += 8) {
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

static inline __mmask32 first_of_32(int64_t count) { return count < 32 ? (1u << count) - 1 : ~0u; }

static inline void store_tile(uint32_t *tile, const __m512i r[16]) {
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 16 * i, r[i]);
}

/* Rows [16 first, 16 last) of x (N, width), its rows `step` apart, as tiles (row, steps): zeros where there is nothing. */
static void lay_left(const bf16 *x, int64_t step, int64_t N, int64_t width, int64_t steps, int64_t first, int64_t last,
                     bf16 *out) {
    for (int64_t row = 16 * first; row < 16 * last; row++)
        for (int64_t s = 0; s < padded(width, 32) / 32; s++) {
            const __mmask32 there = row < N ? first_of_32(width - 32 * s) : 0;
            _mm512_store_si512(out + (row / 16 * steps + s) * TILE + row % 16 * 32,
                               _mm512_maskz_loadu_epi16(there, x + row * step + 32 * s));
        }
}

/* A right factor's tiles lie (column, steps). Here: rows [row, row + count) of W (…, columns), from `column` on, turned. */
static void lay_nf4_turned(const nf4_matrix *w, int64_t columns, int64_t row, int64_t count, int64_t column,
                           int64_t width, int64_t steps, uint32_t *out) {
    for (int64_t start = 0; start < count; start += 16)
        for (int64_t k = 0; k < width; k += SCALED) {
            __m512i halves[2][16];
            for (int i = 0; i < 16; i++) {
                __m512i found[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                if (start + i < count) read_nf4(w, ((row + start + i) * columns + column + k) / SCALED, found);
                halves[0][i] = found[0], halves[1][i] = found[1];
            }
            for (int half = 0; half < 2; half++) {
                turn(halves[half]);
                store_tile(out + (start / 16 * steps + k / 32 + half) * (TILE / 2), halves[half]);
            }
        }
}

/* Two rows of 32 values as a row of pairs of each of two tiles. */
static inline void interleave(uint32_t *left, uint32_t *right, __m512i even, __m512i odd) {
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_or_si512(count, _mm512_set1_epi32(32)), 16));
    _mm512_store_si512(left, _mm512_permutex2var_epi16(even, order, odd));
    _mm512_store_si512(right,
                       _mm512_permutex2var_epi16(even, _mm512_add_epi16(order, _mm512_set1_epi16(16)), odd));
}

/* Here: columns [column, column + count) of `depth` rows of W from `row` on. */
static void lay_nf4(const nf4_matrix *w, int64_t columns, int64_t row, int64_t depth, int64_t column, int64_t count,
                    int64_t steps, uint32_t *out) {
    for (int64_t k = 0; k < padded(depth, 32); k += 2)
        for (int64_t start = 0; start < count; start += SCALED) {
            __m512i even[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd[2] = {even[0], even[0]};
            if (k < depth) read_nf4(w, ((row + k) * columns + column + start) / SCALED, even);
            if (k + 1 < depth) read_nf4(w, ((row + k + 1) * columns + column + start) / SCALED, odd);
            for (int half = 0; half < 2; half++) {
                uint32_t *tile = out + ((start / 16 + 2 * half) * steps + k / 32) * (TILE / 2) + k % 32 / 2 * 16;
                interleave(tile, tile + steps * (TILE / 2), even[half], odd[half]);
            }
        }
}

/* Here: `count` rows of E (columns, R), turned, or as many columns of E (R, columns); its rows are `step` apart. */
static void lay_dense(const bf16 *e, int64_t step, int turned, int64_t count, int64_t R, int64_t steps, uint32_t *out) {
    for (int64_t s = 0; s < padded(R, 32) / 32; s++)
        for (int64_t start = 0; start < count; start += BLOCK)
            for (int side = 0; side < 2; side++) {
                uint32_t *tile = out + ((start / 16 + side) * steps + s) * (TILE / 2);
                if (turned) {
                    __m512i r[16];
                    for (int i = 0; i < 16; i++) {
                        const int64_t at = start + 16 * side + i;
                        r[i] = _mm512_maskz_loadu_epi16(at < count ? first_of_32(R - 32 * s) : 0, e + at * step + 32 * s);
                    }
                    turn(r);
                    store_tile(tile, r);
                } else if (!side)
                    for (int64_t k = 32 * s; k < 32 * s + 32; k += 2) {
                        const __mmask32 there = first_of_32(count - start);
                        interleave(tile + k % 32 / 2 * 16, tile + steps * (TILE / 2) + k % 32 / 2 * 16,
                                   _mm512_maskz_loadu_epi16(k < R ? there : 0, e + k * step + start),
                                   _mm512_maskz_loadu_epi16(k + 1 < R ? there : 0, e + (k + 1) * step + start));
                    }
            }
}

/* A sum, and the bias, as `rows` rows of the result, rounded; `there` are those of its columns that there are. */
static void store_sum(const float *c, const bf16 *bias, __mmask32 there, int64_t rows, bf16 *out, int64_t P) {
    __m512 more[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (bias) {
        const __m512i values = _mm512_maskz_loadu_epi16(there, bias);
        const __m256i halves[2] = {_mm512_castsi512_si256(values), _mm512_extracti64x4_epi64(values, 1)};
        for (int side = 0; side < 2; side++)
            more[side] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[side]), 16));
    }
    for (int64_t r = 0; r < rows; r++) {
        const __m512 left = _mm512_add_ps(_mm512_load_ps(c + r * BLOCK), more[0]);
        const __m512 right = _mm512_add_ps(_mm512_load_ps(c + r * BLOCK + 16), more[1]);
        _mm512_mask_storeu_epi16(out + r * P, there, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
}

/* How a product is divided. */
typedef struct {
    int64_t rows, parts, deep, wide, left_values, panel_values, sum_values;
} division;

static division divide(int64_t N, int64_t K, int64_t P, int64_t R, int turned, int threads) {
    division d = {.rows = padded(N, BLOCK), .parts = (K + DEEPEST - 1) / DEEPEST};
    d.deep = padded((K + d.parts - 1) / d.parts, SCALED);
    const int64_t deepest = d.deep + padded(R, 32), unit = turned ? BLOCK : SCALED;
    const int64_t panels = threads * ((P * deepest + threads * PANEL_VALUES - 1) / (threads * PANEL_VALUES));
    d.wide = padded((P + panels - 1) / panels, unit);
    d.left_values = d.rows * (padded(K, 32) + padded(R, 32));
    d.panel_values = d.wide * deepest;
    d.sum_values = d.parts > 1 ? d.rows * d.wide : BLOCK * BLOCK;
    return d;
}

/* A part of K: where it begins, how deep it is, how many rows of the second product follow it, and tiles in all. */
typedef struct {
    int64_t first, depth, with, steps;
} part;

static part part_of(const division *d, int64_t number, int64_t K, int64_t R) {
    part p = {.first = number * d->deep, .with = number + 1 < d->parts ? 0 : R};
    p.depth = smaller(d->deep, K - p.first);
    p.steps = (padded(p.depth, 32) + padded(p.with, 32)) / 32;
    return p;
}

/* What it works in. */
int64_t nf4_linear_bytes(int64_t N, int64_t K, int64_t P, int64_t R, int turned, int threads) {
    const division d = divide(N, K, P, R, turned, threads);
    return 2 * d.left_values + threads * (2 * d.panel_values + 4 * d.sum_values);
}

/* out (N, P) = x (N, K) W + u (N, R) E + bias (P), where W is what is stored, (K, P), or with `turned` its transpose, and
   so is E. A stored row has a multiple of 64 values. Without u, R is 0. */
void nf4_linear(const bf16 *x, const uint8_t *packed, const uint8_t *codes, const float *outer, const float *code,
                const float *table, const bf16 *u, const bf16 *e, const bf16 *bias, bf16 *out, uint8_t *work, int64_t N,
                int64_t K, int64_t P, int64_t R, float offset, int turned, int threads) {
    const division d = divide(N, K, P, R, turned, threads);
    nf4_matrix w = {packed, codes, outer, code, .offset = offset};
    memcpy(&w.table, table, sizeof w.table);
    bf16 *left = (bf16 *)work;
    uint8_t *own = work + 2 * d.left_values;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads(), blocks = d.rows / 16;
        uint32_t *panel = (uint32_t *)(own + thread * (2 * d.panel_values + 4 * d.sum_values));
        float *sums = (float *)((uint8_t *)panel + 2 * d.panel_values);
        tiles theirs;
        enter(&theirs);
        for (int64_t number = 0; number < d.parts; number++) {
            const part p = part_of(&d, number, K, R);
            const int64_t from = blocks * thread / count, to = blocks * (thread + 1) / count;
            bf16 *tiled = left + p.first * d.rows;
            lay_left(x + p.first, K, N, p.depth, p.steps, from, to, tiled);
            if (p.with) lay_left(u, R, N, R, p.steps, from, to, tiled + padded(p.depth, 32) / 32 * TILE);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t column = 0; column < P; column += d.wide) {
            const int64_t width = smaller(d.wide, P - column);
            for (int64_t number = 0; number < d.parts; number++) {
                const part p = part_of(&d, number, K, R);
                if (turned)
                    lay_nf4_turned(&w, K, column, width, p.first, p.depth, p.steps, panel);
                else
                    lay_nf4(&w, P, p.first, p.depth, column, width, p.steps, panel);
                if (p.with)
                    lay_dense(turned ? e + column * R : e + column, turned ? R : P, turned, width, R, p.steps,
                              panel + padded(p.depth, 32) / 32 * (TILE / 2));
                const int64_t row_bytes = 2 * TILE * p.steps;
                for (int64_t row = 0; row < d.rows; row += BLOCK)
                    for (int64_t at = 0; at < width; at += BLOCK) {
                        float *c = d.parts > 1 ? sums + row * d.wide + at * BLOCK : sums;
                        const strip a = {left + p.first * d.rows + row / 16 * p.steps * TILE,
                                         row_bytes, 2 * TILE, 64};
                        const strip b = {panel + at / 16 * p.steps * (TILE / 2), row_bytes, 2 * TILE, 64};
                        multiply_strips(number > 0, c, BLOCK, a, b, p.steps);
                        if (number + 1 == d.parts)
                            store_sum(c, bias ? bias + column + at : NULL, first_of_32(width - at),
                                      smaller(BLOCK, N - row), out + row * P + column + at, P);
                    }
            }
        }
        leave(&theirs);
    }
}
#endif
