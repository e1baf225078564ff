/* rows + scale left right, as if summed in fp64 and rounded once to bf16: a matrix with its adapter folded in.

   hf_fedlarge/kernels.py compiles this file. A value is computed in fp32 first, of which a register holds twice as many.
   How far it can be from the true one is known, and where both ends of that interval round to the same bf16, so does all
   between them. Where they don't, at one value in some thousands, it is computed in fp64. Sums of ROWS rows and COLUMNS
   columns are in registers; of `right` so many columns are laid together for each CHUNK of rows, so that a product reads
   them in order. */

#include "bf16.h"

#include <math.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define ROWS 4
#define VECTORS 4
#define LANES 16
#define COLUMNS (VECTORS * LANES)
#define CHUNK 16

typedef float floats __attribute__((vector_size(4 * LANES)));

static inline floats plus_product(floats sum, floats a, floats b) {
#ifdef __AVX512F__
    return _mm512_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
}

/* To odd at 13 bits, which fp32 holds, and from there to the nearest: `blocks.round_fp64` says why. */
static bf16 round_fp64(double value) {
    const int64_t cut = ((int64_t)1 << 40) - 1;
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (((bits & cut) + cut) | bits) & ~cut;
    memcpy(&value, &bits, sizeof value);
    return nearest_bf16((float)value);
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* As many columns of as many rows as `count` and `width` say, of what r products add to. Whether a value is not finite. */
static inline __attribute__((always_inline)) int add_tile(const bf16 *rows, const float *left, const float *right,
                                                          bf16 *out, int64_t count, int64_t width, int64_t m, int64_t r,
                                                          double scale, float off) {
    floats sums[ROWS][VECTORS] = {0};
    for (int64_t k = 0; k < r; k++)
        for (int v = 0; v < VECTORS; v++) {
            floats values;
            memcpy(&values, right + k * COLUMNS + v * LANES, sizeof values);
            for (int a = 0; a < count; a++) sums[a][v] = plus_product(sums[a][v], values, left[a * r + k] - (floats){0});
        }
    float lines[ROWS][COLUMNS];
    memcpy(lines, sums, sizeof lines);
    bf16 doubt[ROWS][COLUMNS], doubts = 0, largest = 0;
    const float factor = scale;
#pragma omp simd reduction(| : doubts) reduction(max : largest)
    for (int64_t j = 0; j < width; j++)
        for (int a = 0; a < count; a++) {
            const float value = lines[a][j] * factor + from_bf16(rows[a * m + j]);
            const float around = fabsf(value) * 0x1p-22f + off; /* with what a few roundings to fp32 may have lost */
            /* A tie is rounded down at one end and up at the other, so that it is in doubt. */
            const bf16 low = (bits_of(value - around) + 0x7fff) >> 16, high = (bits_of(value + around) + 0x8000) >> 16;
            const bf16 size = low & 0x7fff;
            out[a * m + j] = low;
            doubt[a][j] = (low ^ high) | (value != value);
            doubts |= doubt[a][j];
            largest = size > largest ? size : largest;
        }
    if (!doubts) return largest >= 0x7f80;
    int beyond = 0;
    for (int a = 0; a < count; a++)
        for (int64_t j = 0; j < width; j++) {
            if (doubt[a][j]) {
                double sum = 0;
                for (int64_t k = 0; k < r; k++) sum += (double)left[a * r + k] * right[k * COLUMNS + j];
                out[a * m + j] = round_fp64(sum * scale + from_bf16(rows[a * m + j]));
            }
            beyond |= (out[a * m + j] & 0x7fff) >= 0x7f80;
        }
    return beyond;
}

/* n rows of m values; left (n, r), right (r, m); `work` has room for r COLUMNS numbers. `off` is how far scale left right
   may be from the truth in fp32. Whether all values are finite. */
int add_product(const bf16 *rows, const float *left, const float *right, bf16 *out, float *work, int64_t n, int64_t m,
                int64_t r, double scale, float off) {
    int beyond = 0;
    for (int64_t chunk = 0; chunk < n; chunk += CHUNK)
        for (int64_t column = 0; column < m; column += COLUMNS) {
            const int64_t stop = chunk + CHUNK < n ? chunk + CHUNK : n;
            const int64_t width = column + COLUMNS < m ? COLUMNS : m - column;
            for (int64_t k = 0; k < r; k++) memcpy(work + k * COLUMNS, right + k * m + column, width * sizeof *work);
            for (int64_t row = chunk; row < stop;) {
                const int64_t at = row * m + column, count = row + ROWS <= stop ? ROWS : 1;
                for (int64_t next = at + CHUNK * m; next < at + (CHUNK + count) * m; next += m) {
                    __builtin_prefetch(rows + next);
                    __builtin_prefetch(rows + next + COLUMNS / 2);
                }
                if (count == ROWS && width == COLUMNS) /* the compiler then knows it */
                    beyond |= add_tile(rows + at, left + row * r, work, out + at, ROWS, COLUMNS, m, r, scale, off);
                else
                    beyond |= add_tile(rows + at, left + row * r, work, out + at, count, width, m, r, scale, off);
                row += count;
            }
        }
    return !beyond;
}
