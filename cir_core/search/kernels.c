/* The inner loops of the exact search on a CPU: cast rows for the scan, prune, keep candidates, score them exactly.

   Plain C without Python objects; kernels.py calls it through ctypes. The threads are OpenMP's, which are torch's: of a
   pool of our own each would wait for a core on which one of torch's still spins. What grows with D is on the heap: their
   stacks may be small. The mathematics and the bounds are explained in compiled_scan.py. Every number that decides a
   result is computed in IEEE float64 in a fixed order: compiled with -ffp-contract=off, so that it equals top_k.py's
   torch code to the bit. */

#define PY_SSIZE_T_CLEAN
#include "kernels.h"
#include "candidates.h"

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

/* --- the scan of a tile ----------------------------------------------------------------------------------------- */

enum { MAX_COLUMNS = 256, MAX_PRODUCTS = 2 }; /* columns at a time; products of a scan with corners */

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
  for (int64_t query = from; query < to; query++) {
    int moved = 0;
    for (int64_t list = query * b->num_keys; list < (query + 1) * b->num_keys; list++) {
      const float *terms = b->slack_terms + list;
      float slack = 1.0001f * (terms[0] * stats[0] + terms[size] * stats[1] + terms[2 * size] * stats[2]);
      if (slack <= b->slack[list] && slack > 0.95f * b->slack[list]) continue; /* that of the tile before will do */
      b->slack[list] = slack;
      b->slack_max[list] = larger(b->slack_max[list], slack);
      moved = 1;
    }
    if (moved) set_need(b, query);
  }
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

/* What the columns of a tile are held against, and the largest values of each in a group of rows. */
typedef struct {
  int16_t least16[MAX_PRODUCTS][CORNERS][MAX_COLUMNS], high16[MAX_PRODUCTS][MAX_COLUMNS];
  float least32[MAX_PRODUCTS][CORNERS][MAX_COLUMNS], high32[MAX_PRODUCTS][MAX_COLUMNS];
} Limits;

INLINE void set_limits(const Batch *b, int64_t query, int64_t column, Limits *limits, int P, int corners, int bf16) {
  const float *corner = b->corners + query * P * CORNERS;
  for (int p = 0; p < P; p++)
    for (int i = 0; i < corners; i++)
      if (bf16) limits->least16[p][i][column] = least_key(corner[p * CORNERS + i], b->rho);
      else limits->least32[p][i][column] = corner[p * CORNERS + i];
}

INLINE float cell(const Tile *t, int64_t product, int64_t row, int64_t query, int bf16) {
  return bf16 ? from_bfloat16(((const uint16_t *)t->products[product])[row * t->ld + query])
              : ((const float *)t->products[product])[row * t->ld + query];
}

/* hit[c]: whether the maxima of the rows start .. stop - 1 lie below no corner of column c. */
INLINE void find_hits(const Tile *t, int64_t start, int64_t stop, int64_t from, int64_t n, Limits *limits,
                      uint8_t *restrict hit, int P, int corners, int bf16) {
  for (int p = 0; p < P; p++) {
    int16_t *restrict high16 = limits->high16[p];
    float *restrict high32 = limits->high32[p];
    const uint16_t *line16 = (const uint16_t *)t->products[p] + start * t->ld + from;
    const float *line32 = (const float *)t->products[p] + start * t->ld + from;
    for (int64_t c = 0; c < n; c++)
      if (bf16) high16[c] = ordered(line16[c]);
      else high32[c] = line32[c];
    for (int64_t r = start + 1; r < stop; r++) {
      line16 += t->ld, line32 += t->ld;
      for (int64_t c = 0; c < n; c++)
        if (bf16) high16[c] = ordered(line16[c]) > high16[c] ? ordered(line16[c]) : high16[c];
        else high32[c] = larger(line32[c], high32[c]);
    }
  }
  for (int64_t c = 0; c < n; c++) {
    int open = 1;
    for (int i = 0; i < corners; i++) {
      int above = 0;
      for (int p = 0; p < P; p++)
        above |= bf16 ? limits->high16[p][c] >= limits->least16[p][i][c]
                      : limits->high32[p][c] >= limits->least32[p][i][c];
      open &= above;
    }
    hit[c] = (uint8_t)open;
  }
}

