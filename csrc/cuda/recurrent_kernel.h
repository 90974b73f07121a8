// A recurrent layer on a GPU, for any cell: all steps in one launch. Formulas: fastseq/reference/.
//
// The product of a step has 16 rows of the batch as one operand and the block's weight vectors, the gates of its units,
// as the other. K is cut into chunks of 64 bytes, which the warps of the block deal out among each other; a warp's
// weights stay in its registers, and in shared memory where those do not suffice. So each warp waits only for what it
// multiplies, reads it from global memory straight into the operand's registers, and leaves partial sums in shared
// memory, which the threads that own the units add up.
#pragma once
#include "cuda/cell_math.h"
#include "cuda/recurrent_plan.h"
#include "cells/back.h"

namespace fastseq::gpu {

template <Math kMath>
struct Numbers {
  using Scalar = float;
};
template <>
struct Numbers<kBfloat16> {
  using Scalar = bfloat16;
};
template <>
struct Numbers<kFloat16> {
  using Scalar = float16;
};

// The vector that a row's product starts from, or null for zeros, and whether other blocks write it meanwhile.
struct Source {
  const unsigned char* p;
  bool is_exchanged;
};

FASTSEQ_DEVICE bool has_missing(const Quad& q) {
  return q.word[0] == kMissing || q.word[1] == kMissing || q.word[2] == kMissing || q.word[3] == kMissing;
}

// How long this thread has been waiting for other blocks.
class Wait {
 public:
  FASTSEQ_DEVICE explicit Wait(const Steps& p) : status_(p.status), patience_(p.patience) {}

  // Whether to read once more. Once time is up, here or in another block, what is missing is taken as the NaN that
  // stands there, so that everything comes to an end and no result looks like one.
  FASTSEQ_DEVICE bool goes_on() {
    if (is_over_) return false;
    if (++reads_ % 1024 != 0) return true;
    const uint64_t now = nanoseconds();
    if (began_ == 0) began_ = now;
    if (now - began_ > patience_) store_to_host(status_, 1);
    is_over_ = load_from_host(status_) != 0;
    return !is_over_;
  }
  FASTSEQ_DEVICE void ends() { began_ = 0; }

 private:
  uint32_t* status_;
  uint64_t patience_, began_ = 0;
  uint32_t reads_ = 0;
  bool is_over_ = false;
};

// A warp's share of the product of 16 vectors with the block's weight vectors, of which there are kColumns times 8.
template <Math kMath, int kColumns>
class WarpProduct {
 public:
  static constexpr int kHeld = register_chunks(kColumns), kBatch = batch_chunks(kColumns, kMath);
  static constexpr int kStride = partial_stride(kColumns);
  static_assert(kHeld % kBatch == 0);
  // A product takes four times as long to come out as to go in: so many sums are on their way at once.
  static constexpr int kSums = kColumns == 1 ? 4 : kColumns <= 3 ? 2 : 1;

