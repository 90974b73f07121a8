// csrc/cuda/launch.h for the emulator: it refuses what a GPU would.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/machine.h"

namespace fastseq::gpu {

struct Chip {
  int multiprocessors;
  int shared;  // bytes of shared memory that one block can have
};

// An H100, or FASTSEQ_EMULATOR_CHIP="multiprocessors,shared".
inline Chip chip_of(int /*device*/) {
  Chip chip{132, 227 << 10};
  const char* told = std::getenv("FASTSEQ_EMULATOR_CHIP");
  char rest;
  if (told && std::sscanf(told, "%d,%d%c", &chip.multiprocessors, &chip.shared, &rest) != 2)
    throw std::runtime_error(std::string("FASTSEQ_EMULATOR_CHIP: expected multiprocessors,shared but got ") + told);
  return chip;
}

// A kernel of csrc/cuda takes all registers of a multiprocessor: each has one block.
template <typename Arguments>
void launch_together(void (*kernel)(Arguments), int blocks, int threads, int shared, int device, void* /*stream*/,
                     Arguments arguments) {
  const auto check = [](const char* what, int value, int least, int most) {
    if (value < least || value > most)
      throw std::runtime_error("launching a recurrent kernel: " + std::to_string(value) + " " + what + ", expected " +
                               std::to_string(least) + " to " + std::to_string(most));
  };
  const Chip chip = chip_of(device);
  check("blocks", blocks, 1, chip.multiprocessors);
  check("threads", threads, 32, 1024);
  check("threads beyond whole warps", threads % 32, 0, 0);
  check("bytes of shared memory", shared, 0, chip.shared);
  emulator::machine.launch(blocks, threads, shared, [=] { kernel(arguments); });
}

}  // namespace fastseq::gpu
