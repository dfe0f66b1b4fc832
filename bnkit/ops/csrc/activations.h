/* The activations and their slopes on vectors. Where PyTorch's yields NaN for NaN, so do these.
 *
 * none and relu are inlined in every loop; the others are called a vector at a time, for they cost more than the call.
 * The polynomials are near-minimax fits; in float32 exp, tanh and erf stay within about one unit in the last place.
 */
#ifndef BNKIT_ACTIVATIONS_H
#define BNKIT_ACTIVATIONS_H

#include "batch_norm.h"
#include "element.h"

/* Adds the next coefficient of a polynomial in x. */
INLINE vec horner(vec p, vec x, real coefficient) { return multiply_add(p, x, broadcast(coefficient)); }

#if TYPE == TYPE_float64

#define LANEWISE(name, expression)                                                                                     \
    static vec name(vec x)                                                                                             \
    {                                                                                                                  \
        for (int i = 0; i < LANES; i++)                                                                                \
            x[i] = expression(x[i]);                                                                                   \
        return x;                                                                                                      \
    }
LANEWISE(vector_exp, exp)
LANEWISE(vector_tanh, tanh)
LANEWISE(vector_erf, erf)

#else

INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE vec with_sign_of(vec x, vec sign) { return (vec)((ivec)x | ((ivec)sign & (ivec)broadcast(-0.0f))); }

/* exp(x) = 2^n exp(r), |r| <= ln(2)/2. Beyond the limits 2^n comes out as infinity and as zero. */
INLINE vec vector_exp(vec x)
{
    x = choose(x > 89.0f, broadcast(89.0f), x);
    x = choose(x < -88.0f, broadcast(-88.0f), x);
    const float to_integer = 0x1.8p23f;
    const vec shifted = horner(x, broadcast(1.44269504f), to_integer), n = shifted - to_integer;
    const vec r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), x));
    vec p = horner(broadcast(0.00139504892f), r, 0.00836888956f);
    p = horner(p, r, 0.0416662058f);
    p = horner(p, r, 0.166665188f);
    p = horner(p, r, 0.50000001f);
    p = multiply_add(p, r * r, r) + 1.0f;
    const ivec exponent = ((ivec)shifted + 127) << 23;
    return p * (vec)exponent;
}

INLINE vec vector_tanh(vec x)
{
    const vec t = absolute(x), s = x * x;
    vec p = horner(broadcast(-0.00545349424f), s, 0.0204129146f);
    p = horner(p, s, -0.0536705343f);
    p = horner(p, s, 0.133306229f);
    p = horner(p, s, -0.333332525f);
    const vec near_zero = multiply_add(p * s, x, x);
    const vec far = with_sign_of(1.0f - 2.0f / (vector_exp(t + t) + 1.0f), x);
    return choose(t < 0.66f, near_zero, far);
}

/* x + x P(x^2) near zero, 1 - exp(-t - t Q(t)) with t = |x| beyond. */
INLINE vec vector_erf(vec x)
{
    const vec s = x * x;
    vec p = horner(broadcast(-0.000593187999f), s, 0.00498215237f);
    p = horner(p, s, -0.0267595866f);
    p = horner(p, s, 0.112816402f);
    p = horner(p, s, -0.376124792f);
    p = horner(p, s, 0.128379148f);
    const vec near_zero = multiply_add(p, x, x);
    vec t = absolute(x);
    const ivec is_near = t < 0.93f;
    t = choose(t > 4.0f, broadcast(4.0f), t);
    vec q = horner(broadcast(1.15224641e-05f), t, -0.000325654375f);
    q = horner(q, t, 0.00365377058f);
    q = horner(q, t, -0.0237853603f);
    q = horner(q, t, 0.106263161f);
    q = horner(q, t, 0.635135904f);
    q = horner(q, t, 0.128652164f);
    const vec far = with_sign_of(1.0f - vector_exp(-multiply_add(q, t, t)), x);
    return choose(is_near, near_zero, far);
}

#endif

INLINE vec sigmoid(vec z) { return (real)1 / ((real)1 + vector_exp(-z)); }
INLINE vec normal_cdf(vec z) { return (vector_erf(z * (real)0.70710678118654752440) + (real)1) * (real)0.5; }
INLINE vec normal_density(vec z) { return vector_exp(z * z * (real)-0.5) * (real)0.39894228040143267794; }

INLINE vec hardswish_gate(vec z)
{
    const vec shifted = z + (real)3;
    const vec capped = choose(shifted > (real)6, broadcast(6), shifted);
    return choose(capped < (real)0, (vec){0}, capped) * ((real)1 / 6);
}

static __attribute__((noinline)) vec other_activation(vec z, int activation)
{
    switch (activation) {
    case BNKIT_LEAKY_RELU: return choose(z > (real)0, z, z * (real)0.01);
    case BNKIT_SILU: return z * sigmoid(z);
    case BNKIT_GELU: return z * normal_cdf(z);
    case BNKIT_HARDSWISH: return z * hardswish_gate(z);
    case BNKIT_SIGMOID: return sigmoid(z);
    default: return vector_tanh(z);
    }
}

static __attribute__((noinline)) vec other_slope(vec z, int activation)
{
    vec s;
    switch (activation) {
    case BNKIT_LEAKY_RELU: return choose(z > (real)0, broadcast(1), broadcast((real)0.01));
    case BNKIT_SILU: s = sigmoid(z); return s * horner(z, (real)1 - s, 1);
    case BNKIT_GELU: return multiply_add(z, normal_density(z), normal_cdf(z));
    case BNKIT_HARDSWISH:
        s = choose(z < (real)3, horner(z, broadcast((real)1 / 3), (real)0.5), broadcast(1));
        return choose(z <= (real)-3, (vec){0}, s);
    case BNKIT_SIGMOID: s = sigmoid(z); return s * ((real)1 - s);
    default: s = vector_tanh(z); return (real)1 - s * s;
    }
}

INLINE vec activate(vec z, int activation)
{
    if (activation == BNKIT_NONE)
        return z;
    if (activation == BNKIT_RELU)
        return choose(z <= (real)0, (vec){0}, z); /* as gradient_through does and masks do */
    return other_activation(z, activation);
}

/* dL/dz from dL/dy. */
INLINE vec gradient_through(vec dy, vec z, int activation)
{
    if (activation == BNKIT_NONE)
        return dy;
    if (activation == BNKIT_RELU)
        return choose(z <= (real)0, (vec){0}, dy);
    return dy * other_slope(z, activation);
}

#endif
