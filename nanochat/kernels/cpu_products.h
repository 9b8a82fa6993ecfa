/* Small operations on vectors, and products of a few rows with large matrices, for cpu_forward.c.

   A matrix lies in panels: PANEL columns side by side for all of its depth, so that a product reads memory in one line
   and keeps TILE rows of sums in registers. No -ffast-math: NaN stays NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE 8
#elif defined(__AVX__)
#define LANES 8
#define TILE 6
#else
#define LANES 4
#define TILE 4
#endif
#define PANEL (2 * LANES)
#define NEAR 64 /* rows of a product at a time */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* ---- small operations --------------------------------------------------------------------------------------------- */

INLINE int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }
INLINE int64_t part(int64_t count, int thread, int threads) { return count * thread / threads; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec v) { *(loose *)x = v; }
INLINE vec where(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }

#if defined(__clang__)
#define SHUFFLED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(v, ...) __builtin_shuffle(v, (ints){__VA_ARGS__})
#define PICKED(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE float total(vec v) {
#if LANES == 16
    v += SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif LANES == 8
    v += SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += SHUFFLED(v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

/* The totals of four vectors: halves of two are added in one vector, quarters of four, and so on. */
INLINE void four_totals(const vec *v, float *out) {
#if LANES == 16
    vec two[2], four;
    for (int i = 0; i < 2; i++)
        two[i] = PICKED(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 PICKED(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    four = PICKED(two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICKED(two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    four += SHUFFLED(four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    for (int i = 0; i < 4; i++) out[i] = four[4 * i] + four[4 * i + 1];
#elif LANES == 8
    vec two[2], four;
    for (int i = 0; i < 2; i++)
        two[i] = PICKED(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                 PICKED(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    four = PICKED(two[0], two[1], 0, 1, 4, 5, 8, 9, 12, 13) + PICKED(two[0], two[1], 2, 3, 6, 7, 10, 11, 14, 15);
    for (int i = 0; i < 4; i++) out[i] = four[2 * i] + four[2 * i + 1];
#else
    for (int i = 0; i < 4; i++) out[i] = total(v[i]);
#endif
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return total(sum) + rest;
}

/* exp for x <= 88, within 2 units of the last place, 0 below -87: 2^n times the series of the rest, |rest| <= ln(2) / 2 */
INLINE vec exponential(vec x) {
    const vec zero = {0}, big = zero + 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    ints low = x < -87.0f;
    vec whole = where(low, zero, (x * 1.44269504f + big) - big);
    vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln(2) in two parts, the first exact */
    vec sum = rest * (1.0f / 5040) + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    return where(low, zero, sum * (vec)power);
}

INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* cap tanh(x / cap) */
INLINE vec capped(vec x, float cap) {
    x = x * (2 / cap);
    x = where(x > 40.0f, (vec){0} + 40.0f, x); /* NaN is not greater */
    return cap - 2 * cap / (exponential(x) + 1);
}

static float inverse_norm(const float *x, int64_t n, float eps) { return 1 / sqrtf(dot(x, x, n) / (float)n + eps); }

/* ---- products ----------------------------------------------------------------------------------------------------- */

enum { PLAIN, SQUARED, ADDED, MIXED, CAPPED };

/* (known to nanochat/native.py too) */
typedef struct {
    const void *panels; /* (panels, depth, PANEL) floats, or with `scale` whole numbers of 8 bits */
    const float *scale; /* (panels * PANEL), or NULL */
    int64_t depth, columns;
} Matrix;

/* What becomes of a product. */
typedef struct {
    int how;
    const float *scales; /* (N) a factor of each row, or NULL */
    float *y;
    int64_t line; /* floats from one row of y to the next */
    float cap;
    /* MIXED: y + product is the stream behind a block; kept in `middle` where that is the middle, then made ready */
    float *middle;
    const float *x0, *taken; /* y = keep y + first x0 for the next block, or y - by * taken behind the last */
    float keep, first, by;
} Fate;

INLINE vec weights(const void *panel, int64_t at, int whole) {
    if (!whole) return load((const float *)panel + at);
    const int8_t *from = (const int8_t *)panel + at;
#if LANES == 16 /* by name: compilers make dozens of instructions of the plain conversion */
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#elif LANES == 8 && defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    return __builtin_convertvector(*(const bytes *)from, vec);
#endif
}

/* sums (rows, 2) of rows of x with a panel; `ahead`: memory that will be read next, `stride` bytes of it a step */
INLINE void tile(const int rows, const float *x, int64_t line, const void *panel, int64_t depth, const int whole,
                 const char *ahead, int64_t stride, vec (*sums)[2]) {
    const int ways = rows > 4 ? 1 : rows > 2 ? 2 : 4; /* enough sums for the additions not to wait for each other */
    vec sum[4 * TILE][2];
    for (int i = 0; i < ways * rows; i++) sum[i][0] = sum[i][1] = (vec){0};
    int64_t k = 0;
    for (; k + ways <= depth; k += ways)
        for (int way = 0; way < ways; way++) {
            vec a = weights(panel, (k + way) * PANEL, whole), b = weights(panel, (k + way) * PANEL + LANES, whole);
            __builtin_prefetch(ahead + (k + way) * stride);
            for (int row = 0; row < rows; row++) {
                sum[way * rows + row][0] += x[row * line + k + way] * a;
                sum[way * rows + row][1] += x[row * line + k + way] * b;
            }
        }
    for (; k < depth; k++)
        for (int row = 0; row < rows; row++) {
            sum[row][0] += x[row * line + k] * weights(panel, k * PANEL, whole);
            sum[row][1] += x[row * line + k] * weights(panel, k * PANEL + LANES, whole);
        }
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) {
            sums[row][half] = sum[row][half];
            for (int way = 1; way < ways; way++) sums[row][half] += sum[way * rows + row][half];
        }
}

#define CASE(n) \
    case n: \
        tile(n, x, line, panel, depth, whole, ahead, stride, sums); \
        break;

INLINE void any_tile(int rows, const float *x, int64_t line, const void *panel, int64_t depth, const int whole,
                     const char *ahead, int64_t stride, vec (*sums)[2]) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if TILE > 4
        CASE(5) CASE(6)
#endif
#if TILE > 6
        CASE(7) CASE(8)
#endif
    }
}

static void float_tile(int rows, const float *x, int64_t line, const void *panel, int64_t depth, const char *ahead,
                       int64_t stride, vec (*sums)[2]) {
    any_tile(rows, x, line, panel, depth, 0, ahead, stride, sums);
}

static void whole_tile(int rows, const float *x, int64_t line, const void *panel, int64_t depth, const char *ahead,
                       int64_t stride, vec (*sums)[2]) {
    any_tile(rows, x, line, panel, depth, 1, ahead, stride, sums);
}

INLINE void put(const Fate *fate, int64_t row, int64_t column, vec v) {
    const int64_t at = row * fate->line + column;
    float *y = fate->y + at;
    if (fate->how == SQUARED) {
        v = where(v < 0.0f, (vec){0}, v);
        v *= v;
    } else if (fate->how == ADDED) {
        v += load(y);
    } else if (fate->how == MIXED) {
        v += load(y);
        if (fate->middle) store(fate->middle + at, v);
        v = fate->taken ? v - fate->by * load(fate->taken + at) : fate->keep * v + fate->first * load(fate->x0 + at);
    }
    store(y, v);
}

/* Logits: lines are not padded, so the last panel's end is cut off. */
INLINE void put_capped(const Fate *fate, int64_t row, int64_t column, vec v, int64_t columns) {
    float x[LANES];
    store(x, capped(v, fate->cap));
    memcpy(fate->y + row * fate->line + column, x, sizeof(float) * (size_t)least(LANES, columns - column));
}

/* This thread's columns of x (N, depth) times the matrix. room: (depth, PANEL), for whole numbers as floats. */
static void multiply(const Matrix *m, const float *x, int64_t line, int64_t rows, Fate fate, float *room, int thread,
                     int threads) {
    const int64_t panels = padded(m->columns) / PANEL, stop = part(panels, thread + 1, threads);
    const int64_t size = m->depth * PANEL * (m->scale ? 1 : 4);
    vec sums[TILE][2];
    for (int64_t begin = 0, end; begin < rows; begin = end) { /* rows of x that stay near while all panels pass */
        end = least(begin + NEAR, rows);
        const int64_t tiles = (end - begin + TILE - 1) / TILE;
        const int64_t stride = (PANEL * (m->scale ? 1 : 4) + tiles - 1) / tiles; /* each tile fetches of the next panel */
        const int widened = m->scale && tiles > 1;
        for (int64_t p = part(panels, thread, threads); p < stop; p++) {
            const char *panel = (const char *)m->panels + p * size;
            const char *next = p + 1 < stop ? panel + size : (const char *)m->panels; /* any address is harmless */
            for (int64_t i = 0; widened && i < m->depth * PANEL; i += LANES) store(room + i, weights(panel, i, 1));
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t row = begin + (end - begin) * t / tiles;
                const int64_t count = begin + (end - begin) * (t + 1) / tiles - row;
                (m->scale && !widened ? whole_tile : float_tile)(
                    (int)count, x + row * line, line, widened ? (const void *)room : panel, m->depth,
                    next + t * stride * m->depth, stride, sums);
                for (int64_t i = 0; i < count; i++)
                    for (int half = 0; half < 2; half++) {
                        const int64_t column = p * PANEL + half * LANES;
                        vec v = sums[i][half];
                        if (m->scale) v *= load(m->scale + column);
                        if (fate.scales) v *= fate.scales[row + i];
                        if (fate.how != CAPPED)
                            put(&fate, row + i, column, v);
                        else if (column < m->columns)
                            put_capped(&fate, row + i, column, v, m->columns);
                    }
            }
        }
    }
}
