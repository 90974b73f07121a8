// How the host starts the kernels in csrc/cuda. tests/emulator/cuda/launch.h has the same functions for a CPU.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastseq::gpu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here, not to whoever asks next
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// What the plan of a launch depends on.
struct Chip {
  int multiprocessors;
  int shared;  // bytes of shared memory that one block can have
};

inline Chip chip_of(int device) {
  Chip chip;
  check(cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&chip.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return chip;
}

// Launches blocks that wait for each other: all of them run at once, or none does and this throws.
template <typename Arguments>
void launch_together(void (*kernel)(Arguments), int blocks, int threads, int shared, int device, void* stream,
                     Arguments arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int before;
  check(cudaGetDevice(&before), "the current device");
  if (before != device) check(cudaSetDevice(device), "the device of the tensors");
  void* list[] = {&arguments};
  // As much as any launch may take: another thread may be about to launch the same kernel with another plan.
  const int most = chip_of(device).shared;
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), list, size_t(shared),
                                        static_cast<cudaStream_t>(stream));
  if (before != device) cudaSetDevice(before);
  check(error, "launching a recurrent kernel");
}

}  // namespace fastseq::gpu
