/* What a training step does between its matrix products, on a CPU: each function one pass over memory.

   nanochat/kernels/cpu_block.py and loss.py call them; gpt.Block and loss.plain under autograd say what is right. Every
   function takes one struct and an item of its work: some tokens of a row, a head of a row, some rows of logits. Threads
   take items as they get free, and no sum crosses an item, so results do not depend on how many threads there are.

   Compiled once a dtype (-DREAL=32, 64, or 16 for bfloat16): `real` is how tensors lie in memory, `acc` what is
   computed in. Shape letters as in nanochat/gpt.py; n rows of a group, N = n H. No -ffast-math: NaN stays NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_threads.h"

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 32 /* of a row, an item */
#define BLOCK 32  /* queries at a time */
#define SUM(x) _Pragma(#x)
#define SUMS(name) SUM(omp simd reduction(+ : name))

/* ---- numbers ------------------------------------------------------------------------------------------------------ */

#if REAL == 64
typedef double real, acc;
INLINE acc get(real x) { return x; }
INLINE real put(acc x) { return x; }
INLINE acc exponential(acc x) { return exp(x); }
INLINE acc root(acc x) { return sqrt(x); }
#else
typedef float acc;
INLINE acc root(acc x) { return sqrtf(x); }
/* exp for x <= 88, within 2 units of the last place, never 0: 2^n times the series of the rest, |rest| <= ln(2) / 2 */
INLINE float exponential(float x) {
    const float big = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = x < -87.0f ? -87.0f : x;
    float whole = (x * 1.44269504f + big) - big;
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln(2) in two parts, the first exact */
    float sum = rest * (1.0f / 720) + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}
