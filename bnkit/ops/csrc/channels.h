/* What is computed once a channel, in double precision, for `n` channels at a time, from channel c of the call on.
 *
 * Forward: z = (x - shift) * scale + offset. The part of the mean that `real` can't hold is in the offset, so z keeps
 * its accuracy where the mean is large against the deviation. Backward, without a mask, computes z again, to the same
 * bit, and then dx = dz * scale + (x - shift) * slope + constant.
 */
#ifndef BNKIT_CHANNELS_H
#define BNKIT_CHANNELS_H

#include "batch_norm.h"
#include "element.h"

enum { MAX_CHANNELS = 64 }; /* of functions that say so */

typedef struct {
    real *shift, *scale, *offset;
    real *slope, *constant; /* backward only */
} channel_maps;

/* Memory for the maps of up to MAX_CHANNELS. */
typedef struct {
    real arrays[5][MAX_CHANNELS];
} maps_memory;

INLINE channel_maps maps_in(maps_memory *m)
{
    return (channel_maps){m->arrays[0], m->arrays[1], m->arrays[2], m->arrays[3], m->arrays[4]};
}

/* Adds `more` values, known by their sums of (x - shift) and its square with shift = (real)mean, to moments of `count`
 * values (Chan et al. 1979). With count = 0, m2 must be zero and `mean` is only the shift. */
static void absorb_sums(int64_t n, double *restrict mean, double *restrict m2, double count,
                        const double *restrict sum, const double *restrict squares, double more)
{
    const double each = 1 / more, fraction = more / (count + more), weight = count * fraction;
    for (int64_t i = 0; i < n; i++) {
        const double offset = sum[i] * each, own_m2 = squares[i] - sum[i] * offset;
        const double delta = (real)mean[i] + offset - mean[i];
        mean[i] += delta * fraction;
        m2[i] += (own_m2 < 0 ? 0 : own_m2) + delta * delta * weight;
    }
}

/* Pools the moments of `count` values with those of `more` others. */
static void merge_moments(int64_t n, double *restrict mean, double *restrict m2, double count,
                          const double *restrict other_mean, const double *restrict other_m2, double more)
{
    const double fraction = more / (count + more), weight = count * fraction;
    for (int64_t i = 0; i < n; i++) {
        const double delta = other_mean[i] - mean[i];
        mean[i] += delta * fraction;
        m2[i] += other_m2[i] + delta * delta * weight;
    }
}

/* Parameters from channel c on, as doubles. */
static void parameters(int64_t n, const void *values, int64_t c, double otherwise, double *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = values ? ((const real *)values)[c + i] : otherwise;
}

static void update_running(int64_t n, void *running, int64_t c, const double *restrict batch, double factor,
                           double momentum)
{
    real *restrict values = (real *)running + c;
    for (int64_t i = 0; i < n; i++)
        values[i] = (real)((1 - momentum) * values[i] + momentum * (batch[i] * factor));
}

/* n <= MAX_CHANNELS */
static void affine_maps(int64_t n, const double *restrict mean, const double *restrict invstd, const void *weight,
                        const void *bias, int64_t c, channel_maps out)
{
    double w[MAX_CHANNELS], b[MAX_CHANNELS];
    real *restrict shift = out.shift, *restrict scale = out.scale, *restrict offset = out.offset;
    parameters(n, weight, c, 1, w);
    parameters(n, bias, c, 0, b);
    for (int64_t i = 0; i < n; i++) {
        const double exact = invstd[i] * w[i];
        shift[i] = (real)mean[i];
        scale[i] = (real)exact;
        offset[i] = (real)(b[i] - (mean[i] - shift[i]) * exact);
    }
}

/* From the batch's moments; `write` puts the statistics out and updates the running ones. n <= MAX_CHANNELS */
static void training_maps(const bnkit_forward *f, int64_t c, int64_t n, const double *restrict mean,
                          const double *restrict m2, bool write, channel_maps out)
{
    const double count = (double)f->outer * f->inner, each = 1 / count;
    double invstd[MAX_CHANNELS];
    for (int64_t i = 0; i < n; i++)
        invstd[i] = 1 / sqrt(m2[i] * each + f->eps);
    if (write) {
        memcpy(f->mean + c, mean, sizeof *mean * n);
        memcpy(f->invstd + c, invstd, sizeof *invstd * n);
        if (f->running_mean)
            update_running(n, f->running_mean, c, mean, 1, f->momentum);
        if (f->running_var)
            update_running(n, f->running_var, c, m2, 1 / (count - 1), f->momentum);
    }
    affine_maps(n, mean, invstd, f->weight, f->bias, c, out);
}

/* From the running statistics, which `write` puts out as well. n <= MAX_CHANNELS */
static void inference_maps(const bnkit_forward *f, int64_t c, int64_t n, bool write, channel_maps out)
{
    double mean[MAX_CHANNELS], invstd[MAX_CHANNELS];
    parameters(n, f->running_mean, c, 0, mean);
    parameters(n, f->running_var, c, 1, invstd);
    for (int64_t i = 0; i < n; i++)
        invstd[i] = 1 / sqrt(invstd[i] + f->eps);
    if (write) {
        memcpy(f->mean + c, mean, sizeof *mean * n);
        memcpy(f->invstd + c, invstd, sizeof *invstd * n);
    }
    affine_maps(n, mean, invstd, f->weight, f->bias, c, out);
}

static void backward_maps(const bnkit_backward *g, int64_t c, int64_t n, channel_maps out)
{
    affine_maps(n, g->mean + c, g->invstd + c, g->weight, g->bias, c, out);
}

static bool needs_sums(const bnkit_backward *g) { return (g->training && g->dx) || g->dweight || g->dbias; }

/* With a residual, the first sweep can leave dz in dresidual, if `elem` holds it exactly; the second reads only that. */
INLINE bool can_keep_dz(const bnkit_backward *g)
{
    return g->dresidual && needs_sums(g) && (g->activation == BNKIT_RELU || sizeof(elem) == sizeof(real));
}

/* From the sums of dz and of dz (x - shift); `write` puts the parameters' gradients out. n <= MAX_CHANNELS */
static void gradient_maps(const bnkit_backward *g, int64_t c, int64_t n, const double *restrict dz,
                          const double *restrict dz_x, bool write, channel_maps out)
{
    const double each = g->training ? 1 / ((double)g->outer * g->inner) : 0;
    const double *restrict mean = g->mean + c, *restrict invstd = g->invstd + c;
    real *restrict slope = out.slope, *restrict constant = out.constant;
    double w[MAX_CHANNELS], dweight[MAX_CHANNELS];
    parameters(n, g->weight, c, 1, w);
    for (int64_t i = 0; i < n; i++) {
        const double scale = w[i] * invstd[i], rest = mean[i] - (real)mean[i];
        dweight[i] = (dz_x[i] - dz[i] * rest) * invstd[i];
        const double exact = -scale * invstd[i] * dweight[i] * each;
        slope[i] = (real)exact;
        constant[i] = (real)(-scale * dz[i] * each - exact * rest);
    }
    for (int64_t i = 0; write && g->dweight && i < n; i++)
        ((real *)g->dweight)[c + i] = (real)dweight[i];
    for (int64_t i = 0; write && g->dbias && i < n; i++)
        ((real *)g->dbias)[c + i] = (real)dz[i];
}

#endif
