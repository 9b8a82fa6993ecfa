/* A step on a CPU in fp32: tokens and pieces of the cache in, logits out; nanochat/decode.py is its slow twin.

   Weights come in panels: PANEL columns side by side for all of the depth, so that a product reads memory in one line
   and keeps TILE rows of sums in registers. Norms have no weight, so a row's norm is one factor of its products. Threads
   share the columns of a product, the rows of a small operation and the (rows, heads) of attention, and meet between.

   Shape letters: N rows, C width, H heads, Hkv key/value heads, G = H / Hkv, D head dim. Lines of the scratch memory are
   padded to whole panels, of zeros. No -ffast-math: NaN stays NaN. */

#include "cpu_products.h"
#include "cpu_threads.h"
#include "cpu_draw.h"

#define KEYS 8  /* tokens whose values are added to a sum while it is in registers */
#define TOGETHER 4 /* rows whose common keys and values are read once */

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

/* A row's share of attention, in the kv heads that are looked at. */
typedef struct {
    const int64_t *pieces; /* (start, stop) of what it sees */
    int64_t count;
    const float *q;    /* (H, D) */
    float *y, *scores; /* (H, D), and a line of score_line for each head */
} Row;

/* What is looked at: kv heads low to high - 1 of `rows`, TOGETHER of them or one. */
typedef struct {
    const Model *model;
    const Layer *layer;
    int64_t low, high, score_line;
    Row rows[TOGETHER];
} Look;

/* scores of `rows` rows with TOGETHER keys that lie `step` apart */
INLINE void score(const int rows, const float *const *q, const float *k, int64_t step, int64_t dim,
                  float *const *scores) {
    vec sum[TOGETHER][TOGETHER];
    int64_t d = 0;
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < TOGETHER; i++) sum[row][i] = (vec){0};
    for (; d + LANES <= dim; d += LANES)
        for (int i = 0; i < TOGETHER; i++)
            for (int row = 0; row < rows; row++) sum[row][i] += load(q[row] + d) * load(k + i * step + d);
    for (int row = 0; row < rows; row++) {
        four_totals(sum[row], scores[row]);
        for (int64_t rest = d; rest < dim; rest++)
            for (int i = 0; i < TOGETHER; i++) scores[row][i] += q[row][rest] * k[i * step + rest];
    }
}

/* y of `rows` rows += sum of p[i] * v[i * step], in `lines` vectors of it */
INLINE void add_lines(const int rows, const int lines, int64_t keys, const float *const *p, const float *v,
                      int64_t step, int64_t d, float *const *y) {
    vec sum[TOGETHER][2];
    for (int row = 0; row < rows; row++)
        for (int line = 0; line < lines; line++) sum[row][line] = load(y[row] + d + line * LANES);
    for (int64_t i = 0; i < keys; i++)
        for (int line = 0; line < lines; line++)
            for (int row = 0; row < rows; row++) sum[row][line] += p[row][i] * load(v + i * step + d + line * LANES);
    for (int row = 0; row < rows; row++)
        for (int line = 0; line < lines; line++) store(y[row] + d + line * LANES, sum[row][line]);
}

INLINE void add_values(const int rows, int64_t keys, const float *const *p, const float *v, int64_t step, int64_t dim,
                       float *const *y) {
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) add_lines(rows, 2, keys, p, v, step, d, y);
    for (; d + LANES <= dim; d += LANES) add_lines(rows, 1, keys, p, v, step, d, y);
    for (; d < dim; d++)
        for (int row = 0; row < rows; row++)
            for (int64_t i = 0; i < keys; i++) y[row][d] += p[row][i] * v[i * step + d];
}

/* Tokens start to stop - 1 of the cache, which `rows` rows from `first` on see as their tokens from at[row] on: their
   scores, or with `values` what they bring. */
INLINE void span(const Look *l, const int rows, int first, int64_t start, int64_t stop, const int64_t *at,
                 const int values) {
    const Model *m = l->model;
    const int64_t dim = m->dim, group = m->heads / m->kv_heads, step = m->kv_heads * dim;
    for (int64_t slot = start, n; slot < stop; slot += n) {
        n = least(values ? KEYS : TOGETHER, stop - slot);
        for (int64_t g = l->low * group; g < l->high * group; g++) {
            const int64_t here = slot * step + g / group * dim;
            const float *k = l->layer->keys + here, *v = l->layer->values + here, *q[TOGETHER];
            float *y[TOGETHER], *p[TOGETHER];
            for (int row = 0; row < rows; row++) {
                const Row *r = l->rows + first + row;
                q[row] = r->q + g * dim;
                y[row] = r->y + g * dim;
                p[row] = r->scores + (g - l->low * group) * l->score_line + at[first + row] + slot - start;
            }
            if (values)
                add_values(rows, n, (const float *const *)p, v, step, dim, y);
            else if (n == TOGETHER)
                score(rows, q, k, step, dim, p);
            else
                for (int row = 0; row < rows; row++)
                    for (int64_t i = 0; i < n; i++) p[row][i] = dot(q[row], k + i * step, dim);
        }
    }
}