  // `vector_at(n)` points at the n-th weight vector, null for zeros; all have `bytes` bytes. `rest`: shared memory.
  template <typename VectorAt>
  FASTSEQ_DEVICE WarpProduct(const VectorAt& vector_at, int64_t bytes, Quad* rest)
      : rest_(rest + (thread() / 32) * (kColumns * 32) + thread() % 32), bytes_(int(bytes)) {
    const int warp = thread() / 32;
    const int all = int(tiles(bytes, kChunkBytes));
    chunks_ = warp < all ? (all - warp - 1) / kWarps + 1 : 0;
    const unsigned char* vectors[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) vectors[j] = vector_at(j * 8 + thread() % 32 / 4);
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) held_[c][j] = weights_at(vectors[j], c);
    }
    for (int c = kHeld; c < chunks_; ++c) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) rest_[place_in_rest(c, j)] = weights_at(vectors[j], c);
    }
  }

  // Multiplies the vectors of rows g and g+8, as lanes 4g to 4g+3 say, and leaves the sums in `partial`.
  FASTSEQ_DEVICE void multiply(const Source (&rows)[2], Wait& wait, float* partial) const {
    float sums[kSums][kColumns][4] = {};
    Quad now[kBatch][2], next[kBatch][2];
    probe(rows, wait);
    read(rows, 0, now);
#pragma unroll
    for (int c = 0; c < kHeld; c += kBatch) {
      if (c < chunks_) {
        if (c + kBatch < chunks_) read(rows, c + kBatch, next);
        settle(rows, c, now, wait);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) add(sums, i, now[i], held_[c + i]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) now[i][0] = next[i][0], now[i][1] = next[i][1];
      }
    }
    for (int c = kHeld; c < chunks_; c += kBatch) {
      if (c + kBatch < chunks_) read(rows, c + kBatch, next);
      settle(rows, c, now, wait);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (c + i >= chunks_) break;
        Quad weights[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) weights[j] = rest_[place_in_rest(c + i, j)];
        add(sums, i, now[i], weights);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i][0] = next[i][0], now[i][1] = next[i][1];
    }
    const int g = thread() % 32 / 4, q = thread() % 4;
    float* const own = partial + (thread() / 32) * (kTileRows * kStride) + 2 * q;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = own + (g + 8 * half) * kStride + 8 * j;
        to[0] = sum_of(sums, j, 2 * half), to[1] = sum_of(sums, j, 2 * half + 1);
      }
    }
  }

 private:
  FASTSEQ_DEVICE int offset_of(int c) const { return (c * kWarps + thread() / 32) * kChunkBytes + thread() % 4 * 16; }
  FASTSEQ_DEVICE static int place_in_rest(int c, int j) { return ((c - kHeld) * kWarps * kColumns + j) * 32; }

  FASTSEQ_DEVICE Quad weights_at(const unsigned char* vector, int c) const {
    Quad q = {};
    if (vector != nullptr && offset_of(c) < bytes_) q = *reinterpret_cast<const Quad*>(vector + offset_of(c));
    if constexpr (kMath == kTf32) round(q);
    return q;
  }

  FASTSEQ_DEVICE static void round(Quad& q) {
#pragma unroll
    for (int k = 0; k < 4; ++k) q.word[k] = to_tf32(q.word[k]);
  }

  FASTSEQ_DEVICE Quad read(const Source& row, int c) const {
    if (row.p == nullptr || offset_of(c) >= bytes_) return {};
    return load_relaxed(reinterpret_cast<const Quad*>(row.p + offset_of(c)));
  }
  FASTSEQ_DEVICE void read(const Source (&rows)[2], int c, Quad (&to)[kBatch][2]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[i][0] = read(rows[0], c + i);
      to[i][1] = read(rows[1], c + i);
    }
  }

  // Waits for one quad of each lane: to ask for all of them again and again would crowd out what they wait for.
  FASTSEQ_DEVICE void probe(const Source (&rows)[2], Wait& wait) const {
    const bool first = rows[0].is_exchanged;
    const Source row = {first ? rows[0].p : rows[1].p, first || rows[1].is_exchanged};
    if (row.is_exchanged) {
      while (has_missing(read(row, 0)) && wait.goes_on()) {
      }
    }
    sync_warp();
  }

  // Reads again what was missing.
  FASTSEQ_DEVICE void settle(const Source (&rows)[2], int c, Quad (&quads)[kBatch][2], Wait& wait) const {
    bool is_missing = true;
    while (any_in_warp(is_missing)) {
      bool was_missing = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (rows[half].is_exchanged && has_missing(quads[i][half])) {
            was_missing = true;
            quads[i][half] = read(rows[half], c + i);
          }
        }
      }
      is_missing = was_missing && wait.goes_on();
    }
    wait.ends();
  }

  // sums += the products of chunk i. Which K a word stands for is the same for both operands, and else no matter.
  FASTSEQ_DEVICE static void add(float (&sums)[kSums][kColumns][4], int i, const Quad (&rows)[2],
                                 const Quad (&weights)[kColumns]) {
    Quad low = rows[0], high = rows[1];
    if constexpr (kMath == kExact) {
      Quad low_rest, high_rest;
      split(low, low_rest), split(high, high_rest);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        Quad w = weights[j], w_rest;
        split(w, w_rest);
        add_words(sums, i, j, low_rest, high_rest, w);
        add_words(sums, i, j, low, high, w_rest);
        add_words(sums, i, j, low, high, w);
      }
    } else {
      if constexpr (kMath == kTf32) round(low), round(high);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) add_words(sums, i, j, low, high, weights[j]);
    }
  }

  FASTSEQ_DEVICE static void add_words(float (&sums)[kSums][kColumns][4], int i, int j, const Quad& low,
                                       const Quad& high, const Quad& w) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      gpu::multiply(typename Numbers<kMath>::Scalar{}, sums[(2 * i + k) % kSums][j], low.word[2 * k], high.word[2 * k],
                    low.word[2 * k + 1], high.word[2 * k + 1], w.word[2 * k], w.word[2 * k + 1]);
  }

  FASTSEQ_DEVICE static float sum_of(const float (&sums)[kSums][kColumns][4], int j, int k) {
    float sum = sums[0][j][k];
#pragma unroll
    for (int i = 1; i < kSums; ++i) sum += sums[i][j][k];
    return sum;
  }

  // float32 as the sum of two TF32, within 2^-22 of it.
  FASTSEQ_DEVICE static void split(Quad& q, Quad& rest) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t word = q.word[k];
      q.word[k] = to_tf32(word);
      const float difference = float_of(word) - float_of(q.word[k]);
      rest.word[k] = difference == difference ? to_tf32(bits(difference)) : 0;  // infinity has no rest
    }
  }

  Quad held_[kHeld][kColumns];
  Quad* rest_;
  int bytes_, chunks_;
};

