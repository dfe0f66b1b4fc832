/* The backward pass over rows. */
#ifndef BNKIT_ROWS_BACKWARD_H
#define BNKIT_ROWS_BACKWARD_H

#include "rows.h"

static void sums_of_row_block(const bnkit_backward *g, const rows *p, const row_share *s, int b)
{
    double *dz = p->partial[0] + b * p->channels, *dz_x = p->partial[1] + b * p->channels;
    const size_t bytes = sizeof *dz * (s->c1 - s->c0);
    patch patches[2];
    patches_of(p, s, row_block_start(p, b), row_block_start(p, b + 1), patches);
    clear_sums(p, s);
    for (int i = 0; i < 2; i++)
        sum_gradient_rows(g->dy, g->x, g->residual, g->mask, can_keep_dz(g) ? g->dresidual : NULL, patches[i], p->maps,
                          s->sum, s->dot, g->activation);
    collapse(p, s, s->sum);
    collapse(p, s, s->dot);
    memcpy(dz + s->c0, s->sum + s->c0, bytes);
    memcpy(dz_x + s->c0, s->dot + s->c0, bytes);
}

/* From the blocks' sums to the maps of n channels from c on. */
static void row_gradient_maps(const bnkit_backward *g, const rows *p, int64_t c, int64_t n)
{
    maps_memory memory;
    const channel_maps maps = maps_in(&memory);
    double *dz = p->partial[0] + c, *dz_x = p->partial[1] + c;
    for (int b = 1; b < p->blocks; b++)
        for (int64_t i = 0; i < n; i++) {
            dz[i] += dz[b * p->channels + i];
            dz_x[i] += dz_x[b * p->channels + i];
        }
    gradient_maps(g, c, n, dz, dz_x, true, maps);
    spread(p, p->maps.slope, c, n, maps.slope);
    spread(p, p->maps.constant, c, n, maps.constant);
}

static void row_backward_maps(const bnkit_backward *g, const rows *p, int64_t c, int64_t n)
{
    maps_memory memory;
    backward_maps(g, c, n, maps_in(&memory));
    spread_forward_maps(p, c, n, maps_in(&memory));
}

static void gradient_of_row_block(const bnkit_backward *g, const rows *p, const row_share *s, int b)
{
    patch patches[2];
    patches_of(p, s, row_block_start(p, b), row_block_start(p, b + 1), patches);
    for (int i = 0; i < 2; i++)
        if (can_keep_dz(g))
            gradient_rows(g->dresidual, g->x, NULL, NULL, g->dx, NULL, patches[i], p->maps, g->training, BNKIT_NONE);
        else
            gradient_rows(g->dy, g->x, g->residual, g->mask, g->dx, g->dresidual, patches[i], p->maps, g->training,
                          g->activation);
}

static void backward_rows_share(const bnkit_backward *g, const rows *p, int rank, int size)
{
    const row_share s = share_of_rows(p, rank, size);
    const int64_t c0 = p->channels * rank / size, c1 = p->channels * (rank + 1) / size;
    for (int64_t c = c0; c < c1; c += MAX_CHANNELS)
        row_backward_maps(g, p, c, smaller(c1 - c, MAX_CHANNELS));
    team_barrier(size);
    if (needs_sums(g)) {
        for (int b = s.b0; b < s.b1; b++)
            sums_of_row_block(g, p, &s, b);
        team_barrier(size);
        for (int64_t c = c0; c < c1; c += MAX_CHANNELS)
            row_gradient_maps(g, p, c, smaller(c1 - c, MAX_CHANNELS));
        team_barrier(size);
    }
    if (g->dx || (g->dresidual && !can_keep_dz(g)))
        for (int b = s.b1; b-- > s.b0;)
            gradient_of_row_block(g, p, &s, b);
    finish_streaming();
}

static bool backward_rows(const bnkit_backward *g)
{
    rows p;
    if (!rows_of(g->outer, g->channels, g->inner, g->threads, g->stream, g->mask != NULL, &p))
        return false;
    if (p.threads == 1)
        backward_rows_share(g, &p, 0, 1);
    else {
#pragma omp parallel num_threads(p.threads)
        backward_rows_share(g, &p, thread_rank(), team_size());
    }
    free(p.memory);
    return true;
}

#endif
