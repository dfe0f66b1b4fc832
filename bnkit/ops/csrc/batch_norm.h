/* Fused batch normalization on the CPU: y = activation((x - mean) * invstd * weight + bias + residual).
 *
 * A tensor is (outer, channels, inner), contiguous: (N, C, *) has inner = product of the spatial sizes, channels_last
 * and (N, C) have outer = all rows and inner = 1. Pointers need only their element's alignment.
 */
#ifndef BNKIT_BATCH_NORM_H
#define BNKIT_BATCH_NORM_H

#include <stdbool.h>
#include <stdint.h>

enum bnkit_dtype { BNKIT_FLOAT32, BNKIT_BFLOAT16, BNKIT_FLOAT16, BNKIT_FLOAT64, BNKIT_DTYPES };

enum bnkit_activation {
    BNKIT_NONE,
    BNKIT_RELU,
    BNKIT_LEAKY_RELU,
    BNKIT_SILU,
    BNKIT_GELU,
    BNKIT_HARDSWISH,
    BNKIT_SIGMOID,
    BNKIT_TANH
};

/* "real" below: double for float64, else float. "elem": the activations' type. The caller fills in all but `stream`, and
 * packs these two in this order: _cpu_library.py, bnkit_interface. */
typedef struct {
    int64_t outer, channels, inner;
    int dtype, activation;
    int threads;            /* at most */
    bool training;
    bool stream;            /* y goes past the caches */
    const void *x;          /* elem (outer, channels, inner) */
    const void *residual;   /* elem, like x, or NULL */
    const void *weight;     /* real (channels), or NULL for ones */
    const void *bias;       /* real (channels), or NULL for zeros */
    void *running_mean;     /* real (channels): updated in training unless NULL, read in inference */
    void *running_var;      /* real (channels), likewise */
    double *mean;           /* out: (channels), of the batch in training, else the running one */
    double *invstd;         /* out: (channels), 1 / sqrt(variance + eps), in training of the biased variance */
    void *y;                /* out: elem, like x */
    void *mask;             /* out: which values ReLU passed (mask.h), of the size in cpu.py, or NULL */
    double momentum, eps;
} bnkit_forward;

typedef struct {
    int64_t outer, channels, inner;
    int dtype, activation;
    int threads;
    bool training;          /* mean and invstd depend on x */
    bool stream;
    const void *dy, *x;     /* elem (outer, channels, inner) */
    const void *residual;   /* elem, like x; NULL if there was none, or no activation, or a mask */
    const void *mask;       /* forward's, or NULL if it made none */
    const void *weight, *bias; /* real (channels), or NULL */
    const double *mean, *invstd; /* (channels) */
    void *dx, *dresidual;   /* out: elem, like x, or NULL when not wanted */
    void *dweight, *dbias;  /* out: real (channels), or NULL when not wanted */
} bnkit_backward;

typedef struct {
    int64_t outer, rows, columns;
    int threads;
    const void *in;         /* elem (outer, rows, columns) */
    void *out;              /* out: elem (outer, columns, rows) */
} bnkit_transposition;

/* Whether an image is swept as one row, since its planes are so short that they would leave vectors too empty. */
static inline bool in_rows(int64_t inner) { return inner < 16; }

/* One instruction set's code for one element type. The passes return false when memory for partial sums is refused. */
typedef struct {
    bool (*forward)(const bnkit_forward *);
    bool (*backward)(const bnkit_backward *);
    void (*transpose)(const bnkit_transposition *);
} bnkit_kernels;

#endif