// Which units and rows a block has, and where its rows stand in time.
struct Place {
  const Steps& p;
  int d, first_unit, first_row;

  FASTSEQ_DEVICE Place(const Steps& p, int units) : p(p) {
    const int tile = block() % p.unit_tiles, group = block() / p.unit_tiles;
    d = group / p.row_groups;
    first_unit = tile * units;
    first_row = group % p.row_groups * p.row_tiles * kTileRows;
  }

  FASTSEQ_DEVICE int time_of(int s) const { return d == 0 ? s : p.T - 1 - s; }
  FASTSEQ_DEVICE int length(int row) const {
    return row >= p.B ? 0 : p.lengths == nullptr ? p.T : std::min(p.lengths[row], p.T);
  }
  FASTSEQ_DEVICE int64_t at(int t, int row) const {
    return (p.starts == nullptr ? int64_t(t) * p.B : p.starts[t]) + row;
  }
  FASTSEQ_DEVICE int64_t state(int row) const { return int64_t(d) * p.B + row; }
  // Whether a row's state starts anew before step t; what stands before step 0 is the host's.
  FASTSEQ_DEVICE bool is_reset(int t, int row) const {
    return p.reset != nullptr && p.reset[int64_t(t) * p.B + row] != 0;
  }
};

// The sums of all warps for one of the block's columns, of one row of a tile.
template <int kStride>
FASTSEQ_DEVICE float total(const float* partial, int row, int column) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[(w * kTileRows + row) * kStride + column];
  return sum;
}

// Stores a value for the other blocks. The threads of two neighbouring units make one word of half precision, the
// first of which is at an even place; all threads of a warp call this.
FASTSEQ_DEVICE void hand_on(float* p, float value, bool is_wanted) {
  if (is_wanted) store_relaxed(reinterpret_cast<uint32_t*>(p), value == value ? bits(value) : 0x7fffffffu);
}
template <typename Half>
FASTSEQ_DEVICE void hand_on(Half* p, float value, bool is_wanted) {
  Half rounded;
  from_float(value, rounded);
  const uint32_t own = value == value ? *reinterpret_cast<const uint16_t*>(&rounded) : 0x7fffu;
  const uint32_t both = own | from_lane_above(own, 1) << 16;
  if (is_wanted && thread() % 2 == 0) store_relaxed(reinterpret_cast<uint32_t*>(p), both);
}

