// What the GPU's recurrent kernels are told. No torch in here.
//
// One launch makes all steps of a layer. A block owns some units, whose weights it loads before the first step, and
// some rows of the batch. What all blocks need of each other, h_t forward and da_t backward, goes through global memory
// without a flag or a barrier: the place for each step is filled with words that no value has, and whoever needs a
// value reads until another word stands there. So a step waits for one store and one load, and for nothing else.
#pragma once
#include <cstdint>

namespace fastseq::gpu {

// The word that stands where a step has not been made: NaNs with all bits set, which stored values never are.
constexpr uint32_t kMissing = 0xffffffffu;

// Rows of the batch that are shorter end early: row b runs at steps t < lengths[b], and has its place at
// starts[t] + b among the N rows of all steps.
struct Steps {
  int T, B, H, D;
  int64_t N;
  int width;                              // E: H rounded up to 16 bytes of elements
  const uint8_t* reset;                   // [T, B] whether a state starts anew before that step, or null
  const int32_t* lengths;                 // [B], or null: all rows run at all steps
  const int64_t* starts;                  // [T], or null for t*B
  uint32_t* status;                       // in host memory: set to 1 if a block has waited for longer than `patience`
  uint64_t patience;                      // ns
  int unit_tiles, row_groups, row_tiles;  // blocks along the units and along the batch; tiles of 16 rows of a block
};

struct ForwardSteps : Steps {
  void* pre;  // [D, N, pre_width] W_ih x_t + b, gate by gate; the tape comes in its place
  int64_t pre_width;
  bool save;                // whether it does
  const void* weights;      // [D, G*H, E] W_hh, zeros past H
  const void* inner_bias;   // [D, H] or null: what the last gate's W_hh h has by itself (GRU)
  const void* h0;           // [D, B, E]
  float* carry;             // [D, B, H] c or h, replaced by that after the last step; null if the cell needs none
  void* exchange;           // [N, D, E], kMissing everywhere: h_t
  void* y;                  // [N, D, H], or null where the exchange is y
  void* h_n;                // [D, B, H], h0 everywhere: replaced where a row has run
  void* cells;              // [D, N, H] c_t, or null
  const void* reset_h;      // [D, B, E] or null for zeros
  const void* reset_carry;  // [D, B, H] or null for zeros
};

struct BackwardSteps : Steps {
  const void* weights;  // [D, H, G*E] the transpose of W_hh, gate by gate, zeros past H
  const void* dy;       // [N, D, H] or null for zeros
  const void* dcells;   // [D, N, H] or null
  const void* gates;    // [D, N, tape*H] or null
  const void* before;   // [D, N, H] c or h before each step, or null
  const void* after;    // c after it [D, N, H], or h [N, D, H] (RNN), or null (GRU)
  void* exchange;       // [D, N, exchange_width] in whose first G*E da_t comes, kMissing everywhere
  int64_t exchange_width;
  void* da;                    // [D, N, A*H] the gradients of the pre-activations; null where the exchange is da
  float* dh;                   // [D, B, H] dh_n, replaced by dh0
  float* dc;                   // [D, B, H] dc_n, replaced by dc0, or null
  float *dreset_h, *dreset_c;  // [D, B, H] zeros to add to, or null
};

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 16;    // rows of the batch in one product
constexpr int kChunkBytes = 64;  // of K, in one product by a warp
constexpr int kUnitChoices = 3;  // 8, 16 and 32 units a block

enum Math { kBfloat16, kFloat16, kTf32, kExact, kMaths };  // kExact: float32 by three products of TF32

// The kernels of one cell, by Math and by how many units a block has.
struct RecurrentKernels {
  void (*forward[kMaths][kUnitChoices])(ForwardSteps);
  void (*backward[kMaths][kUnitChoices])(BackwardSteps);
};

extern const RecurrentKernels lstm_kernels, gru_kernels, rnn_tanh_kernels, rnn_relu_kernels;

}  // namespace fastseq::gpu
