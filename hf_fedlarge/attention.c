/* The gradient of causal attention, on the matrix registers of a processor with AMX (amx.h).

   hf_fedlarge/kernels.py says what is computed. T tokens, H heads, G heads of keys and values, E values a head; all are
   contiguous. A head of keys is one thread's, so results don't depend on the number of threads. */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(__x86_64__)
#include "amx.h"

#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOG2_E 1.44269504f
#define STRIP 128 /* queries at a time */
#define ACROSS (STRIP + 16) /* no power of two, whose rows would all lie in the same places of the cache */

typedef uint32_t pair __attribute__((aligned(2), may_alias));

/* Linux gives a process these registers when it asks. */
int may_use_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* 2^x to 2^-14 of it, for what bf16 will hold; 2^-126 or 2^126 beyond these. */
static inline float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x > 126.0f ? 126.0f : x;
    const float n = rintf(x), r = x - n;
    float sum = fmaf(0.0096181291f, r, 0.055504109f);
    sum = fmaf(sum, r, 0.24022651f);
    sum = fmaf(sum, r, 0.69314718f);
    sum = fmaf(sum, r, 1.0f);
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* c (rows, columns) = or += a (rows, inner) b (inner, columns), sizes multiples of BLOCK. */
static void multiply(int adds, float *c, int64_t c_width, const bf16 *a, int64_t a_width, const uint32_t *b,
                     int64_t b_width, int64_t rows, int64_t columns, int64_t inner) {
    for (int64_t row = 0; row < rows; row += BLOCK)
        for (int64_t column = 0; column < columns; column += BLOCK) {
            const strip left = {a + row * a_width, 2 * 16 * a_width, 2 * BLOCK, 2 * a_width};
            const strip right = {b + column, 4 * 16, 4 * 16 * b_width, 4 * b_width};
            multiply_strips(adds, c + row * c_width + column, c_width, left, right, inner / BLOCK);
        }
}

/* x (T, E), its rows `step` apart, as a right factor (T, E). */
static void pack(const bf16 *x, int64_t step, int64_t T, int64_t E, uint32_t *out, int64_t width) {
    for (int64_t t = 0; t < T; t += 2) {
        const bf16 *even = x + t * step, *odd = t + 1 < T ? even + step : even;
        const uint32_t keep = t + 1 < T ? 0xffff0000 : 0;
        uint32_t *row = out + t / 2 * width;
#pragma omp simd
        for (int64_t e = 0; e < E; e++) row[e] = even[e] | ((uint32_t)odd[e] << 16 & keep);
    }
}

/* The same as a right factor (E, T), turned; E is even. */
static void pack_turned(const bf16 *x, int64_t step, int64_t T, int64_t E, uint32_t *out, int64_t width) {
    for (int64_t start = 0; start < T; start += BLOCK) {
        const int64_t stop = start + BLOCK < T ? start + BLOCK : T;
        for (int64_t e = 0; e < E / 2; e++)
#pragma omp simd
            for (int64_t t = start; t < stop; t++) out[e * width + t] = *(const pair *)(x + t * step + 2 * e);
    }
}

/* What a thread works in, each row and column up to a multiple of BLOCK, zeros where there is nothing. */
typedef struct {
    int64_t wide, across; /* the widths of what is E wide and of what is T wide */
    bf16 *k, *v, *k_turned, *p, *ds;
    uint32_t *q, *grad, *q_turned, *grad_turned, *ds_packed;
    float *scores, *slopes, *lse, *mean, *dk, *dv, *dq_turned;
} workplace;

static void *take(uint8_t *work, int64_t *used, int64_t bytes) {
    void *place = work + *used;
    *used += (bytes + 63) / 64 * 64;
    return place;
}

/* Gives each its place from `work` on; returns how many bytes all take. */
static int64_t lay_out(workplace *w, uint8_t *work, int64_t T, int64_t E) {
    const int64_t rows = padded(T, BLOCK), wide = w->wide = padded(E, BLOCK), across = w->across = rows + 16;
    int64_t used = 0;
    w->k = take(work, &used, 2 * rows * wide);
    w->v = take(work, &used, 2 * rows * wide);
    w->k_turned = take(work, &used, 2 * wide * across);
    w->q = take(work, &used, 2 * rows * wide);
    w->grad = take(work, &used, 2 * rows * wide);
    w->q_turned = take(work, &used, 2 * wide * across);
    w->grad_turned = take(work, &used, 2 * wide * across);
    w->scores = take(work, &used, 4 * BLOCK * ACROSS);
    w->slopes = take(work, &used, 4 * BLOCK * ACROSS);
    w->p = take(work, &used, 2 * BLOCK * ACROSS);
    w->ds = take(work, &used, 2 * BLOCK * ACROSS);
    w->ds_packed = take(work, &used, 2 * BLOCK * ACROSS);
    w->lse = take(work, &used, 4 * rows);
    w->mean = take(work, &used, 4 * rows);
    w->dk = take(work, &used, 4 * rows * wide);
    w->dv = take(work, &used, 4 * rows * wide);
    w->dq_turned = take(work, &used, 4 * wide * across);
    return used;
}

/* How much a thread works in. */
int64_t attention_bytes(int64_t T, int64_t E) {
    workplace unused;
    return lay_out(&unused, NULL, T, E);
}

