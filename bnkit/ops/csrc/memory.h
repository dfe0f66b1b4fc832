/* What the kernels must know of the machine's memory. */
#ifndef BNKIT_MEMORY_H
#define BNKIT_MEMORY_H

#include <stddef.h>

enum { HUGE_PAGE = 2 << 20 };

/* Asks for huge pages under a large output, before it is written to: fresh memory costs a page fault for every 4 KiB
 * otherwise, more than the arithmetic. Does nothing for small ones and where the system has no such thing. */
void bnkit_advise_output(void *start, size_t bytes);

#endif
