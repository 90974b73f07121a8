// A recurrent layer on the CPU, for any cell. Formulas: fastseq/reference/.
//
// Every member of the team owns a rectangle of the batch and of the hidden units, for the whole sequence: rows of the
// batch where there are enough of them (then nobody waits for anybody), else blocks of units (one barrier a step, since
// every unit needs all of h_{t-1}). Two directions are two independent chains, each with half of the team. Where rows
// end at different steps, the rectangles are cut anew at every step from the rows that still run.
#pragma once
#include "cpu/gemm.h"
#include "cpu/pass.h"
#include "cpu/recurrent.h"
#include "cells/back.h"

namespace fastseq::FASTSEQ_ISA {

// At B=1 a thread does about 20 multiply-adds a ns. Starting a parallel region costs 3 to 10 us, a barrier 0.2 us.
constexpr int64_t kWorkPerThread = 192 * 1024, kWorkPerBarrier = 4 * 1024;
// With fewer rows than this for each thread the weights' way from the L3 cache limits a step: split the units instead.
// Where they do not fit into the L2 cache, each unit's weights shall at least be read for many rows.
constexpr int64_t kRowsPerThread = 8, kRowsOfLargeWeights = 128, kLargeWeightsBytes = 2 * 1024 * 1024;
// With fewer rows than this in all, packing a weight matrix costs more than it saves.
constexpr int64_t kUnpackedRows = 8;
// A single step of so many rows multiplies the weights where they are by its rows, which are packed instead.
constexpr int64_t kLeastTurnedRows = 16, kMostTurnedRows = 128;
// The input projection is made for so many elements of gates at a time that they are still in the L2 cache when they
// are used (256 KB), but for at least so many rows that the weights' way from memory does not count.
constexpr int64_t kChunkElements = 64 * 1024, kChunkRows = 96;

// Which directions a member works on, and with whom: [first, first + count).
struct Side {
  int rank, first, count;
  int64_t direction, direction_end;

  Side(int rank, int size, int64_t D) : rank(rank), first(0), count(size), direction(0), direction_end(D) {
    if (D == 2 && size % 2 == 0) {
      count = size / 2;
      direction = rank / count;
      direction_end = direction + 1;
      first = int(direction) * count;
    }
  }
  int member() const { return rank - first; }
};

// A member's rectangle of a step: rows [row, row_end) and, of anything that is split where rows are not, its part.
struct Share {
  int64_t row, row_end;
  int member, members;  // 0 of 1 where rows are split
  bool splits_units() const { return members > 1; }
  int64_t begin(int64_t count) const { return share(count, member, members); }
  int64_t end(int64_t count) const { return share(count, member + 1, members); }

  Share(const Side& side, int64_t rows, int64_t least_rows)
      : row(0), row_end(rows), member(side.member()), members(side.count) {
    if (rows < least_rows * members) return;
    row = share(rows, member, members), row_end = share(rows, member + 1, members);
    member = 0, members = 1;
  }
};

// Blocks of units in an order that turns round at every step: what was read last is still in the cache.
template <typename Body>
FASTSEQ_INLINE void to_and_fro(int64_t begin, int64_t end, bool back, const Body& body) {
  const int64_t first = back ? end - 1 : begin, last = back ? begin : end - 1, stride = back ? -1 : 1;
  for (int64_t i = first; begin < end; i += stride) {
    body(i, i == last ? i : i + stride);
    if (i == last) break;
  }
}

// The elements of a padded row of H units.
template <typename T>
int64_t padded_to_panels(int64_t count) {
  return Columns<T>{count}.panels() * kPanel<T>;
}

// A stride between rows that are multiplied together. Those that lie a multiple of 2 KB apart share so few sets of the
// L1 cache that they would evict each other.
constexpr int64_t kSetsBytes = 2048;
template <typename T>
int64_t spread(int64_t width) {
  return width * int64_t(sizeof(T)) % kSetsBytes ? width : width + kLine<T>;
}

// Steps and rows of a call. A "rank" is a row's place in the order by falling length, which is where all scratch has
// it.
template <typename Cell, typename T, typename Call>
struct Steps : Call {
  using Call::B, Call::D, Call::H, Call::I, Call::P, Call::T_;

  bool ragged = this->before != nullptr;

  explicit Steps(const Call& call) : Call(call) {}

  int64_t step(int64_t d, int64_t s) const { return d == 0 ? s : T_ - 1 - s; }  // the s-th step in a direction's order
  int64_t before_step(int64_t t) const { return ragged ? this->before[t] : t * B; }
  int64_t active(int64_t t) const { return ragged ? this->before[t + 1] - this->before[t] : B; }
  int64_t most_rows() const { return before_step(T_); }
  int64_t row_of(int64_t rank) const { return this->order ? this->order[rank] : rank; }
  // The row of y, dy and the tape.
  int64_t place(int64_t t, int64_t rank) const { return this->packed ? before_step(t) + rank : t * B + row_of(rank); }
  const T* x_row(int64_t t, int64_t rank) const {
    return this->packed ? this->x + (before_step(t) + rank) * I : this->x + t * this->x_t + row_of(rank) * this->x_b;
  }
  T* y_row(T* y, int64_t t, int64_t rank, int64_t d) const { return y + place(t, rank) * D * P + d * P; }

  bool is_first(int64_t d, int64_t t, int64_t rank) const { return d == 0 ? t == 0 : is_end(t, rank); }
  bool is_last(int64_t d, int64_t t, int64_t rank) const { return d == 0 ? is_end(t, rank) : t == 0; }
  bool is_end(int64_t t, int64_t rank) const { return t + 1 == T_ || rank >= active(t + 1); }

  // Whether the state that goes into step t starts anew. Backwards in time a sequence starts at what is its end
  // forwards.
  bool starts_anew(int64_t d, int64_t t, int64_t rank) const {
    if (!this->reset) return false;
    if (d == 0) return this->reset[t * B + row_of(rank)];
    return !is_end(t, rank) && this->reset[(t + 1) * B + row_of(rank)];
  }

  // The row of what a state starts from, `width` wide, or null for zeros.
  const T* start_row(const T* initial, const T* anew, int64_t d, int64_t t, int64_t rank, int64_t width) const {
    const T* from = starts_anew(d, t, rank) ? anew : initial;
    return from ? from + (d * B + row_of(rank)) * width : nullptr;
  }

