/* rows + scale left right, summed in fp64 and rounded once to bf16: a matrix with its adapter folded in.

   hf_fedlarge/kernels.py compiles this file. Sums of ROWS rows and COLUMNS columns are in registers; of `right` so many
   columns are laid together for each CHUNK of rows, so that a product reads them in order. */

#include "bf16.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ROWS 4
#define VECTORS 4
#define LANES 8
#define COLUMNS (VECTORS * LANES)
#define CHUNK 16

typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t longs __attribute__((vector_size(8 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));

static inline doubles plus_product(doubles sum, doubles a, doubles b) {
#ifdef __AVX512F__
    return _mm512_fmadd_pd(a, b, sum);
#else
    return sum + a * b;
#endif
}

/* To odd at 13 bits, which fp32 holds, and from there to the nearest: `blocks.round_fp64` says why. */
static inline bf16 round_fp64(double value) {
    const int64_t cut = ((int64_t)1 << 40) - 1;
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (((bits & cut) + cut) | bits) & ~cut;
    memcpy(&value, &bits, sizeof value);
    return nearest_bf16((float)value);
}

/* COLUMNS columns of at most ROWS rows, or `width` of them; a last row stands in for those that are missing. Whether a
   value is not finite. */
static inline __attribute__((always_inline)) int add_tile(const bf16 *rows, const double *left, const double *right,
                                                          bf16 *out, int64_t n, int64_t width, int64_t m, int64_t r,
                                                          double scale) {
    const double *factors[ROWS];
    for (int a = 0; a < ROWS; a++) factors[a] = left + (a < n ? a : n - 1) * r;
    doubles sums[ROWS][VECTORS] = {0};
    for (int64_t k = 0; k < r; k++)
        for (int v = 0; v < VECTORS; v++) {
            doubles values;
            memcpy(&values, right + k * COLUMNS + v * LANES, sizeof values);
            for (int a = 0; a < ROWS; a++) sums[a][v] = plus_product(sums[a][v], values, factors[a][k] - (doubles){0});
        }
    int beyond = 0;
    for (int a = 0; a < ROWS && a < n; a++) {
        double line[COLUMNS];
        memcpy(line, sums[a], sizeof line);
#pragma omp simd reduction(| : beyond)
        for (int64_t j = 0; j < width; j++) {
            const bf16 value = round_fp64(line[j] * scale + from_bf16(rows[a * m + j]));
            out[a * m + j] = value;
            beyond |= (value & 0x7fff) >= 0x7f80;
        }
    }
    return beyond;
}

/* n rows of m values; left (n, r), right (r, m); `work` has room for r COLUMNS numbers. Whether all values are finite. */
int add_product(const bf16 *rows, const double *left, const double *right, bf16 *out, double *work, int64_t n,
                int64_t m, int64_t r, double scale) {
    int beyond = 0;
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK) {
        const int64_t stop = chunk + CHUNK < n ? chunk + CHUNK : n;
        for (int64_t column = 0; column < m; column += COLUMNS) {
            const int64_t width = column + COLUMNS < m ? COLUMNS : m - column;
            for (int64_t k = 0; k < r; k++) memcpy(work + k * COLUMNS, right + k * m + column, width * sizeof *work);
            for (int64_t row = chunk; row < stop; row += ROWS) {
                const int64_t at = row * m + column;
                for (int a = 0; a < ROWS; a++) __builtin_prefetch(rows + at + (CHUNK + a) * m);
                if (width == COLUMNS) /* the compiler then knows it */
                    beyond |= add_tile(rows + at, left + row * r, work, out + at, stop - row, COLUMNS, m, r, scale);
                else
                    beyond |= add_tile(rows + at, left + row * r, work, out + at, stop - row, width, m, r, scale);
            }
        }
    }
    return !beyond;
}
