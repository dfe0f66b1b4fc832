/* Loops over rows in which every element has its own channel: the channels' numbers come as arrays as wide as a row. */
#ifndef BNKIT_ROW_SWEEPS_H
#define BNKIT_ROW_SWEEPS_H

#include "vectors.h"

enum { TILE = 4 }; /* vectors side by side whose sums stay in registers while UNROLL rows go by, in memory's order */

/* `height` pieces of rows, `width` elements each, `stride` apart, from element `start` of the tensor on. The numbers
 * for a piece's first element are at `column` of the arrays, where a whole vector may be read from any column.
 * Passed by value, as the maps are: a compiler then knows that no store changes them. */
typedef struct {
    int64_t start, height, width, stride, column;
    bool stream; /* outputs go past the caches, which the tensor is too large for */
} patch;

INLINE vec_maps forward_maps_at(channel_maps m, int64_t j)
{
    return (vec_maps){.shift = load_vec(m.shift + j), .scale = load_vec(m.scale + j), .offset = load_vec(m.offset + j)};
}

INLINE vec_maps backward_maps_at(channel_maps m, int64_t j)
{
    vec_maps maps = forward_maps_at(m, j);
    maps.slope = load_vec(m.slope + j);
    maps.constant = load_vec(m.constant + j);
    return maps;
}

/* Whether every whole vector of the patch may be streamed to. */
INLINE bool can_stream(const elem *out, patch p)
{
    return misaligned(out + p.start) == 0 && p.stride % (int64_t)(sizeof(raw) / sizeof(elem)) == 0;
}

/* Calls STEP(i, j, lanes) for all vectors of row r: i is their place in the tensor, j in the arrays. Here and below,
 * the numbers that follow j are constants but at the edges. */
#define FOR_EACH_VECTOR(p, r, STEP)                                                                                    \
    do {                                                                                                               \
        const int64_t row_start = (p).start + (r) * (p).stride;                                                        \
        int64_t column = 0;                                                                                            \
        for (; column + LANES <= (p).width; column += LANES)                                                           \
            STEP(row_start + column, (p).column + column, LANES);                                                      \
        if (column < (p).width)                                                                                        \
            STEP(row_start + column, (p).column + column, (p).width - column);                                         \
    } while (0)

/* Calls STEP(i, j, rows, lanes, vectors, next) for all tiles: UNROLL rows by TILE vectors, or fewer at the edges. */
#define FOR_EACH_TILE_OF(p, r, rows, STEP)                                                                             \
    do {                                                                                                               \
        const int64_t row_start = (p).start + (r) * (p).stride;                                                        \
        int64_t column = 0;                                                                                            \
        for (; column + TILE * LANES <= (p).width; column += TILE * LANES)                                             \
            STEP(row_start + column, (p).column + column, rows, LANES, TILE, next_of(p, r, column));                   \
        for (; column + LANES <= (p).width; column += LANES)                                                           \
            STEP(row_start + column, (p).column + column, rows, LANES, 1, next_of(p, r, column));                      \
        if (column < (p).width)                                                                                        \
            STEP(row_start + column, (p).column + column, rows, (p).width - column, 1, -1);                            \
    } while (0)

#define FOR_EACH_TILE(p, STEP)                                                                                         \
    do {                                                                                                               \
        int64_t r = 0;                                                                                                 \
        for (; r + UNROLL <= (p).height; r += UNROLL)                                                                  \
            FOR_EACH_TILE_OF(p, r, UNROLL, STEP);                                                                      \
        if (r < (p).height)                                                                                            \
            FOR_EACH_TILE_OF(p, r, (int)((p).height - r), STEP);                                                       \
    } while (0)

/* Tiles of rows wider than they are do not go through memory in its order, which memory rewards: so with each of them
 * as much is asked for of what lies UNROLL rows ahead, in that order. Narrow rows come in order: asking for them pays
 * only if they come from memory. From which element on, or -1. */
INLINE int64_t next_of(patch p, int64_t r, int64_t column)
{
    if (p.width < p.stride || (p.width <= TILE * LANES && !p.stream))
        return -1;
    const int64_t ahead = UNROLL * p.stride;
    return p.start + r * p.stride + UNROLL * column + (ahead < AHEAD ? AHEAD : ahead);
}

INLINE void ask_for(const elem *x, int64_t next, int vectors)
{
    if (next >= 0)
        prefetch(x + next, UNROLL * vectors * LANES);
}

INLINE void sum_tile(const elem *x, int64_t stride, int height, int64_t lanes, int vectors, const real *shift,
                     double *sum, double *squares)
{
    vec sums[TILE] = {{0}}, dots[TILE] = {{0}};
    for (int k = 0; k < height; k++)
        for (int w = 0; w < vectors; w++) {
            const vec from_x = load(x + k * stride + w * LANES, lanes);
            const vec d = first_lanes(from_x - load_vec(shift + w * LANES), lanes);
            sums[w] += d;
            dots[w] = multiply_add(d, d, dots[w]);
        }
    for (int w = 0; w < vectors; w++) {
        accumulate_at(sum + w * LANES, sums[w]);
        accumulate_at(squares + w * LANES, dots[w]);
    }
}

