/* What is done to one vector of neighbours, whether they share a channel (runs.h) or each have their own (rows.h). */
#ifndef BNKIT_VECTORS_H
#define BNKIT_VECTORS_H

#include "activations.h"
#include "channels.h"
#include "mask.h"

enum {
    UNROLL = 8,
    AHEAD = 4096 / sizeof(elem) /* elements from one in use to the one asked for, at least */
};

/* Calls CALL with the activation and the flag as constants for the cases worth a loop of their own; with a mask, the
 * flag is `masked_flag`. */
#define SPECIALIZE(mask, masked_flag, activation, flag, CALL)                                                          \
    do {                                                                                                               \
        if (mask)                                                                                                      \
            CALL(RELU_WITH_MASK, masked_flag);                                                                         \
        else if ((activation) == BNKIT_NONE && (flag))                                                                 \
            CALL(BNKIT_NONE, true);                                                                                    \
        else if ((activation) == BNKIT_NONE)                                                                           \
            CALL(BNKIT_NONE, false);                                                                                   \
        else if ((activation) == BNKIT_RELU && (flag))                                                                 \
            CALL(BNKIT_RELU, true);                                                                                    \
        else if ((activation) == BNKIT_RELU)                                                                           \
            CALL(BNKIT_RELU, false);                                                                                   \
        else if (flag)                                                                                                 \
            CALL((activation), true);                                                                                  \
        else                                                                                                           \
            CALL((activation), false);                                                                                 \
    } while (0)

/* Of one channel in every lane, or of neighbouring channels: see channels.h. */
typedef struct {
    vec shift, scale, offset;
    vec slope, constant; /* backward's second sweep only */
} vec_maps;

/* Eight summands as a tree: with double accumulators for the trees' results, a sum costs little more than in float and
 * is nearly as exact as in double. */
INLINE vec tree_sum(const vec v[UNROLL])
{
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

INLINE vec tree_dot(const vec v[UNROLL], const vec w[UNROLL])
{
    vec pairs[UNROLL / 2];
    for (int k = 0; k < UNROLL / 2; k++)
        pairs[k] = multiply_add(v[2 * k], w[2 * k], v[2 * k + 1] * w[2 * k + 1]);
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

/* Below, n is LANES or a tail's length; pointers to elements are to the vector's first. `residual` counts if `add`, the
 * mask under RELU_WITH_MASK: it goes to `passed`, and comes from the i-th bit of `mask` on, a head and whole vectors
 * after its start. */

INLINE vec before_activation(vec x, const elem *residual, vec_maps m, bool add, int64_t n)
{
    const vec z = multiply_add(x - m.shift, m.scale, m.offset);
    return add ? z + load(residual, n) : z;
}

INLINE void normalize_vector(const elem *x, const elem *residual, elem *y, bit_writer *passed, vec_maps m,
                             int activation, bool add, int64_t n, bool stream)
{
    const vec z = before_activation(load(x, n), residual, m, add, n);
    if (activation == RELU_WITH_MASK) {
        const uint32_t bits = passed_lanes(z);
        put_bits(passed, n == LANES ? bits : bits & ((1u << n) - 1), n);
        store(y, activate(z, BNKIT_RELU), n, stream);
    } else
        store(y, activate(z, activation), n, stream);
}

INLINE vec vector_dz(const elem *dy, vec x, const elem *residual, const unsigned char *mask, int64_t i, int64_t head,
                     vec_maps m, int activation, bool add, int64_t n)
{
    if (activation == BNKIT_NONE)
        return load(dy, n);
    if (activation == RELU_WITH_MASK)
        return keep_lanes(load(dy, n), bits_at(mask + (uint64_t)i / 8, bit_of(i, head)));
    return gradient_through(load(dy, n), before_activation(x, residual, m, add, n), activation);
}

/* `through_x`: whether dx has the terms that come by way of the batch's statistics. */
INLINE void gradient_vector(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask, int64_t i,
                            int64_t head, elem *dx, elem *dresidual, vec_maps m, bool through_x, int activation,
                            bool add, int64_t n, bool stream)
{
    const vec from_x = load(x, n), dz = vector_dz(dy, from_x, residual, mask, i, head, m, activation, add, n);
    if (dx && through_x)
        store(dx, multiply_add(dz, m.scale, multiply_add(from_x - m.shift, m.slope, m.constant)), n, stream);
    else if (dx)
        store(dx, dz * m.scale, n, stream);
    if (dresidual)
        store(dresidual, dz, n, stream);
}

#endif
