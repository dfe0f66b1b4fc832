/* The element type this file is compiled for (BNKIT_TYPE), read into and written from vectors of `real`. */
#ifndef BNKIT_ELEMENT_H
#define BNKIT_ELEMENT_H

#include "simd.h"

#define TYPE_float32 0
#define TYPE_bfloat16 1
#define TYPE_float16 2
#define TYPE_float64 3
#define TYPE_JOIN(name) TYPE_##name
#define TYPE_OF(name) TYPE_JOIN(name)
#define TYPE TYPE_OF(BNKIT_TYPE)

#if TYPE == TYPE_float64
typedef double real;
typedef vdouble vec;
typedef vint64 ivec;
typedef int64_t lane_index;
enum { LANES = DOUBLE_LANES };
#else
typedef float real;
typedef vfloat vec;
typedef vint32 ivec;
typedef int32_t lane_index;
enum { LANES = FLOAT_LANES };
#endif

#if TYPE == TYPE_float32
typedef float elem;
typedef vfloat raw;
INLINE vec widen(raw r) { return r; }
INLINE raw narrow(vec v) { return v; }
#elif TYPE == TYPE_bfloat16
typedef uint16_t elem;
typedef vhalf raw;
INLINE vec widen(raw r) { return bfloat_to_float(r); }
INLINE raw narrow(vec v) { return float_to_bfloat(v); }
#elif TYPE == TYPE_float16
typedef uint16_t elem;
typedef vhalf raw;
INLINE vec widen(raw r) { return half_to_float(r); }
INLINE raw narrow(vec v) { return float_to_half(v); }
#else
typedef double elem;
typedef vdouble raw;
INLINE vec widen(raw r) { return r; }
INLINE raw narrow(vec v) { return v; }
#endif

enum { CACHE_LINE = 64 / sizeof(elem) };

/* The same in memory, anywhere and among elements of any type. */
typedef raw raw_in_memory __attribute__((aligned(1), may_alias));
typedef vec vec_in_memory __attribute__((aligned(1), may_alias));

/* n elements into the second level of caches, which can wait for more lines at a time than the first. */
INLINE void prefetch(const elem *p, int64_t n)
{
    for (int64_t i = 0; i < n; i += CACHE_LINE)
        __builtin_prefetch(p + i, 0, 2);
}

INLINE raw load_raw(const elem *p) { return *(const raw_in_memory *)p; }
INLINE void store_raw(elem *p, raw r) { *(raw_in_memory *)p = r; }
INLINE vec load_vec(const real *p) { return *(const vec_in_memory *)p; }

/* The first n < LANES elements, zeros after them. */
INLINE raw load_raw_part(const elem *p, int64_t n)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float32
    return (raw)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(BNKIT_AVX512) && TYPE == TYPE_float64
    return (raw)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(BNKIT_AVX512)
    return (raw)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    elem padded[LANES] = {0};
    for (int64_t i = 0; i < n; i++)
        padded[i] = p[i];
    return load_raw(padded);
#endif
}

INLINE void store_raw_part(elem *p, raw r, int64_t n)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float32
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)r);
#elif defined(BNKIT_AVX512) && TYPE == TYPE_float64
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)r);
#elif defined(BNKIT_AVX512)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)r);
#else
    elem padded[LANES];
    store_raw(padded, r);
    for (int64_t i = 0; i < n; i++)
        p[i] = padded[i];
#endif
}

/* Past the caches; p is aligned to the raw vector. Where there is no such store, an ordinary one. */
INLINE void stream_raw(elem *p, raw r)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float32
    _mm512_stream_ps((float *)p, (__m512)r);
#elif defined(BNKIT_AVX512) && TYPE == TYPE_float64
    _mm512_stream_pd((double *)p, (__m512d)r);
#elif defined(BNKIT_AVX512)
    _mm256_stream_si256((__m256i *)p, (__m256i)r);
