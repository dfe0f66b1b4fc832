/* Dividing work, and waiting for each other. Without OpenMP everything runs on the caller's thread. */
#ifndef BNKIT_THREADS_H
#define BNKIT_THREADS_H

#include <stdint.h>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
INLINE int thread_rank(void) { return omp_get_thread_num(); }
INLINE int team_size(void) { return omp_get_num_threads(); }
#else
INLINE int thread_rank(void) { return 0; }
INLINE int team_size(void) { return 1; }
#endif

/* Of all `size` threads of the parallel region, or of none. */
INLINE void team_barrier(int size)
{
    if (size > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
}

INLINE int64_t between(int64_t least, int64_t value, int64_t most)
{
    if (value > most)
        value = most;
    return value < least ? least : value;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

#endif
