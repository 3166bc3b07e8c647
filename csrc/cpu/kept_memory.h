// Memory of new gradients and of the LM head's tiles, which are as large as logits and of the same
// size in every step.
//
// The C library takes a block of that size from the system and gives it back as soon as it is freed;
// that the system then zeroes new pages takes longer than to compute what they are overwritten with.
// Here a freed block is kept for the next call, as PyTorch does on a GPU. Meanwhile its pages are the
// system's to take whenever it needs some, and no more is kept than was once in use at a time.
#pragma once

#include "check.h"

namespace cppo::cpu {

// A dense tensor of the shape and dtype of `like`, not initialised; of kept memory where it is large
// and the system is Linux, else torch's own.
Tensor new_gradient(const Tensor& like);

// (bytes,) of uint8, likewise.
Tensor kept_memory(int64_t bytes);

}  // namespace cppo::cpu