#elif defined(BNKIT_AVX2) && (TYPE == TYPE_float32 || TYPE == TYPE_float64)
    _mm256_stream_si256((__m256i *)p, (__m256i)r);
#elif defined(BNKIT_AVX2)
    _mm_stream_si128((__m128i *)p, (__m128i)r);
#else
    store_raw(p, r);
#endif
}

/* Streaming stores are weakly ordered: to be called before another thread may read them. */
INLINE void finish_streaming(void)
{
#if defined(BNKIT_AVX512) || defined(BNKIT_AVX2)
    _mm_sfence();
#endif
}

/* `n` is LANES (a constant where it matters, so that the branch goes away) or the length of a tail. */
INLINE vec load(const elem *p, int64_t n) { return widen(n == LANES ? load_raw(p) : load_raw_part(p, n)); }

INLINE void store(elem *p, vec v, int64_t n, bool stream)
{
    const raw r = narrow(v);
    if (n != LANES)
        store_raw_part(p, r, n);
    else if (stream)
        stream_raw(p, r);
    else
        store_raw(p, r);
}

/* How many elements from p on lie before the next place to stream to: fewer than LANES. */
INLINE int64_t misaligned(const elem *p) { return (int64_t)((-(uintptr_t)p % sizeof(raw)) / sizeof(elem)); }

INLINE vec broadcast(real value) { return value - (vec){0}; }

/* a * b + c, rounded once where the instruction set can, else twice. The compiler is told to fuse nothing by itself: it
 * may choose differently in each copy of a loop, and which copy an element meets depends on the number of threads. */
INLINE vec multiply_add(vec a, vec b, vec c)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float64
    return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(BNKIT_AVX512)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(BNKIT_AVX2) && TYPE == TYPE_float64
    return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(BNKIT_AVX2)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vec choose(ivec condition, vec yes, vec no)
{
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

/* v with zeros from lane n on. */
INLINE vec first_lanes(vec v, int64_t n)
{
    if (n == LANES)
        return v;
    ivec lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    return choose(lane < (lane_index)n, v, (vec){0});
}

/* Sums of vectors in double precision. */
#if TYPE == TYPE_float64
typedef struct {
    vdouble all;
} accumulator;
INLINE void accumulate(accumulator *a, vec v) { a->all += v; }
INLINE void accumulate_at(double *sums, vec v) { *(vec_in_memory *)sums += v; }
INLINE double total(const accumulator *a)
{
    double sum = 0;
    for (int i = 0; i < DOUBLE_LANES; i++)
        sum += a->all[i];
    return sum;
}
#else
typedef vdouble vdouble_in_memory __attribute__((aligned(1), may_alias));
typedef struct {
    vdouble low, high;
} accumulator;
#if defined(BNKIT_AVX512)
INLINE vdouble low_half(vec v) { return (vdouble)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
INLINE vdouble high_half(vec v) { return (vdouble)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
#elif defined(BNKIT_AVX2)
INLINE vdouble low_half(vec v) { return (vdouble)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
INLINE vdouble high_half(vec v) { return (vdouble)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#else
INLINE vdouble low_half(vec v) { return (vdouble){v[0], v[1]}; }
INLINE vdouble high_half(vec v) { return (vdouble){v[2], v[3]}; }
#endif
INLINE void accumulate(accumulator *a, vec v)
{
    a->low += low_half(v);
    a->high += high_half(v);
}
/* To the sums of each lane that lie in order from p on. */
INLINE void accumulate_at(double *sums, vec v)
{
    ((vdouble_in_memory *)sums)[0] += low_half(v);
    ((vdouble_in_memory *)sums)[1] += high_half(v);
}
INLINE double total(const accumulator *a)
{
    const vdouble both = a->low + a->high;
    double sum = 0;
    for (int i = 0; i < DOUBLE_LANES; i++)
        sum += both[i];
    return sum;
}
#endif

#endif
