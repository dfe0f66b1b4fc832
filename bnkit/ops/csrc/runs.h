/* Loops over a run of elements of one channel that are neighbours in memory. */
#ifndef BNKIT_RUNS_H
#define BNKIT_RUNS_H

#include "vectors.h"

enum { BATCH = UNROLL * LANES };

/* The processor can't foresee where the next run is, `next` elements on: with the `count` from the i-th of n elements,
 * those are asked for that lie AHEAD of them, or as far into the next run, in the same place at the most. */
INLINE void prefetch_ahead(const elem *x, int64_t i, int64_t n, int64_t next, int64_t count)
{
    const int64_t beyond = n < AHEAD ? 0 : AHEAD - n;
    prefetch(x + i + (i + AHEAD < n ? AHEAD : next + beyond), count);
}

/* The i-th channel's numbers in every lane. */
INLINE vec_maps forward_maps_of(const channel_maps *m, int64_t i)
{
    return (vec_maps){
        .shift = broadcast(m->shift[i]), .scale = broadcast(m->scale[i]), .offset = broadcast(m->offset[i])};
}

INLINE vec_maps backward_maps_of(const channel_maps *m, int64_t i)
{
    vec_maps maps = forward_maps_of(m, i);
    maps.slope = broadcast(m->slope[i]);
    maps.constant = broadcast(m->constant[i]);
    return maps;
}

/* Adds the sums of (x - shift) and of its square. The run that will be summed next lies `next` elements on. */
INLINE void sum_run(const elem *x, int64_t next, int64_t n, real shift, accumulator *sum, accumulator *squares)
{
    int64_t i = 0;
    for (; i + BATCH <= n; i += BATCH) {
        vec d[UNROLL];
        prefetch_ahead(x, i, n, next, BATCH);
        for (int k = 0; k < UNROLL; k++)
            d[k] = load(x + i + k * LANES, LANES) - shift;
        accumulate(sum, tree_sum(d));
        accumulate(squares, tree_dot(d, d));
    }
    vec rest = {0}, rest_squares = {0};
    for (; i + LANES <= n; i += LANES) {
        prefetch_ahead(x, i, n, next, LANES);
        const vec d = load(x + i, LANES) - shift;
        rest += d;
        rest_squares = multiply_add(d, d, rest_squares);
    }
    if (i < n) {
        prefetch_ahead(x, i, n, next, n - i);
        const vec d = first_lanes(load(x + i, n - i) - shift, n - i);
        rest += d;
        rest_squares = multiply_add(d, d, rest_squares);
    }
    accumulate(sum, rest);
    accumulate(squares, rest_squares);
}

/* How many elements come before the first whole vector, which is aligned: a store across cache lines costs twice as
 * much, and a streaming one must not be. */
INLINE int64_t head_length(const elem *out, int64_t n)
{
    const int64_t head = misaligned(out);
    return head < n ? head : n;
}

/* x is in the cache, or follows in memory's order; of a residual the run comes next that lies `next` elements on.
 * `ask`, here and below: for that run's lines of the outputs too. */
INLINE void normalize_run(const elem *x, const elem *residual, elem *y, unsigned char *mask, int64_t next, int64_t n,
                          vec_maps m, bool ask, bool stream, int activation, bool add)
{
    bit_writer passed = {.next = mask};
    if (add && n < AHEAD)
        prefetch(residual + next, n);
    if (ask)
        prefetch(y + next, n);
#define NORMALIZE(lanes, past_cache)                                                                                   \
    normalize_vector(x + i, residual + i, y + i, &passed, m, activation, add, lanes, past_cache)
    int64_t i = 0;
    const int64_t head = head_length(y, n);
    if (head > 0)
        NORMALIZE(head, false);
    for (i = head; i + LANES <= n; i += LANES)
        NORMALIZE(LANES, stream);
    if (i < n)
        NORMALIZE(n - i, false);
#undef NORMALIZE
    if (activation == RELU_WITH_MASK)
        finish_bits(&passed);
}

