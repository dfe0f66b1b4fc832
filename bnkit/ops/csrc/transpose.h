/* From contiguous to channels_last and back: of each of `outer` matrices its transpose.
 *
 * A matrix goes by in squares as wide as a cache line, so that every line is read and written once, whole, however far
 * apart the lines lie. A square is transposed by interleaving its first half of rows with its second, log2(CACHE_LINE)
 * times: each time the bits of an element's place, those of its row before those of its column, move round by one.
 */
#ifndef BNKIT_TRANSPOSE_H
#define BNKIT_TRANSPOSE_H

#include "element.h"
#include "threads.h"

INLINE void interleave_halves(const elem *restrict from, elem *restrict to)
{
    for (int i = 0; i < CACHE_LINE / 2; i++)
        for (int j = 0; j < CACHE_LINE; j++) {
            to[2 * (i * CACHE_LINE + j)] = from[i * CACHE_LINE + j];
            to[2 * (i * CACHE_LINE + j) + 1] = from[(i + CACHE_LINE / 2) * CACHE_LINE + j];
        }
}

/* `height` rows of `width` elements; both are constants but at the edges, where the rest of the square is garbage. */
INLINE void transpose_square(const elem *in, int64_t in_stride, elem *out, int64_t out_stride, int64_t height,
                             int64_t width)
{
    elem squares[2][CACHE_LINE * CACHE_LINE] __attribute__((aligned(64)));
    int now = 0;
    for (int64_t i = 0; i < height; i++)
        memcpy(squares[now] + i * CACHE_LINE, in + i * in_stride, width * sizeof(elem));
    for (int step = 1; step < CACHE_LINE; step *= 2, now = !now)
        interleave_halves(squares[now], squares[!now]);
    for (int64_t j = 0; j < width; j++)
        memcpy(out + j * out_stride, squares[now] + j * CACHE_LINE, height * sizeof(elem));
}

/* Rows [first, first + height) of one matrix. */
INLINE void transpose_rows(const bnkit_transposition *t, int64_t matrix, int64_t first, int64_t height)
{
    const elem *in = (const elem *)t->in + matrix * t->rows * t->columns + first * t->columns;
    elem *out = (elem *)t->out + matrix * t->rows * t->columns + first;
    int64_t column = 0;
    for (; column + CACHE_LINE <= t->columns; column += CACHE_LINE)
        transpose_square(in + column, t->columns, out + column * t->rows, t->rows, height, CACHE_LINE);
    if (column < t->columns)
        transpose_square(in + column, t->columns, out + column * t->rows, t->rows, height, t->columns - column);
}

static void transpose(const bnkit_transposition *t)
{
    const int64_t strips = (t->rows + CACHE_LINE - 1) / CACHE_LINE;
#pragma omp parallel for num_threads(t->threads) if (t->threads > 1)
    for (int64_t i = 0; i < t->outer * strips; i++) {
        const int64_t first = i % strips * CACHE_LINE;
        if (first + CACHE_LINE <= t->rows)
            transpose_rows(t, i / strips, first, CACHE_LINE);
        else
            transpose_rows(t, i / strips, first, t->rows - first);
    }
}

#endif
