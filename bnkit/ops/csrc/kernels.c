/* The kernels for one instruction set (the compiler's flags) and one element type (BNKIT_TYPE), as one symbol. */
#include "planes_backward.h"
#include "planes_forward.h"
#include "rows_backward.h"
#include "rows_forward.h"
#include "transpose.h"

static bool forward(const bnkit_forward *f) { return in_rows(f->inner) ? forward_rows(f) : forward_planes(f); }
static bool backward(const bnkit_backward *g) { return in_rows(g->inner) ? backward_rows(g) : backward_planes(g); }

#define JOIN(set, type) bnkit_kernels_##set##_##type
#define NAME(set, type) JOIN(set, type)

extern const bnkit_kernels NAME(BNKIT_SET, BNKIT_TYPE);
const bnkit_kernels NAME(BNKIT_SET, BNKIT_TYPE) = {forward, backward, transpose};