#if REAL == 16
typedef uint16_t real;
INLINE acc get(real x) {
    uint32_t bits = (uint32_t)x << 16;
    acc y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE real put(acc x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (real)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float real;
INLINE acc get(real x) { return x; }
INLINE real put(acc x) { return x; }
#endif
#endif

#if defined(__AVX512F__)
#define VECTOR 64 /* bytes */
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
#define LANES (VECTOR / (int)sizeof(acc))
#define WIDE (2 * LANES) /* columns of a tile of sums, which stays in registers */
typedef acc vec __attribute__((vector_size(VECTOR)));
typedef acc loose __attribute__((vector_size(VECTOR), aligned(4), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE acc square_sum(const acc *x, int64_t n) {
    acc sum = 0;
    SUMS(sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

INLINE acc sum_of(const acc *x, int64_t n) {
    acc sum = 0;
    SUMS(sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

INLINE acc product_sum(const real *a, const real *b, int64_t n) {
    acc sum = 0;
    SUMS(sum)
    for (int64_t i = 0; i < n; i++) sum += get(a[i]) * get(b[i]);
    return sum;
}

INLINE acc inverse_rms(const acc *x, int64_t n, double eps) { return 1 / root(square_sum(x, n) / (acc)n + (acc)eps); }

static __thread acc *desk_memory; /* what this thread may write on while it works on an item */

/* ---- what Python fills in (cpu_block.py, loss.py): the order and types of these members are known there ------------ */

typedef struct {
    int64_t n, t, c, heads, kv_heads, dim, window, channels; /* channels: that the gate sees; 0: there is none */
    double eps, score_scale, gate_scale, scale, scale0;
    const real *x, *x0;                    /* (n T, C) */
    real *mixed, *normed;                  /* (n T, C) */
    acc *inverse;                          /* (n T) */
    const acc *cos, *sin;                  /* (T, D / 2) */
    const real *embedded, *gate_weight;    /* (n T, Hkv D), (Hkv, channels) */
    real *joint;                           /* (n T, (H + 2 Hkv) D): q, k, v */
    real *q, *k, *v;                       /* (N, T, D), q with the score's scale; k and v once a query head */
    acc *inverse_q, *inverse_k, *gate;     /* (N, T), (n Hkv, T), (n T, Hkv) */
    acc *inverse_sum;                      /* (N, T) */
    real *y;                               /* (n T, C) */
    real *hidden, *squares;                /* (n T, 4C) */
    real *grad, *plus;                     /* (n T, C) */
    real *by_q, *by_k, *by_v;              /* (N, T, D) */
    real *by_embedded, *by_gate;           /* (n T, Hkv D), (n T, Hkv) */
    real *by_x, *by_x0;                    /* (n T, C) */
    double *dots;                          /* (items, 2) */
} Rows;

typedef struct {
    int64_t rows, vocab, line, only_losses; /* line: columns of a row of logits, the padding too */
    double cap;
    real *logits;              /* (rows, line): z in, before the cap; unless only_losses, the gradient by it out */
    const int64_t *targets;
    acc *losses;               /* (rows); of -1 targets 0 */
} Score;

/* A token's place: item -> row b, tokens [from, to). */
INLINE int64_t tokens(const Rows *g, int64_t item, int64_t *from, int64_t *to) {
    const int64_t pieces = (g->t + TOKENS - 1) / TOKENS, b = item / pieces;
    *from = item % pieces * TOKENS;
    *to = least(*from + TOKENS, g->t);
    return b;
}

#define EACH_TOKEN(g, item)                                     \
    int64_t from, to;                                           \
    const int64_t b = tokens(g, item, &from, &to);              \
    for (int64_t t = from, at = b * (g)->t + from; t < to; t++, at++)

/* ---- the stream ---------------------------------------------------------------------------------------------------- */

/* mixed <- scale x + scale0 x0 (where there is x0), normed <- its norm, inverse <- 1 / rms */
static void mix(const Rows *g, int64_t item) {
    const int64_t c = g->c;
    EACH_TOKEN(g, item) {
        acc line[c];
        const real *x = g->x + at * c;
        if (g->x0) {
            const real *x0 = g->x0 + at * c;
            real *mixed = g->mixed + at * c;
            const acc scale = (acc)g->scale, scale0 = (acc)g->scale0;
            for (int64_t i = 0; i < c; i++) mixed[i] = put(scale * get(x[i]) + scale0 * get(x0[i]));
            x = mixed;
        }
        for (int64_t i = 0; i < c; i++) line[i] = get(x[i]);
        const acc inverse = inverse_rms(line, c, g->eps);
        for (int64_t i = 0; i < c; i++) g->normed[at * c + i] = put(line[i] * inverse);
        g->inverse[at] = inverse;
    }
}

/* plus <- plus + the gradient by what was normed, grad being by the norm; with `by_x` that of the mixed streams too. */
static void norm_back(const Rows *g, int64_t item) {
    const int64_t c = g->c;
    double dot = 0, dot0 = 0;
    EACH_TOKEN(g, item) {
        const real *grad = g->grad + at * c, *normed = g->normed + at * c;
        real *plus = g->plus + at * c;
        const acc inverse = g->inverse[at], mean = product_sum(grad, normed, c) / (acc)c;
        for (int64_t i = 0; i < c; i++) plus[i] = put((get(grad[i]) - get(normed[i]) * mean) * inverse + get(plus[i]));
        if (!g->by_x) continue;
        const acc scale = (acc)g->scale, scale0 = (acc)g->scale0;
        for (int64_t i = 0; i < c; i++) {
            g->by_x[at * c + i] = put(scale * get(plus[i]));
            g->by_x0[at * c + i] = put(scale0 * get(plus[i]));
        }
        dot += product_sum(plus, g->x + at * c, c);
        dot0 += product_sum(plus, g->x0 + at * c, c);
    }
    if (g->by_x) g->dots[2 * item] = dot, g->dots[2 * item + 1] = dot0;
}

/* hidden <- relu(hidden), squares <- its square */
static void relu_squared(const Rows *g, int64_t item) {
    const int64_t width = 4 * g->c;
    EACH_TOKEN(g, item) {
        real *hidden = g->hidden + at * width, *squares = g->squares + at * width;
        for (int64_t i = 0; i < width; i++) {
            acc x = get(hidden[i]);
            x = x < 0 ? 0 : x; /* NaN is not less */
            hidden[i] = put(x);
            squares[i] = put(x * x);
        }
    }
}

/* squares: the gradient by them -> that by what relu took; hidden <- its square, which the product needs */
static void relu_squared_back(const Rows *g, int64_t item) {
    const int64_t width = 4 * g->c;
    EACH_TOKEN(g, item) {
        real *hidden = g->hidden + at * width, *squares = g->squares + at * width;
        for (int64_t i = 0; i < width; i++) {
            const acc x = get(hidden[i]);
            squares[i] = put(2 * x * get(squares[i]));
            hidden[i] = put(x * x);
        }
    }
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */

INLINE acc sigmoid(acc x) { return 1 / (1 + exponential(x < -80 ? 80 : -x)); }

/* in (D) turned, normed and scaled -> out (D); the factor of the norm */
INLINE acc turn(const Rows *g, const real *in, int64_t t, int64_t half, double scale, real *out) {
    const acc *cos = g->cos + t * half, *sin = g->sin + t * half;
    acc line[2 * half];
    for (int64_t i = 0; i < half; i++) {
        const acc a = get(in[i]), b = get(in[half + i]);
        line[i] = a * cos[i] + b * sin[i];
        line[half + i] = b * cos[i] - a * sin[i];
    }
    const acc inverse = inverse_rms(line, 2 * half, g->eps) * (acc)scale;
    for (int64_t i = 0; i < 2 * half; i++) out[i] = put(line[i] * inverse);
    return inverse;
}

/* its gradient: by out (D), out itself and the factor -> by in (D) */
INLINE void turn_back(const Rows *g, const acc *by_out, const real *out, int64_t t, int64_t half, acc inverse,
                      double scale, real *in) {
    const acc *cos = g->cos + t * half, *sin = g->sin + t * half;
    acc line[2 * half], sum = 0;
    SUMS(sum)
    for (int64_t i = 0; i < 2 * half; i++) sum += by_out[i] * get(out[i]);
    const acc mean = sum / ((acc)(2 * half) * (acc)(scale * scale));
    for (int64_t i = 0; i < 2 * half; i++) line[i] = (by_out[i] - get(out[i]) * mean) * inverse;
    for (int64_t i = 0; i < half; i++) {
        const acc a = line[i], b = line[half + i];
        in[i] = put(a * cos[i] - b * sin[i]);
        in[half + i] = put(b * cos[i] + a * sin[i]);
    }
}

/* joint, normed, embedded -> q, k, v, their factors and the gate */
INLINE void split_of(const Rows *g, int64_t item, const int64_t d) {
    const int64_t share = g->heads / g->kv_heads, line = (g->heads + 2 * g->kv_heads) * d;
    EACH_TOKEN(g, item) {
        const real *joint = g->joint + at * line, *normed = g->normed + at * g->c;
        for (int64_t h = 0; h < g->heads; h++) {
            const int64_t place = (b * g->heads + h) * g->t + t;
            g->inverse_q[place] = turn(g, joint + h * d, t, d / 2, g->score_scale, g->q + place * d);
        }
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const int64_t place = (b * g->heads + h * share) * g->t + t;
            real *k = g->k + place * d, *v = g->v + place * d;
            const real *k_in = joint + (g->heads + h) * d, *v_in = k_in + g->kv_heads * d;
            g->inverse_k[(b * g->kv_heads + h) * g->t + t] = turn(g, k_in, t, d / 2, 1, k);
            if (g->channels) {
                const acc gate = sigmoid(product_sum(normed, g->gate_weight + h * g->channels, g->channels));
                const real *embedded = g->embedded + (at * g->kv_heads + h) * d;
                const acc factor = gate * (acc)g->gate_scale;
                for (int64_t i = 0; i < d; i++) v[i] = put(get(v_in[i]) + factor * get(embedded[i]));
                g->gate[at * g->kv_heads + h] = gate;
            } else {
                memcpy(v, v_in, (size_t)d * sizeof(real));
            }
            for (int64_t i = 1; i < share; i++) {
                memcpy(k + i * g->t * d, k, (size_t)d * sizeof(real));
                memcpy(v + i * g->t * d, v, (size_t)d * sizeof(real));
            }
        }
    }
}

/* The sum over the query heads that share a key head, `step` apart. */
INLINE void gather_heads(const real *in, int64_t share, int64_t step, int64_t d, acc *sum) {
    for (int64_t i = 0; i < d; i++) sum[i] = get(in[i]);
    for (int64_t s = 1; s < share; s++)
        for (int64_t i = 0; i < d; i++) sum[i] += get(in[s * step + i]);
}

/* by_q, by_k, by_v -> joint (the gradient by it), by_embedded, by_gate (by what the sigmoid took) */
INLINE void split_back_of(const Rows *g, int64_t item, const int64_t d) {
    const int64_t share = g->heads / g->kv_heads, line = (g->heads + 2 * g->kv_heads) * d;
    EACH_TOKEN(g, item) {
        real *joint = g->joint + at * line;
        acc sum[d];
        for (int64_t h = 0; h < g->heads; h++) {
            const int64_t place = (b * g->heads + h) * g->t + t;
            for (int64_t i = 0; i < d; i++) sum[i] = get(g->by_q[place * d + i]);
            turn_back(g, sum, g->q + place * d, t, d / 2, g->inverse_q[place], g->score_scale, joint + h * d);
        }
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const int64_t place = (b * g->heads + h * share) * g->t + t;
            const acc inverse = g->inverse_k[(b * g->kv_heads + h) * g->t + t];
            real *k_in = joint + (g->heads + h) * d, *v_in = k_in + g->kv_heads * d;
            gather_heads(g->by_k + place * d, share, g->t * d, d, sum);
            turn_back(g, sum, g->k + place * d, t, d / 2, inverse, 1, k_in);
            gather_heads(g->by_v + place * d, share, g->t * d, d, sum);
            for (int64_t i = 0; i < d; i++) v_in[i] = put(sum[i]);
            if (g->channels) {
                const int64_t cell = at * g->kv_heads + h;
                const acc gate = g->gate[cell], factor = gate * (acc)g->gate_scale;
                const real *embedded = g->embedded + cell * d;
                acc by_gate = 0;
                SUMS(by_gate)
                for (int64_t i = 0; i < d; i++) by_gate += sum[i] * get(embedded[i]);
                for (int64_t i = 0; i < d; i++) g->by_embedded[cell * d + i] = put(sum[i] * factor);
                g->by_gate[cell] = put(by_gate * factor * (1 - gate));
            }
        }
    }
}

/* ---- attention: of one head of a row, in `acc`, a block of queries against the keys that one of them sees ------------ */

/* c (4, WIDE) <- or += a b, in registers: a (4, k) by its two steps, b (k, WIDE) and c by lines. */
INLINE void tile(const acc *a, int64_t a_row, int64_t a_k, const acc *b, int64_t b_line, int64_t k, acc *c,
                 int64_t c_line, int add) {
    vec s[4][2] = {{{0}}};
    if (add)
        for (int r = 0; r < 4; r++) s[r][0] = *(loose *)(c + r * c_line), s[r][1] = *(loose *)(c + r * c_line + LANES);
    for (int64_t j = 0; j < k; j++) {
        const vec left = *(const loose *)(b + j * b_line), right = *(const loose *)(b + j * b_line + LANES);
        for (int r = 0; r < 4; r++) {
            const acc factor = a[r * a_row + j * a_k];
            s[r][0] += factor * left;
            s[r][1] += factor * right;
        }
    }
    for (int r = 0; r < 4; r++) *(loose *)(c + r * c_line) = s[r][0], *(loose *)(c + r * c_line + LANES) = s[r][1];
}

/* c (rows, columns) <- or += a b, rows a multiple of 4, columns of WIDE */
INLINE void product(const acc *a, int64_t a_row, int64_t a_k, const acc *b, int64_t b_line, int64_t k, acc *c,
                    int64_t c_line, int64_t rows, int64_t columns, int add) {
    for (int64_t i = 0; i < columns; i += WIDE)
        for (int64_t r = 0; r < rows; r += 4)
            tile(a + r * a_row, a_row, a_k, b + i, b_line, k, c + r * c_line + i, c_line, add);
}

/* What one head's attention works on: its tokens and channels padded with zeros to whole tiles. */
typedef struct {
    int64_t tokens, dim;                                            /* both padded */
    acc *weights, *slopes;                                          /* (BLOCK, tokens) */
    acc *query, *grad, *out;                                        /* (BLOCK, dim) */
    acc *keys, *values;                                             /* (dim, tokens), or values by token */
    acc *key_rows, *by_keys, *by_values;                            /* (tokens, dim) */
} Desk;

/* The desk in this memory -> how much it takes. `matrices`: how many of the last five there are. */
static int64_t lay(const Rows *g, acc *memory, int64_t matrices, Desk *d) {
    d->tokens = (g->t + BLOCK - 1) / BLOCK * BLOCK;
    d->dim = (g->dim + WIDE - 1) / WIDE * WIDE;
    const int64_t matrix = d->tokens * d->dim, line = BLOCK * d->tokens, block = BLOCK * d->dim;
    if (memory) {
        acc *at = memory;
        acc **places[] = {&d->weights, &d->slopes, &d->query, &d->grad, &d->out, &d->keys, &d->values, &d->key_rows,
                          &d->by_keys, &d->by_values};
        for (int i = 0; i < 5 + matrices; i++) {
            *places[i] = at;
            at += i < 2 ? line : i < 5 ? block : matrix;
        }
        memset(d->query, 0, (size_t)(at - d->query) * sizeof(acc));
    }
    return 2 * line + 3 * block + matrices * matrix;
}

/* (T, D) -> lines of `line` numbers, or columns of them */
INLINE void widen(const real *in, int64_t t, int64_t dim, acc *out, int64_t line) {
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < dim; j++) out[i * line + j] = get(in[i * dim + j]);
}

INLINE void widen_columns(const real *in, int64_t t, int64_t dim, acc *out, int64_t line) {
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < dim; j++) out[j * line + i] = get(in[i * dim + j]);
}

/* weights (BLOCK, to - from) <- exp of the scores of the queries start.. against the keys from..to, 0 where one does
   not see the other. The queries of the padding see nothing. */
INLINE void weigh(const Rows *g, const Desk *d, int64_t start, int64_t from, int64_t to) {
    product(d->query, d->dim, 1, d->keys + from, d->tokens, g->dim, d->weights, d->tokens, BLOCK, to - from, 0);
    for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t query = start + i, low = most(0, query - g->window) - from;
        const int64_t high = query < g->t ? query + 1 - from : low;
        acc *row = d->weights + i * d->tokens;
        for (int64_t j = 0; j < low; j++) row[j] = 0;
        for (int64_t j = low; j < high; j++) row[j] = exponential(row[j]);
        for (int64_t j = high; j < to - from; j++) row[j] = 0;
    }
}

/* The keys that a block of queries sees, in whole tiles. */
#define EACH_BLOCK(g)                                                                                        \
    for (int64_t start = 0, from = 0, to; to = start + BLOCK, start < (g)->t;                                \
         start += BLOCK, from = most(0, start - (g)->window) / WIDE * WIDE)

/* q, k, v -> y, by token, and each query's 1 / sum of exp. An item: a head of a row. */
static void attend(const Rows *g, int64_t item) {
    Desk d;
    lay(g, desk_memory, 2, &d);
    const int64_t place = item * g->t, b = item / g->heads, head = item % g->heads, dim = g->dim;
    widen_columns(g->k + place * dim, g->t, dim, d.keys, d.tokens);
    widen(g->v + place * dim, g->t, dim, d.values, d.dim);
    EACH_BLOCK(g) {
        const int64_t count = least(BLOCK, g->t - start);
        widen(g->q + (place + start) * dim, count, dim, d.query, d.dim);
        weigh(g, &d, start, from, to);
        product(d.weights, d.tokens, 1, d.values + from * d.dim, d.dim, to - from, d.out, d.dim, BLOCK, d.dim, 0);
        for (int64_t i = 0; i < count; i++) {
            const acc inverse = 1 / sum_of(d.weights + i * d.tokens, to - from);
            real *y = g->y + (b * g->t + start + i) * g->c + head * dim;
            for (int64_t j = 0; j < dim; j++) y[j] = put(d.out[i * d.dim + j] * inverse);
            g->inverse_sum[place + start + i] = inverse;
        }
    }
}

/* grad, by y -> by_q, by_k, by_v. The scores are made again. An item: a head of a row. */
static void attend_back(const Rows *g, int64_t item) {
    Desk d;
    lay(g, desk_memory, 5, &d);
    const int64_t place = item * g->t, b = item / g->heads, head = item % g->heads, dim = g->dim;
    widen_columns(g->k + place * dim, g->t, dim, d.keys, d.tokens);
    widen_columns(g->v + place * dim, g->t, dim, d.values, d.tokens);
    widen(g->k + place * dim, g->t, dim, d.key_rows, d.dim);
    EACH_BLOCK(g) {
        const int64_t count = least(BLOCK, g->t - start), keys = to - from;
        acc inner[BLOCK] = {0}; /* what the gradients by all weights of a query have in common */
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = (b * g->t + start + i) * g->c + head * dim;
            const acc inverse = g->inverse_sum[place + start + i];
            inner[i] = product_sum(g->grad + at, g->y + at, dim) * inverse;
            for (int64_t j = 0; j < dim; j++) d.grad[i * d.dim + j] = get(g->grad[at + j]) * inverse;
        }
        widen(g->q + (place + start) * dim, count, dim, d.query, d.dim);
        weigh(g, &d, start, from, to);
        product(d.grad, d.dim, 1, d.values + from, d.tokens, dim, d.slopes, d.tokens, BLOCK, keys, 0);
        for (int64_t i = 0; i < BLOCK; i++)
            for (int64_t j = i * d.tokens; j < i * d.tokens + keys; j++)
                d.slopes[j] = (d.slopes[j] - inner[i]) * d.weights[j];
        product(d.slopes, d.tokens, 1, d.key_rows + from * d.dim, d.dim, keys, d.out, d.dim, BLOCK, d.dim, 0);
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < dim; j++) g->by_q[(place + start + i) * dim + j] = put(d.out[i * d.dim + j]);
        acc *by_keys = d.by_keys + from * d.dim, *by_values = d.by_values + from * d.dim;
        product(d.slopes, 1, d.tokens, d.query, d.dim, BLOCK, by_keys, d.dim, keys, d.dim, 1);
        product(d.weights, 1, d.tokens, d.grad, d.dim, BLOCK, by_values, d.dim, keys, d.dim, 1);
    }
    for (int64_t i = 0; i < g->t; i++)
        for (int64_t j = 0; j < dim; j++) {
            g->by_k[(place + i) * dim + j] = put(d.by_keys[i * d.dim + j]);
            g->by_v[(place + i) * dim + j] = put(d.by_values[i * d.dim + j]);
        }
}

/* The same with the usual head dims as constants: loops of a known length need no ends. */
#define BY_DIM(name)                                                          \
    static void name(const Rows *g, int64_t item) {                           \
        switch (g->dim) {                                                     \
            case 32: name##_of(g, item, 32); break;                           \
            case 64: name##_of(g, item, 64); break;                           \
            case 128: name##_of(g, item, 128); break;                         \
            default: name##_of(g, item, g->dim);                              \
        }                                                                     \
    }

BY_DIM(split)
BY_DIM(split_back)

/* ---- the loss -------------------------------------------------------------------------------------------------------- */

#define SCORED 8 /* rows an item */

/* Soft cap, cross-entropy and its gradient, of rows of logits. The cap bounds them: exp needs no maximum taken off. */
static void score(const Score *s, int64_t item) {
    const int64_t vocab = s->vocab;
    const acc cap = (acc)s->cap, twice = (acc)(2 / s->cap);
    acc *weight = desk_memory, *slope = weight + vocab;
    for (int64_t row = item * SCORED; row < least((item + 1) * SCORED, s->rows); row++) {
        real *z = s->logits + row * s->line;
        const int64_t target = s->targets[row];
        if (target < 0) {
            memset(z, 0, (size_t)s->line * sizeof(real));
            s->losses[row] = 0;
            continue;
        }
        acc sum = 0;
        SUMS(sum)
        for (int64_t i = 0; i < vocab; i++) {
            acc x = get(z[i]) * twice;
            x = x > 40 ? 40 : x; /* NaN is not greater */
            const acc tanh = 1 - 2 / (exponential(x) + 1);
            weight[i] = exponential(cap * tanh);
            slope[i] = 1 - tanh * tanh;
            sum += weight[i];
        }
        s->losses[row] = (acc)log((double)sum / (double)weight[target]);
        if (s->only_losses) continue;
        const acc inverse = 1 / sum;
        for (int64_t i = 0; i < vocab; i++) z[i] = put(weight[i] * inverse * slope[i]);
        z[target] = put((weight[target] * inverse - 1) * slope[target]);
        memset(z + vocab, 0, (size_t)(s->line - vocab) * sizeof(real));
    }
}

/* ---- the way in ------------------------------------------------------------------------------------------------------ */

typedef struct {
    void (*run)(const Rows *, int64_t);
    int64_t matrices; /* of a desk; 0: an item is some tokens of a row, else a head of a row */
} Pass;

static const Pass PASSES[] = { /* in the order that Python knows */
    {mix, 0}, {norm_back, 0}, {relu_squared, 0}, {relu_squared_back, 0}, {split, 0}, {split_back, 0}, {attend, 2},
    {attend_back, 5},
};

int64_t items(int64_t number, const Rows *g) {
    return g->n * (PASSES[number].matrices ? g->heads : (g->t + TOKENS - 1) / TOKENS);
}

/* How many numbers a thread's desk holds. */
int64_t desk(int64_t number, const Rows *g) {
    Desk d;
    return PASSES[number].matrices ? lay(g, NULL, PASSES[number].matrices, &d) : 0;
}

typedef struct {
    const Pass *pass; /* NULL: score */
    const Rows *rows;
    const Score *score;
    acc *desks;
    int64_t desk, items, next, seats;
} Round;

/* Take a desk, and items until there are none. */
static void work(const void *job, int thread, int threads) {
    (void)thread, (void)threads;
    Round *round = (Round *)job;
    desk_memory = round->desks + __atomic_fetch_add(&round->seats, 1, __ATOMIC_RELAXED) * round->desk;
    for (int64_t item; (item = __atomic_fetch_add(&round->next, 1, __ATOMIC_RELAXED)) < round->items;) {
        if (round->pass)
            round->pass->run(round->rows, item);
        else
            score(round->score, item);
    }
}

static void work_as_one_of_a_team(void *job) { work(job, 0, 0); }

/* OpenMP's way to run a function on its threads, or NULL. */
static void (*team)(void (*)(void *), void *, unsigned, unsigned);

void borrow(void *gomp_parallel) { team = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel; }

static void run(Round *round, int64_t threads) {
    threads = least(threads, round->items);
    if (threads > 1 && team)
        team(work_as_one_of_a_team, round, (unsigned)threads, 0);
    else
        together(work, round, threads);
}

void run_pass(int64_t number, const Rows *g, int64_t threads, acc *desks) {
    Round round = {.pass = &PASSES[number], .rows = g, .desks = desks, .desk = desk(number, g), .items = items(number, g)};
    run(&round, threads);
}

void score_rows(const Score *s, int64_t threads, acc *desks) {
    Round round = {.score = s, .desks = desks, .desk = 2 * s->vocab, .items = (s->rows + SCORED - 1) / SCORED};
    run(&round, threads);
}