/* A query head's part, for keys and values that lie in `w`: their gradients grow there, `dq` is written.
   P = exp(scale Q K^T - lse), dS = scale P (dO V^T - mean), mean = sum of dO O; dV = P^T dO, dK = dS^T Q, dQ = dS K.
   Products have keys for rows and queries for columns, so that nothing as large as P is turned. */
static void head_gradient(const workplace *w, const bf16 *q, const bf16 *out, const bf16 *grad, const float *lse,
                          bf16 *dq, int64_t T, int64_t H, int64_t E, float scale) {
    const int64_t step = H * E, wide = w->wide, across = w->across, rows = padded(T, BLOCK);
    const float scale2 = scale * LOG2_E;
    pack(q, step, T, E, w->q, wide);
    pack(grad, step, T, E, w->grad, wide);
    pack_turned(q, step, T, E, w->q_turned, across);
    pack_turned(grad, step, T, E, w->grad_turned, across);
    for (int64_t t = 0; t < T; t++) {
        const bf16 *given = out + t * step, *slope = grad + t * step;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t e = 0; e < E; e++) sum += from_bf16(given[e]) * from_bf16(slope[e]);
        w->mean[t] = sum;
        w->lse[t] = lse[t * H] * LOG2_E;
    }
    for (int64_t first = 0; first < rows; first += BLOCK)
        for (int64_t start = first; start < rows; start += STRIP) {
            const int64_t count = start + STRIP < rows ? STRIP : rows - start;
            multiply(0, w->scores, ACROSS, w->k + first * wide, wide, w->q_turned + start, across, BLOCK, count, wide);
            multiply(0, w->slopes, ACROSS, w->v + first * wide, wide, w->grad_turned + start, across, BLOCK, count,
                     wide);
            for (int row = 0; row < BLOCK; row++) {
                const int unseen = first + row - start; /* queries that come before this key */
                const float *score = w->scores + row * ACROSS, *slope = w->slopes + row * ACROSS;
                const float *less = w->lse + start, *mean = w->mean + start;
                bf16 *p = w->p + row * ACROSS, *ds = w->ds + row * ACROSS;
#pragma omp simd
                for (int c = 0; c < (int)count; c++) {
                    const float power = power_of_two(fmaf(score[c], scale2, -less[c]));
                    const float seen = c < unseen ? 0 : power;
                    p[c] = nearest_bf16(seen);
                    ds[c] = nearest_bf16(seen * (slope[c] - mean[c]) * scale);
                }
            }
            pack(w->ds, ACROSS, BLOCK, count, w->ds_packed, ACROSS);
            multiply(1, w->dv + first * wide, wide, w->p, ACROSS, w->grad + start / 2 * wide, wide, BLOCK, wide, count);
            multiply(1, w->dk + first * wide, wide, w->ds, ACROSS, w->q + start / 2 * wide, wide, BLOCK, wide, count);
            multiply(first > 0, w->dq_turned + start, across, w->k_turned + first, across, w->ds_packed, ACROSS, wide,
                     count, BLOCK);
        }
    for (int64_t t = 0; t < T; t++)
#pragma omp simd
        for (int64_t e = 0; e < E; e++) dq[t * step + e] = nearest_bf16(w->dq_turned[e * across + t]);
}

/* Rows of E next to each other. */
static void gather(const bf16 *x, int64_t step, int64_t T, int64_t E, bf16 *out, int64_t width) {
    for (int64_t t = 0; t < T; t++) memcpy(out + t * width, x + t * step, E * sizeof *x);
}

/* All heads' (B, T, H, E); keys and values have G heads. `work` is `attention_bytes` for each thread that will have
   something to do. The others are there because OpenMP would end them, and start them again for whoever wants them. */
void attention_gradient(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const bf16 *grad,
                        const float *lse, bf16 *dq, bf16 *dk, bf16 *dv, uint8_t *work, int64_t B, int64_t T, int64_t H,
                        int64_t G, int64_t E, float scale, int threads) {
    const int64_t bytes = attention_bytes(T, E), step = G * E;
    int64_t places = 0;
#pragma omp parallel num_threads(threads)
    {
        int64_t place = -1;
        tiles theirs;
        enter(&theirs);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < B * G; task++) {
            const int64_t b = task / G, g = task % G, shared = b * T * step + g * E;
            if (place < 0)
#pragma omp atomic capture
                place = places++;
            workplace w;
            lay_out(&w, memset(work + place * bytes, 0, bytes), T, E);
            gather(k + shared, step, T, E, w.k, w.wide);
            gather(v + shared, step, T, E, w.v, w.wide);
            pack_turned(k + shared, step, T, E, w.q_turned, w.across); /* on its way */
            for (int64_t e = 0; e < E; e++)
#pragma omp simd
                for (int64_t t = 0; t < T; t++)
                    w.k_turned[e * w.across + t] = w.q_turned[e / 2 * w.across + t] >> e % 2 * 16;
            for (int64_t head = g * (H / G); head < (g + 1) * (H / G); head++) {
                const int64_t own = b * T * H * E + head * E;
                head_gradient(&w, q + own, out + own, grad + own, lse + b * T * H + head, dq + own, T, H, E, scale);
            }
            for (int64_t t = 0; t < T; t++)
#pragma omp simd
                for (int64_t e = 0; e < E; e++) {
                    dk[shared + t * step + e] = nearest_bf16(w.dk[t * w.wide + e]);
                    dv[shared + t * step + e] = nearest_bf16(w.dv[t * w.wide + e]);
                }
        }
        leave(&theirs);
    }
}
#endif
