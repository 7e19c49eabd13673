/* The inner loops of the exact search on a CPU: cast rows for the scan, prune, keep candidates, score them exactly.

   Plain C without Python objects; kernels.py calls it through ctypes. The threads are OpenMP's, which are torch's: of a
   pool of our own each would wait for a core on which one of torch's still spins. What grows with D is on the heap: their
   stacks may be small. The mathematics and the bounds are explained in compiled_scan.py. Every number that decides a
   result is computed in IEEE float64 in a fixed order: compiled with -ffp-contract=off, so that it equals top_k.py's
   torch code to the bit. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512bw", "avx2", "default")))
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { MAX_COLUMNS = 1024, LANES = 16, STEPS = 128 };
enum { ALL_FINITE = -1, NO_MEMORY = -2 }; /* of cast_rows, where there is no bad row */

/* One batch of queries; arrays are C-contiguous. Q queries, K keys (weightings), P scanned products, R parts of the
   exact score. A key's scanned score is the sum over products of weight * product. */
typedef struct {
  int64_t num_queries, num_keys, num_products, num_parts, k, capacity, dim;
  int64_t lanes;             /* K rounded up to LANES: what the scan works on */
  float rho;                 /* relative rounding of a product where it is stored in bfloat16, else 0 */
  const float *scan_weights; /* [Q, P, lanes], zero past K */
  const float *slack_terms;  /* [3, Q, K]: times (residual, scanned norm, row norm) of a tile, added up: its error E */
  const float *queries;      /* [R, Q, dim] */
  const double *weights;     /* [R, Q, K] */
  const double *offsets;     /* [Q, K]: what the scan leaves out of the score, the product with the centre */
  const int64_t *excluded;   /* [Q, num_excluded], ascending */
  int64_t num_excluded;
  float *bar;                /* [Q, K]: a row whose upper bound is below cannot enter the list */
  float *slack;              /* [Q, K]: E of the present tile */
  float *slack_max;          /* [Q, K]: the largest E of the block so far */
  float *need;               /* [Q, lanes]: bar - slack, what a scanned score must reach; infinite past K */
  float *steps;              /* [Q, STEPS] for two products and no negative weight, else NULL: see set_steps */
  float *steps_from;         /* [2, Q]: product 0 at the first step, and steps per unit of it */
  int32_t *count;            /* [Q]: candidates held, of all keys together */
  int32_t *limit;            /* [Q]: so many are held before the bars are raised */
  float *value;              /* [Q, P, capacity]: their products */
  int32_t *row;              /* [Q, capacity]: their rows in the block */
  float *best_score;         /* [Q, K, k]: exact, in order of (-score, index); -inf and -1 past the end */
  int64_t *best_index;
  int64_t *num_exact;        /* [Q]: rows scored exactly, for the log and the tests */
} Batch;

typedef struct {
  const void *rows; /* [n, dim] */
  int32_t dtype;
  int64_t stride;         /* elements from a row to the next */
  int64_t first_index;    /* gallery index of row 0 where indices is NULL */
  const int64_t *indices; /* [n] or NULL */
} Block;

/* As wide as the widest registers; the compiler splits it where they are narrower. Unrolled loops it leaves scalar. */
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE float larger(float a, float b) { return a > b ? a : b; } /* fmaxf stays a call, for the sake of NaN */

#ifdef __FLT16_MAX__ /* the compiler knows the type, and the processor's instructions for it */
INLINE float from_half(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
#else
INLINE float from_half(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13, out;
  float value;
  if (rest < 0x00800000u) { /* subnormal: the magnitude is a small whole number times 2^-24 */
    value = (float)(bits & 0x7fff) * 0x1p-24f;
    memcpy(&out, &value, 4);
    out |= sign;
  } else {
    out = sign | (rest + (rest >= 0x0f800000u ? 0x70000000u : 0x38000000u));
  }
  memcpy(&value, &out, 4);
  return value;
}
#endif

INLINE float from_bfloat16(uint16_t bits) {
  uint32_t out = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &out, 4);
  return value;
}

