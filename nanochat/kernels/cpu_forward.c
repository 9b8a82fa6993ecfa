/* A decode step on a CPU in fp32: tokens and pieces of the cache in, logits out; nanochat/decode.py is its slow twin.

   Weights come in panels: PANEL columns side by side for all of the depth, so that a product reads memory in one line
   and keeps TILE rows of sums in registers. Norms have no weight, so a row's norm is one factor of its products. Threads
   share the columns of a product, the rows of a small operation and the (row, heads) of attention, and meet between.

   Shape letters: N rows, C width, H heads, Hkv key/value heads, G = H / Hkv, D head dim. Lines of the scratch memory are
   padded to whole panels, of zeros. No -ffast-math: NaN stays NaN. */

#include "cpu_products.h"
#include "cpu_threads.h"
#include "cpu_draw.h"

#define KEYS 8 /* tokens whose values are added to a sum while it is in registers */

/* ---- what Python fills in (nanochat/native.py): the order and types of these members are known there ------------- */

typedef struct {
    Matrix qkv, out, up, down;
    const float *table, *gate; /* value embeddings (V, Hkv D) and gate (Hkv, channels), or NULL */
    float *keys, *values;      /* (slots, Hkv, D) */
    float keep, first;
    int64_t group;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *embedding, *smear_gate, *cos, *sin; /* (V, C), (channels), (T, D/2) each */
    int64_t depth, width, heads, kv_heads, dim, smear_channels, gate_channels;
    float eps, qk_scale, gate_scale, softcap, smear_by, backout;
} Model;

typedef struct {
    int64_t rows, threads, longest; /* longest: most tokens that a row sees */
    const int64_t *ids, *previous, *positions; /* (N) each; previous -1: none */
    const int64_t *starts, *pieces; /* (groups, N + 1) and (start, stop): where in the cache lies what a row sees */
    const int64_t *wanted;          /* rows that get logits, or NULL: all; there may be none */
    int64_t wanted_rows;
    float *logits, *scratch;
} Step;

/* ---- attention ---------------------------------------------------------------------------------------------------- */

/* Turn a head by its position, norm it, scale it: in (D) -> out (D). */
static void turn(const Model *m, const float *in, int64_t position, float scale, float *out) {
    const int64_t half = m->dim / 2;
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    for (int64_t i = 0; i < half; i++) {
        out[i] = in[i] * cos[i] + in[half + i] * sin[i];
        out[half + i] = in[half + i] * cos[i] - in[i] * sin[i];
    }
    scale *= inverse_norm(out, m->dim, m->eps);
    for (int64_t i = 0; i < m->dim; i++) out[i] *= scale;
}

/* A row's q made ready in place, its k and v written to the cache. x: its normed stream's first channels / `scale`. */
static void place(const Model *m, const Layer *layer, const float *x, float scale, int64_t id, int64_t position,
                  int64_t slot, float *qkv, float *spare) {
    const int64_t dim = m->dim, kv_dim = m->kv_heads * dim;
    float *k = layer->keys + slot * kv_dim, *v = layer->values + slot * kv_dim, *q = qkv;
    for (int64_t h = 0; h < m->heads; h++, q += dim) {
        turn(m, q, position, m->qk_scale / sqrtf((float)dim), spare);
        memcpy(q, spare, sizeof(float) * (size_t)dim);
    }
    for (int64_t h = 0; h < m->kv_heads; h++) turn(m, q + h * dim, position, m->qk_scale, k + h * dim);
    memcpy(v, q + kv_dim, sizeof(float) * (size_t)kv_dim);
    for (int64_t h = 0; layer->table && h < m->kv_heads; h++) {
        const float gate = sigmoid(scale * dot(layer->gate + h * m->gate_channels, x, m->gate_channels)) * m->gate_scale;
        const float *embedded = layer->table + id * kv_dim + h * dim;
        for (int64_t i = 0; i < dim; i++) v[h * dim + i] += gate * embedded[i];
    }
}

/* scores (n) -> their softmax; there is room up to a whole vector */
static void weigh(float *scores, int64_t n) {
    vec most = (vec){0} - INFINITY, sum = {0};
    int64_t i = n;
    for (; i % LANES; i++) scores[i] = -INFINITY;
    const int64_t lines = i;
    for (i = 0; i < lines; i += LANES) most = where(load(scores + i) > most, load(scores + i), most);
    float top = most[0];
    for (i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (i = 0; i < lines; i += LANES) {
        vec e = exponential(load(scores + i) - top);
        store(scores + i, e);
        sum += e;
    }
    const float inverse = 1 / total(sum);
    for (i = 0; i < lines; i += LANES) store(scores + i, load(scores + i) * inverse);
}

/* y (D) += sum of p[i] * v[i * line] */
INLINE void add_values(const int count, const float *p, const float *v, int64_t line, int64_t dim, float *y) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        vec sum = load(y + d);
        for (int i = 0; i < count; i++) sum += p[i] * load(v + i * line + d);
        store(y + d, sum);
    }
    for (; d < dim; d++)
        for (int i = 0; i < count; i++) y[d] += p[i] * v[i * line + d];
}

