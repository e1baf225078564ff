/* NF4: two values a byte, the first in its high half, 64 under a scale, which is code[codes] outer + offset with one
   `outer` for 256 of them. */

#pragma once

#include "bf16.h"

#ifdef __AVX512BW__
#include <immintrin.h>

#define SCALED 64 /* values under a scale */

typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

typedef struct {
    const uint8_t *packed, *codes;
    const float *outer, *code;
    floats table; /* what the halves of a byte mean */
    float offset;
} nf4_matrix;

/* The 64 values of a block as bf16, in two registers. Their 16 different values are computed, and then looked up. */
static inline void read_nf4(const nf4_matrix *w, int64_t block, __m512i out[2]) {
    const float scale = w->code[w->codes[block]] * w->outer[block / 256] + w->offset;
    const words bits = (words)(w->table * scale);
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* a value times a scale is no NaN */
    const __m512i values = _mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)rounded));
    for (int half = 0; half < 2; half++) {
        const __m512i pairs =
            _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->packed + block * 32 + half * 16)));
        const __m512i first = _mm512_srli_epi32(pairs, 4);
        const __m512i second = _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(15)), 16);
        out[half] = _mm512_permutexvar_epi16(_mm512_or_si512(first, second), values);
    }
}
#endif