INLINE uint16_t to_bfloat16(float value) { /* to nearest, ties to even; finite input */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void load_row(float *restrict out, const Block *block, int64_t row, int64_t dim) {
  if (block->dtype == FLOAT32) {
    memcpy(out, (const float *)block->rows + row * block->stride, (size_t)dim * 4);
  } else {
    const uint16_t *bits = (const uint16_t *)block->rows + row * block->stride;
    if (block->dtype == FLOAT16)
      for (int64_t i = 0; i < dim; i++) out[i] = from_half(bits[i]);
    else
      for (int64_t i = 0; i < dim; i++) out[i] = from_bfloat16(bits[i]);
  }
}

INLINE float sum_of_squares(const float *values, int64_t n) {
  float sums[16] = {0}, total = 0; /* a vector's worth of independent sums */
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t lane = 0; lane < 16; lane++) sums[lane] += values[i + lane] * values[i + lane];
  for (; i < n; i++) total += values[i] * values[i];
  for (int64_t lane = 0; lane < 16; lane++) total += sums[lane];
  return total;
}

static FAST int64_t cast_range(const Block *block, int64_t from, int64_t to, int64_t dim, const float *centre,
                               void *out, int32_t to_bf16, float max_norm, float *stats) {
  float *restrict row = malloc((size_t)dim * 4), *restrict kept = malloc((size_t)dim * 4);
  float *restrict rest = calloc((size_t)dim, 4);
  int64_t bad = row && kept && rest ? ALL_FINITE : NO_MEMORY;
  float residual = stats[0], scanned = stats[1], norm = stats[2];
  for (int64_t r = from; r < to && bad == ALL_FINITE; r++) {
    load_row(row, block, r, dim);
    float whole = sum_of_squares(row, dim);
    if (!(sqrtf(whole) <= max_norm)) {
      bad = r;
      break;
    }
    norm = larger(norm, whole);
    if (to_bf16) {
      uint16_t *cells = (uint16_t *)out + (r - from) * dim;
      for (int64_t i = 0; i < dim; i++) {
        float value = row[i] - centre[i];
        uint16_t bits = to_bfloat16(value);
        cells[i] = bits;
        kept[i] = from_bfloat16(bits);
        rest[i] = value - kept[i];
      }
    } else {
      for (int64_t i = 0; i < dim; i++) kept[i] = row[i] - centre[i];
      memcpy((float *)out + (r - from) * dim, kept, (size_t)dim * 4);
    }
    residual = larger(residual, sum_of_squares(rest, dim));
    scanned = larger(scanned, sum_of_squares(kept, dim));
  }
  stats[0] = residual, stats[1] = scanned, stats[2] = norm; /* squares; the caller takes roots */
  free(row), free(kept), free(rest);
  return bad;
}

/* float64 inner product, added in the order of top_k.pair_dots: the upper half onto the lower, again and again. */
INLINE double fixed_order_dot(const float *restrict a, const float *restrict b, double *restrict sums, int64_t dim) {
  for (int64_t i = 0; i < dim; i++) sums[i] = (double)a[i] * (double)b[i];
  for (int64_t width = dim; width > 1;) {
    int64_t half = (width + 1) / 2, top = width - half;
    for (int64_t i = 0; i < top; i++) sums[i] += sums[half + i];
    width = half;
  }
  return sums[0];
}

static FAST int dot_range(const float *queries, const Block *block, const int64_t *left, const int64_t *right,
                          int64_t from, int64_t to, int64_t dim, double *out) {
  float *row = malloc((size_t)dim * sizeof(float));
  double *sums = malloc((size_t)dim * sizeof(double));
  int failed = !row || !sums;
  for (int64_t p = from; p < to && !failed; p++) {
    load_row(row, block, right[p], dim);
    out[p] = fixed_order_dot(queries + left[p] * dim, row, sums, dim);
  }
  free(row), free(sums);
  return failed ? -1 : 0;
}

/* --- lists --------------------------------------------------------------------------------------------------- */

static float kth_largest(float *values, int64_t n, int64_t k) { /* quickselect; reorders values */
  int64_t from = 0, to = n - 1, place = k - 1;
  while (from < to) {
    float pivot = values[(from + to) / 2];
    int64_t i = from, j = to;
    while (i <= j) {
      while (values[i] > pivot) i++;
      while (values[j] < pivot) j--;
      if (i <= j) {
        float other = values[i];
        values[i++] = values[j];
        values[j--] = other;
      }
    }
    if (place <= j) to = j;
    else if (place >= i) from = i;
    else break;
  }
  return values[place];
}

/* With two products x, y and weights of one sign, what every key needs together is a falling staircase: steps[i] is a y
   below which no key is reached by any x of step i. One look-up replaces a comparison per key; it rules out, never in. */
