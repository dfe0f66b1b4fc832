/* Memory of large outputs, kept for the next ones. */
#ifndef BNKIT_OUTPUTS_H
#define BNKIT_OUTPUTS_H

#include <stddef.h>
#include <stdint.h>

/* A tensor as DLPack hands it over (DLManagedTensor of https://dmlc.github.io/dlpack, version 0). */
typedef struct bnkit_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides; /* strides in elements */
    uint64_t byte_offset;
    void *context;
    void (*release)(struct bnkit_tensor *);
} bnkit_tensor;

/* Memory for a tensor, its values undefined; it is kept when the tensor is released. NULL where the system has none, or
 * nothing to keep memory with. `layout` has the shape, then the strides. */
bnkit_tensor *bnkit_new_output(uint8_t code, uint8_t bits, int32_t dimensions, const int64_t *layout, size_t bytes);

/* Gives all that is kept back to the system, and says how many bytes that were. */
size_t bnkit_give_back_outputs(void);

#endif
