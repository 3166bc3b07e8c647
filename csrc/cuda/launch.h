// Where a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "check.h"

namespace cppo::cuda {

// The device of a tensor for as long as it lives, and the stream that torch uses there.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
  cudaStream_t on() const { return static_cast<cudaStream_t>(stream); }

  static void check(const char* op) {
    const cudaError_t error = cudaGetLastError();
    CPPO_CHECK(error == cudaSuccess, op, "the launch failed: ", cudaGetErrorString(error));
  }
};

}  // namespace cppo::cuda