/* Adds the sums of dz and of dz (x - shift). Writes dz out if dresidual is given. The run that will be summed next lies
 * `next` elements on, and its mask at next_mask. */
INLINE void sum_gradient_run(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask,
                             const unsigned char *next_mask, elem *dresidual, int64_t next, int64_t n, vec_maps m,
                             accumulator *sum, accumulator *dot, bool ask, int activation, bool add)
{
#define DZ(i, from_x, lanes) vector_dz(dy + (i), from_x, residual + (i), mask, i, 0, m, activation, add, lanes)
#define PREFETCH(count)                                                                                                \
    prefetch_ahead(x, i, n, next, count), prefetch_ahead(dy, i, n, next, count),                                       \
        prefetch_ahead(residual, i, n, next, add ? (count) : 0)
    int64_t i = 0;
    if (activation == RELU_WITH_MASK)
        prefetch_bits(next_mask, n);
    if (ask && dresidual)
        prefetch(dresidual + next, n);
    for (; i + BATCH <= n; i += BATCH) {
        vec dz[UNROLL], d[UNROLL];
        PREFETCH(BATCH);
        for (int k = 0; k < UNROLL; k++) {
            const int64_t at = i + k * LANES;
            const vec from_x = load(x + at, LANES);
            d[k] = from_x - m.shift;
            dz[k] = DZ(at, from_x, LANES);
            if (dresidual)
                store(dresidual + at, dz[k], LANES, false);
        }
        accumulate(sum, tree_sum(dz));
        accumulate(dot, tree_dot(dz, d));
    }
    vec rest = {0}, rest_dot = {0};
    for (; i + LANES <= n; i += LANES) {
        PREFETCH(LANES);
        const vec from_x = load(x + i, LANES), dz = DZ(i, from_x, LANES);
        if (dresidual)
            store(dresidual + i, dz, LANES, false);
        rest += dz;
        rest_dot = multiply_add(dz, from_x - m.shift, rest_dot);
    }
    if (i < n) {
        PREFETCH(n - i);
        const vec from_x = load(x + i, n - i), dz = first_lanes(DZ(i, from_x, n - i), n - i);
        if (dresidual)
            store(dresidual + i, dz, n - i, false);
        rest += dz;
        rest_dot = multiply_add(dz, from_x - m.shift, rest_dot);
    }
    accumulate(sum, rest);
    accumulate(dot, rest_dot);
#undef PREFETCH
#undef DZ
}

/* dx and dresidual, as far as given. */
INLINE void gradient_run(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask, elem *dx,
                         elem *dresidual, int64_t next, int64_t n, vec_maps m, bool through_x, bool ask, bool stream,
                         int activation, bool add)
{
    if (ask && dx)
        prefetch(dx + next, n);
    if (ask && dresidual)
        prefetch(dresidual + next, n);
#define GRADIENT(i, head, lanes, past_cache)                                                                           \
    gradient_vector(dy + (i), x + (i), residual + (i), mask, i, head, dx ? dx + (i) : NULL,                            \
                    dresidual ? dresidual + (i) : NULL, m, through_x, activation, add, lanes, past_cache)
    /* To have a vector's bits begin a byte of the mask saves more than to align it. */
    const int64_t head = activation == RELU_WITH_MASK && !stream ? 0 : head_length(dx ? dx : dresidual, n);
    int64_t i = head;
    if (head > 0)
        GRADIENT(0, 0, head, false);
    if (activation == RELU_WITH_MASK && head == 0) /* the compiler then knows where in a byte the vectors' bits are */
        for (; i + LANES <= n; i += LANES)
            GRADIENT(i, 0, LANES, stream);
    else
        for (; i + LANES <= n; i += LANES)
            GRADIENT(i, head, LANES, stream);
    if (i < n)
        GRADIENT(i, head, n - i, false);
#undef GRADIENT
}

#endif