  // h_{t-1} of a row in y or where it starts from, or null for zeros.
  const T* h_before(const T* y, int64_t d, int64_t t, int64_t rank) const {
    if (is_first(d, t, rank) || starts_anew(d, t, rank)) return start_row(this->h0, this->reset_h, d, t, rank, P);
    return y + place(t + (d == 0 ? -1 : 1), rank) * D * P + d * P;
  }

  // How many threads the call deserves.
  int team_size(const Threads& threads) const {
    const int64_t rows = most_rows(), per_row = D * Cell::kGates * H * (P + I);
    const int64_t step = rows * per_row / T_;
    const int64_t useful = std::min(rows * per_row / kWorkPerThread, std::max(D, step / kWorkPerBarrier));
    return int(std::max<int64_t>(1, std::min<int64_t>({threads.count, Team::kMost, useful})));
  }

  Share share_of(const Side& side, int64_t rows) const {
    const bool large = Cell::kGates * H * P * int64_t(sizeof(T)) > kLargeWeightsBytes;
    return Share(side, rows, large ? kRowsOfLargeWeights : kRowsPerThread);
  }

  // Who waits for whom after every step: all members of a side unless each has rows of its own for the whole sequence.
  bool in_step(const Side& side) const { return side.count > 1 && (ragged || share_of(side, B).splits_units()); }
};

template <typename T>
FASTSEQ_INLINE void copy_or_zero(T* to, const T* from, int64_t count) {
  if (from)
    memcpy(to, from, count * sizeof(T));
  else
    memset(to, 0, count * sizeof(T));
}

template <typename Cell, typename T>
struct ForwardPass : Steps<Cell, T, RecurrentForward<T>> {
  using Base = Steps<Cell, T, RecurrentForward<T>>;
  using Base::active, Base::B, Base::before_step, Base::D, Base::H, Base::I, Base::P, Base::place, Base::ragged,
      Base::step, Base::T_;

  static constexpr int kBlockPanels = Cell::kGates * Cell::kUnitPanels;
  static constexpr int64_t kUnits = Cell::kUnitPanels * kPanel<T>;                // units of a block
  static constexpr int64_t kBlock = Cell::kSlots * kUnits;                        // its pre-activations
  static constexpr int64_t kHiddenSlot = (Cell::kSlots - Cell::kGates) * kUnits;  // the first that W_hh adds to

  Columns<T> from_x{H, Cell::kGates, Cell::kFirstGate}, from_h{H, Cell::kGates, 0}, outputs{P};
  int64_t blocks = (H + kUnits - 1) / kUnits, width = spread<T>(padded_to_panels<T>(P)),
          cell_width = spread<T>(padded_to_panels<T>(H));
  bool unpacked;          // weights are read where they are, by a few rows
  bool turned;            // or by the packed rows of a step
  int64_t chunk;          // steps whose input projection is made at once
  T *w_ih, *w_hh, *w_hr;  // packed, per direction
  T* bias;                // [D, blocks, kBlock]
  T* sums;                // [D, blocks, rows of a chunk, kBlock] pre-activations, in the order of time
  T *h, *c;               // [D, 2, B, width], read at even and odd steps, and [D, B, cell_width]
  T* unprojected;         // [D, B, cell_width] h before w_hr
  T* gathered;            // per member [kMostBlockRows, spread(I)]: rows of x that are not evenly spaced, or badly
  T* turned_rows;         // per member, if `turned`: packed rows of x and of h, and products [kBlock, panel]

  explicit ForwardPass(const RecurrentForward<T>& call) : Base(call) {
    unpacked = this->most_rows() < kUnpackedRows && P == H;
    turned = T_ == 1 && B >= kLeastTurnedRows && B <= kMostTurnedRows && P == H && this->stored == Stored::kSame &&
             (this->packed || (!this->order && !ragged));
    chunk = std::max<int64_t>(1, std::min(T_, std::max(kChunkRows, kChunkElements / (Cell::kGates * H)) / B));
  }

  bool evenly_spaced() const {
    return this->packed || (!this->order && !ragged && (B == 1 || this->x_t == B * this->x_b));
  }
  bool in_place() const { return unpacked || turned; }
  int64_t x_elements() const { return in_place() ? 0 : from_x.panels() * kPanel<T> * I; }
  int64_t h_elements() const { return in_place() ? 0 : from_h.panels() * kPanel<T> * P; }
  int64_t hr_elements() const { return P == H ? 0 : outputs.panels() * kPanel<T> * H; }
  int64_t turned_elements() const { return turned ? padded_to_panels<T>(B) * (I + P) + kBlock * kPanel<T> : 0; }
  int64_t x_stride() const { return this->packed ? I : B == 1 ? this->x_t : this->x_b; }  // if they are evenly spaced
  // Whether rows of x are multiplied where they are.
  bool reads_x() const {
    return evenly_spaced() && (this->most_rows() <= kTileRows || spread<T>(x_stride()) == x_stride());
  }
  int64_t gathered_elements() const {
    return in_place() || reads_x() ? 0 : Arena<T>::padded(kMostBlockRows * spread<T>(I));
  }

  // Lays the scratch out from `start` on; with null it only counts.
  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    w_ih = pieces.take(D * x_elements());
    w_hh = pieces.take(D * h_elements());
    w_hr = pieces.take(D * hr_elements());
    bias = pieces.take(D * blocks * kBlock);
    sums = pieces.take(D * blocks * chunk * B * kBlock);
    h = pieces.take(D * 2 * B * width);
    c = pieces.take(Cell::kHasCell ? D * B * cell_width : 0);
    unprojected = pieces.take(P == H ? 0 : D * B * cell_width);
    gathered = pieces.take(members * gathered_elements());
    turned_rows = pieces.take(members * turned_elements());
    return pieces.count;
  }

  // Pre-activations of a block of units at step t, [active, kBlock].
  T* sums_of(int64_t d, int64_t block, int64_t t) const {
    const int64_t s = d == 0 ? t : T_ - 1 - t, begin = s / chunk * chunk, end = std::min(T_, begin + chunk);
    const int64_t earliest = d == 0 ? begin : T_ - end;
    return sums + ((d * blocks + block) * chunk * B + before_step(t) - before_step(earliest)) * kBlock;
  }
  T* h_of(int64_t d, int64_t s) const { return h + (d * 2 + s % 2) * B * width; }
  T* c_of(int64_t d) const { return c + d * B * cell_width; }

