/* The functions that compute: choose the instruction set and the number of threads, then run the kernels. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "batch_norm.h"
#include "export.h"
#include "memory.h"

enum {
    ELEMENTS_PER_THREAD = 16384, /* with fewer, waking a thread costs more than it does */
    STREAMED_BYTES = 16 << 20    /* larger outputs go past the caches: a last level of 32 MiB would not keep them */
};

#define DECLARE(set)                                                                                                   \
    extern const bnkit_kernels bnkit_kernels_##set##_float32, bnkit_kernels_##set##_bfloat16,                          \
        bnkit_kernels_##set##_float16, bnkit_kernels_##set##_float64;
#define ALL(set)                                                                                                       \
    {                                                                                                                  \
        &bnkit_kernels_##set##_float32, &bnkit_kernels_##set##_bfloat16, &bnkit_kernels_##set##_float16,               \
            &bnkit_kernels_##set##_float64                                                                             \
    }

typedef struct {
    const char *name;
    const bnkit_kernels *kernels[BNKIT_DTYPES];
} instruction_set;

DECLARE(portable)
static instruction_set chosen = {"portable", ALL(portable)};

#ifdef BNKIT_X86
#include <cpuid.h>

DECLARE(avx2)
DECLARE(avx512)
extern const bnkit_kernels bnkit_kernels_avx512bf16_bfloat16;

static bool has_f16c(void) /* not every compiler's __builtin_cpu_supports knows the name */
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Runs when the library is loaded. BNKIT_CPU asks for less than the machine has; for more it asks in vain. */
__attribute__((constructor)) static void choose_instruction_set(void)
{
    const char *wanted = getenv("BNKIT_CPU");
    __builtin_cpu_init();
    if (!has_avx2() || (wanted && strcmp(wanted, "portable") == 0))
        return;
    chosen = (instruction_set){"avx2", ALL(avx2)};
    if (!has_avx512() || (wanted && strcmp(wanted, "avx2") == 0))
        return;
    chosen = (instruction_set){"avx512", ALL(avx512)};
    if (__builtin_cpu_supports("avx512bf16"))
        chosen.kernels[BNKIT_BFLOAT16] = &bnkit_kernels_avx512bf16_bfloat16;
}
#endif

/* A forked child inherits a thread pool without its threads, and would wait for them forever. */
static bool forked = false;

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>
static void note_fork(void) { forked = true; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }
#endif

static int threads_for(int64_t elements, int threads)
{
    const int64_t useful = elements / ELEMENTS_PER_THREAD;
    if (forked || useful <= 1)
        return 1;
    return useful < threads ? (int)useful : threads;
}

/* A single channel is one run of elements, whatever the layout. */
static void flatten_single_channel(int64_t *outer, int64_t channels, int64_t *inner)
{
    if (channels == 1) {
        *inner *= *outer;
        *outer = 1;
    }
}

static size_t bytes_of(int dtype, int64_t elements)
{
    static const size_t size[BNKIT_DTYPES] = {4, 2, 2, 8};
    return size[dtype] * (size_t)elements;
}

/* Whether two outputs can be streamed to in step. */
static bool same_alignment(const void *a, const void *b)
{
    return !a || !b || ((uintptr_t)a - (uintptr_t)b) % 64 == 0;
}

/* What the arguments are packed as (Python's struct): a library of other sources would misread them. The number counts
 * changes of meaning alone. */
EXPORT const char *bnkit_interface(void) { return "2 3q3i??10P2d 3q3i??12P"; }

EXPORT const char *bnkit_instruction_set(void) { return chosen.name; }

/* `packed` is a bnkit_forward at any address; 0 if memory for partial sums is refused. */
EXPORT int bnkit_batch_norm_forward(const void *packed)
{
    bnkit_forward f;
    memcpy(&f, packed, sizeof f);
    const int64_t elements = f.outer * f.channels * f.inner;
    const size_t bytes = bytes_of(f.dtype, elements);
    flatten_single_channel(&f.outer, f.channels, &f.inner);
    bnkit_advise_output(f.y, bytes);
    f.threads = threads_for(elements, f.threads);
    f.stream = bytes > STREAMED_BYTES;
    return chosen.kernels[f.dtype]->forward(&f);
}

/* Likewise a bnkit_backward. */
EXPORT int bnkit_batch_norm_backward(const void *packed)
{
    bnkit_backward g;
    memcpy(&g, packed, sizeof g);
    const int64_t elements = g.outer * g.channels * g.inner;
    const size_t bytes = bytes_of(g.dtype, elements);
    flatten_single_channel(&g.outer, g.channels, &g.inner);
    bnkit_advise_output(g.dx, bytes);
    bnkit_advise_output(g.dresidual, bytes);
    g.threads = threads_for(elements, g.threads);
    g.stream = bytes > STREAMED_BYTES && same_alignment(g.dx, g.dresidual);
    return chosen.kernels[g.dtype]->backward(&g);
}

EXPORT void bnkit_transpose(int dtype, int threads, int64_t outer, int64_t rows, int64_t columns, const void *in,
                            void *out)
{
    const int64_t elements = outer * rows * columns;
    bnkit_advise_output(out, bytes_of(dtype, elements));
    const bnkit_transposition t = {
        .outer = outer, .rows = rows, .columns = columns, .threads = threads_for(elements, threads), .in = in,
        .out = out,
    };
    chosen.kernels[dtype]->transpose(&t);
}
