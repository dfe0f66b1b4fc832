/* The forward pass over rows. */
#ifndef BNKIT_ROWS_FORWARD_H
#define BNKIT_ROWS_FORWARD_H

#include "rows.h"

/* Sums of rows [begin, end) around the share's shift. */
static void sum_share(const rows *p, const row_share *s, const elem *x, int64_t begin, int64_t end)
{
    patch patches[2];
    patches_of(p, s, begin, end, patches);
    clear_sums(p, s);
    for (int i = 0; i < 2; i++)
        sum_rows(x, patches[i], s->shift, s->sum, s->dot);
    collapse(p, s, s->sum);
    collapse(p, s, s->dot);
}

static void set_shift(const rows *p, const row_share *s, const double *mean)
{
    real values[MAX_CHANNELS];
    for (int64_t n, c = s->c0; c < s->c1; c += n) {
        n = smaller(s->c1 - c, MAX_CHANNELS);
        for (int64_t i = 0; i < n; i++)
            values[i] = (real)mean[c + i];
        spread(p, s->shift, c, n, values);
    }
}

/* Each chunk is summed around the mean so far, the first around that of its first rows. It is as long as all before it:
 * however far its values lie from their mean, the variance of them all has a good part of that distance in it. */
static void moments_of_row_block(const rows *p, const row_share *s, const elem *x, int b)
{
    const int64_t begin = row_block_start(p, b), end = row_block_start(p, b + 1), chunk = ROWS_CHUNK * p->fold;
    const int64_t first = smaller(begin + ROWS_FIRST * p->fold, end), n = s->c1 - s->c0;
    double *mean = p->partial[0] + b * p->channels, *m2 = p->partial[1] + b * p->channels;
    memset(s->shift, 0, sizeof(real) * p->padded);
    sum_share(p, s, x, begin, first);
    for (int64_t c = s->c0; c < s->c1; c++)
        mean[c] = s->sum[c] / row_values(p, begin, first);
    memset(m2 + s->c0, 0, sizeof *m2 * n);
    for (int64_t next, r = begin; r < end; r = next) {
        next = smaller(r + (r - begin < chunk ? chunk : r - begin), end);
        set_shift(p, s, mean);
        sum_share(p, s, x, r, next);
        absorb_sums(n, mean + s->c0, m2 + s->c0, row_values(p, begin, r), s->sum + s->c0, s->dot + s->c0,
                    row_values(p, r, next));
    }
}

/* From the blocks' moments, or the running statistics, to the maps of n channels from c on. */
static void row_forward_maps(const bnkit_forward *f, const rows *p, int64_t c, int64_t n)
{
    maps_memory memory;
    const channel_maps maps = maps_in(&memory);
    double *mean = p->partial[0] + c, *m2 = p->partial[1] + c;
    for (int b = 1; f->training && b < p->blocks; b++) {
        const int64_t begin = row_block_start(p, b);
        merge_moments(n, mean, m2, row_values(p, 0, begin), mean + b * p->channels, m2 + b * p->channels,
                      row_values(p, begin, row_block_start(p, b + 1)));
    }
    if (f->training)
        training_maps(f, c, n, mean, m2, true, maps);
    else
        inference_maps(f, c, n, true, maps);
    spread_forward_maps(p, c, n, maps);
}

static void forward_rows_share(const bnkit_forward *f, const rows *p, int rank, int size)
{
    const row_share s = share_of_rows(p, rank, size);
    const int64_t c0 = p->channels * rank / size, c1 = p->channels * (rank + 1) / size;
    if (f->training) {
        for (int b = s.b0; b < s.b1; b++)
            moments_of_row_block(p, &s, f->x, b);
        team_barrier(size);
    }
    for (int64_t c = c0; c < c1; c += MAX_CHANNELS)
        row_forward_maps(f, p, c, smaller(c1 - c, MAX_CHANNELS));
    team_barrier(size);
    for (int b = s.b1; b-- > s.b0;) {
        patch patches[2];
        patches_of(p, &s, row_block_start(p, b), row_block_start(p, b + 1), patches);
        for (int i = 0; i < 2; i++)
            normalize_rows(f->x, f->residual, f->y, f->mask, patches[i], p->maps, f->activation);
    }
    finish_streaming();
}

static bool forward_rows(const bnkit_forward *f)
{
    rows p;
    if (!rows_of(f->outer, f->channels, f->inner, f->threads, f->stream, f->mask != NULL, &p))
        return false;
    if (p.threads == 1)
        forward_rows_share(f, &p, 0, 1);
    else {
#pragma omp parallel num_threads(p.threads)
        forward_rows_share(f, &p, thread_rank(), team_size());
    }
    free(p.memory);
    return true;
}

#endif
