/* Vectors of the instruction set this file is compiled for, as compiler vector extensions. */
#ifndef BNKIT_SIMD_H
#define BNKIT_SIMD_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BNKIT_AVX512 1
#define VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define BNKIT_AVX2 1
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(VECTOR_BYTES / 2)));

enum { FLOAT_LANES = VECTOR_BYTES / 4, DOUBLE_LANES = VECTOR_BYTES / 8 };

/* float16 <-> float32. The portable versions are exact for every value: subnormals, infinities, NaN, ties to even. */
#if defined(BNKIT_AVX512)
INLINE vfloat half_to_float(vhalf h) { return (vfloat)_mm512_cvtph_ps((__m256i)h); }
INLINE vhalf float_to_half(vfloat f) { return (vhalf)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(BNKIT_AVX2)
INLINE vfloat half_to_float(vhalf h) { return (vfloat)_mm256_cvtph_ps((__m128i)h); }
INLINE vhalf float_to_half(vfloat f) { return (vhalf)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE vfloat half_to_float(vhalf h)
{
    const vuint32 bits = __builtin_convertvector(h, vuint32);
    const vuint32 sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    const vuint32 special = (vuint32)(magnitude >= 0x0f800000u) & 0x7f800000u;
    const vfloat value = (vfloat)magnitude * 0x1p112f; /* moves the exponent's bias, also for subnormals */
    return (vfloat)((vuint32)value | special | sign);
}
INLINE vhalf float_to_half(vfloat f)
{
    const vuint32 bits = (vuint32)f, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const vuint32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const vuint32 subnormal = (vuint32)((vfloat)magnitude + 0.5f) - 0x3f000000u; /* the addition rounds */
    const vuint32 is_small = (vuint32)(magnitude < 0x38800000u), is_huge = (vuint32)(magnitude >= 0x477ff000u);
    const vuint32 is_nan = (vuint32)(magnitude > 0x7f800000u);
    vuint32 half = (subnormal & is_small) | (normal & ~is_small);
    half = (half & ~is_huge) | (is_huge & 0x7c00u) | (is_nan & 0x0200u);
    return __builtin_convertvector(half | sign, vhalf);
}
#endif

/* The lower half of each lane, and back. */
#if defined(BNKIT_AVX512)
INLINE vuint32 widen_half(vhalf h) { return (vuint32)_mm512_cvtepu16_epi32((__m256i)h); }
INLINE vhalf narrow_half(vuint32 v) { return (vhalf)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(BNKIT_AVX2)
INLINE vuint32 widen_half(vhalf h) { return (vuint32)_mm256_cvtepu16_epi32((__m128i)h); }
INLINE vhalf narrow_half(vuint32 v) /* of values below 2^16 */
{
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (vhalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
}
#else
INLINE vuint32 widen_half(vhalf h) { return __builtin_convertvector(h, vuint32); }
INLINE vhalf narrow_half(vuint32 v) { return __builtin_convertvector(v, vhalf); }
#endif

/* bfloat16 is the upper half of a float32; ties to even, NaN stays NaN. The processor's own instruction takes subnormal
 * numbers for zero. */
INLINE vfloat bfloat_to_float(vhalf h) { return (vfloat)(widen_half(h) << 16); }
#if defined(BNKIT_AVX512) && defined(__AVX512BF16__)
INLINE vhalf float_to_bfloat(vfloat f) { return (vhalf)_mm512_cvtneps_pbh((__m512)f); }
#else
INLINE vhalf float_to_bfloat(vfloat f)
{
    const vuint32 bits = (vuint32)f, is_nan = (vuint32)(f != f);
    const vuint32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return narrow_half(((rounded & ~is_nan) | (is_nan & 0x7fc00000u)) >> 16);
}
#endif

#endif
