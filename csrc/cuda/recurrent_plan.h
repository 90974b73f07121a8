// Which block has which units and rows, and how much shared memory it takes. Plain C++, for host code and kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>

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
  return columns <= 2 ? 4 : columns <= (math == kTf32 ? 2 : 8) ? 2 : 1;
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

// The estimated time of a step in ns. Its rates are estimates from an H100's data sheet, at about half of the peaks,
// not measurements. What they have to get right is the order of the candidates.
inline double step_time(const StepProduct& of, const Plan& p) {
  constexpr double kExchange = 700;                   // from a store until all blocks have read it through L2
  constexpr double kTile = 200;                       // what a tile takes at any size: a barrier of the block, the cell
  constexpr double kL2OfBlock = 60, kL2OfAll = 5000;  // bytes/ns
  constexpr double kShared = 128 * 1.7;               // bytes/ns: 128 a clock
  constexpr double kProducts = 2 * 640 * 1.7;         // bytes of K multiplied and added/ns; as many for any dtype

  const int columns = column_tiles(of.stack, p.choice);
  const double vectors = double(std::min(of.B, kTileRows)) * of.K;
  const double product =
      std::max({vectors / kL2OfBlock, vectors * p.blocks(of.D) / kL2OfAll,
                double(kTileRows) * columns * 8 * of.K / kProducts, weight_bytes(columns, of.K) / kShared});
  const double reduction = partial_bytes(columns) / kShared;  // one of the two buffers, written and read
  const double tile = product + reduction + kTile;
  return std::max(p.row_tiles * tile, kExchange + tile);  // other tiles of the block are made during an exchange
}

// The plan whose estimated time is least, or nothing where none fits: blocks that wait for each other must all be
// resident, one on a multiprocessor, and each has `shared` bytes of shared memory at most.
inline std::optional<Plan> plan(const StepProduct& of, int multiprocessors, int shared) {
  std::optional<Plan> best;
  const int64_t batch_tiles = tiles(of.B, kTileRows);
  for (int choice = 0; choice < kUnitChoices; ++choice) {
    const int columns = column_tiles(of.stack, choice);
    const int64_t unit_tiles = tiles(of.units, 8 << choice);
    for (int64_t groups = 1; groups <= batch_tiles && groups * unit_tiles * of.D <= multiprocessors; ++groups) {
      const int64_t row_tiles = tiles(batch_tiles, groups);
      if (tiles(batch_tiles, row_tiles) != groups) continue;  // fewer groups have as few tiles each
      const int64_t bytes = partial_bytes(columns) + carry_bytes(choice, int(row_tiles)) + weight_bytes(columns, of.K);
      if (bytes > shared) continue;
      const Plan found{choice, int(unit_tiles), int(groups), int(row_tiles), int(bytes)};
      if (!best || step_time(of, found) < step_time(of, *best)) best = found;
    }
  }
  return best;
}

}  // namespace fastseq::gpu