/* What a row sees in kv heads low to high - 1. q, y (H, D); scores: G lines a kv head. */
static void look(const Model *m, const Layer *layer, const int64_t *pieces, int64_t count, int64_t low, int64_t high,
                 const float *q, float *scores, int64_t line, float *y) {
    const int64_t dim = m->dim, group = m->heads / m->kv_heads, step = m->kv_heads * dim;
    int64_t seen = 0;
    for (int64_t p = 0; p < count; p++)
        for (int64_t slot = pieces[2 * p]; slot < pieces[2 * p + 1]; slot++, seen++)
            for (int64_t h = low; h < high; h++)
                for (int64_t g = h * group; g < (h + 1) * group; g++)
                    scores[(g - low * group) * line + seen] = dot(q + g * dim, layer->keys + slot * step + h * dim, dim);
    for (int64_t g = low * group; g < high * group; g++) {
        weigh(scores + (g - low * group) * line, seen);
        memset(y + g * dim, 0, sizeof(float) * (size_t)dim);
    }
    seen = 0;
    for (int64_t p = 0; p < count; p++)
        for (int64_t slot = pieces[2 * p], n; slot < pieces[2 * p + 1]; slot += n, seen += n) {
            n = least(KEYS, pieces[2 * p + 1] - slot);
            for (int64_t h = low; h < high; h++)
                for (int64_t g = h * group; g < (h + 1) * group; g++) {
                    const float *p_ = scores + (g - low * group) * line + seen, *v = layer->values + slot * step + h * dim;
                    if (n == KEYS)
                        add_values(KEYS, p_, v, step, dim, y + g * dim);
                    else
                        for (int64_t i = 0; i < n; i++) add_values(1, p_ + i, v + i * step, step, dim, y + g * dim);
                }
        }
}

/* ---- the step ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const Model *model;
    const Step *step;
    float *x, *x0, *middle, *y, *wide; /* (N, line) each, and (N, wide_line) */
    float *own;                        /* of each thread: factors of the rows, scores, a head */
    int64_t line, wide_line, score_line, own_size;
    uint32_t *next; /* of each layer: how many tasks of its attention are taken */
} Job;

/* Fills in the sizes, and where `scratch` is given the places -> floats of scratch memory in all. */
static int64_t lay_out(Job *job, const Model *m, const Step *s) {
    const int64_t inner = m->layers[0].up.columns, qkv = m->layers[0].qkv.columns;
    job->model = m;
    job->step = s;
    job->line = padded(m->width);
    job->wide_line = padded(inner > qkv ? inner : qkv);
    job->score_line = padded(s->longest);
    job->own_size = padded(s->rows) + padded(m->dim) + m->heads * job->score_line;
    const int64_t lines = s->rows * job->line, wide = s->rows * job->wide_line, own = s->threads * job->own_size;
    if (s->scratch) {
        float *at = s->scratch;
        job->x = at;
        job->x0 = at + lines;
        job->middle = at + 2 * lines;
        job->y = at + 3 * lines;
        job->wide = at + 4 * lines;
        job->own = job->wide + wide;
        job->next = (uint32_t *)(job->own + own);
    }
    return 4 * lines + wide + own + m->depth;
}

int64_t scratch_floats(const Model *m, const Step *s) {
    Job job = {0};
    Step sizes = *s;
    sizes.scratch = NULL;
    return lay_out(&job, m, &sizes);
}

int64_t panel_columns(void) { return PANEL; }

/* The stream of a row at the beginning, smeared with the token before, and mixed for the first block. */
static void begin(const Job *job, int64_t row) {
    const Model *m = job->model;
    const Step *s = job->step;
    const float *mine = m->embedding + s->ids[row] * m->width;
    float *x = job->x + row * job->line, *x0 = job->x0 + row * job->line;
    memset(x, 0, sizeof(float) * (size_t)job->line);
    memcpy(x0, mine, sizeof(float) * (size_t)m->width);
    memset(x0 + m->width, 0, sizeof(float) * (size_t)(job->line - m->width));
    if (s->previous[row] >= 0) {
        const float by = m->smear_by * sigmoid(dot(m->smear_gate, mine, m->smear_channels));
        const float *before = m->embedding + s->previous[row] * m->width;
        for (int64_t i = 0; i < m->width; i++) x0[i] += by * before[i];
    }
    for (int64_t i = 0; i < m->width; i++) x[i] = (m->layers[0].first + m->layers[0].keep) * x0[i];
}