/* Adds, for each place in a row, the sums of (x - shift) and of its square. */
static void sum_rows(const elem *x, patch p, const real *shift, double *sum, double *squares)
{
#define SUM(i, j, rows, lanes, vectors, next)                                                                          \
    ask_for(x, next, vectors), sum_tile(x + (i), p.stride, rows, lanes, vectors, shift + (j), sum + (j), squares + (j))
    FOR_EACH_TILE(p, SUM);
#undef SUM
}

INLINE void normalize_rows_as(const elem *x, const elem *residual, elem *y, unsigned char *mask, patch p,
                              channel_maps m, bool stream, int activation, bool add)
{
#define NORMALIZE(i, j, lanes)                                                                                         \
    normalize_vector(x + (i), residual + (i), y + (i), &passed, forward_maps_at(m, j), activation, add, lanes, stream)
    for (int64_t r = 0; r < p.height; r++) {
        bit_writer passed = {.next = activation == RELU_WITH_MASK ? mask + (p.start + r * p.stride) / 8 : NULL};
        FOR_EACH_VECTOR(p, r, NORMALIZE);
        if (activation == RELU_WITH_MASK)
            finish_bits(&passed);
    }
#undef NORMALIZE
}

/* A mask's bits are in the order of the tensor, whose rows are whole bytes of it. */
static void normalize_rows(const elem *x, const elem *residual, elem *y, unsigned char *mask, patch p, channel_maps m,
                           int activation)
{
    const bool stream = p.stream && can_stream(y, p);
#define NORMALIZE(activation, add) normalize_rows_as(x, add ? residual : x, y, mask, p, m, stream, activation, add)
    SPECIALIZE(mask, true, activation, residual != NULL, NORMALIZE);
#undef NORMALIZE
}

INLINE void sum_gradient_tile(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask, int64_t i,
                              elem *dresidual, int64_t stride, int height, int64_t lanes, int vectors, channel_maps m,
                              int64_t j, double *sum, double *dot, int activation, bool add, bool stream)
{
    vec sums[TILE] = {{0}}, dots[TILE] = {{0}};
    for (int k = 0; k < height; k++)
        for (int w = 0; w < vectors; w++) {
            const int64_t at = k * stride + w * LANES;
            const vec_maps maps = forward_maps_at(m, j + w * LANES);
            const vec from_x = load(x + at, lanes);
            const vec dz = first_lanes(
                vector_dz(dy + at, from_x, residual + at, mask, i + at, 0, maps, activation, add, lanes), lanes);
            sums[w] += dz;
            dots[w] = multiply_add(dz, from_x - maps.shift, dots[w]);
            if (dresidual)
                store(dresidual + at, dz, lanes, stream);
        }
    for (int w = 0; w < vectors; w++) {
        accumulate_at(sum + j + w * LANES, sums[w]);
        accumulate_at(dot + j + w * LANES, dots[w]);
    }
}

INLINE void sum_gradient_rows_as(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask,
                                 elem *dresidual, patch p, channel_maps m, double *sum, double *dot, bool stream,
                                 int activation, bool add)
{
#define SUM(i, j, rows, lanes, vectors, next)                                                                          \
    ask_for(x, next, vectors), ask_for(dy, next, vectors), ask_for(residual, add ? next : -1, vectors),                \
        sum_gradient_tile(dy + (i), x + (i), residual + (i), mask, i, dresidual ? dresidual + (i) : NULL, p.stride,    \
                          rows, lanes, vectors, m, j, sum, dot, activation, add, stream)
    FOR_EACH_TILE(p, SUM);
#undef SUM
}

/* Adds, for each place in a row, the sums of dz and of dz (x - shift). Writes dz out if dresidual is given. */
static void sum_gradient_rows(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask,
                              elem *dresidual, patch p, channel_maps m, double *sum, double *dot, int activation)
{
    const bool stream = p.stream && dresidual && can_stream(dresidual, p);
#define SUM(activation, add)                                                                                           \
    sum_gradient_rows_as(dy, x, add ? residual : x, mask, dresidual, p, m, sum, dot, stream, activation, add)
    SPECIALIZE(mask, false, activation, residual != NULL, SUM);
#undef SUM
}

INLINE void gradient_rows_as(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask, elem *dx,
                             elem *dresidual, patch p, channel_maps m, bool through_x, bool stream, int activation,
                             bool add)
{
#define GRADIENT(i, j, lanes)                                                                                          \
    gradient_vector(dy + (i), x + (i), residual + (i), mask, i, 0, dx ? dx + (i) : NULL,                               \
                    dresidual ? dresidual + (i) : NULL, backward_maps_at(m, j), through_x, activation, add, lanes,     \
                    stream)
    for (int64_t r = 0; r < p.height; r++)
        FOR_EACH_VECTOR(p, r, GRADIENT);
#undef GRADIENT
}

/* dx and dresidual, as far as given. */
static void gradient_rows(const elem *dy, const elem *x, const elem *residual, const unsigned char *mask, elem *dx,
                          elem *dresidual, patch p, channel_maps m, bool through_x, int activation)
{
    const bool stream = p.stream && (!dx || can_stream(dx, p)) && (!dresidual || can_stream(dresidual, p));
#define GRADIENT(activation, add)                                                                                      \
    gradient_rows_as(dy, x, add ? residual : x, mask, dx, dresidual, p, m, through_x, stream, activation, add)
    SPECIALIZE(mask, false, activation, residual != NULL, GRADIENT);
#undef GRADIENT
}

#endif
