/* channels_last and (N, C), and planes too small for a loop of their own: rows of channels * inner elements.
 *
 * Blocks of rows get their sums, which are merged, then one more sweep over the same blocks, last one first, for its
 * rows may still be in cache. Narrow rows are folded, several to one wide row. The blocks depend on the shape alone and
 * are merged in their order, so results are the same to the bit however many threads there are.
 */
#ifndef BNKIT_ROWS_H
#define BNKIT_ROWS_H

#include <stdlib.h>

#include "row_sweeps.h"
#include "threads.h"

enum {
    ROWS_WIDTH = 64,             /* narrow rows are folded to at least this */
    ROWS_FIRST = 8,              /* folded rows that give the first shift */
    ROWS_CHUNK = 128,            /* folded rows that are summed around it, at least */
    ROWS_BLOCK_ELEMENTS = 32768, /* a block at least */
    ROWS_BLOCK_VALUES = 128,     /* a channel's values in a block at least */
    ROWS_MAX_BLOCKS = 64,
    ROWS_ALIGNMENT = 64          /* of arrays, in bytes: a cache line; of their lengths, in elements */
};

typedef struct {
    int64_t rows, channels, inner;
    int64_t row;    /* elements of a row */
    int64_t fold;   /* rows that are swept as one */
    int64_t padded; /* elements of an array as wide as a folded row: a vector may start at any of them */
    int blocks, threads;
    bool stream;    /* outputs go past the caches */
    int64_t step;   /* channels that threads do not part: those of a mask's byte, if there is one */
    void *memory;
    double *partial[2]; /* (blocks, channels): a block's mean and m2, or its sums of dz and dz_x */
    double *sums;       /* (threads, 2, padded) */
    real *shift;        /* (threads, padded), forward only */
    channel_maps maps;  /* (padded) each */
} rows;

/* What one thread sweeps: blocks [b0, b1) of channels [c0, c1). */
typedef struct {
    int b0, b1;
    int64_t c0, c1;
    double *sum, *dot;
    real *shift;
} row_share;

static bool allocate_rows(rows *p)
{
    const size_t partial = (size_t)round_up(p->blocks * p->channels, ROWS_ALIGNMENT), wide = (size_t)p->padded;
    const size_t doubles = 2 * partial + 2 * wide * p->threads, reals = wide * (p->threads + 5);
    double *memory = p->memory = aligned_alloc(ROWS_ALIGNMENT, doubles * sizeof(double) + reals * sizeof(real));
    if (!memory)
        return false;
    p->partial[0] = memory;
    p->partial[1] = memory + partial;
    p->sums = memory + 2 * partial;
    p->shift = (real *)(memory + doubles);
    real *arrays = p->shift + wide * p->threads;
    p->maps = (channel_maps){arrays, arrays + wide, arrays + 2 * wide, arrays + 3 * wide, arrays + 4 * wide};
    memset(p->shift, 0, reals * sizeof(real)); /* the padding is computed with */
    return true;
}

static bool rows_of(int64_t outer, int64_t channels, int64_t inner, int threads, bool stream, bool masked, rows *p)
{
    *p = (rows){.rows = outer, .channels = channels, .inner = inner, .row = channels * inner, .threads = threads,
                .stream = stream, .step = masked ? 8 : 1};
    p->fold = between(1, (ROWS_WIDTH + p->row - 1) / p->row, outer);
    p->padded = round_up(p->fold * p->row + LANES, ROWS_ALIGNMENT);
    p->blocks = (int)between(1, smaller(outer * inner / ROWS_BLOCK_VALUES, outer * p->row / ROWS_BLOCK_ELEMENTS),
                             ROWS_MAX_BLOCKS);
    return allocate_rows(p);
}

INLINE int64_t row_block_start(const rows *p, int b) { return p->rows * b / p->blocks; }
INLINE double row_values(const rows *p, int64_t begin, int64_t end) { return (double)((end - begin) * p->inner); }

/* The k-th share's first channel. */
INLINE int64_t share_start(const rows *p, int k, int shares)
{
    return k < shares ? p->channels / p->step * k / shares * p->step : p->channels;
}

/* Threads divide the blocks; where there are fewer blocks than threads, the channels too. */
static row_share share_of_rows(const rows *p, int rank, int size)
{
    const int down = (int)smaller(p->blocks, size), across = p->fold == 1 ? size / down : 1;
    const int i = rank % down, k = rank / down;
    row_share s = {.sum = p->sums + 2 * p->padded * rank, .shift = p->shift + p->padded * rank};
    s.dot = s.sum + p->padded;
    if (k < across) {
        s.b0 = p->blocks * i / down;
        s.b1 = p->blocks * (i + 1) / down;
        s.c0 = share_start(p, k, across);
        s.c1 = share_start(p, k + 1, across);
    }
    return s;
}

/* Rows [begin, end) of the share's channels: whole folded rows, and what is left of one. */
static void patches_of(const rows *p, const row_share *s, int64_t begin, int64_t end, patch patches[2])
{
    const int64_t column = s->c0 * p->inner, stride = p->fold * p->row, whole = (end - begin) / p->fold;
    const int64_t width = p->fold > 1 ? stride : (s->c1 - s->c0) * p->inner, start = begin * p->row + column;
    patches[0] = (patch){start, whole, width, stride, column, p->stream};
    patches[1] = (patch){start + whole * stride, 1, (end - begin) % p->fold * p->row, stride, column, p->stream};
}

INLINE bool is_plain(const rows *p) { return p->fold == 1 && p->inner == 1; }

/* Adds up what belongs to each of the share's channels: its places in each of the folded rows. In place: channel c's
 * sum goes to the c-th place, which no later channel reads. */
static void collapse(const rows *p, const row_share *s, double *sums)
{
    if (is_plain(p))
        return;
    for (int64_t c = s->c0; c < s->c1; c++) {
        double sum = 0;
        for (int64_t k = 0; k < p->fold; k++)
            for (int64_t i = 0; i < p->inner; i++)
                sum += sums[k * p->row + c * p->inner + i];
        sums[c] = sum;
    }
}

/* Puts numbers of n channels from c on at all of their places. */
static void spread(const rows *p, real *array, int64_t c, int64_t n, const real *values)
{
    if (is_plain(p)) {
        memcpy(array + c, values, sizeof *values * n);
        return;
    }
    for (int64_t k = 0; k < p->fold; k++)
        for (int64_t j = 0; j < n * p->inner; j++)
            array[k * p->row + c * p->inner + j] = values[j / p->inner];
}

static void spread_forward_maps(const rows *p, int64_t c, int64_t n, channel_maps m)
{
    spread(p, p->maps.shift, c, n, m.shift);
    spread(p, p->maps.scale, c, n, m.scale);
    spread(p, p->maps.offset, c, n, m.offset);
}

static void clear_sums(const rows *p, const row_share *s) { memset(s->sum, 0, 2 * sizeof(double) * p->padded); }

#endif