  void run(int rank, Team& team) const {
    const Side side(rank, team.size(), D);
    const bool in_step = this->in_step(side);
    const auto wait = [&] { team.barrier(rank, side.first, side.count); };
    for (int64_t d = side.direction; d < side.direction_end; ++d) prepare(d, side);
    wait();
    for (int64_t s = 0; s < T_; ++s) {
      for (int64_t d = side.direction; d < side.direction_end; ++d) {
        if (!in_place() && s % chunk == 0) {
          project(d, s, std::min(T_, s + chunk), side);
          if (ragged) wait();
        }
        const int64_t rows = active(step(d, s));
        const Share my = turned ? Share(side, rows, kMostTurnedRows + 1) : this->share_of(side, rows);
        if (turned)
          advance_turned(d, side, my);
        else
          advance(d, s, my);
        if (P != H) {
          if (in_step) wait();
          shrink(d, s, my);
        }
      }
      if (in_step && s + 1 < T_) wait();
    }
    if (ragged && !this->packed) clear_padding(side);
  }

  // Calls body with a direction's weights as what they are stored as.
  template <typename Body>
  void with_weights(int64_t d, const Body& body) const {
    const auto& w = this->weights[d];
    with_stored<T>(this->stored, [&](auto element) {
      using Element = const decltype(element);
      const auto cast = [](const T* p) { return reinterpret_cast<Element*>(p); };
      body(RecurrentWeights<Element>{cast(w.w_ih), cast(w.w_hh), cast(w.b_ih), cast(w.b_hh), cast(w.w_hr)});
    });
  }

  // Packs the weights and sets the states to where they start.
  void prepare(int64_t d, const Side& side) const {
    with_weights(d, [&](const auto& w) { pack(d, side, w); });
    start(d, side);
  }

  template <typename Weights>
  void pack(int64_t d, const Side& side, const Weights& w) const {
    const auto mine = [&](int64_t count, int more = 0) { return share(count, side.member() + more, side.count); };
    const int64_t block = mine(blocks), block_end = mine(blocks, 1);
    if (!in_place()) {
      const int64_t begin = block * kBlockPanels, end = std::min(from_x.panels(), block_end * kBlockPanels);
      pack_transposed(from_x, begin, end, w.w_ih, I, I, w_ih + d * x_elements());
      pack_transposed(from_h, begin, end, w.w_hh, P, P, w_hh + d * h_elements());
    }
    if (P != H)
      pack_transposed(outputs, mine(outputs.panels()), mine(outputs.panels(), 1), w.w_hr, H, H,
                      w_hr + d * hr_elements());
    for (int64_t b = block; b < block_end; ++b)
      for (int slot = 0; slot < Cell::kSlots; ++slot)
        for (int64_t i = 0; i < kUnits; ++i) {
          const int64_t u = b * kUnits + i;
          const int from_x_gate = (slot + Cell::kFirstGate) % Cell::kGates,
                    from_h_gate = slot - (Cell::kSlots - Cell::kGates);
          T value = 0;
          if (w.b_ih && u < H && slot < Cell::kGates) value += value_of<T>(w.b_ih + from_x_gate * H + u);
          if (w.b_hh && u < H && from_h_gate >= 0) value += value_of<T>(w.b_hh + from_h_gate * H + u);
          bias[(d * blocks + b) * kBlock + slot * kUnits + i] = value;
        }
  }

  void start(int64_t d, const Side& side) const {
    const int64_t end = share(B, side.member() + 1, side.count);
    for (int64_t rank = share(B, side.member(), side.count); rank < end; ++rank) {
      int64_t t = 0;
      if (d == 1) {
        t = T_ - 1;
        while (t > 0 && active(t) <= rank) --t;
      }
      if (rank >= active(0)) {  // no step at all
        const int64_t row = d * B + this->row_of(rank);
        copy_or_zero(this->h_n + row * P, this->h0 ? this->h0 + row * P : nullptr, P);
        if (Cell::kHasCell) copy_or_zero(this->c_n + row * H, this->c0 ? this->c0 + row * H : nullptr, H);
        continue;
      }
      for (int64_t s = 0; s < 2; ++s) {
        T* row = h_of(d, s) + rank * width;
        copy_or_zero(row, this->start_row(this->h0, this->reset_h, d, t, rank, P), P);
        std::fill(row + P, row + width, T(0));
      }
      if (Cell::kHasCell)
        copy_or_zero(c_of(d) + rank * cell_width, this->start_row(this->c0, this->reset_c, d, t, rank, H), H);
    }
  }

  // sums = W_ih x for steps [from, to) of a direction: for my units, or for my part of the rows.
  void project(int64_t d, int64_t from, int64_t to, const Side& side) const {
    const int64_t earliest = d == 0 ? from : T_ - to, latest = earliest + to - from;
    const int64_t first_row = before_step(earliest), all = before_step(latest) - first_row;
    if (ragged)
      return project_rows(d, earliest, share(all, side.member(), side.count), share(all, side.member() + 1, side.count),
                          0, blocks, side);
    const Share my = this->share_of(side, B);
    if (my.splits_units() || my.row_end - my.row == B)
      return project_rows(d, earliest, 0, all, my.begin(blocks), my.end(blocks), side);
    for (int64_t t = 0; t < latest - earliest; ++t)
      project_rows(d, earliest, t * B + my.row, t * B + my.row_end, 0, blocks, side);
  }

  // The same for rows [row, row_end), counted from the first one of step `earliest`.
  void project_rows(int64_t d, int64_t earliest, int64_t row, int64_t row_end, int64_t block, int64_t block_end,
                    const Side& side) const {
    const Packed<T> w{w_ih + d * x_elements(), I};
    const int64_t most = block_rows<T>(I), first_row = before_step(earliest);
    for (; row < row_end; row += most) {
      const int64_t count = std::min(most, row_end - row);
      Left<T> left{nullptr, spread<T>(I)};
      if (reads_x()) {
        left = {this->x + (first_row + row) * x_stride(), x_stride()};
      } else {
        T* to = gathered + side.rank * gathered_elements();
        left.data = to;
        for (int64_t i = 0; i < count; ++i, to += left.stride) {
          const int64_t at = first_row + row + i, t = ragged ? this->step_of[at] : at / B;
          memcpy(to, this->x_row(t, at - before_step(t)), I * sizeof(T));
        }
      }
      for (int64_t b = block; b < block_end; ++b) {
        T* out = sums_of(d, b, earliest) + row * kBlock;
        const int64_t next = b + 1 < block_end ? b + 1 : block;
        multiply_panels<T>(w, b * kBlockPanels, panels_of(b), next * kBlockPanels, left, count, out, kBlock, false);
        if constexpr (kHiddenSlot > 0)
          for (int64_t i = 0; i < count; ++i) std::fill_n(out + i * kBlock + Cell::kGates * kUnits, kHiddenSlot, T(0));
      }
    }
  }

