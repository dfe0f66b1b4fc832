/* The forward pass over planes. */
#ifndef BNKIT_PLANES_FORWARD_H
#define BNKIT_PLANES_FORWARD_H

#include "planes.h"

/* Sums of units [begin, end) around each channel's (real)mean. */
static void sum_units(const planes *p, const elem *x, share s, int64_t begin, int64_t end, const double *mean,
                      double *sum, double *squares)
{
    accumulator sums[MAX_GROUP], dots[MAX_GROUP];
    memset(sums, 0, sizeof sums[0] * s.width);
    memset(dots, 0, sizeof dots[0] * s.width);
#define SUM(i, at, bits, unit) sum_run(x + at, unit.next, unit.length, (real)mean[i], &sums[i], &dots[i])
    FOR_EACH_UNIT(p, s, begin, end, SUM)
#undef SUM
    for (int64_t i = 0; i < s.width; i++) {
        sum[i] = total(&sums[i]);
        squares[i] = total(&dots[i]);
    }
}

/* The mean of each channel's first few elements from unit `begin` on. */
static void first_means(const planes *p, const elem *x, share s, int64_t begin, int64_t end, double *mean)
{
    const int64_t units = between(1, FIRST_ELEMENTS / p->unit, end - begin);
    const int64_t length = smaller(unit_of(p, begin, s.c).length, FIRST_ELEMENTS);
    for (int64_t i = 0; i < s.width; i++) {
        accumulator sum = {0}, unused = {0};
        for (int64_t u = begin; u < begin + units; u++)
            sum_run(x + unit_of(p, u, s.c + i).start, 0, length, 0, &sum, &unused);
        mean[i] = total(&sum) / (double)(units * length);
    }
}

/* The moments of block b. Each chunk is summed around the mean so far. */
static void moments_of_block(const planes *p, const elem *x, share s, int b, double *mean, double *m2)
{
    const int64_t begin = block_start(p, b), end = block_start(p, b + 1);
    const int64_t chunk = between(1, CHUNK_ELEMENTS / p->unit, end - begin);
    double sum[MAX_GROUP], squares[MAX_GROUP];
    first_means(p, x, s, begin, end, mean);
    memset(m2, 0, sizeof *m2 * s.width);
    for (int64_t next, u = begin; u < end; u = next) {
        next = smaller(u + chunk, end);
        sum_units(p, x, s, u, next, mean, sum, squares);
        absorb_sums(s.width, mean, m2, elements_between(p, begin, u), sum, squares, elements_between(p, u, next));
    }
}

/* From all blocks' moments to the maps; the first thread of those that share the channels writes the statistics. */
static void training_maps_of(const bnkit_forward *f, const planes *p, share s, const partials *partial,
                             channel_maps maps)
{
    double mean[MAX_GROUP], m2[MAX_GROUP];
    memcpy(mean, partial->a, sizeof *mean * s.width);
    memcpy(m2, partial->b, sizeof *m2 * s.width);
    for (int b = 1; b < p->blocks; b++)
        merge_moments(s.width, mean, m2, elements_between(p, 0, block_start(p, b)), partial->a + b * s.width,
                      partial->b + b * s.width, elements_between(p, block_start(p, b), block_start(p, b + 1)));
    training_maps(f, s.c, s.width, mean, m2, s.rank == 0, maps);
}

INLINE void normalize_blocks_as(const bnkit_forward *f, const planes *p, share s, int first, int last,
                                const channel_maps *maps, int activation, bool add)
{
    const elem *x = f->x, *residual = add ? f->residual : f->x;
    unsigned char *mask = f->mask;
    elem *y = f->y;
#define NORMALIZE(i, at, bits, unit)                                                                                   \
    normalize_run(x + at, residual + at, y + at, activation == RELU_WITH_MASK ? mask + (bits) : NULL, unit.next,       \
                  unit.length, forward_maps_of(maps, i), p->short_runs && !f->stream, f->stream, activation, add)
    FOR_EACH_UNIT(p, s, block_start(p, first), block_start(p, last), NORMALIZE)
#undef NORMALIZE
}

static void normalize_blocks(const bnkit_forward *f, const planes *p, share s, int first, int last,
                             const channel_maps *maps)
{
#define NORMALIZE(activation, add) normalize_blocks_as(f, p, s, first, last, maps, activation, add)
    SPECIALIZE(f->mask, true, f->activation, f->residual != NULL, NORMALIZE);
#undef NORMALIZE
}

static void forward_share(const bnkit_forward *f, const planes *p, share s, partials *partial)
{
    const int first = first_block(p, s.rank, s.size), last = first_block(p, s.rank + 1, s.size);
    maps_memory memory;
    const channel_maps maps = maps_in(&memory);
    if (f->training) {
        for (int b = first; b < last; b++)
            moments_of_block(p, f->x, s, b, partial->a + b * s.width, partial->b + b * s.width);
        team_barrier(s.size);
        training_maps_of(f, p, s, partial, maps);
    } else
        inference_maps(f, s.c, s.width, s.rank == 0, maps);
    normalize_blocks(f, p, s, first, last, &maps);
    finish_streaming();
}

static bool forward_planes(const bnkit_forward *f)
{
    const planes p = planes_of(f->outer, f->channels, f->inner, f->threads, f->training ? 2 : 1);
#define FORWARD(share, partial) forward_share(f, &p, share, partial)
    FOR_ALL_CHANNELS(p, FORWARD)
#undef FORWARD
    return true;
}

#endif
