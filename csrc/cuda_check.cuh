// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace rconv {

// Throws if the launch just made was refused; does not wait for the kernel.
inline void check_launch(char const* kernel) {
  cudaError_t const error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("rconv_fast: ") + kernel + ": " + cudaGetErrorName(error) +
                             " (" + cudaGetErrorString(error) + ")");
  }
}

}  // namespace rconv
