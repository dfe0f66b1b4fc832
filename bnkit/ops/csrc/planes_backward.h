/* The backward pass over planes. */
#ifndef BNKIT_PLANES_BACKWARD_H
#define BNKIT_PLANES_BACKWARD_H

#include "planes.h"

/* Streamed to, dresidual would have to come back from memory for the second sweep. */
INLINE bool keeps_dz(const bnkit_backward *g) { return !g->stream && can_keep_dz(g); }

INLINE void sum_block_as(const bnkit_backward *g, const planes *p, share s, int b, const channel_maps *maps,
                         accumulator *sums, accumulator *dots, int activation, bool add)
{
    const elem *dy = g->dy, *x = g->x, *residual = add ? g->residual : g->x;
    const unsigned char *mask = g->mask;
    elem *dz = keeps_dz(g) ? g->dresidual : NULL;
#define MASK(bits) (activation == RELU_WITH_MASK ? mask + (bits) : NULL)
#define SUM(i, at, bits, unit)                                                                                         \
    sum_gradient_run(dy + at, x + at, residual + at, MASK(bits), MASK(bits + unit.next_bits), dz ? dz + at : NULL,     \
                     unit.next, unit.length, forward_maps_of(maps, i), &sums[i], &dots[i], p->short_runs, activation,  \
                     add)
    FOR_EACH_UNIT(p, s, block_start(p, b), block_start(p, b + 1), SUM)
#undef SUM
}

/* Block b's sums of dz and of dz (x - shift). */
static void sums_of_block(const bnkit_backward *g, const planes *p, share s, int b, const channel_maps *maps,
                          double *dz, double *dz_x)
{
    accumulator sums[MAX_GROUP], dots[MAX_GROUP];
    memset(sums, 0, sizeof sums[0] * s.width);
    memset(dots, 0, sizeof dots[0] * s.width);
#define SUM(activation, add) sum_block_as(g, p, s, b, maps, sums, dots, activation, add)
    SPECIALIZE(g->mask, false, g->activation, g->residual != NULL, SUM);
#undef SUM
    for (int64_t i = 0; i < s.width; i++) {
        dz[i] = total(&sums[i]);
        dz_x[i] = total(&dots[i]);
    }
}

/* From all blocks' sums to the maps; the first thread of those that share the channels writes dweight and dbias. */
static void gradient_maps_of(const bnkit_backward *g, const planes *p, share s, const partials *partial,
                             channel_maps maps)
{
    double dz[MAX_GROUP] = {0}, dz_x[MAX_GROUP] = {0};
    for (int b = 0; b < p->blocks; b++)
        for (int64_t i = 0; i < s.width; i++) {
            dz[i] += partial->a[b * s.width + i];
            dz_x[i] += partial->b[b * s.width + i];
        }
    gradient_maps(g, s.c, s.width, dz, dz_x, s.rank == 0, maps);
}

INLINE void gradient_of_blocks_as(const bnkit_backward *g, const planes *p, share s, int first, int last,
                                  const channel_maps *maps, const elem *dy, elem *dresidual, int activation, bool add)
{
    const elem *x = g->x, *residual = add ? g->residual : g->x;
    const unsigned char *mask = g->mask;
    elem *dx = g->dx;
#define GRADIENT(i, at, bits, unit)                                                                                    \
    gradient_run(dy + at, x + at, residual + at, MASK(bits), dx ? dx + at : NULL, dresidual ? dresidual + at : NULL,   \
                 unit.next, unit.length, backward_maps_of(maps, i), g->training, p->short_runs && !g->stream,          \
                 g->stream, activation, add)
    FOR_EACH_UNIT(p, s, block_start(p, first), block_start(p, last), GRADIENT)
#undef GRADIENT
#undef MASK
}

static void gradient_of_blocks(const bnkit_backward *g, const planes *p, share s, int first, int last,
                               const channel_maps *maps)
{
#define GRADIENT(activation, add)                                                                                      \
    gradient_of_blocks_as(g, p, s, first, last, maps, g->dy, g->dresidual, activation, add)
    if (keeps_dz(g))
        gradient_of_blocks_as(g, p, s, first, last, maps, g->dresidual, NULL, BNKIT_NONE, false);
    else
        SPECIALIZE(g->mask, false, g->activation, g->residual != NULL, GRADIENT);
#undef GRADIENT
}

static void backward_share(const bnkit_backward *g, const planes *p, share s, partials *partial)
{
    const int first = first_block(p, s.rank, s.size), last = first_block(p, s.rank + 1, s.size);
    maps_memory memory = {0};
    const channel_maps maps = maps_in(&memory);
    backward_maps(g, s.c, s.width, maps);
    if (needs_sums(g)) {
        for (int b = first; b < last; b++)
            sums_of_block(g, p, s, b, &maps, partial->a + b * s.width, partial->b + b * s.width);
        team_barrier(s.size);
        gradient_maps_of(g, p, s, partial, maps);
    }
    if (g->dx || (g->dresidual && !keeps_dz(g)))
        gradient_of_blocks(g, p, s, first, last, &maps);
    finish_streaming();
}

static bool backward_planes(const bnkit_backward *g)
{
    const planes p = planes_of(g->outer, g->channels, g->inner, g->threads, needs_sums(g) ? 2 : 1);
#define BACKWARD(share, partial) backward_share(g, &p, share, partial)
    FOR_ALL_CHANNELS(p, BACKWARD)
#undef BACKWARD
    return true;
}

#endif
