/* The elementwise work of a training step, each in one pass over memory where torch's operations take many.

   hf_fedlarge/kernels.py compiles this file on the machine that runs it and says what each function computes. All
   tensors are contiguous. A bf16 value is its 16 bits, its arithmetic that of fp32; every row or piece is one thread's,
   so results don't depend on their number. Loops are for the compiler to vectorize: no branches, no libm. */

#include "nf4.h"

#include <math.h>

#define PIECE 1024 /* values that a thread takes at a time; a multiple of every vector's length */

static inline float from_fp32(float value) { return value; }
static inline float to_fp32(float value) { return value; }

/* e^x to some ulp, by 2^n e^r with |r| <= ln 2 / 2; e^-87 or e^87 beyond these. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in 9 bits */
    float sum = 1.0f / 720 * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

/* RMSNorm: out = bf16(x / rms) weight, inverse = 1 / rms of each token. */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, float *inverse, int64_t tokens, int64_t width,
              float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < tokens; n++) {
        const bf16 *from = x + n * width;
        bf16 *to = out + n * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++) squares += from_bf16(from[d]) * from_bf16(from[d]);
        const float scale = 1 / sqrtf(squares / width + epsilon);
        inverse[n] = scale;
#pragma omp simd
        for (int64_t d = 0; d < width; d++)
            to[d] = to_bf16(from_bf16(to_bf16(from_bf16(from[d]) * scale)) * from_bf16(weight[d]));
    }
}

/* Its gradient: with s = grad weight, s / rms - x mean(s x) / rms^3. */
void rms_norm_gradient(const bf16 *x, const float *inverse, const bf16 *weight, const bf16 *grad, bf16 *grad_x,
                       int64_t tokens, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < tokens; n++) {
        const bf16 *from = x + n * width, *slope = grad + n * width;
        bf16 *to = grad_x + n * width;
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < width; d++) along += from_bf16(slope[d]) * from_bf16(weight[d]) * from_bf16(from[d]);
        const float scale = inverse[n], pull = along / width * scale * scale * scale;
#pragma omp simd
        for (int64_t d = 0; d < width; d++)
            to[d] = to_bf16(from_bf16(slope[d]) * from_bf16(weight[d]) * scale - from_bf16(from[d]) * pull);
    }
}

/* act(gate) up and its gradients. Both activations are x sigmoid(p(x)): SiLU with p = x, GELU's tanh form with
   p = sqrt(8 / pi) (x + 0.044715 x^3). `turn` is p, `tilt` its derivative. */
