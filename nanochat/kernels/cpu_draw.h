/* The next token of each row drawn from its logits, for cpu_forward.c; nanochat/sampling.py is the slow twin and says
   what the cuts mean. A row: k likeliest by the largest values of groups of neighbours, or all of the vocabulary. */

#define NEIGHBOURS 64 /* at least so many tokens a group */
#define MOST_GROUPS 2048
#define MOST_KEPT 256 /* largest top_k */

typedef struct {
    int64_t rows, threads, vocab;
    const float *logits, *u;                    /* (N, V), (N) */
    const float *temperature, *top_p, *min_p;   /* (N) */
    const int64_t *top_k;                       /* (N): 1 is greedy, 0 all of the vocabulary, else up to MOST_KEPT */
    int64_t *ids;                               /* (N), out */
} Draw;

INLINE float largest(const float *x, int64_t n) {
    float most = -INFINITY;
    vec line = (vec){0} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) line = where(load(x + i) > line, load(x + i), line);
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    for (i = 0; i < LANES; i++) most = line[i] > most ? line[i] : most;
    return most;
}

/* Put a value in its place among the `have` largest of at most k, equal ones in the order of their coming -> how many. */
INLINE int64_t keep(float *values, int64_t *ids, int64_t have, int64_t k, float value, int64_t id) {
    if (have == k && !(value > values[k - 1])) return have;
    int64_t at = have < k ? have++ : k - 1;
    for (; at && value > values[at - 1]; at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
    return have;
}

/* maxima (groups) of the logits, `width` neighbours each -> how many groups */
INLINE int64_t group_maxima(const float *x, int64_t n, int64_t width, float *maxima) {
    int64_t groups = 0;
    for (int64_t i = 0; i < n; i += width) maxima[groups++] = largest(x + i, least(width, n - i));
    return groups;
}

INLINE int64_t width_of(int64_t n) { return (n + NEIGHBOURS * MOST_GROUPS - 1) / (NEIGHBOURS * MOST_GROUPS) * NEIGHBOURS; }

static int64_t draw_greedy(const float *x, int64_t n) {
    const float most = largest(x, n);
    for (int64_t i = 0; i < n; i++)
        if (x[i] == most) return i;
    return 0; /* nothing but NaN */
}

/* Among the k likeliest: they lie in the k groups with the largest maxima, so above the k-th of these. */
static int64_t draw_top(const float *x, int64_t n, int64_t k, float temperature, float top_p, float min_p, float u) {
    float maxima[MOST_GROUPS], best[MOST_KEPT];
    int64_t ids[MOST_KEPT], have = 0;
    const int64_t width = width_of(n), groups = group_maxima(x, n, width, maxima);
    for (int64_t g = 0; g < groups; g++) have = keep(best, ids, have, k, maxima[g], g);
    const float low = have == k ? best[k - 1] : -INFINITY;
    have = 0;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = g * width; maxima[g] >= low && i < least(n, (g + 1) * width); i++)
            if (x[i] >= low) have = keep(best, ids, have, k, x[i], i);
    if (!have) return 0; /* NaN is above nothing */
    float sum = 0, kept = 0, before = 0;
    const float top = best[0];
    for (int64_t i = 0; i < have; i++) sum += best[i] = expf((best[i] - top) / temperature);
    int64_t count = 0;
    for (; count < have && before / sum < top_p && best[count] >= min_p; count++) {
        before += best[count];
        kept += best[count];
    }
    float reached = 0;
    for (int64_t i = 0; i < count; i++)
        if ((reached += best[i]) > u * kept) return ids[i];
    return ids[count ? count - 1 : 0];
}

INLINE float likelihood(float x, float top, float temperature, float min_p) {
    const float e = expf((x - top) / temperature);
    return e >= min_p ? e : 0;
}

/* Among all: the group in which the sum passes u of the total, then the token in it. */
static int64_t draw_whole(const float *x, int64_t n, float temperature, float min_p, float u) {
    float sums[MOST_GROUPS], total_sum = 0, reached = 0;
    const int64_t width = width_of(n);
    const float top = largest(x, n);
    for (int64_t g = 0; g * width < n; g++) {
        const int64_t stop = least(n, (g + 1) * width);
        vec line = {0};
        int64_t i = g * width;
        for (; i + LANES <= stop; i += LANES) {
            vec e = exponential((load(x + i) - top) / temperature);
            line += where(e >= min_p, e, (vec){0});
        }
        sums[g] = total(line);
        for (; i < stop; i++) sums[g] += likelihood(x[i], top, temperature, min_p);
        total_sum += sums[g];
    }
    int64_t g = 0, last = 0;
    for (; (g + 1) * width < n && reached + sums[g] <= u * total_sum; g++) reached += sums[g];
    for (int64_t i = g * width; i < least(n, (g + 1) * width); i++) {
        const float e = likelihood(x[i], top, temperature, min_p);
        if ((reached += e) > u * total_sum) return i;
        if (e > 0) last = i; /* rounding may leave the total out of reach */
    }
    return last;
}

static void draw_rows(const void *argument, int thread, int threads) {
    const Draw *d = argument;
    for (int64_t row = part(d->rows, thread, threads); row < part(d->rows, thread + 1, threads); row++) {
        const float *x = d->logits + row * d->vocab;
        const int64_t k = least(d->top_k[row], d->vocab);
        const float t = d->temperature[row], u = d->u[row];
        d->ids[row] = k == 1 ? draw_greedy(x, d->vocab)
                      : k    ? draw_top(x, d->vocab, k, t, d->top_p[row], d->min_p[row], u)
                             : draw_whole(x, d->vocab, t, d->min_p[row], u);
    }
}

int64_t most_kept(void) { return MOST_KEPT; }

void draw(const Draw *d) { together(draw_rows, d, least(d->threads, (d->rows + 3) / 4)); }
