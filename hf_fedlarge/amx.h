/* The matrix registers of a processor with AMX: tiles of 16 rows of 64 bytes. What a product's right factor has in two
   rows, one below the other, lies side by side there: a pair of bf16. */

#include "bf16.h"

#include <immintrin.h>

#define BLOCK 32 /* rows and columns of a product at a time: two by two tiles */

/* What is in memory is written before what follows, and read after it: GCC 12 doesn't know that the instructions for these
   registers read and write it. */
static inline void settle(void) { __asm__ volatile("" ::: "memory"); }

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
