/* Which values of z ReLU passed, a bit each: where there is a residual, backward would have to read it again to know.
 *
 * Each plane's bits, or row's, begin with a byte of their own, so that no two threads write to one byte. Bit i % 8 of
 * byte i / 8 is that of the run's i-th element.
 */
#ifndef BNKIT_MASK_H
#define BNKIT_MASK_H

#include "element.h"

enum {
    RELU_WITH_MASK = 64 /* an activation: the ReLU whose mask is kept, or was */
};

/* Of a vector's lanes those that ReLU passes: NaN too. */
INLINE uint32_t passed_lanes(vec z)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float64
    return _mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_NLE_UQ);
#elif defined(BNKIT_AVX512)
    return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(BNKIT_AVX2) && TYPE == TYPE_float64
    return (uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)z, _mm256_setzero_pd(), _CMP_NLE_UQ));
#elif defined(BNKIT_AVX2)
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (uint32_t) !(z[i] <= 0) << i;
    return bits;
#endif
}

/* v with zeros where the bits have them. Bits beyond the lanes do not count. */
INLINE vec keep_lanes(vec v, uint32_t bits)
{
#if defined(BNKIT_AVX512) && TYPE == TYPE_float64
    return (vec)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)v);
#elif defined(BNKIT_AVX512)
    return (vec)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
    ivec lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = (lane_index)1 << i;
    return choose((((lane_index)bits + (ivec){0}) & lane) != 0, v, (vec){0});
#endif
}

/* Writes bits one after the other, a word at a time: more stores among those of whole vectors would slow these down. */
typedef struct {
    unsigned char *next;
    uint64_t word;
    int count; /* bits in the word */
} bit_writer;

/* Of n bits, no others being set. */
INLINE void put_bits(bit_writer *w, uint64_t bits, int64_t n)
{
    w->word |= bits << w->count;
    w->count += (int)n;
    if (w->count < 64)
        return;
    for (int k = 0; k < 8; k++)
        w->next[k] = (unsigned char)(w->word >> 8 * k);
    w->next += 8;
    w->count -= 64;
    w->word = w->count ? bits >> (n - w->count) : 0;
}

INLINE void finish_bits(bit_writer *w)
{
    for (; w->count > 0; w->count -= 8, w->word >>= 8)
        *w->next++ = (unsigned char)w->word;
}

/* Of a vector that begins `head` elements after a run's start, or whole vectors later, the bit in its byte: the
 * compiler knows it where it knows the head, if vectors are whole bytes. */
INLINE int bit_of(int64_t i, int64_t head) { return (int)(LANES % 8 ? i % 8 : head % 8); }

/* LANES bits or more from this bit of *p on. Two bytes after the last of them may be read. */
INLINE uint32_t bits_at(const unsigned char *p, int bit)
{
    const uint32_t low = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    return bit ? (low | (uint32_t)p[2] << 16) >> bit : low;
}

INLINE void prefetch_bits(const unsigned char *mask, int64_t n)
{
    for (int64_t i = 0; i < n; i += 8 * 64)
        __builtin_prefetch(mask + i / 8, 0, 2);
}

#endif
