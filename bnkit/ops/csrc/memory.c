#define _DEFAULT_SOURCE
#include "memory.h"

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { LARGE_OUTPUT = 4 << 20 };

void bnkit_advise_output(void *start, size_t bytes)
{
#if defined(MADV_HUGEPAGE)
    if (!start || bytes < LARGE_OUTPUT)
        return;
    const uintptr_t begin = ((uintptr_t)start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = ((uintptr_t)start + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* advice: whether it is taken changes no result */
#else
    (void)start, (void)bytes;
#endif
}