template <typename Scalar>
FASTSEQ_DEVICE void put(void* p, int64_t place, float value) {
  from_float(value, static_cast<Scalar*>(p)[place]);
}
template <typename Scalar>
FASTSEQ_DEVICE Scalar scalar(const void* p, int64_t place) {
  return static_cast<const Scalar*>(p)[place];
}
template <typename Scalar>
FASTSEQ_DEVICE float get(const void* p, int64_t place) {
  return to_float(scalar<Scalar>(p, place));
}
template <typename Scalar>
FASTSEQ_DEVICE const unsigned char* bytes_at(const void* p, int64_t place) {
  return reinterpret_cast<const unsigned char*>(static_cast<const Scalar*>(p) + place);
}

// A thread owns as many units of rows in a tile.
constexpr int owned(int units) { return std::max(1, kTileRows * units / kThreads); }

template <typename Cell, Math kMath, int kChoice>
FASTSEQ_KERNEL(kThreads)
forward_steps(ForwardSteps p) {
  using Scalar = typename Numbers<kMath>::Scalar;
  constexpr int G = Cell::kGates, kUnits = 8 << kChoice, kColumns = column_tiles(G, kChoice);
  constexpr int kOwned = owned(kUnits), kStride = partial_stride(kColumns);
  constexpr int kFirstOfH = Cell::kSlots - G;  // the first slot that W_hh adds to
  constexpr bool kCarries = Cell::kHasCell || Cell::kKeepsH;
  const Place place(p, kUnits);
  const int d = place.d, H = p.H, E = p.width;

  float* const partial = reinterpret_cast<float*>(shared_memory());
  float* const carried = partial + partial_bytes(kColumns) / 4;
  Quad* const rest = reinterpret_cast<Quad*>(carried + carry_bytes(kChoice, p.row_tiles) / 4);
  const WarpProduct<kMath, kColumns> product(
      [&](int n) -> const unsigned char* {
        const int unit = place.first_unit + n % kUnits;
        if (unit >= H) return nullptr;
        return bytes_at<Scalar>(p.weights, ((int64_t(d) * G + n / kUnits) * H + unit) * E);
      },
      int64_t(E) * sizeof(Scalar), rest);
  const bool is_owner = thread() < kTileRows * kUnits;
  const auto row_in_tile = [&](int i) { return (thread() + i * kThreads) / kUnits; };
  const int unit = place.first_unit + thread() % kUnits;
  const bool has_unit = is_owner && unit < H;
  const float bias = has_unit && p.inner_bias ? get<Scalar>(p.inner_bias, int64_t(d) * H + unit) : 0.0f;

  for (int j = 0; kCarries && j < p.row_tiles; ++j) {
    for (int i = 0; i < kOwned && has_unit; ++i) {
      const int local = j * kTileRows + row_in_tile(i), row = place.first_row + local;
      if (row < p.B) carried[local * kUnits + thread() % kUnits] = p.carry[place.state(row) * H + unit];
    }
  }

  // What a row's step starts from.
  const auto source_of = [&](int s, int row) -> Source {
    const int t = place.time_of(s), earlier = t - 1 + 2 * d, length = place.length(row);
    if (t >= length) return {nullptr, false};
    if (earlier < 0 || earlier >= length) return {bytes_at<Scalar>(p.h0, place.state(row) * E), false};
    if (place.is_reset(t + d, row)) {
      return {p.reset_h == nullptr ? nullptr : bytes_at<Scalar>(p.reset_h, place.state(row) * E), false};
    }
    return {bytes_at<Scalar>(p.exchange, (place.at(earlier, row) * p.D + d) * E), true};
  };

  // What is read for a step while the one before it is made. It is converted when it is used: nothing waits for it
  // here.
  struct Ahead {
    Source rows[2];
    Scalar x[kOwned][G];
    bool runs[kOwned], is_anew[kOwned];
  };
  const auto look_ahead = [&](int item, Ahead& to) {
    const int s = item / p.row_tiles, tile_row = place.first_row + item % p.row_tiles * kTileRows;
    const int t = place.time_of(s);
#pragma unroll
    for (int half = 0; half < 2; ++half) to.rows[half] = source_of(s, tile_row + thread() % 32 / 4 + 8 * half);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int row = tile_row + row_in_tile(i), length = is_owner ? place.length(row) : 0;
      const int earlier = t - 1 + 2 * d;
      to.runs[i] = t < length;
      to.is_anew[i] = to.runs[i] && earlier >= 0 && earlier < length && place.is_reset(t + d, row);
#pragma unroll
      for (int k = 0; k < G; ++k) {
        to.x[i][k] = Scalar{};
        if (to.runs[i] && has_unit)
          to.x[i][k] = scalar<Scalar>(p.pre, (int64_t(d) * p.N + place.at(t, row)) * p.pre_width + k * H + unit);
      }
    }
  };

  Wait wait(p);
  const int items = p.T * p.row_tiles;
  Ahead now, next;
  look_ahead(0, now);
  for (int item = 0; item < items; ++item, now = next) {
    if (item + 1 < items) look_ahead(item + 1, next);
    float* const sums = partial + item % 2 * (partial_bytes(kColumns) / 8);
    product.multiply(now.rows, wait, sums);
    // Of two buffers for the sums each is free again: nobody passes here twice before all have read the other one.
    sync_block();
    if (!is_owner) continue;
    const int s = item / p.row_tiles, tile = item % p.row_tiles, t = place.time_of(s);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int tile_row = row_in_tile(i), local = tile * kTileRows + tile_row, row = place.first_row + local;
      float from_h[G], tape[Cell::kTape > 0 ? Cell::kTape : 1];
#pragma unroll
      for (int k = 0; k < G; ++k) from_h[k] = total<kStride>(sums, tile_row, k * kUnits + thread() % kUnits);
      from_h[G - 1] += bias;
      float own = kCarries ? carried[local * kUnits + thread() % kUnits] : 0.0f;
      if (kCarries && now.is_anew[i])
        own = p.reset_carry && has_unit ? get<Scalar>(p.reset_carry, place.state(row) * H + unit) : 0.0f;
      const auto slot = [&](int k) {
        float sum = 0;
        if (k < G) sum += to_float(now.x[i][(k + Cell::kFirstGate) % G]);
        if (k >= kFirstOfH) sum += from_h[k - kFirstOfH];
        return sum;
      };
      float c = own;
      const float stepped = Cell::template step<float>(slot, own, c, [&](int k, float value) { tape[k] = value; });
      const bool runs = now.runs[i] && has_unit;
      const float h = runs ? stepped : 0.0f;

      // First what others wait for. Where there is a place for each row at each step, those that do not run have zeros.
      const bool has_place = row < p.B && (p.starts == nullptr || now.runs[i]);
      const int64_t at = has_place ? place.at(t, row) : 0;
      hand_on(static_cast<Scalar*>(p.exchange) + (at * p.D + d) * E + unit, h, has_place && unit < E);
      if (!has_unit || !has_place) continue;
      if (p.y != nullptr) put<Scalar>(p.y, (at * p.D + d) * H + unit, h);
      if (Cell::kHasCell && p.cells != nullptr)
        put<Scalar>(p.cells, (int64_t(d) * p.N + at) * H + unit, runs ? c : 0.0f);
      if (!runs) continue;
      if (kCarries) carried[local * kUnits + thread() % kUnits] = Cell::kHasCell ? c : stepped;
      if (Cell::kTape > 0 && p.save) {
#pragma unroll
        for (int k = 0; k < Cell::kTape; ++k)
          put<Scalar>(p.pre, (int64_t(d) * p.N + at) * p.pre_width + k * H + unit, tape[k]);
      }
      const bool is_last = d == 1 ? t == 0 : t + 1 == place.length(row);
      if (is_last) put<Scalar>(p.h_n, place.state(row) * H + unit, h);
    }
  }

  for (int j = 0; kCarries && j < p.row_tiles; ++j) {
    for (int i = 0; i < kOwned && has_unit; ++i) {
      const int local = j * kTileRows + row_in_tile(i), row = place.first_row + local;
      if (row < p.B) p.carry[place.state(row) * H + unit] = carried[local * kUnits + thread() % kUnits];
    }
  }
}