  int64_t panels_of(int64_t block) const {
    return std::min<int64_t>(kBlockPanels, from_h.panels() - block * kBlockPanels);
  }

  // One step of one direction, for my rows and units.
  void advance(int64_t d, int64_t s, const Share& my) const {
    const T* h_now = h_of(d, s);
    const Packed<T> w{w_hh + d * h_elements(), P};
    const bool no_h = s == 0 && !this->h0 && !this->reset && !ragged;
    const int64_t most = block_rows<T>(P);
    for (int64_t row = my.row; row < my.row_end; row += most) {
      const int64_t row_end = std::min(my.row_end, row + most);
      to_and_fro(my.begin(blocks), my.end(blocks), s % 2, [&](int64_t block, int64_t next) {
        T* a = sums_of(d, block, step(d, s)) + row * kBlock;
        if (unpacked)
          with_weights(d, [&](const auto& weights) {
            block_from_weights(weights, d, s, block, row, row_end, no_h ? nullptr : h_now, a);
          });
        else if (!no_h)
          multiply_panels<T>(w, block * kBlockPanels, panels_of(block), next * kBlockPanels,
                             {h_now + row * width, width}, row_end - row, a + kHiddenSlot, kBlock, true);
        if ((block + 1) * kUnits <= H)
          activate<true>(d, s, block, row, row_end, a);
        else
          activate<false>(d, s, block, row, row_end, a);
      });
    }
  }

  // a = W_ih x and W_hh h of one block of units, from weights where they are.
  template <typename Weights>
  void block_from_weights(const Weights& w, int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end,
                          const T* h_now, T* a) const {
    // One gate's units lie together, several gates' units apart: so many dot products at once either way.
    constexpr int kAtOnce = Cell::kGates == 1 ? 4 : Cell::kGates;
    const int64_t first = block * kUnits, count = std::min<int64_t>(kUnits, H - first), t = step(d, s);
    const auto dots = [&](int64_t u, const auto* matrix, const T* vector, int64_t K, int first_gate, T* slots) {
      T out[kAtOnce] = {};
      if constexpr (Cell::kGates > 1) {
        dot_rows<kAtOnce>(matrix + (first + u) * K, H * K, vector, K, out);
        for (int k = 0; k < kAtOnce; ++k) slots[(k - first_gate + kAtOnce) % kAtOnce * kUnits + u] += out[k];
      } else if (u % kAtOnce == 0 && u + kAtOnce <= count) {
        dot_rows<kAtOnce>(matrix + (first + u) * K, K, vector, K, out);
        for (int k = 0; k < kAtOnce; ++k) slots[u + k] += out[k];
      } else if (u >= count / kAtOnce * kAtOnce) {
        dot_rows<1>(matrix + (first + u) * K, K, vector, K, out);
        slots[u] += out[0];
      }
    };
    for (int64_t b = row; b < row_end; ++b) {
      T* slots = a + (b - row) * kBlock;
      std::fill_n(slots, kBlock, T(0));
      for (int64_t u = 0; u < count; ++u) {
        dots(u, w.w_ih, this->x_row(t, b), I, Cell::kFirstGate, slots);
        if (h_now) dots(u, w.w_hh, h_now + b * width, P, 0, slots + kHiddenSlot);
      }
    }
  }

  // The only step of one direction, for my units.
  void advance_turned(int64_t d, const Side& side, const Share& my) const {
    const Columns<T> rows{B};
    T *x = turned_rows + side.rank * turned_elements(), *h_packed = x + rows.panels() * kPanel<T> * I,
      *products = h_packed + rows.panels() * kPanel<T> * P;
    const bool no_h = !this->h0 && !this->reset;
    pack_transposed(rows, 0, rows.panels(), this->x_row(0, 0), this->packed ? I : this->x_b, I, x);
    if (!no_h) pack_transposed(rows, 0, rows.panels(), h_of(d, 0), width, P, h_packed);
    const auto& w = this->weights[d];
    for (int64_t block = my.begin(blocks); block < my.end(blocks); ++block) {
      const int64_t first = block * kUnits, count = std::min(kUnits, H - first);
      T* a = sums_of(d, block, 0);
      for (int64_t panel = 0; panel < rows.panels(); ++panel) {
        // products[slot, unit][rows of a panel] = W x + W h.
        std::fill_n(products, kBlock * kPanel<T>, T(0));
        const auto add = [&](const T* matrix, int64_t K, int gate, int slot, const T* packed) {
          const T* left = matrix + (gate * H + first) * K;
          for (int64_t u = 0; u < count; u += kTileRows)
            tile_rows<T>(std::min<int64_t>(kTileRows, count - u), K, {left + u * K, K}, packed,
                         products + (slot * kUnits + u) * kPanel<T>, kPanel<T>, true, {left + u * K, kLine<T>});
        };
        for (int gate = 0; gate < Cell::kGates; ++gate) {
          const int slot = (gate - Cell::kFirstGate + Cell::kGates) % Cell::kGates;
          add(w.w_ih, I, gate, slot, x + panel * I * kPanel<T>);
          if (!no_h) add(w.w_hh, P, gate, Cell::kSlots - Cell::kGates + gate, h_packed + panel * P * kPanel<T>);
        }
        const int64_t row = panel * kPanel<T>;
        turn_back(products, std::min<int64_t>(kPanel<T>, B - row), a + row * kBlock);
      }
      if (first + kUnits <= H)
        activate<true>(d, 0, block, 0, B, a);
      else
        activate<false>(d, 0, block, 0, B, a);
    }
  }

  // a[rows][kBlock] from products[kBlock][kPanel].
  static void turn_back(const T* products, int64_t rows, T* a) {
    constexpr int n = kLanes<T>;
    for (int64_t row = 0; row < rows; row += n)
      for (int64_t i = 0; i < kBlock; i += n) {
        Vec<T> square[n];
        for (int j = 0; j < n; ++j) square[j] = load(products + (i + j) * kPanel<T> + row);
        transpose<T>(square);
        for (int64_t j = 0; j < std::min<int64_t>(n, rows - row); ++j) store(a + (row + j) * kBlock + i, square[j]);
      }
  }

