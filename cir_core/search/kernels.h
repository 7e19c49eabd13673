/* What the loops of the search share: their arguments, numbers and rows. Included by kernels.c alone. */

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
enum { LANES = 16, CORNERS = 8 };
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
  float *corners;            /* [Q, P, CORNERS] for one or two products and no negative weight, else NULL: see set_corners */
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

INLINE int32_t float_key(float value) { /* a float's bits as a number in the order of the floats */
  int32_t bits;
  memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

INLINE float float_of_key(int32_t key) {
  int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

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

INLINE void prefetch_row(const Block *block, int64_t row, int64_t dim) { /* candidates lie far apart in memory */
  int64_t size = block->dtype == FLOAT32 ? 4 : 2;
  const char *from = (const char *)block->rows + row * block->stride * size;
  for (int64_t at = 0; at < dim * size; at += 64) __builtin_prefetch(from + at);
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
