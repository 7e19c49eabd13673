/* The candidates of a query: what rows must reach to become one, bars that rise, exact scores. Included by kernels.c. */

/* A value >= from that at least k of the values reach, and few more than k: halved in the order of the floats' bits.
   `from` where fewer than k reach it. */
INLINE float raised(const float *restrict values, int64_t n, int64_t k, float from) {
  int32_t reached = 0, most = INT32_MIN;
  for (int64_t i = 0; i < n; i++) {
    int32_t key = float_key(values[i]);
    most = key > most ? key : most;
    reached += values[i] >= from;
  }
  if (reached < k) return from;
  int64_t low = float_key(from), high = (int64_t)most + 1; /* low is reached by k, high by none */
  while (high - low > 1 && reached > k + k / 16) {
    int64_t middle = low + (high - low) / 2;
    float value = float_of_key((int32_t)middle);
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++) count += values[i] >= value;
    if (count < k) high = middle;
    else low = middle, reached = count;
  }
  return float_of_key((int32_t)low);
}

/* Where no weight is negative, scores rise with every product: what no key lets pass lies below a falling line from
   which CORNERS points are taken. A row below a corner in every product reaches no key's need; so do rows whose maxima
   are below it. Few comparisons, the same for all keys, rule out nearly all rows; they rule out, never in. */
INLINE void set_corners(Batch *b, int64_t query) {
  /* 1 - sin of the middles of equal parts of a right angle, for slerp's line is an arc; those first that rule out most */
  static const float share[CORNERS] = {0.366f, 0.227f, 0.529f, 0.118f, 0.710f, 0.0431f, 0.902f, 0.00482f};
  float *x = b->corners + query * b->num_products * CORNERS, *y = x + CORNERS, last = INFINITY;
  const float *need = b->need + query * b->lanes, *w = b->scan_weights + query * b->num_products * b->lanes;
  const float *v = w + b->lanes;
  if (b->num_products == 1) { /* one key, of weight 1 */
    for (int i = 0; i < CORNERS; i++) x[i] = need[0];
    return;
  }
  for (int64_t key = 0; key < b->num_keys; key++)
    if (w[key] > 0) last = need[key] / w[key] < last ? need[key] / w[key] : last; /* from here on x alone is enough */
  int usable = fabsf(last) < 1e22f; /* not before all bars are set; and weights and products up to 1e12 stay finite */
  for (int i = 0; i < CORNERS; i++) {
    x[i] = usable ? last - share[i] * fabsf(last) : -INFINITY;
    y[i] = usable ? INFINITY : -INFINITY;
    for (int64_t key = 0; key < b->num_keys && usable; key++) {
      /* w x + v y < need for whatever lies below, with the roundings of these lines many times over */
      float taken = w[key] * x[i], rest = need[key] - taken - 1e-5f * (fabsf(need[key]) + fabsf(taken));
      float least = v[key] > 0 ? rest / v[key] : rest > 0 ? INFINITY : -INFINITY;
      y[i] = least < y[i] ? least : y[i];
    }
  }
}

INLINE void set_need(Batch *b, int64_t query) {
  for (int64_t key = 0; key < b->num_keys; key++) {
    int64_t list = query * b->num_keys + key;
    /* Finite, so that a row without a score (-inf) never passes. */
    b->need[query * b->lanes + key] = larger(nextafterf(b->bar[list] - b->slack[list], -INFINITY), -3e38f);
  }
  if (b->corners) set_corners(b, query);
}

/* out[c] = the bound of candidate c's score under a key: the upper one for sign 1, the lower one for -1. */
INLINE void candidate_bounds(const Batch *b, int64_t query, int64_t key, float sign, float *restrict out) {
  const float *values = b->value + query * b->num_products * b->capacity;
  int64_t count = b->count[query];
  float slack = sign * b->slack_max[query * b->num_keys + key];
  for (int64_t c = 0; c < count; c++) out[c] = slack;
  for (int64_t p = 0; p < b->num_products; p++) {
    const float *value = values + p * b->capacity;
    float w = b->scan_weights[(query * b->num_products + p) * b->lanes + key], width = sign * b->rho * fabsf(w);
    for (int64_t c = 0; c < count; c++) out[c] += w * value[c] + width * fabsf(value[c]);
  }
}

/* Raise every bar to the k-th best lower bound and drop the candidates that reach none any more.
   scratch: floats [2, capacity]. */
INLINE void shrink(Batch *b, int64_t query, float *scratch) {
  int64_t count = b->count[query], kept = 0, room;
  float *bounds = scratch, *margin = scratch + b->capacity;
  for (int64_t c = 0; c < count; c++) margin[c] = -INFINITY;
  for (int64_t key = 0; key < b->num_keys; key++) {
    float *bar = b->bar + query * b->num_keys + key;
    candidate_bounds(b, query, key, -1, bounds);
    *bar = raised(bounds, count, b->k, *bar);
    candidate_bounds(b, query, key, 1, bounds);
    for (int64_t c = 0; c < count; c++) margin[c] = larger(margin[c], bounds[c] - *bar);
  }
  int32_t *row = b->row + query * b->capacity;
  float *value = b->value + query * b->num_products * b->capacity;
  for (int64_t c = 0; c < count; c++) {
    if (!(margin[c] >= 0)) continue; /* the sign of a difference is that of the comparison */
    row[kept] = row[c];
    for (int64_t p = 0; p < b->num_products; p++) value[p * b->capacity + kept] = value[p * b->capacity + c];
    kept++;
  }
  b->count[query] = (int32_t)kept;
  room = kept > b->k ? kept : b->k;
  b->limit[query] = (int32_t)(kept + room < b->capacity ? kept + room : b->capacity);
  set_need(b, query);
}