  // Cell and output of one block of units in rows [row, row_end) from the pre-activations a.
  template <bool kFull>
  FASTSEQ_INLINE void activate(int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end, const T* a) const {
    const int64_t t = step(d, s);
    const T* b_block = bias + (d * blocks + block) * kBlock;
    for (int64_t b = row; b < row_end; ++b, a += kBlock) {
      const int64_t at = d * this->N + place(t, b);
      const Output out = output(d, s, b);
      T *c_row = Cell::kHasCell ? c_of(d) + b * cell_width : nullptr,
        *c_n = Cell::kHasCell && out.last ? this->c_n + (d * B + this->row_of(b)) * H : nullptr;
      const T* c_start = out.anew && this->reset_c ? this->reset_c + (d * B + this->row_of(b)) * H : nullptr;
      for (int v = 0; v < Cell::kUnitPanels * kPanelVectors; ++v) {
        const int64_t u = block * kUnits + v * kLanes<T>;
        const int lanes = kFull ? kLanes<T> : int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, H - u)));
        if (lanes == 0) continue;
        const auto slot = [&](int k) __attribute__((always_inline)) {
          const int64_t i = k * kUnits + v * kLanes<T>;
          return load(a + i) + load(b_block + i);
        };
        const auto keep = [&](int k, Vec<T> value) __attribute__((always_inline)) {
          if (this->gates) store(this->gates + (at * Cell::kTape + k) * H + u, value, lanes);
        };
        Vec<T> c_t{}, h_before{};
        if constexpr (Cell::kKeepsH) h_before = load(out.now + u);
        if constexpr (Cell::kHasCell) c_t = load(c_row + u, lanes);
        const Vec<T> h_t = Cell::template step<T>(slot, h_before, c_t, keep);
        if constexpr (Cell::kHasCell) {
          if (this->cells) store(this->cells + at * H + u, c_t, lanes);
          if (c_n) store(c_n + u, c_t, lanes);
          store(c_row + u, out.anew ? (c_start ? load(c_start + u, lanes) : Vec<T>{}) : c_t, lanes);
        }
        if (P != H)
          store(unprojected + (d * B + b) * cell_width + u, h_t, lanes);
        else
          out.put(u, h_t, lanes);
      }
    }
  }

  // Where h_t of a row goes to.
  struct Output {
    const T* now;       // h_{t-1}
    T *y, *h_n, *next;  // h_n may be null
    const T* start;     // what the next step starts from, null for zeros, if `anew`
    bool anew, last;

    FASTSEQ_INLINE void put(int64_t u, Vec<T> h_t, int lanes) const {
      store(y + u, h_t, lanes);
      if (h_n) store(h_n + u, h_t, lanes);
      store(next + u, anew ? (start ? load(start + u, lanes) : Vec<T>{}) : h_t, lanes);
    }
  };

  FASTSEQ_INLINE Output output(int64_t d, int64_t s, int64_t b) const {
    const int64_t t = step(d, s), row = (d * B + this->row_of(b)) * P;
    Output out;
    out.last = this->is_last(d, t, b);
    out.anew = this->reset && !out.last && this->starts_anew(d, d == 0 ? t + 1 : t - 1, b);
    out.now = h_of(d, s) + b * width;
    out.next = h_of(d, s + 1) + b * width;
    out.y = this->y_row(this->y, t, b, d);
    out.h_n = out.last ? this->h_n + row : nullptr;
    out.start = out.anew && this->reset_h ? this->reset_h + row : nullptr;
    return out;
  }

  // h = W_hr of what activate left, for my rows and outputs.
  void shrink(int64_t d, int64_t s, const Share& my) const {
    const T* left = unprojected + (d * B + my.row) * cell_width;
    multiply<T>({w_hr + d * hr_elements(), H}, outputs, my.begin(outputs.panels()), my.end(outputs.panels()),
                {left, cell_width}, my.row_end - my.row,
                [&](int64_t i, int64_t p, int lanes, Vec<T> h_t) { output(d, s, my.row + i).put(p, h_t, lanes); });
  }

  // Outputs and cells past a row's end are zeros.
  void clear_padding(const Side& side) const {
    for (int64_t t = share(T_, side.member(), side.count); t < share(T_, side.member() + 1, side.count); ++t)
      for (int64_t rank = active(t); rank < B; ++rank)
        for (int64_t d = side.direction; d < side.direction_end; ++d) {
          std::fill_n(this->y_row(this->y, t, rank, d), P, T(0));
          if (this->cells) std::fill_n(this->cells + (d * this->N + place(t, rank)) * H, H, T(0));
        }
  }
};

template <typename Cell, typename T>
void forward(const RecurrentForward<T>& call, Threads threads) {
  ForwardPass<Cell, T> pass(call);
  run_pass<ForwardPass<Cell, T>, T>(pass, threads);
}

// Steps are taken back in chunks: da_t for every step of a chunk, one after the other, then what the chunk adds to the
// gradients of the input and of the weights, as products over all of its rows at once.
template <typename Cell, typename T>
struct BackwardPass : Steps<Cell, T, RecurrentBackward<T>> {
  using Base = Steps<Cell, T, RecurrentBackward<T>>;
  using Base::active, Base::B, Base::before_step, Base::D, Base::H, Base::I, Base::P, Base::place, Base::ragged,
      Base::step, Base::T_;

  struct Chunk {  // steps [begin, end) in the order of each direction
    int64_t begin, end;
  };

  // da holds a gradient for every slot; W_ih stands opposite the first kGates*H columns, W_hh opposite the last ones.
  int64_t G = Cell::kGates * H, da_width = spread<T>(Cell::kSlots * H), hidden_from = (Cell::kSlots - Cell::kGates) * H;
  Columns<T> hidden{P}, units{H}, input{I};
  int64_t width = spread<T>(padded_to_panels<T>(P)), cell_width = spread<T>(padded_to_panels<T>(H));
  bool unpacked, state_wanted;  // weights are read where they are; somebody asks for dh0
  int64_t chunk;                // the most steps of a chunk
  T *w_hh, *w_ih, *w_hr;        // packed for products from the left, per direction
  T* da;                        // [D, rows of a chunk, da_width] gradients of the pre-activations, in the order of time
  T *dh, *dc;                   // [D, B, width] and [D, B, cell_width]: what reaches h and c from later steps
  T *dp, *unprojected;          // [D, rows of a chunk, P] and [.., H]: gradients of h, and h before w_hr
  T* draw;                      // [D, B, cell_width] gradients of h before w_hr
  T* zeros;                     // a row of them
  T* outer;                     // per member: scratch of multiply_outer
  T* db;                        // [D, da_width]: sums of da