#define GATE(NAME, REAL, LOAD, STORE, TURN, TILT)                                                                      \
    void gate_##NAME(const bf16 *gate, const bf16 *up, REAL *out, int64_t count, int threads) {                        \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                              \
        for (int64_t start = 0; start < count; start += PIECE) {                                                       \
            const int64_t stop = start + PIECE < count ? start + PIECE : count;                                        \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = start; i < stop; i++) {                                                                   \
                const float x = from_bf16(gate[i]);                                                                    \
                out[i] = STORE(x * sigmoid(TURN) * from_bf16(up[i]));                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    void gate_gradient_##NAME(const bf16 *gate, const bf16 *up, const REAL *grad, bf16 *grad_gate, bf16 *grad_up,      \
                              REAL *value, int64_t count, int threads) {                                               \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                              \
        for (int64_t start = 0; start < count; start += PIECE) {                                                       \
            const int64_t stop = start + PIECE < count ? start + PIECE : count;                                        \
            _Pragma("omp simd")                                                                                        \
            for (int64_t i = start; i < stop; i++) {                                                                   \
                const float x = from_bf16(gate[i]), u = from_bf16(up[i]), g = LOAD(grad[i]);                           \
                const float part = sigmoid(TURN), active = x * part;                                                   \
                grad_gate[i] = to_bf16(u * g * (part + active * (1 - part) * (TILT)));                                 \
                grad_up[i] = to_bf16(active * g);                                                                      \
                value[i] = STORE(active * u);                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

#define SILU x, 1.0f
#define GELU_TANH 1.5957691f * (x + 0.044715f * x * x * x), 1.5957691f * (1 + 0.134145f * x * x)
#define EXPANDED(...) GATE(__VA_ARGS__)
EXPANDED(silu_bf16, bf16, from_bf16, to_bf16, SILU)
EXPANDED(silu_fp32, float, from_fp32, to_fp32, SILU)
EXPANDED(gelu_tanh_bf16, bf16, from_bf16, to_bf16, GELU_TANH)
EXPANDED(gelu_tanh_fp32, float, from_fp32, to_fp32, GELU_TANH)

/* A slice of a softmax over many: the maximum so far moves to `top`, the sum of what is not a label's to `others`, and
   `logits` become exp(logit - top), 0 at the label. `decay` is what a sum under the old maximum is to be multiplied by.
   A label outside of [0, columns) is in another slice. */
#define SOFTMAX(NAME, REAL, LOAD, STORE)                                                                               \
    void softmax_slice_##NAME(REAL *logits, const int64_t *labels, float scale, float *top, float *others,             \
                              float *label_logit, float *decay, int64_t rows, int64_t columns, int threads) {          \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                              \
        for (int64_t n = 0; n < rows; n++) {                                                                           \
            REAL *row = logits + n * columns;                                                                          \
            const int has_label = labels[n] >= 0 && labels[n] < columns;                                               \
            float largest = top[n];                                                                                    \
            _Pragma("omp simd reduction(max : largest)")                                                               \
            for (int64_t r = 0; r < columns; r++) {                                                                    \
                const float logit = LOAD(row[r]) * scale;                                                              \
                largest = largest > logit ? largest : logit;                                                           \
            }                                                                                                          \
            if (has_label) {                                                                                           \
                label_logit[n] = LOAD(row[labels[n]]) * scale;                                                         \
                row[labels[n]] = STORE(-INFINITY);                                                                     \
            }                                                                                                          \
            float sum = 0;                                                                                             \
            _Pragma("omp simd reduction(+ : sum)")                                                                     \
            for (int64_t r = 0; r < columns; r++) {                                                                    \
                const float p = exponential(LOAD(row[r]) * scale - largest);                                           \
                sum += p;                                                                                              \
                row[r] = STORE(p);                                                                                     \
            }                                                                                                          \
            if (has_label) row[labels[n]] = 0;                                                                         \
            decay[n] = top[n] == largest ? 1 : exponential(top[n] - largest);                                          \
            others[n] = others[n] * decay[n] + sum;                                                                    \
            top[n] = largest;                                                                                          \
        }                                                                                                              \
    }

SOFTMAX(bf16, bf16, from_bf16, to_bf16)
SOFTMAX(fp32, float, from_fp32, to_fp32)

/* Rows of int8 with a scale each. */
#define INT8_ROWS(NAME, REAL, STORE)                                                                                   \
    void int8_rows_##NAME(const int8_t *values, const float *scales, REAL *out, int64_t rows, int64_t columns,         \
                          int threads) {                                                                               \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                              \
        for (int64_t r = 0; r < rows; r++) {                                                                           \
            const float scale = scales[r];                                                                             \
            _Pragma("omp simd")                                                                                        \
            for (int64_t c = 0; c < columns; c++) out[r * columns + c] = STORE(values[r * columns + c] * scale);       \
        }                                                                                                              \
    }

INT8_ROWS(bf16, bf16, to_bf16)
INT8_ROWS(fp32, float, to_fp32)

#ifdef __AVX512BW__
void nf4(const uint8_t *packed, const uint8_t *codes, const float *outer, const float *code, const float *table,
         bf16 *out, int64_t first, int64_t count, float offset, int threads) {
    nf4_matrix w = {packed, codes, outer, code, .offset = offset};
    memcpy(&w.table, table, sizeof w.table);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < count; block++) {
        __m512i values[2];
        read_nf4(&w, first + block, values);
        memcpy(out + block * SCALED, values, sizeof values);
    }
}
#endif