static void attend(const Job *job, int64_t index, float *scores) {
    const Model *m = job->model;
    const Step *s = job->step;
    const Layer *layer = m->layers + index;
    const int64_t *starts = s->starts + layer->group * (s->rows + 1);
    const int64_t parts = least(m->kv_heads, (2 * s->threads + s->rows - 1) / s->rows); /* of a row: enough for all */
    for (;;) {
        const int64_t task = __atomic_fetch_add(job->next + index, 1, __ATOMIC_RELAXED);
        if (task >= s->rows * parts) return;
        const int64_t row = task / parts, low = m->kv_heads * (task % parts) / parts;
        const int64_t high = m->kv_heads * (task % parts + 1) / parts;
        look(m, layer, s->pieces + 2 * starts[row], starts[row + 1] - starts[row], low, high,
             job->wide + row * job->wide_line, scores, job->score_line, job->y + row * job->line);
    }
}

static void norms(const Job *job, const float *x, int64_t rows, float *scales) {
    for (int64_t row = 0; row < rows; row++)
        scales[row] = inverse_norm(x + row * job->line, job->model->width, job->model->eps);
}

static void block(const Job *job, int64_t index, int thread, int threads) {
    const Model *m = job->model;
    const Step *s = job->step;
    const Layer *layer = m->layers + index;
    const int64_t rows = s->rows, *starts = s->starts + layer->group * (rows + 1);
    float *scales = job->own + thread * job->own_size, *head = scales + padded(rows), *scores = head + padded(m->dim);
    norms(job, job->x, rows, scales);
    Fate wide = {.how = PLAIN, .scales = scales, .y = job->wide, .line = job->wide_line};
    multiply(&layer->qkv, job->x, job->line, rows, wide, thread, threads);
    meet(threads);
    for (int64_t row = part(rows, thread, threads); row < part(rows, thread + 1, threads); row++)
        place(m, layer, job->x + row * job->line, scales[row], s->ids[row], s->positions[row],
              s->pieces[2 * starts[row + 1] - 1] - 1, job->wide + row * job->wide_line, head);
    meet(threads);
    attend(job, index, scores);
    meet(threads);
    Fate added = {.how = ADDED, .y = job->x, .line = job->line};
    multiply(&layer->out, job->y, job->line, rows, added, thread, threads);
    meet(threads);
    norms(job, job->x, rows, scales);
    wide.how = SQUARED;
    multiply(&layer->up, job->x, job->line, rows, wide, thread, threads);
    meet(threads);
    Fate mixed = {.how = MIXED, .y = job->x, .line = job->line, .x0 = job->x0, .by = m->backout};
    if (index == m->depth / 2) mixed.middle = job->middle;
    if (index == m->depth - 1) {
        mixed.taken = job->middle;
    } else {
        mixed.keep = layer[1].keep;
        mixed.first = layer[1].first;
    }
    multiply(&layer->down, job->wide, job->wide_line, rows, mixed, thread, threads);
    meet(threads);
}

static void work(const void *argument, int thread, int threads) {
    const Job *job = argument;
    const Model *m = job->model;
    const Step *s = job->step;
    int64_t rows = s->rows;
    for (int64_t row = part(rows, thread, threads); row < part(rows, thread + 1, threads); row++) begin(job, row);
    meet(threads);
    for (int64_t index = 0; index < m->depth; index++) block(job, index, thread, threads);
    const float *x = job->x;
    if (s->wanted) {
        rows = s->wanted_rows;
        for (int64_t row = part(rows, thread, threads); row < part(rows, thread + 1, threads); row++)
            memcpy(job->y + row * job->line, x + s->wanted[row] * job->line, sizeof(float) * (size_t)job->line);
        x = job->y;
        meet(threads);
    }
    if (!rows) return;
    float *scales = job->own + thread * job->own_size;
    norms(job, x, rows, scales);
    Fate logits = {.how = CAPPED, .scales = scales, .y = s->logits, .line = m->head.columns, .cap = m->softcap};
    multiply(&m->head, x, job->line, rows, logits, thread, threads);
}

void forward(const Model *m, const Step *s) {
    Job job = {0};
    lay_out(&job, m, s);
    memset(job.next, 0, sizeof(uint32_t) * (size_t)m->depth);
    together(work, &job, s->threads);
}