  explicit BackwardPass(const RecurrentBackward<T>& call) : Base(call) {
    unpacked = this->most_rows() < kUnpackedRows && P == H;
    state_wanted = this->dh0 || this->dreset_h;
    chunk = std::max<int64_t>(1, std::min(T_, kOuterDepth / std::max<int64_t>(B, 1)));
  }

  int64_t packed_elements(const Columns<T>& columns, int64_t K) const {
    return unpacked ? 0 : columns.panels() * K * kPanel<T>;
  }
  int64_t outer_elements() const { return Arena<T>::padded(scratch_for_outer<T>(std::max(I, std::max(P, H)))); }

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    const int64_t rows = D * chunk * B, projected = P == H ? 0 : 1;
    w_hh = pieces.take(D * packed_elements(hidden, G));
    w_ih = pieces.take(this->dx ? D * packed_elements(input, G) : 0);
    w_hr = pieces.take(projected * D * packed_elements(units, P));
    da = pieces.take(rows * da_width);
    dh = pieces.take(D * B * width);
    dc = pieces.take(Cell::kHasCell ? D * B * cell_width : 0);
    dp = pieces.take(projected * rows * P);
    unprojected = pieces.take(projected * rows * H);
    draw = pieces.take(projected * D * B * cell_width);
    zeros = pieces.take(std::max(P, H));
    outer = pieces.take(members * outer_elements());
    db = pieces.take(D * da_width);
    return pieces.count;
  }

  int64_t earliest(int64_t d, Chunk c) const { return d == 0 ? c.begin : T_ - c.end; }
  int64_t rows_of(int64_t d, Chunk c) const {
    return before_step(earliest(d, c) + c.end - c.begin) - before_step(earliest(d, c));
  }
  // A chunk's rows of a buffer `columns` wide, from those of step t on.
  T* chunk_row(T* buffer, int64_t columns, int64_t d, Chunk c, int64_t t) const {
    return buffer + (d * chunk * B + before_step(t) - before_step(earliest(d, c))) * columns;
  }
  // Step and rank of a chunk's k-th row.
  std::pair<int64_t, int64_t> row_at(int64_t d, Chunk c, int64_t k) const {
    const int64_t at = before_step(earliest(d, c)) + k, t = ragged ? this->step_of[at] : at / B;
    return {t, at - before_step(t)};
  }

  void run(int rank, Team& team) const {
    const int members = team.size();
    const Side side(rank, members, D);
    const bool in_step = this->in_step(side);
    const auto wait = [&] { team.barrier(rank, side.first, side.count); };
    prepare(side, rank, members);
    team.barrier(rank, 0, members);
    for (int64_t end = T_; end > 0; end -= (end - 1) % chunk + 1) {
      const Chunk c{(end - 1) / chunk * chunk, end};
      for (int64_t s = c.end - 1; s >= c.begin; --s) {
        const auto each_direction = [&](const auto& stage) {
          for (int64_t d = side.direction; d < side.direction_end; ++d)
            stage(d, this->share_of(side, active(step(d, s))));
        };
        if (P != H) {
          each_direction([&](int64_t d, const Share& my) { gather_dh(d, c, s, my); });
          if (in_step) wait();
          each_direction([&](int64_t d, const Share& my) { unproject(d, c, s, my); });
        }
        each_direction([&](int64_t d, const Share& my) { gates_backward(d, c, s, my); });
        if (in_step) wait();
        if (s == 0 && !state_wanted) break;
        each_direction([&](int64_t d, const Share& my) { state_backward(d, c, s, my); });
        if (in_step && ragged) wait();  // the next step's rows are somebody else's
      }
      team.barrier(rank, 0, members);
      for (int64_t d = 0; d < D; ++d) {
        if (this->dx) input_backward(d, c, rank, members);
        weights_backward(d, c, rank, members);
        if (D == 2) team.barrier(rank, 0, members);  // both directions add to the same rows of dx
      }
      if (D == 1 && c.begin > 0) team.barrier(rank, 0, members);  // da is about to be written again
    }
    finish(side, rank, members, team);
  }

  // Packs the weights, and sets what is summed up to where it starts.
  void prepare(const Side& side, int rank, int members) const {
    const auto mine = [&](int64_t count, int more = 0) { return share(count, side.member() + more, side.count); };
    for (int64_t d = side.direction; d < side.direction_end; ++d) {
      const auto& w = this->weights[d];
      if ((T_ > 1 || state_wanted) && !unpacked)
        pack_rows<T>(
            hidden, mine(hidden.panels()), mine(hidden.panels(), 1), [&](int64_t k) { return w.w_hh + k * P; }, G,
            w_hh + d * packed_elements(hidden, G));
      if (P != H)
        pack_rows<T>(
            units, mine(units.panels()), mine(units.panels(), 1), [&](int64_t k) { return w.w_hr + k * H; }, P,
            w_hr + d * packed_elements(units, P));
      for (int64_t b = mine(B); b < mine(B, 1); ++b) {
        const int64_t row = d * B + this->row_of(b);
        T* dh_row = dh + (d * B + b) * width;
        copy_or_zero(dh_row, this->dh_n ? this->dh_n + row * P : nullptr, P);
        std::fill(dh_row + P, dh_row + width, T(0));
        if (Cell::kHasCell) copy_or_zero(dc + (d * B + b) * cell_width, this->dc_n ? this->dc_n + row * H : nullptr, H);
        if (this->dreset_h) std::fill_n(this->dreset_h + row * P, P, T(0));
        if (this->dreset_c) std::fill_n(this->dreset_c + row * H, H, T(0));
      }
    }
    if (rank == 0) {
      std::fill_n(zeros, std::max(P, H), T(0));
      std::fill_n(db, D * da_width, T(0));
    }
    if (!this->dx) return;
    const int64_t panels = input.panels(), begin = share(panels, rank, members), end = share(panels, rank + 1, members);
    for (int64_t d = 0; d < D && !unpacked; ++d) {
      const T* w = this->weights[d].w_ih;
      pack_rows<T>(
          input, begin, end, [&](int64_t k) { return w + (k + Cell::kFirstGate * H) % G * I; }, G,
          w_ih + d * packed_elements(input, G));
    }
    const int64_t elements = (this->packed ? this->N : T_ * B) * I;
    if (D == 2 || (ragged && !this->packed))
      std::fill(this->dx + share(elements, rank, members), this->dx + share(elements, rank + 1, members), T(0));
  }

  // body(rank, first unit, count) for every row of my rectangle.
  template <typename Body>
  FASTSEQ_INLINE void each_row(const Share& my, int64_t units_in_all, const Body& body) const {
    const int64_t panels = Columns<T>{units_in_all}.panels();
    const int64_t u = std::min(units_in_all, my.begin(panels) * kPanel<T>),
                  end = std::min(units_in_all, my.end(panels) * kPanel<T>);
    for (int64_t b = my.row; b < my.row_end; ++b) body(b, u, end - u);
  }

  const T* dy_row(int64_t t, int64_t b, int64_t d) const {
    if (this->packed) return this->dy + (before_step(t) + b) * this->dy_t + d * P;
    return this->dy + t * this->dy_t + this->row_of(b) * this->dy_b + d * P;
  }

  // With a projection: all that reaches h_t, kept for the gradient of w_hr.
  void gather_dh(int64_t d, Chunk c, int64_t s, const Share& my) const {
    const int64_t t = step(d, s);
    each_row(my, P, [&](int64_t b, int64_t first, int64_t count) {
      const T *from = dh + (d * B + b) * width, *dy = dy_row(t, b, d);
      T* to = chunk_row(dp, P, d, c, t) + b * P;
      for (int64_t p = first; p < first + count; ++p) to[p] = from[p] + dy[p];
    });
  }

  // What of it reaches h_t before its projection.
  void unproject(int64_t d, Chunk c, int64_t s, const Share& my) const {
    const T* left = chunk_row(dp, P, d, c, step(d, s)) + my.row * P;
    multiply<T>({w_hr + d * packed_elements(units, P), P}, units, my.begin(units.panels()), my.end(units.panels()),
                {left, P}, my.row_end - my.row, [&](int64_t i, int64_t u, int lanes, Vec<T> value) {
                  store(draw + (d * B + my.row + i) * cell_width + u, value, lanes);
                });
  }

  // da_t from dh_t and dc_t, which become what of dh_{t-1} and dc_{t-1} does not come through W_hh.
  void gates_backward(int64_t d, Chunk c, int64_t s, const Share& my) const {
    const int64_t t = step(d, s);
    each_row(my, H, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t at = d * this->N + place(t, b);
      const bool starts = this->is_first(d, t, b) || this->starts_anew(d, t, b);
      const T* c_before = !Cell::kHasCell ? nullptr
                          : starts        ? this->start_row(this->c0, this->reset_c, d, t, b, H)
                                          : this->cells + (d * this->N + place(t + (d == 0 ? -1 : 1), b)) * H;
      const T* h_before = this->h_before(this->y, d, t, b);
      const T *h_row = this->y + place(t, b) * D * P + d * P, *gates = this->gates + at * Cell::kTape * H,
              *cells = this->cells + at * H, *dy = P == H ? dy_row(t, b, d) : nullptr,
              *dcells = this->dcells ? this->dcells + at * H : nullptr;
      T *da_row = chunk_row(da, da_width, d, c, t) + b * da_width, *dh_row = dh + (d * B + b) * width,
        *dc_row = dc + (d * B + b) * cell_width;
      const auto some = [&](int64_t u, int lanes) __attribute__((always_inline)) {
        const auto tape = [&](int k) __attribute__((always_inline)) { return load(gates + k * H + u, lanes); };
        const auto put = [&](int k, Vec<T> value)
                             __attribute__((always_inline)) { store(da_row + k * H + u, value, lanes); };
        Back<T> at_t{};
        at_t.dh =
            P == H ? load(dh_row + u, lanes) + load(dy + u, lanes) : load(draw + (d * B + b) * cell_width + u, lanes);
        if constexpr (Cell::kHasCell) {
          at_t.c = load(cells + u, lanes);
          at_t.dc = load(dc_row + u, lanes);
          if (dcells) at_t.dc += load(dcells + u, lanes);
          if (c_before) at_t.c_before = load(c_before + u, lanes);
        } else {
          at_t.h = load(h_row + u, lanes);
          if (h_before) at_t.h_before = load(h_before + u, lanes);
        }
        Cell::template step_back<T>(tape, at_t, put);
        if constexpr (Cell::kHasCell) store(dc_row + u, at_t.dc, lanes);
        if constexpr (Cell::kKeepsH) store(dh_row + u, at_t.dh, lanes);
        if (P != H) store(chunk_row(unprojected, H, d, c, t) + b * H + u, at_t.h, lanes);
      };
      int64_t u = first;
      for (; u + kLanes<T> <= first + count; u += kLanes<T>) some(u, kLanes<T>);
      if (u < first + count) some(u, int(first + count - u));
    });
  }

  // dh_{t-1} = W_hh^T da_t (+ what the cell passes on), for my rows and units.
  void state_backward(int64_t d, Chunk c, int64_t s, const Share& my) const {
    const T* left = chunk_row(da, da_width, d, c, step(d, s)) + hidden_from;
    if (unpacked) {
      each_row(my, P, [&](int64_t b, int64_t p, int64_t count) {
        multiply_row<T>(left + b * da_width, this->weights[d].w_hh, P, G, p, p + count, dh + (d * B + b) * width,
                        Cell::kKeepsH);
      });
    } else {
      const Packed<T> w{w_hh + d * packed_elements(hidden, G), G};
      const int64_t most = block_rows<T>(G), begin = my.begin(hidden.panels()), end = my.end(hidden.panels());
      for (int64_t row = my.row; row < my.row_end; row += most) {
        const int64_t rows = std::min(most, my.row_end - row);
        T* result = dh + (d * B + row) * width;
        // In groups of panels, as many as a tile of few rows wants.
        constexpr int64_t kGroup = 4;
        to_and_fro(0, (end - begin + kGroup - 1) / kGroup, s % 2, [&](int64_t group, int64_t next) {
          const int64_t panel = begin + group * kGroup;
          multiply_panels<T>(w, panel, std::min(kGroup, end - panel), begin + next * kGroup,
                             {left + row * da_width, da_width}, rows, result + panel * kPanel<T>, width, Cell::kKeepsH);
        });
      }
    }
    if (this->reset) cut(d, step(d, s), my);
  }

  // Where a state started anew before step t, what reaches it goes to what it started from.
  void cut(int64_t d, int64_t t, const Share& my) const {
    const auto part = [&](T* from, int64_t padded, T* to, int64_t count_in_all) {
      each_row(my, count_in_all, [&](int64_t b, int64_t first, int64_t count) {
        if (!this->starts_anew(d, t, b)) return;
        T* row = from + (d * B + b) * padded;
        if (to)
          for (int64_t u = first; u < first + count; ++u) to[(d * B + this->row_of(b)) * count_in_all + u] += row[u];
        std::fill_n(row + first, count, T(0));
      });
    };
    part(dh, width, this->dreset_h, P);
    if (Cell::kHasCell) part(dc, cell_width, this->dreset_c, H);
  }

  // body(da's columns [begin, end), how many rows further the weight's are) for the parts of W_ih opposite columns
  // [begin, end) of da: gates stand in da from kFirstGate on and round.
  template <typename Body>
  FASTSEQ_INLINE void each_gate_range(int64_t begin, int64_t end, const Body& body) const {
    const int64_t turn = G - Cell::kFirstGate * H;
    if (begin < std::min(end, turn)) body(begin, std::min(end, turn), Cell::kFirstGate * H);
    if (std::max(begin, turn) < end) body(std::max(begin, turn), end, -turn);
  }

  // dx_t (+)= W_ih^T da_t for the chunk's steps; each member does some rows, or some columns where there are few rows.
  void input_backward(int64_t d, Chunk c, int rank, int members) const {
    const int64_t rows = rows_of(d, c);
    const T* left = da + d * chunk * B * da_width;
    if (unpacked) {
      const int64_t panels = input.panels(), first = std::min(I, share(panels, rank, members) * kPanel<T>),
                    last = std::min(I, share(panels, rank + 1, members) * kPanel<T>);
      for (int64_t row = 0; row < rows; ++row) {
        bool add = D == 2;
        each_gate_range(0, G, [&](int64_t from, int64_t to, int64_t shift) {
          multiply_row<T>(left + row * da_width + from, this->weights[d].w_ih + (from + shift) * I, I, to - from, first,
                          last, dx_row(d, c, row), add);
          add = true;
        });
      }
      return;
    }
    const int64_t begin = share(rows, rank, members), end = share(rows, rank + 1, members);
    T* first = ragged ? nullptr : this->dx + (before_step(earliest(d, c)) + begin) * I;
    multiply<T>({w_ih + d * packed_elements(input, G), G}, input, 0, input.panels(),
                {left + begin * da_width, da_width}, end - begin,
                [&](int64_t i, int64_t column, int lanes, Vec<T> value) {
                  T* out = (first ? first + i * I : dx_row(d, c, begin + i)) + column;
                  store(out, D == 2 ? load(out, lanes) + value : value, lanes);
                });
  }

  T* dx_row(int64_t d, Chunk c, int64_t k) const {
    const auto [t, b] = row_at(d, c, k);
    return this->dx + place(t, b) * I;
  }

  // The chunk's part of the weights' gradients; each member does some of the gates.
  void weights_backward(int64_t d, Chunk c, int rank, int members) const {
    const int64_t begin = share(G, rank, members), end = share(G, rank + 1, members), rows = rows_of(d, c);
    const bool add = c.end < T_;
    const auto& dw = this->dweights[d];
    const T* left = da + d * chunk * B * da_width;
    T* scratch = outer + rank * outer_elements();
    const auto x_rows = [&](int64_t k) {
      const auto [t, b] = row_at(d, c, k);
      return this->x_row(t, b);
    };
    if (dw.w_ih)
      each_gate_range(begin, end, [&](int64_t from, int64_t to, int64_t shift) {
        multiply_outer<T>([&](int64_t k) { return left + k * da_width; }, x_rows, rows, from, to, I,
                          dw.w_ih + shift * I, add, scratch);
      });
    if (dw.w_hh) {
      // Rows that start from zeros add nothing. Where they are all of a step, they are left out.
      const bool none = c.begin == 0 && !this->h0 && !this->reset && !ragged;
      const int64_t skipped = none && d == 0 ? B : 0;
      const auto h_rows = [&](int64_t k) {
        const auto [t, b] = row_at(d, c, skipped + k);
        const T* row = this->h_before(this->y, d, t, b);
        return row ? row : zeros;
      };
      multiply_outer<T>([&](int64_t k) { return left + (skipped + k) * da_width + hidden_from; }, h_rows,
                        rows - (none ? B : 0), begin, end, P, dw.w_hh, add, scratch);
    }
    if (dw.w_hr)
      multiply_outer<T>([&](int64_t k) { return dp + (d * chunk * B + k) * P; },
                        [&](int64_t k) { return unprojected + (d * chunk * B + k) * H; }, rows, share(P, rank, members),
                        share(P, rank + 1, members), H, dw.w_hr, add, scratch);
    if (!dw.b_ih && !dw.b_hh) return;
    const int64_t from = share(Cell::kSlots * H, rank, members), to = share(Cell::kSlots * H, rank + 1, members);
    T* sums = db + d * da_width;
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t m = from; m < to; ++m) sums[m] += left[k * da_width + m];
  }

  // What was summed up goes to where it belongs.
  void finish(const Side& side, int rank, int members, Team& team) const {
    team.barrier(rank, 0, members);
    for (int64_t d = side.direction; d < side.direction_end; ++d)
      for (int64_t b = share(B, side.member(), side.count); b < share(B, side.member() + 1, side.count); ++b) {
        const int64_t row = d * B + this->row_of(b);
        if (this->dh0) memcpy(this->dh0 + row * P, dh + (d * B + b) * width, P * sizeof(T));
        if (this->dc0) memcpy(this->dc0 + row * H, dc + (d * B + b) * cell_width, H * sizeof(T));
      }
    if (rank > 0) return;
    for (int64_t d = 0; d < D; ++d) {
      const auto& dw = this->dweights[d];
      const T* sums = db + d * da_width;
      if (dw.b_ih)
        each_gate_range(0, G, [&](int64_t from, int64_t to, int64_t shift) {
          std::copy(sums + from, sums + to, dw.b_ih + from + shift);
        });
      if (dw.b_hh) std::copy(sums + hidden_from, sums + hidden_from + G, dw.b_hh);
    }
  }
};

template <typename Cell, typename T>
void backward(const RecurrentBackward<T>& call, Threads threads) {
  BackwardPass<Cell, T> pass(call);
  run_pass<BackwardPass<Cell, T>, T>(pass, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
