/* A large output's memory, once released, serves the next output of about its size.
 *
 * The C library's allocator gives it back to the system at once. Its pages have to be cleared before anyone gets them
 * again, and that takes as long as the kernels. The pages of what is kept here the system may still take whenever it
 * runs short (MADV_FREE). A new piece of memory is asked for only after as much has been given back of what is kept, as
 * far as there is any: so the outputs never hold much more together than they once did in use, an eighth at most.
 *
 * Tensors may be released by any thread, and in a forked child whose parent was in here. So nobody waits long for the
 * lock: who doesn't get it does without what is kept. */
#define _DEFAULT_SOURCE
#include "outputs.h"

#include "export.h"
#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(MADV_FREE)
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_KEPT = 256,
    PAGE = 64 << 10, /* the largest of any machine that PyTorch runs on */
    ATTEMPTS = 100,  /* to get the lock, which nobody has for longer than a few microseconds */
    CPU = 1          /* DLPack's kDLCPU */
};

typedef struct {
    char *start;
    size_t bytes;
} span;

typedef struct {
    bnkit_tensor tensor;
    span memory;
    int64_t layout[];
} output;

static struct {
    atomic_flag locked;
    int count;
    span spans[MOST_KEPT]; /* the one that was released last comes last */
} kept = {.locked = ATOMIC_FLAG_INIT};

static bool lock(void)
{
    for (int i = 0; i < ATTEMPTS; i++) {
        if (!atomic_flag_test_and_set_explicit(&kept.locked, memory_order_acquire))
            return true;
        sched_yield();
    }
    return false;
}

static void unlock(void) { atomic_flag_clear_explicit(&kept.locked, memory_order_release); }

static span remove_at(int i)
{
    const span found = kept.spans[i];
    memmove(kept.spans + i, kept.spans + i + 1, (size_t)(--kept.count - i) * sizeof found);
    return found;
}

/* Takes what fits with at most an eighth to spare, the span released last. If there is none, takes the oldest ones out
 * instead, to be given back: as many bytes as are wanted. */
static span take(size_t bytes, span *oldest, int *count)
{
    for (int i = kept.count - 1; i >= 0; i--)
        if (kept.spans[i].bytes >= bytes && kept.spans[i].bytes - bytes <= bytes / 8)
            return remove_at(i);
    for (size_t found = 0; found < bytes && kept.count; found += oldest[(*count)++].bytes)
        oldest[*count] = remove_at(0);
    return (span){NULL, 0};
}

static bool keep(span released)
{
    if (!lock())
        return false;
    const bool has_room = kept.count < MOST_KEPT;
    if (has_room)
        kept.spans[kept.count++] = released;
    unlock();
    return has_room;
}

static size_t give_back(const span *spans, int count)
{
    size_t bytes = 0;
    for (int i = 0; i < count; bytes += spans[i++].bytes)
        munmap(spans[i].start, spans[i].bytes);
    return bytes;
}

/* Begins where a huge page does. */
static span map(size_t bytes)
{
    char *found = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        return (span){NULL, 0};
    const size_t before = (HUGE_PAGE - (uintptr_t)found % HUGE_PAGE) % HUGE_PAGE;
    if (before)
        munmap(found, before);
    munmap(found + before + bytes, HUGE_PAGE - before);
    bnkit_advise_output(found + before, bytes);
    return (span){found + before, bytes};
}

static span acquire(size_t bytes)
{
    span found = {NULL, 0}, oldest[MOST_KEPT];
    int count = 0;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (lock()) {
        found = take(bytes, oldest, &count);
        unlock();
    }
    give_back(oldest, count);
    if (!found.start)
        found = map(bytes);
    if (!found.start && bnkit_give_back_outputs()) /* where what is kept counts against a limit all the same */
        found = map(bytes);
    return found;
}

static void release(bnkit_tensor *tensor)
{
    const span memory = ((output *)tensor)->memory;
    if (madvise(memory.start, memory.bytes, MADV_FREE) || !keep(memory))
        give_back(&memory, 1);
    free(tensor);
}

EXPORT bnkit_tensor *bnkit_new_output(uint8_t code, uint8_t bits, int32_t dimensions, const int64_t *layout,
                                      size_t bytes)
{
    const size_t layout_bytes = 2 * (size_t)dimensions * sizeof *layout;
    output *made = malloc(sizeof *made + layout_bytes);
    if (!made)
        return NULL;
    made->memory = acquire(bytes);
    if (!made->memory.start) {
        free(made);
        return NULL;
    }
    memcpy(made->layout, layout, layout_bytes);
    made->tensor = (bnkit_tensor){
        .data = made->memory.start,
        .device = {CPU, 0},
        .dimensions = dimensions,
        .dtype = {code, bits, 1},
        .shape = made->layout,
        .strides = made->layout + dimensions,
        .release = release,
    };
    return &made->tensor;
}

EXPORT size_t bnkit_give_back_outputs(void)
{
    span all[MOST_KEPT];
    int count = 0;
    if (lock()) {
        count = kept.count;
        memcpy(all, kept.spans, (size_t)count * sizeof *all);
        kept.count = 0;
        unlock();
    }
    return give_back(all, count);
}

/* Else the parent would have to copy, page by page, what its next outputs overwrite. */
static void give_back_in_child(void) { bnkit_give_back_outputs(); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, give_back_in_child); }

#else

EXPORT bnkit_tensor *bnkit_new_output(uint8_t code, uint8_t bits, int32_t dimensions, const int64_t *layout,
                                      size_t bytes)
{
    (void)code, (void)bits, (void)dimensions, (void)layout, (void)bytes;
    return NULL;
}

EXPORT size_t bnkit_give_back_outputs(void) { return 0; }

#endif