typedef struct {
  float score;
  int64_t index;
} Scored;

static int by_rank(const void *x, const void *y) {
  const Scored *a = x, *b = y;
  if (a->score != b->score) return a->score > b->score ? -1 : 1;
  return (a->index > b->index) - (a->index < b->index);
}

/* Merge exact candidates into a list's best; merged: room for k. */
static void merge_best(Batch *b, int64_t list, Scored *found, int64_t count, Scored *merged) {
  float *scores = b->best_score + list * b->k;
  int64_t *indices = b->best_index + list * b->k, i = 0, j = 0;
  if (count == 0) return;
  qsort(found, (size_t)count, sizeof(Scored), by_rank);
  for (int64_t n = 0; n < b->k; n++) {
    Scored held = {scores[i], indices[i]};
    int take = j < count && (held.index < 0 || by_rank(&found[j], &held) < 0);
    merged[n] = take ? found[j++] : (i++, held);
  }
  for (int64_t n = 0; n < b->k; n++) scores[n] = merged[n].score, indices[n] = merged[n].index;
  if (indices[b->k - 1] >= 0) {
    double floor_ = (double)scores[b->k - 1] - b->offsets[list];
    float bar = nextafterf((float)floor_, -INFINITY);
    if (bar > b->bar[list]) b->bar[list] = bar;
  }
}

/* Score all candidates of a query exactly, each row read once, and start with an empty list. -1: no memory.
   scratch: floats [capacity]. */
INLINE int settle(Batch *b, const Block *block, int64_t query, float *restrict scratch) {
  int64_t K = b->num_keys, R = b->num_parts, dim = b->dim, count = b->count[query];
  const int32_t *rows = b->row + query * b->capacity;
  if (count == 0) return 0;
  double *dots = malloc((size_t)(count * (R + 1)) * sizeof(double)), *restrict sums = dots + count * R; /* [R, count] */
  Scored *found = malloc((size_t)(count + b->k) * sizeof(Scored));
  float *row = malloc((size_t)dim * sizeof(float));
  double *work = malloc((size_t)dim * sizeof(double));
  if (!dots || !found || !row || !work) {
    free(dots), free(found), free(row), free(work);
    return -1;
  }
  for (int64_t c = 0; c < count; c++) {
    if (c + 2 < count) prefetch_row(block, rows[c + 2], dim);
    load_row(row, block, rows[c], dim);
    for (int64_t part = 0; part < R; part++)
      dots[part * count + c] = fixed_order_dot(b->queries + (part * b->num_queries + query) * dim, row, work, dim);
  }
  b->num_exact[query] += count;
  for (int64_t key = 0; key < K; key++) {
    int64_t list = query * K + key, num_found = 0;
    for (int64_t part = 0; part < R; part++) {
      double weight = b->weights[part * b->num_queries * K + list];
      const double *restrict dot = dots + part * count;
      if (part == 0)
        for (int64_t c = 0; c < count; c++) sums[c] = weight * dot[c];
      else
        for (int64_t c = 0; c < count; c++) sums[c] += weight * dot[c];
    }
    for (int64_t c = 0; c < count; c++) scratch[c] = (float)sums[c];
    float least = raised(scratch, count, b->k, b->best_score[(list + 1) * b->k - 1]);
    for (int64_t c = 0; c < count; c++) {
      if (!(scratch[c] >= least)) continue;
      found[num_found].score = scratch[c];
      found[num_found++].index = block->indices ? block->indices[rows[c]] : block->first_index + rows[c];
    }
    merge_best(b, list, found, num_found, found + count);
  }
  free(dots), free(found), free(row), free(work);
  b->count[query] = 0;
  b->limit[query] = (int32_t)(2 * b->k < b->capacity ? 2 * b->k : b->capacity);
  set_need(b, query);
  return 0;
}

INLINE int is_excluded(const Batch *b, const Block *block, int64_t query, int64_t row) {
  const int64_t *listed = b->excluded + query * b->num_excluded;
  int64_t index = block->indices ? block->indices[row] : block->first_index + row;
  int64_t from = 0, to = b->num_excluded;
  while (from < to) {
    int64_t middle = (from + to) / 2;
    if (listed[middle] < index) from = middle + 1;
    else to = middle;
  }
  return from < b->num_excluded && listed[from] == index;
}

/* Take a candidate; 1 where the bars of its query have moved, -1 without memory. */
INLINE int push(Batch *b, const Block *block, int64_t query, int64_t row, const float *values, float *scratch) {
  if (b->num_excluded && is_excluded(b, block, query, row)) return 0;
  int32_t at = b->count[query]++;
  float *value = b->value + query * b->num_products * b->capacity + at;
  for (int64_t p = 0; p < b->num_products; p++) value[p * b->capacity] = values[p];
  b->row[query * b->capacity + at] = (int32_t)row;
  if (at + 1 < b->limit[query]) return 0;
  shrink(b, query, scratch);
  if (b->count[query] * 4 > b->capacity * 3 && settle(b, block, query, scratch)) return -1; /* near ties fill it */
  return 1;
}