INLINE void set_steps(Batch *b, int64_t query) {
  const float *w = b->scan_weights + query * 2 * b->lanes, *v = w + b->lanes, *need = b->need + query * b->lanes;
  float *steps = b->steps + query * STEPS, last = INFINITY, scale, first;
  for (int64_t key = 0; key < b->num_keys; key++)
    if (w[key] > 0) last = need[key] / w[key] < last ? need[key] / w[key] : last; /* from here on x alone is enough */
  first = last - 1.25f * fabsf(last);
  scale = (STEPS - 1) / (last - first);
  for (int i = 0; i < STEPS; i++) steps[i] = i < STEPS - 1 && scale < 1e20f && scale > 1e-20f ? INFINITY : -INFINITY;
  if (steps[0] < 0) scale = 0, first = 0; /* no such x, or bars that are not set: nothing is ruled out */
  b->steps_from[query] = first, b->steps_from[b->num_queries + query] = scale;
  if (scale == 0) return;
  for (int64_t key = 0; key < b->num_keys; key++)
    for (int i = 0; i < STEPS - 1; i++) {
      float x = first + (i + 1.01f) / scale, rest = need[key] - w[key] * x; /* the upper end of the step, and more */
      rest -= 1e-5f * (fabsf(need[key]) + fabsf(w[key] * x) + w[key] * fabsf(first));
      float y = v[key] > 0 ? rest / v[key] : rest > 0 ? INFINITY : -INFINITY;
      steps[i] = y < steps[i] ? y : steps[i];
    }
}

INLINE int above_steps(const float *steps, float first, float scale, float x, float y) {
  float place = (x - first) * scale;
  int32_t step = (int32_t)(place < 0 ? 0 : place > STEPS - 1 ? STEPS - 1 : place);
  return y >= steps[step];
}

