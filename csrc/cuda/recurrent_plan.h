// Which block has which units and rows, and how much shared memory it takes. Plain C++, for host code and kernels.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/recurrent.h"

namespace fastseq::gpu {

// What is summed at each step: for each of B rows in D directions, over K bytes, for `stack` vectors of each unit.
struct StepProduct {
  int stack;  // G forward, 1 backward
  int units;  // H
  int64_t K;  // in bytes
  int B, D;
};

struct Plan {
  int choice;  // 8 << choice units a block
  int unit_tiles, row_groups, row_tiles;
  int shared;  // bytes

  int blocks(int D) const { return unit_tiles * row_groups * D; }
};

constexpr int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// Tiles of 8 weight vectors in a block.
constexpr int column_tiles(int stack, int choice) { return stack << choice; }

// How many chunks of each warp's weights are in registers: 64 to 128 of the 255 that a thread can have.
constexpr int register_chunks(int columns) { return columns == 1 ? 16 : columns <= 4 ? 8 : columns <= 8 ? 4 : 1; }

// How many chunks of the vectors that they multiply a warp reads at once.
constexpr int batch_chunks(int columns, Math math) {
  if (math == kExact) return columns <= 2 ? 2 : 1;
  return columns <= 2 ? 4 : columns <= (math == kTf32 ? 4 : 8) ? 2 : 1;
}

// How many chunks along K a warp has.
constexpr int64_t chunks_per_warp(int64_t K) { return tiles(tiles(K, kChunkBytes), kWarps); }

// The row stride of a warp's partial sums, in floats: an odd multiple of 8, so that no two lanes meet in one bank.
constexpr int partial_stride(int columns) { return 8 * (columns + (columns % 2 == 0)); }

constexpr int64_t partial_bytes(int columns) { return 2 * int64_t(kWarps) * kTileRows * partial_stride(columns) * 4; }

// Weights that registers do not hold, in shared memory.
constexpr int64_t weight_bytes(int columns, int64_t K) {
  const int64_t rest = chunks_per_warp(K) - register_chunks(columns);
  return rest > 0 ? rest * kWarps * columns * 8 * kChunkBytes : 0;
}

// Two float32 a unit and row, for what a unit carries from step to step.
constexpr int64_t carry_bytes(int choice, int row_tiles) { return int64_t(row_tiles) * kTileRows * (8 << choice) * 8; }

}  // namespace fastseq::gpu
