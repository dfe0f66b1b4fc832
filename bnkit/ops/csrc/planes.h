/* How (N, C, *) contiguous tensors are divided: a channel's slab is N planes of `inner` elements, C planes apart.
 *
 * A slab is read from memory once for its sums and again, from cache, for the result; small planes go with their
 * neighbours'. The slab is cut into units (a plane, or a piece of a large one) and blocks of units. The cut depends on
 * the shape alone, and sums are merged in its order, so results are the same to the bit however many threads there are.
 */
#ifndef BNKIT_PLANES_H
#define BNKIT_PLANES_H

#include "runs.h"
#include "threads.h"

enum {
    UNIT_ELEMENTS = 16384,  /* a unit at most */
    CHUNK_ELEMENTS = 8192,  /* about what is summed around one shift */
    FIRST_ELEMENTS = 128,   /* about what gives the first shift */
    BLOCK_ELEMENTS = 32768, /* about a block, unless that makes more than MAX_BLOCKS */
    MAX_BLOCKS = 16,
    MAX_GROUP = 32,         /* adjacent planes that are swept together, for memory likes long runs: as many as */
    GROUP_BYTES = 65536,    /* make up about this in one image, */
    GROUP_MIN_BYTES = 4096, /* or only this, */
    GROUP_SLAB = 1 << 19,   /* to keep the bytes of all images in a core's own cache */
    SHORT_RUN_BYTES = 8192  /* of a group in one image: outputs of the next image are asked for ahead */
};

typedef struct {
    int64_t channels, inner;
    int64_t unit;   /* elements of a unit, the last of a plane excepted: whole bytes of a mask */
    int64_t pieces; /* units a plane */
    int64_t units;  /* units a slab */
    int64_t bits;   /* bytes of a plane's mask */
    int64_t groups; /* of channels, which one thread sweeps together */
    int blocks, threads;
    bool team;      /* threads share each channel, instead of having channels of their own */
    bool short_runs; /* the processor does not learn in time where outputs go on */
} planes;

/* What one thread does: `width` channels from c on, as the rank-th of `size` threads that share them. */
typedef struct {
    int64_t c, width;
    int rank, size;
} share;

/* Two sums or moments of each channel of a share: by block, (blocks, width). */
typedef struct {
    double a[MAX_BLOCKS * MAX_GROUP], b[MAX_BLOCKS * MAX_GROUP];
} partials;

/* `sweeps` that a slab is read in: with one alone, no cache has to keep it. */
static planes planes_of(int64_t outer, int64_t channels, int64_t inner, int threads, int sweeps)
{
    planes p = {.channels = channels, .inner = inner, .bits = (inner + 7) / 8, .threads = threads};
    p.pieces = (inner + UNIT_ELEMENTS - 1) / UNIT_ELEMENTS;
    p.unit = round_up((inner + p.pieces - 1) / p.pieces, 8);
    p.pieces = (inner + p.unit - 1) / p.unit;
    p.units = outer * p.pieces;
    p.blocks = (int)between(1, smaller(outer * inner / BLOCK_ELEMENTS, p.units), MAX_BLOCKS);
    const int64_t bytes = inner * (int64_t)sizeof(elem);
    const int64_t kept = between(GROUP_MIN_BYTES / bytes, GROUP_SLAB / (outer * bytes), GROUP_BYTES / bytes);
    const int64_t together = sweeps > 1 ? between(1, kept, MAX_GROUP) : MAX_GROUP; /* at most */
    const int64_t rounds = (channels + together * threads - 1) / (together * threads);
    p.groups = smaller(channels, rounds * threads); /* the same number for each thread */
    p.short_runs = channels / p.groups * bytes <= SHORT_RUN_BYTES;
    p.team = threads > 1 && channels < 4 * threads && p.blocks >= threads;
    return p;
}

/* Where unit u of channel c starts, if planes are this long and units that. Divisions would cost as much as a small
 * plane. */
INLINE int64_t place_of(const planes *p, int64_t u, int64_t c, int64_t plane, int64_t unit)
{
    if (p->pieces == 1)
        return (u * p->channels + c) * plane;
    return ((u / p->pieces) * p->channels + c) * plane + (u % p->pieces) * unit;
}

/* Unit u of channel c: its first element and its mask's first byte, how far from there the channel goes on, and how
 * many elements it has. */
typedef struct {
    int64_t start, bits, next, next_bits, length;
} unit;

INLINE unit unit_of(const planes *p, int64_t u, int64_t c)
{
    const int64_t after = u + 1 < p->units ? u + 1 : u;
    unit found = {.start = place_of(p, u, c, p->inner, p->unit), .bits = place_of(p, u, c, p->bits, p->unit / 8)};
    found.next = place_of(p, after, c, p->inner, p->unit) - found.start;
    found.next_bits = place_of(p, after, c, p->bits, p->unit / 8) - found.bits;
    found.length = p->pieces == 1 ? p->inner : smaller(p->unit, p->inner - (u % p->pieces) * p->unit);
    return found;
}

INLINE int64_t block_start(const planes *p, int64_t b) { return p->units * b / p->blocks; }
INLINE int first_block(const planes *p, int rank, int size) { return p->blocks * rank / size; }

INLINE double elements_between(const planes *p, int64_t begin, int64_t end)
{
    return (double)((end / p->pieces - begin / p->pieces) * p->inner + (end % p->pieces - begin % p->pieces) * p->unit);
}

/* Calls STEP(i, at, bits, unit) for every channel c + i of the share in every unit of [begin, end): where it starts,
 * and its mask; the rest is as in the unit of channel c. */
#define FOR_EACH_UNIT(p, s, begin, end, STEP)                                                                          \
    for (int64_t u = begin; u < end; u++) {                                                                            \
        const unit first = unit_of(p, u, (s).c);                                                                       \
        for (int64_t i = 0; i < (s).width; i++)                                                                        \
            STEP(i, first.start + i * (p)->inner, first.bits + i * (p)->bits, first);                                  \
    }

/* Runs WORK(share, partials) over all channels. */
#define FOR_ALL_CHANNELS(p, WORK)                                                                                      \
    if ((p).team) {                                                                                                    \
        partials partial[2]; /* by turns, so that one barrier a channel is enough */                                   \
        _Pragma("omp parallel num_threads((p).threads)") for (int64_t c = 0; c < (p).channels; c++)                    \
            WORK(((share){c, 1, thread_rank(), team_size()}), &partial[c % 2]);                                        \
    } else {                                                                                                           \
        _Pragma("omp parallel for schedule(dynamic) num_threads((p).threads) if ((p).threads > 1)")                    \
        for (int64_t k = 0; k < (p).groups; k++) {                                                                     \
            const int64_t c = (p).channels * k / (p).groups, after = (p).channels * (k + 1) / (p).groups;              \
            partials partial;                                                                                          \
            WORK(((share){c, after - c, 0, 1}), &partial);                                                             \
        }                                                                                                              \
    }

#endif