INLINE void set_need(Batch *b, int64_t query) {
  for (int64_t key = 0; key < b->num_keys; key++) {
    int64_t list = query * b->num_keys + key;
    /* Finite, so that a row without a score (-inf) never passes. */
    b->need[query * b->lanes + key] = larger(nextafterf(b->bar[list] - b->slack[list], -INFINITY), -3e38f);
  }
  if (b->steps) set_steps(b, query);
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
    int64_t above = 0;
    candidate_bounds(b, query, key, -1, bounds);
    for (int64_t c = 0; c < count; c++) {
      float bound = bounds[c];
      bounds[above] = bound;
      above += bound > *bar;
    }
    if (above >= b->k) *bar = larger(*bar, kth_largest(bounds, above, b->k));
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

/* Score all candidates of a query exactly, each row read once, and start with an empty list. -1: no memory. */
INLINE int settle(Batch *b, const Block *block, int64_t query, float *scratch) {
  int64_t K = b->num_keys, R = b->num_parts, dim = b->dim, count = b->count[query];
  const int32_t *rows = b->row + query * b->capacity;
  if (count == 0) return 0;
  double *dots = malloc((size_t)(count * R) * sizeof(double));
  Scored *found = malloc((size_t)(count + b->k) * sizeof(Scored));
  float *row = malloc((size_t)dim * sizeof(float));
  double *sums = malloc((size_t)dim * sizeof(double));
  if (!dots || !found || !row || !sums) {
    free(dots), free(found), free(row), free(sums);
    return -1;
  }
  for (int64_t c = 0; c < count; c++) {
    load_row(row, block, rows[c], dim);
    for (int64_t part = 0; part < R; part++)
      dots[c * R + part] = fixed_order_dot(b->queries + (part * b->num_queries + query) * dim, row, sums, dim);
  }
  b->num_exact[query] += count;
  for (int64_t key = 0; key < K; key++) {
    int64_t list = query * K + key, num_found = 0;
    candidate_bounds(b, query, key, 1, scratch);
    for (int64_t c = 0; c < count; c++) {
      if (!(scratch[c] >= b->bar[list])) continue;
      double score = b->weights[list] * dots[c * R];
      for (int64_t part = 1; part < R; part++)
        score += b->weights[part * b->num_queries * K + list] * dots[c * R + part];
      found[num_found].score = (float)score;
      found[num_found++].index = block->indices ? block->indices[rows[c]] : block->first_index + rows[c];
    }
    merge_best(b, list, found, num_found, found + count);
  }
  free(dots), free(found), free(row), free(sums);
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

/* --- the scan of a tile ----------------------------------------------------------------------------------------- */

/* bfloat16 bits as int16 in the order of their values. */
INLINE int16_t ordered(uint16_t bits) { return (int16_t)(bits ^ (((int16_t)bits >> 15) & 0x7fff)); }
INLINE float unordered(int16_t key) { return from_bfloat16((uint16_t)(key ^ ((key >> 15) & 0x7fff))); }

INLINE int16_t least_key(float need, float rho) { /* the smallest bfloat16 value s with s + rho |s| >= need */
  float value = need >= 0 ? need / (1 + rho) : need / (1 - rho);
  uint32_t bits;
  value = nextafterf(value, -INFINITY);
  memcpy(&bits, &value, 4);
  uint16_t high = (uint16_t)(bits >> 16); /* cut: towards zero, so up where negative, down where positive */
  return (int16_t)(ordered(high) - (value < 0 ? 1 : 0));
}

typedef struct {
  Batch *batch;
  const Block *block;
  const void **products; /* P of [rows, ld]: bfloat16 or float32; column = query */
  int64_t ld, num_rows, first_row;
  int64_t group;
  float stats[3];
} Tile;

INLINE void begin_tile(Batch *b, const float *stats, int64_t from, int64_t to) {
  int64_t size = b->num_queries * b->num_keys;
  for (int64_t list = from * b->num_keys; list < to * b->num_keys; list++) {
    const float *terms = b->slack_terms + list;
    float slack = 1.0001f * (terms[0] * stats[0] + terms[size] * stats[1] + terms[2 * size] * stats[2]);
    b->slack[list] = slack;
    b->slack_max[list] = larger(b->slack_max[list], slack);
  }
  for (int64_t query = from; query < to; query++) set_need(b, query);
}

/* One key, one product of weight 1: groups of rows fall to one comparison of their maximum, for all queries at once. */
INLINE int scan_single(const Tile *t, int64_t from, int64_t to, float *scratch, int bf16) {
  Batch *b = t->batch;
  int16_t high16[MAX_COLUMNS], need16[MAX_COLUMNS];
  float high32[MAX_COLUMNS];
  uint8_t hit[MAX_COLUMNS + 8];
  int64_t n = to - from;
  float rho = b->rho;
  const float *need = b->need + from * b->lanes;
  const uint16_t *cells16 = (const uint16_t *)t->products[0] + from;
  const float *cells32 = (const float *)t->products[0] + from;
  memset(hit, 0, sizeof(hit));
  if (bf16)
    for (int64_t c = 0; c < n; c++) need16[c] = least_key(need[c * b->lanes], rho);
  for (int64_t start = 0; start < t->num_rows; start += t->group) {
    int64_t stop = start + t->group < t->num_rows ? start + t->group : t->num_rows;
    if (bf16) {
      const uint16_t *line = cells16 + start * t->ld;
      for (int64_t c = 0; c < n; c++) high16[c] = ordered(line[c]);
      for (int64_t r = start + 1; r < stop; r++) {
        line = cells16 + r * t->ld;
        for (int64_t c = 0; c < n; c++) {
          int16_t value = ordered(line[c]);
          high16[c] = value > high16[c] ? value : high16[c];
        }
      }
      for (int64_t c = 0; c < n; c++) hit[c] = high16[c] >= need16[c];
    } else {
      const float *line = cells32 + start * t->ld;
      for (int64_t c = 0; c < n; c++) high32[c] = line[c];
      for (int64_t r = start + 1; r < stop; r++) {
        line = cells32 + r * t->ld;
        for (int64_t c = 0; c < n; c++) high32[c] = line[c] > high32[c] ? line[c] : high32[c];
      }
      for (int64_t c = 0; c < n; c++) hit[c] = high32[c] >= need[c * b->lanes];
    }
    for (int64_t base = 0; base < n; base += 8) {
      uint64_t eight;
      memcpy(&eight, hit + base, 8);
      if (!eight) continue;
      for (int64_t c = base; c < base + 8; c++) {
        if (!hit[c]) continue;
        for (int64_t r = start; r < stop; r++) {
          float value = bf16 ? from_bfloat16(cells16[r * t->ld + c]) : cells32[r * t->ld + c];
          if (!(value + rho * fabsf(value) >= need[c * b->lanes])) continue;
          int moved = push(b, t->block, from + c, t->first_row + r, &value, scratch);
          if (moved < 0) return -1;
          if (moved && bf16) need16[c] = least_key(need[c * b->lanes], rho);
        }
      }
    }
  }
  return 0;
}

/* Whether some key's upper bound reaches what it needs; each product lies in [down, up]. */
INLINE int reaches(const Batch *b, int64_t query, const float *up, const float *down) {
  int64_t P = b->num_products, lanes = b->lanes;
  const float *weights = b->scan_weights + query * P * lanes, *need = b->need + query * lanes;
  Bits any = {0};
  for (int64_t base = 0; base < lanes; base += LANES) {
    Lanes most = {0};
    for (int64_t p = 0; p < P; p++) {
      Bits w = *(const Bits *)(weights + p * lanes + base), negative = w >> 31;
      most += (Lanes)(w & ~negative) * up[p] + (Lanes)(w & negative) * down[p];
    }
    any |= most >= *(const Lanes *)(need + base);
  }
  uint64_t words[sizeof(any) / 8], found = 0;
  memcpy(words, &any, sizeof(any));
  for (size_t i = 0; i < sizeof(any) / 8; i++) found |= words[i];
  return found != 0;
}

/* The largest and smallest value of each column in rows start .. stop - 1, widened by their rounding. */
INLINE void column_bounds(const Tile *t, int64_t product, int64_t start, int64_t stop, int64_t from, int64_t n,
                          float *restrict high, float *restrict low, int bf16) {
  if (bf16) {
    int16_t top[MAX_COLUMNS], bottom[MAX_COLUMNS];
    const uint16_t *cells = (const uint16_t *)t->products[product] + from;
    for (int64_t c = 0; c < n; c++) top[c] = bottom[c] = ordered(cells[start * t->ld + c]);
    for (int64_t r = start + 1; r < stop; r++)
      for (int64_t c = 0; c < n; c++) {
        int16_t value = ordered(cells[r * t->ld + c]);
        top[c] = value > top[c] ? value : top[c];
        bottom[c] = value < bottom[c] ? value : bottom[c];
      }
    for (int64_t c = 0; c < n; c++) {
      float h = unordered(top[c]), l = unordered(bottom[c]);
      high[c] = h + t->batch->rho * fabsf(h);
      low[c] = l - t->batch->rho * fabsf(l);
    }
  } else {
    const float *cells = (const float *)t->products[product] + from;
    for (int64_t c = 0; c < n; c++) high[c] = low[c] = cells[start * t->ld + c];
    for (int64_t r = start + 1; r < stop; r++)
      for (int64_t c = 0; c < n; c++) {
        float value = cells[r * t->ld + c];
        high[c] = value > high[c] ? value : high[c];
        low[c] = value < low[c] ? value : low[c];
      }
  }
}

/* Several keys share the products: the maxima and minima of both bound every key's scores in a group of rows. */
INLINE int scan_weighted(const Tile *t, int64_t from, int64_t to, float *scratch, int bf16) {
  Batch *b = t->batch;
  int64_t P = b->num_products, n = to - from;
  float high[P][MAX_COLUMNS], low[P][MAX_COLUMNS], up[P], down[P], values[P];
  uint8_t hit[MAX_COLUMNS];
  const float *first = b->steps_from + from, *scale = first + b->num_queries;
  for (int64_t start = 0; start < t->num_rows; start += t->group) {
    int64_t stop = start + t->group < t->num_rows ? start + t->group : t->num_rows;
    for (int64_t p = 0; p < P; p++) column_bounds(t, p, start, stop, from, n, high[p], low[p], bf16);
    if (b->steps)
      for (int64_t c = 0; c < n; c++)
        hit[c] = (uint8_t)above_steps(b->steps + (from + c) * STEPS, first[c], scale[c], high[0][c], high[1][c]);
    for (int64_t c = 0; c < n; c++) {
      int64_t query = from + c;
      if (b->steps && !hit[c]) continue;
      for (int64_t p = 0; p < P; p++) up[p] = high[p][c], down[p] = low[p][c];
      if (!b->steps && !reaches(b, query, up, down)) continue;
      for (int64_t r = start; r < stop; r++) {
        for (int64_t p = 0; p < P; p++) {
          values[p] = bf16 ? from_bfloat16(((const uint16_t *)t->products[p])[r * t->ld + query])
                           : ((const float *)t->products[p])[r * t->ld + query];
          float width = b->rho * fabsf(values[p]);
          up[p] = values[p] + width, down[p] = values[p] - width;
        }
        if (b->steps && !above_steps(b->steps + query * STEPS, first[c], scale[c], up[0], up[1])) continue;
        if (reaches(b, query, up, down) && push(b, t->block, query, t->first_row + r, values, scratch) < 0) return -1;
      }
    }
  }
  return 0;
}

static FAST int scan_range(const Tile *t, int64_t from, int64_t to, int32_t bf16) {
  Batch *b = t->batch;
  float *scratch = malloc((size_t)b->capacity * 2 * sizeof(float));
  int failed = scratch == NULL;
  if (!failed) begin_tile(b, t->stats, from, to);
  for (int64_t first = from; first < to && !failed; first += MAX_COLUMNS) {
    int64_t last = first + MAX_COLUMNS < to ? first + MAX_COLUMNS : to;
    if (b->num_keys == 1)
      failed = bf16 ? scan_single(t, first, last, scratch, 1) : scan_single(t, first, last, scratch, 0);
    else
      failed = bf16 ? scan_weighted(t, first, last, scratch, 1) : scan_weighted(t, first, last, scratch, 0);
  }
  free(scratch);
  return failed ? -1 : 0;
}

static FAST int settle_range(Batch *b, const Block *block, int64_t from, int64_t to) {
  float *scratch = malloc((size_t)b->capacity * 2 * sizeof(float));
  int failed = scratch == NULL;
  for (int64_t query = from; query < to && !failed; query++) {
    shrink(b, query, scratch);
    failed = settle(b, block, query, scratch);
  }
  free(scratch);
  return failed ? -1 : 0;
}

/* --- what kernels.py calls: the work in equal ranges, one a thread ------------------------------------------------ */

/* out[i] = rows[i] - centre, in bfloat16 or float32. stats: float[3], the largest |row - centre - out|^2, |out|^2 and
   |row|^2, as computed in float32; returns the first row whose norm is not at most max_norm, ALL_FINITE or NO_MEMORY. */
EXPORT int64_t cast_rows(const Block *block, int64_t from, int64_t to, int64_t dim, const float *centre, void *out,
                         int32_t to_bf16, float max_norm, float *stats, int32_t threads) {
  int64_t bad = ALL_FINITE, size = to_bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int32_t n = 0; n < threads; n++) {
    int64_t first = from + (to - from) * n / threads, last = from + (to - from) * (n + 1) / threads;
    float own[3] = {0};
    int64_t found =
        cast_range(block, first, last, dim, centre, (char *)out + (first - from) * dim * size, to_bf16, max_norm, own);
#pragma omp critical
    {
      if (found == NO_MEMORY || (found >= 0 && bad != NO_MEMORY && (bad < 0 || found < bad))) bad = found;
      for (int i = 0; i < 3; i++) stats[i] = larger(stats[i], own[i]);
    }
  }
  return bad;
}

/* out[p] = queries[left[p]] . rows[right[p]]. 0, or -1 where memory has run out. */
EXPORT int pair_dots(const float *queries, const Block *block, const int64_t *left, const int64_t *right,
                     int64_t num_pairs, int64_t dim, double *out, int32_t threads) {
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
  for (int32_t n = 0; n < threads; n++)
    failed |= dot_range(queries, block, left, right, num_pairs * n / threads, num_pairs * (n + 1) / threads, dim, out);
  return failed;
}

/* Scan a tile for all queries of its batch. 0, or -1 where memory has run out. */
EXPORT int scan_tile(const Tile *t, int32_t bf16, int32_t threads) {
  int64_t size = t->batch->num_queries;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
  for (int32_t n = 0; n < threads; n++)
    failed |= scan_range(t, size * n / threads, size * (n + 1) / threads, bf16);
  return failed;
}

/* The end of a block: what is left of the candidates is scored exactly. */
EXPORT int settle_block(Batch *b, const Block *block, int32_t threads) {
  int64_t size = b->num_queries;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
  for (int32_t n = 0; n < threads; n++)
    failed |= settle_range(b, block, size * n / threads, size * (n + 1) / threads);
  return failed;
}

/* What kernels.py compares with its own structures: a library left over from another version must not be called. */
EXPORT int64_t structure_sizes(void) { return sizeof(Batch) * 1000000 + sizeof(Block) * 1000 + sizeof(Tile); }

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
