/* Loops over rows in which every element has its own channel: the channels' numbers come as arrays as wide as a row. */
#ifndef BNKIT_ROW_SWEEPS_H
#define BNKIT_ROW_SWEEPS_H

#include "vectors.h"

/* `height` pieces of rows, `width` elements each, `stride` apart, from element `start` of the tensor on. The numbers
 * for a piece's first element are at `column` of the arrays, where a whole vector may be read from any column.
 * Passed by value, as the maps are: a compiler then knows that no store changes them. */
typedef struct {
    int64_t start, height, width, stride, column;
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

/* Calls STEP(i, j, rows, lanes) for all vectors of `rows` rows from row r on: i is their place in the tensor, j in the
 * arrays. `rows` and `lanes` are constants but at the edges. */
#define FOR_EACH_VECTOR(p, r, rows, STEP)                                                                              \
    do {                                                                                                               \
        const int64_t row_start = (p).start + (r) * (p).stride;                                                        \
        int64_t column = 0;                                                                                            \
        for (; column + LANES <= (p).width; column += LANES)                                                           \
            STEP(row_start + column, (p).column + column, rows, LANES);                                                \
        if (column < (p).width)                                                                                        \
            STEP(row_start + column, (p).column + column, rows, (p).width - column);                                   \
    } while (0)

#define FOR_EACH_ROW(p, STEP)                                                                                          \
    for (int64_t r = 0; r < (p).height; r++)                                                                           \
        FOR_EACH_VECTOR(p, r, 1, STEP)

#define FOR_EACH_EIGHT_ROWS(p, STEP)                                                                                   \
    do {                                                                                                               \
        int64_t r = 0;                                                                                                 \
        for (; r + UNROLL <= (p).height; r += UNROLL)                                                                  \
            FOR_EACH_VECTOR(p, r, UNROLL, STEP);                                                                       \
        if (r < (p).height)                                                                                            \
            FOR_EACH_VECTOR(p, r, (int)((p).height - r), STEP);                                                        \
    } while (0)

/* Whether to ask for the next eight rows while eight are summed: where rows are so long that the processor loses sight
 * of what comes next, and so short that eight of them stay in its first cache. */
INLINE bool fetches_ahead(patch p)
{
    const int64_t bytes = p.stride * (int64_t)sizeof(elem);
    return 256 <= bytes && bytes <= 1024;
}

INLINE void prefetch_next_rows(const elem *x, int64_t stride)
{
    for (int k = 0; k < UNROLL; k++)
        __builtin_prefetch(x + (k + UNROLL) * stride);
}

INLINE void sum_column(const elem *x, int64_t stride, int height, int64_t lanes, vec shift, double *sum,
                       double *squares, bool ahead)
{
    vec d[UNROLL];
    if (ahead)
        prefetch_next_rows(x, stride);
    for (int k = 0; k < UNROLL; k++)
        d[k] = k < height ? first_lanes(load(x + k * stride, lanes) - shift, lanes) : (vec){0};
    accumulate_at(sum, tree_sum(d));
    accumulate_at(squares, tree_dot(d, d));
}

/* Adds, for each place in a row, the sums of (x - shift) and of its square. */
static void sum_rows(const elem *x, patch p, const real *shift, double *sum, double *squares)
{
#define SUM(i, j, rows, lanes)                                                                                         \
    sum_column(x + (i), p.stride, rows, lanes, load_vec(shift + (j)), sum + (j), squares + (j), ahead)
    const bool ahead = fetches_ahead(p);
    FOR_EACH_EIGHT_ROWS(p, SUM);
#undef SUM
}

INLINE void normalize_rows_as(const elem *x, const elem *residual, elem *y, patch p, channel_maps m, bool stream,
                              int activation, bool add)
{
#define NORMALIZE(i, j, rows, lanes)                                                                                   \
    normalize_vector(x + (i), residual + (i), y + (i), forward_maps_at(m, j), activation, add, lanes, stream)
    FOR_EACH_ROW(p, NORMALIZE);
#undef NORMALIZE
}

static void normalize_rows(const elem *x, const elem *residual, elem *y, patch p, channel_maps m, int activation,
                           bool stream)
{
    stream = stream && can_stream(y, p);
#define NORMALIZE(activation, add) normalize_rows_as(x, add ? residual : x, y, p, m, stream, activation, add)
    SPECIALIZE(activation, residual != NULL, NORMALIZE);
#undef NORMALIZE
}

INLINE void sum_gradient_column(const elem *dy, const elem *x, const elem *residual, elem *dresidual, int64_t stride,
                                int height, int64_t lanes, vec_maps m, double *sum, double *dot, int activation,
                                bool add, bool stream, bool ahead)
{
    vec dz[UNROLL], d[UNROLL];
    if (ahead) {
        prefetch_next_rows(x, stride);
        prefetch_next_rows(dy, stride);
        if (add)
            prefetch_next_rows(residual, stride);
    }
    for (int k = 0; k < UNROLL; k++) {
        dz[k] = d[k] = (vec){0};
        if (k >= height)
            continue;
        const int64_t at = k * stride;
        const vec from_x = load(x + at, lanes);
        d[k] = from_x - m.shift;
        dz[k] = first_lanes(vector_dz(dy + at, from_x, residual + at, m, activation, add, lanes), lanes);
        if (dresidual)
            store(dresidual + at, dz[k], lanes, stream);
    }
    accumulate_at(sum, tree_sum(dz));
    accumulate_at(dot, tree_dot(dz, d));
}

INLINE void sum_gradient_rows_as(const elem *dy, const elem *x, const elem *residual, elem *dresidual, patch p,
                                 channel_maps m, double *sum, double *dot, bool stream, int activation, bool add)
{
#define SUM(i, j, rows, lanes)                                                                                         \
    sum_gradient_column(dy + (i), x + (i), residual + (i), dresidual ? dresidual + (i) : NULL, p.stride, rows, lanes,  \
                        forward_maps_at(m, j), sum + (j), dot + (j), activation, add, stream, ahead)
    const bool ahead = fetches_ahead(p);
    FOR_EACH_EIGHT_ROWS(p, SUM);
#undef SUM
}

/* Adds, for each place in a row, the sums of dz and of dz (x - shift). Writes dz out if dresidual is given. */
static void sum_gradient_rows(const elem *dy, const elem *x, const elem *residual, elem *dresidual, patch p,
                              channel_maps m, double *sum, double *dot, int activation, bool stream)
{
    stream = stream && dresidual && can_stream(dresidual, p);
#define SUM(activation, add)                                                                                           \
    sum_gradient_rows_as(dy, x, add ? residual : x, dresidual, p, m, sum, dot, stream, activation, add)
    SPECIALIZE(activation, residual != NULL, SUM);
#undef SUM
}

INLINE void gradient_rows_as(const elem *dy, const elem *x, const elem *residual, elem *dx, elem *dresidual, patch p,
                             channel_maps m, bool through_x, bool stream, int activation, bool add)
{
#define GRADIENT(i, j, rows, lanes)                                                                                    \
    gradient_vector(dy + (i), x + (i), residual + (i), dx ? dx + (i) : NULL, dresidual ? dresidual + (i) : NULL,       \
                    backward_maps_at(m, j), through_x, activation, add, lanes, stream)
    FOR_EACH_ROW(p, GRADIENT);
#undef GRADIENT
}

/* dx and dresidual, as far as given. */
static void gradient_rows(const elem *dy, const elem *x, const elem *residual, elem *dx, elem *dresidual, patch p,
                          channel_maps m, bool through_x, int activation, bool stream)
{
    stream = stream && (!dx || can_stream(dx, p)) && (!dresidual || can_stream(dresidual, p));
#define GRADIENT(activation, add)                                                                                      \
    gradient_rows_as(dy, x, add ? residual : x, dx, dresidual, p, m, through_x, stream, activation, add)
    SPECIALIZE(activation, residual != NULL, GRADIENT);
#undef GRADIENT
}

#endif