/* All that each row sees: together for as long as they stand at the same place of the cache, then each alone. */
INLINE void walk(const Look *l, const int rows, int64_t *seen, const int values) {
    int64_t next[TOGETHER] = {0}, place[TOGETHER], low = 0, together = rows > 1;
    for (int row = 0; row < rows; row++) {
        seen[row] = 0;
        place[row] = l->rows[row].pieces[0];
        low = place[row] > low ? place[row] : low;
    }
    for (int row = 0; row < rows; row++) together = together && low < l->rows[row].pieces[1];
    for (int row = 0; together && row < rows; row++) { /* where a window begins earlier */
        span(l, 1, row, place[row], low, seen, values);
        seen[row] += low - place[row];
    }
    while (together) {
        int64_t high = l->rows[0].pieces[2 * next[0] + 1];
        for (int row = 1; row < rows; row++) high = least(high, l->rows[row].pieces[2 * next[row] + 1]);
        span(l, rows, 0, low, high, seen, values);
        for (int row = 0; row < rows; row++) {
            const Row *r = l->rows + row;
            seen[row] += high - low;
            place[row] = high;
            if (high == r->pieces[2 * next[row] + 1]) place[row] = ++next[row] < r->count ? r->pieces[2 * next[row]] : -1;
            together = together && place[row] >= 0 && place[row] == place[0];
        }
        low = place[0];
    }
    for (int row = 0; row < rows; row++) {
        const Row *r = l->rows + row;
        for (; next[row] < r->count; place[row] = ++next[row] < r->count ? r->pieces[2 * next[row]] : -1) {
            span(l, 1, row, place[row], r->pieces[2 * next[row] + 1], seen, values);
            seen[row] += r->pieces[2 * next[row] + 1] - place[row];
        }
    }
}

INLINE void look(const Look *l, const int rows) {
    const int64_t dim = l->model->dim, group = l->model->heads / l->model->kv_heads;
    int64_t seen[TOGETHER];
    walk(l, rows, seen, 0);
    for (int row = 0; row < rows; row++)
        for (int64_t g = l->low * group; g < l->high * group; g++) {
            weigh(l->rows[row].scores + (g - l->low * group) * l->score_line, seen[row]);
            memset(l->rows[row].y + g * dim, 0, sizeof(float) * (size_t)dim);
        }
    walk(l, rows, seen, 1);
}

/* ---- the step ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const Model *model;
    const Step *step;
    float *x, *x0, *middle, *y, *wide; /* (N, line) each, and (N, wide_line) */
    float *own;                        /* of each thread: factors of the rows, a head, a panel, scores */
    int64_t line, wide_line, score_line, panel_size, own_size;
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
    job->panel_size = PANEL * (inner > m->width ? inner : m->width);
    job->own_size = padded(s->rows) + padded(m->dim) + job->panel_size + TOGETHER * m->heads * job->score_line;
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
    Look l = {.model = m, .layer = m->layers + index, .score_line = job->score_line};
    const int64_t *starts = s->starts + l.layer->group * (s->rows + 1);
    const int64_t rows = s->rows * m->kv_heads < 2 * TOGETHER * s->threads ? 1 : TOGETHER; /* of a task */
    const int64_t tasks = (s->rows + rows - 1) / rows;
    const int64_t parts = least(m->kv_heads, (2 * s->threads + tasks - 1) / tasks); /* of the heads: enough for all */
    for (;;) {
        const int64_t task = __atomic_fetch_add(job->next + index, 1, __ATOMIC_RELAXED);
        if (task >= tasks * parts) return;
        const int64_t first = task / parts * rows, count = least(rows, s->rows - first);
        l.low = m->kv_heads * (task % parts) / parts;
        l.high = m->kv_heads * (task % parts + 1) / parts;
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = first + i, *start = starts + row, at = count == TOGETHER ? i : 0;
            l.rows[at] = (Row){.pieces = s->pieces + 2 * start[0], .count = start[1] - start[0],
                               .q = job->wide + row * job->wide_line, .y = job->y + row * job->line,
                               .scores = scores + at * m->heads * job->score_line};
            if (count < TOGETHER) look(&l, 1);
        }
        if (count == TOGETHER) look(&l, TOGETHER);
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
    float *scales = job->own + thread * job->own_size, *head = scales + padded(rows);
    float *panel = head + padded(m->dim), *scores = panel + job->panel_size;
    norms(job, job->x, rows, scales);
    Fate wide = {.how = PLAIN, .scales = scales, .y = job->wide, .line = job->wide_line};
    multiply(&layer->qkv, job->x, job->line, rows, wide, panel, thread, threads);
    meet(threads);
    for (int64_t row = part(rows, thread, threads); row < part(rows, thread + 1, threads); row++)
        place(m, layer, job->x + row * job->line, scales[row], s->ids[row], s->positions[row],
              s->pieces[2 * starts[row + 1] - 1] - 1, job->wide + row * job->wide_line, head);
    meet(threads);
    attend(job, index, scores);
    meet(threads);
    Fate added = {.how = ADDED, .y = job->x, .line = job->line};
    multiply(&layer->out, job->y, job->line, rows, added, panel, thread, threads);
    meet(threads);
    norms(job, job->x, rows, scales);
    wide.how = SQUARED;
    multiply(&layer->up, job->x, job->line, rows, wide, panel, thread, threads);
    meet(threads);
    Fate mixed = {.how = MIXED, .y = job->x, .line = job->line, .x0 = job->x0, .by = m->backout};
    if (index == m->depth / 2) mixed.middle = job->middle;
    if (index == m->depth - 1) {
        mixed.taken = job->middle;
    } else {
        mixed.keep = layer[1].keep;
        mixed.first = layer[1].first;
    }
    multiply(&layer->down, job->wide, job->wide_line, rows, mixed, panel, thread, threads);
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
    float *scales = job->own + thread * job->own_size, *panel = scales + padded(s->rows) + padded(m->dim);
    norms(job, x, rows, scales);
    Fate logits = {.how = CAPPED, .scales = scales, .y = s->logits, .line = m->head.columns, .cap = m->softcap};
    multiply(&m->head, x, job->line, rows, logits, panel, thread, threads);
}

void forward(const Model *m, const Step *s) {
    Job job = {0};
    lay_out(&job, m, s);
    memset(job.next, 0, sizeof(uint32_t) * (size_t)m->depth);
    together(work, &job, s->threads);
}