template <typename Cell, Math kMath, int kChoice>
FASTSEQ_KERNEL(kThreads)
backward_steps(BackwardSteps p) {
  using Scalar = typename Numbers<kMath>::Scalar;
  constexpr int G = Cell::kGates, A = Cell::kSlots, kUnits = 8 << kChoice, kColumns = column_tiles(1, kChoice);
  constexpr int kOwned = owned(kUnits), kStride = partial_stride(kColumns), kTape = Cell::kTape;
  constexpr int kFirstOfH = A - G;
  const Place place(p, kUnits);
  const int d = place.d, H = p.H, E = p.width;

  float* const partial = reinterpret_cast<float*>(shared_memory());
  float* const carried = partial + partial_bytes(kColumns) / 4;  // dh and dc
  Quad* const rest = reinterpret_cast<Quad*>(carried + carry_bytes(kChoice, p.row_tiles) / 4);
  const WarpProduct<kMath, kColumns> product(
      [&](int n) -> const unsigned char* {
        const int unit = place.first_unit + n;
        return unit >= H ? nullptr : bytes_at<Scalar>(p.weights, (int64_t(d) * H + unit) * G * E);
      },
      int64_t(G) * E * sizeof(Scalar), rest);
  const bool is_owner = thread() < kTileRows * kUnits;
  const auto row_in_tile = [&](int i) { return (thread() + i * kThreads) / kUnits; };
  const int unit = place.first_unit + thread() % kUnits;
  const bool has_unit = is_owner && unit < H;
  const auto carried_at = [&](int local) { return carried + 2 * (local * kUnits + thread() % kUnits); };

  for (int j = 0; j < p.row_tiles; ++j) {
    for (int i = 0; i < kOwned && has_unit; ++i) {
      const int local = j * kTileRows + row_in_tile(i), row = place.first_row + local;
      if (row >= p.B) continue;
      carried_at(local)[0] = p.dh[place.state(row) * H + unit];
      if (Cell::kHasCell) carried_at(local)[1] = p.dc[place.state(row) * H + unit];
    }
  }

  // The gradient of the step that comes after step s of a row, in the order of its direction.
  const auto source_of = [&](int s, int row) -> Source {
    const int later = place.time_of(s) + 1 - 2 * d;
    if (s + 1 >= p.T || later >= place.length(row)) return {nullptr, false};
    return {bytes_at<Scalar>(p.exchange, (int64_t(d) * p.N + place.at(later, row)) * p.exchange_width), true};
  };

  struct Ahead {
    Source rows[2];
    Scalar dy[kOwned], dcells[kOwned], before[kOwned], after[kOwned], tape[kOwned][kTape > 0 ? kTape : 1];
    bool runs[kOwned], is_anew[kOwned], follows[kOwned];  // follows: whether a step of this row comes after it
  };
  const auto look_ahead = [&](int item, Ahead& to) {
    const int s = p.T - 1 - item / p.row_tiles, tile_row = place.first_row + item % p.row_tiles * kTileRows;
    const int t = place.time_of(s);
#pragma unroll
    for (int half = 0; half < 2; ++half) to.rows[half] = source_of(s, tile_row + thread() % 32 / 4 + 8 * half);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int row = tile_row + row_in_tile(i), length = is_owner ? place.length(row) : 0;
      const int cut = t + 1 - d;
      to.runs[i] = s >= 0 && t < length;
      to.is_anew[i] = s + 1 < p.T && cut < length && place.is_reset(cut, row);
      to.follows[i] = s + 1 < p.T && t + 1 - 2 * d < length;
      const bool reads = to.runs[i] && has_unit;
      const int64_t at = reads ? place.at(t, row) : 0, of_d = (int64_t(d) * p.N + at) * H + unit;
      const int64_t of_y = (at * p.D + d) * H + unit;
      to.dy[i] = reads && p.dy ? scalar<Scalar>(p.dy, of_y) : Scalar{};
      to.dcells[i] = reads && p.dcells ? scalar<Scalar>(p.dcells, of_d) : Scalar{};
      to.before[i] = reads && p.before ? scalar<Scalar>(p.before, of_d) : Scalar{};
      to.after[i] = reads && p.after ? scalar<Scalar>(p.after, Cell::kHasCell ? of_d : of_y) : Scalar{};
#pragma unroll
      for (int k = 0; k < kTape; ++k)
        to.tape[i][k] = reads ? scalar<Scalar>(p.gates, ((int64_t(d) * p.N + at) * kTape + k) * H + unit) : Scalar{};
    }
  };

  Wait wait(p);
  const int items = (p.T + 1) * p.row_tiles;  // one more step, to the initial state
  Ahead now, next;
  look_ahead(0, now);
  for (int item = 0; item < items; ++item, now = next) {
    if (item + 1 < items) look_ahead(item + 1, next);
    float* const sums = partial + item % 2 * (partial_bytes(kColumns) / 8);
    product.multiply(now.rows, wait, sums);
    sync_block();
    if (!is_owner) continue;
    const int s = p.T - 1 - item / p.row_tiles, tile = item % p.row_tiles, t = place.time_of(s);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int tile_row = row_in_tile(i), local = tile * kTileRows + tile_row, row = place.first_row + local;
      const bool runs = now.runs[i] && has_unit;
      float dh = carried_at(local)[0];
      // Where there is no step to come back from, zeros met the weights, which may be infinite.
      if (now.follows[i]) dh += total<kStride>(sums, tile_row, thread() % kUnits);
      float dc = Cell::kHasCell ? carried_at(local)[1] : 0.0f;
      if (now.is_anew[i] && has_unit) {  // the reset takes what would go on to the step before
        const int64_t at = place.state(row) * H + unit;
        p.dreset_h[at] += dh, dh = 0;
        if (Cell::kHasCell) p.dreset_c[at] += dc, dc = 0;
      }
      const float before = to_float(now.before[i]), after = to_float(now.after[i]);
      Back<float> back{dh + to_float(now.dy[i]), dc + to_float(now.dcells[i]), after, before, after, before};
      float da[A];
      Cell::template step_back<float>([&](int k) { return to_float(now.tape[i][k]); }, back,
                                      [&](int k, float value) { da[k] = value; });

      const bool has_place = row < p.B && s >= 0 && (p.starts == nullptr || now.runs[i]);
      const int64_t at = int64_t(d) * p.N + (has_place ? place.at(t, row) : 0);
      Scalar* const exchange = static_cast<Scalar*>(p.exchange) + at * p.exchange_width;
      // First the gradients of what W_hh gave, which others wait for; then that of what W_ih gives beside it.
#pragma unroll
      for (int k = 0; k < A; ++k) {
        const float value = runs ? da[(k + kFirstOfH) % A] : 0.0f;
        if (k < G)
          hand_on(exchange + k * E + unit, value, has_place && unit < E);
        else if (p.da == nullptr && has_place && has_unit)
          put<Scalar>(exchange, k * E + unit, value);
        if (p.da != nullptr && has_place && has_unit) put<Scalar>(p.da, (at * A + k) * H + unit, value);
      }
      if (!has_unit || row >= p.B) continue;
      carried_at(local)[0] = !runs ? dh : Cell::kKeepsH ? back.dh : 0.0f;
      if (Cell::kHasCell) carried_at(local)[1] = runs ? back.dc : dc;
    }
  }

  for (int j = 0; j < p.row_tiles; ++j) {
    for (int i = 0; i < kOwned && has_unit; ++i) {
      const int local = j * kTileRows + row_in_tile(i), row = place.first_row + local;
      if (row >= p.B) continue;
      p.dh[place.state(row) * H + unit] = carried_at(local)[0];
      if (Cell::kHasCell) p.dc[place.state(row) * H + unit] = carried_at(local)[1];
    }
  }
}

template <typename Cell, Math kMath, int kChoice>
constexpr void add_kernels(RecurrentKernels& to) {
  to.forward[kMath][kChoice] = forward_steps<Cell, kMath, kChoice>;
  to.backward[kMath][kChoice] = backward_steps<Cell, kMath, kChoice>;
  if constexpr (kChoice + 1 < kUnitChoices)
    add_kernels<Cell, kMath, kChoice + 1>(to);
  else if constexpr (kMath + 1 < kMaths)
    add_kernels<Cell, Math(kMath + 1), 0>(to);
}

template <typename Cell>
RecurrentKernels kernels_of() {
  RecurrentKernels kernels{};
  add_kernels<Cell, Math(0), 0>(kernels);
  return kernels;
}

}  // namespace fastseq::gpu
