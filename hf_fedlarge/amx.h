/* The matrix registers of a processor with AMX: tiles of 16 rows of 64 bytes. What a product's right factor has in two
   rows, one below the other, lies side by side there: a pair of bf16. */

#pragma once

#include "bf16.h"

#include <immintrin.h>

#define BLOCK 32 /* rows and columns of a product at a time: two by two tiles */

static inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

/* What is in memory is written before what follows, and read after it: GCC 12 doesn't know that the instructions for these
   registers read and write it. */
static inline void settle(void) { __asm__ volatile("" ::: "memory"); }

/* A factor's two rows or columns of tiles: where the first begins, and how many bytes further the second one is, each
   next tile of both, and a tile's next row. */
typedef struct {
    const void *first;
    int64_t second, next, row;
} strip;

/* c (BLOCK, BLOCK), `c_width` values a row, = or += a strip of `steps` tiles times another. */
static inline void multiply_strips(int adds, float *c, int64_t c_width, strip a, strip b, int64_t steps) {
    float *lower = c + 16 * c_width;
    const uint8_t *left = a.first, *right = b.first;
    settle();
    if (adds) {
        _tile_loadd(0, c, 4 * c_width);
        _tile_loadd(1, c + 16, 4 * c_width);
        _tile_loadd(2, lower, 4 * c_width);
        _tile_loadd(3, lower + 16, 4 * c_width);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, left + step * a.next, a.row);
        _tile_loadd(5, left + step * a.next + a.second, a.row);
        _tile_loadd(6, right + step * b.next, b.row);
        _tile_loadd(7, right + step * b.next + b.second, b.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * c_width);
    _tile_stored(1, c + 16, 4 * c_width);
    _tile_stored(2, lower, 4 * c_width);
    _tile_stored(3, lower + 16, 4 * c_width);
    settle();
}

/* How the registers are set. */
typedef struct {
    uint8_t palette, unused[15];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tiles;

/* Others use these registers, too, and may rely on how they have set them: `theirs` is for `leave`. */
static inline void enter(tiles *theirs) {
    tiles ours = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) ours.row_bytes[tile] = 64, ours.rows[tile] = 16;
    __asm__ volatile("sttilecfg %0" : "=m"(*theirs));
    __asm__ volatile("ldtilecfg %0" ::"m"(ours));
}

static inline void leave(const tiles *theirs) {
    if (theirs->palette)
        __asm__ volatile("ldtilecfg %0" ::"m"(*theirs));
    else
        _tile_release();
}