/* No weight is negative: groups of rows fall to a few comparisons of their maxima, for all queries at once. */
INLINE int scan_rising(const Tile *t, int64_t from, int64_t to, float *scratch, int P, int corners, int bf16) {
  Batch *b = t->batch;
  Limits limits;
  uint8_t hit[MAX_COLUMNS + 8] = {0};
  float values[MAX_PRODUCTS], up[MAX_PRODUCTS];
  int64_t n = to - from;
  for (int64_t c = 0; c < n; c++) set_limits(b, from + c, c, &limits, P, corners, bf16);
  for (int64_t start = 0; start < t->num_rows; start += t->group) {
    int64_t stop = start + t->group < t->num_rows ? start + t->group : t->num_rows;
    find_hits(t, start, stop, from, n, &limits, hit, P, corners, bf16);
    for (int64_t base = 0; base < n; base += 8) {
      uint64_t eight;
      memcpy(&eight, hit + base, 8);
      if (!eight) continue;
      for (int64_t c = base; c < base + 8; c++) {
        if (!hit[c]) continue;
        const float *corner = b->corners + (from + c) * P * CORNERS;
        for (int64_t r = start; r < stop; r++) {
          int open = 1;
          for (int p = 0; p < P; p++) {
            values[p] = cell(t, p, r, from + c, bf16);
            up[p] = values[p] + b->rho * fabsf(values[p]);
          }
          for (int i = 0; i < corners && open; i++)
            open = up[0] >= corner[i] || (P > 1 && up[P - 1] >= corner[CORNERS + i]);
          if (!open || (P > 1 && !reaches(b, from + c, up, up))) continue;
          int moved = push(b, t->block, from + c, t->first_row + r, values, scratch);
          if (moved < 0) return -1;
          if (moved) set_limits(b, from + c, c, &limits, P, corners, bf16);
        }
      }
    }
  }
  return 0;
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

/* Any weights: the maxima and minima of the products bound every key's scores in a group of rows. */
INLINE int scan_weighted(const Tile *t, int64_t from, int64_t to, float *scratch, int bf16) {
  Batch *b = t->batch;
  int64_t P = b->num_products, n = to - from;
  float high[P][MAX_COLUMNS], low[P][MAX_COLUMNS], up[P], down[P], values[P];
  for (int64_t start = 0; start < t->num_rows; start += t->group) {
    int64_t stop = start + t->group < t->num_rows ? start + t->group : t->num_rows;
    for (int64_t p = 0; p < P; p++) column_bounds(t, p, start, stop, from, n, high[p], low[p], bf16);
    for (int64_t c = 0; c < n; c++) {
      int64_t query = from + c;
      for (int64_t p = 0; p < P; p++) up[p] = high[p][c], down[p] = low[p][c];
      if (!reaches(b, query, up, down)) continue;
      for (int64_t r = start; r < stop; r++) {
        for (int64_t p = 0; p < P; p++) {
          values[p] = cell(t, p, r, query, bf16);
          float width = b->rho * fabsf(values[p]);
          up[p] = values[p] + width, down[p] = values[p] - width;
        }
        if (reaches(b, query, up, down) && push(b, t->block, query, t->first_row + r, values, scratch) < 0) return -1;
      }
    }
  }
  return 0;
}

INLINE int scan_columns(const Tile *t, int64_t from, int64_t to, float *scratch, int bf16) {
  if (!t->batch->corners) return scan_weighted(t, from, to, scratch, bf16);
  if (t->batch->num_products == 1) return scan_rising(t, from, to, scratch, 1, 1, bf16);
  return scan_rising(t, from, to, scratch, MAX_PRODUCTS, CORNERS, bf16);
}

static FAST int scan_range(const Tile *t, int64_t from, int64_t to, int32_t bf16) {
  Batch *b = t->batch;
  float *scratch = malloc((size_t)b->capacity * 2 * sizeof(float));
  int failed = scratch == NULL;
  if (!failed) begin_tile(b, t->stats, from, to);
  for (int64_t first = from; first < to && !failed; first += MAX_COLUMNS) {
    int64_t last = first + MAX_COLUMNS < to ? first + MAX_COLUMNS : to;
    failed = bf16 ? scan_columns(t, first, last, scratch, 1) : scan_columns(t, first, last, scratch, 0);
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
