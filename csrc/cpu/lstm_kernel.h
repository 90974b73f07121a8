// The LSTM layer on the CPU. Formulas: fastseq/reference/lstm.py.
//
// Every member of the team owns a rectangle of the batch and of the hidden units, for the whole sequence: rows of the
// batch where there are enough of them (then nobody waits for anybody), else blocks of units (one barrier a step, since
// every unit needs all of h_{t-1}). Two directions are two independent chains, each with half of the team.
#pragma once
#include "cpu/arena.h"
#include "cpu/gemm.h"
#include "cpu/lstm.h"
#include "cpu/team.h"

namespace fastseq::FASTSEQ_ISA {

// At B=1 a thread does about 20 multiply-adds a ns. Starting a parallel region costs 3 to 10 us, a barrier 0.2 us.
constexpr int64_t kWorkPerThread = 192 * 1024, kWorkPerBarrier = 4 * 1024;
// With fewer rows than this for each thread the weights' way from the L3 cache limits a step: split the units instead.
constexpr int64_t kRowsPerThread = 8;
// With fewer rows than this in all, packing a weight matrix costs more than it saves.
constexpr int64_t kUnpackedRows = 8;
// The input projection is made for so many elements of gates at a time that they are still in the L2 cache when they are
// used (256 KB), but for at least so many rows that the weights' way from memory does not count.
constexpr int64_t kChunkElements = 64 * 1024, kChunkRows = 96;

// What one member of the team does: rows [row, row_end) of the batch and blocks [block, block_end) of the units, for
// directions [direction, direction_end), in step with the members [first, first + count) when `waits`.
struct Share {
  int rank, first, count;
  int64_t direction, direction_end, row, row_end, block, block_end;
  bool waits;
};

inline Share share_of(int rank, int size, int64_t D, int64_t B, int64_t blocks) {
  Share s{rank, 0, size, 0, D, 0, B, 0, blocks, false};
  if (D == 2 && size % 2 == 0) {
    s.count = size / 2;
    s.direction = rank / s.count;
    s.direction_end = s.direction + 1;
    s.first = int(s.direction) * s.count;
  }
  const int64_t member = rank - s.first, members = s.count;
  if (B >= kRowsPerThread * members) {
    s.row = B * member / members;
    s.row_end = B * (member + 1) / members;
  } else {
    s.block = blocks * member / members;
    s.block_end = blocks * (member + 1) / members;
    s.waits = members > 1;
  }
  return s;
}

// How many threads a call deserves.
template <typename T>
int team_size(const Threads& threads, const LstmShape<T>& call) {
  const int64_t step = call.D * call.B * 4 * call.H * (call.H + call.I);
  const int64_t useful = std::min(call.T_ * step / kWorkPerThread, std::max(call.D, step / kWorkPerBarrier));
  return int(std::max<int64_t>(1, std::min<int64_t>({threads.count, Team::kMost, useful})));
}

// Calls body(rank, team) on every member of a team of about `size` threads.
template <typename Body>
void in_team(const Threads& threads, int size, const Body& body) {
  struct Context {
    Team team;
    const Body& body;
  } context{{}, body};
  threads.run(size, [](void* opaque, int calls) {
    auto& context = *static_cast<Context*>(opaque);
    const int rank = context.team.join(calls);
    if (rank >= 0) context.body(rank, context.team);
  }, &context);
}

// Blocks of units in an order that turns round at every step: what was read last is still in the cache.
template <typename Body>
FASTSEQ_INLINE void to_and_fro(int64_t begin, int64_t end, bool back, const Body& body) {
  const int64_t first = back ? end - 1 : begin, last = back ? begin : end - 1, stride = back ? -1 : 1;
  for (int64_t i = first; begin < end; i += stride) {
    body(i, i == last ? i : i + stride);
    if (i == last) break;
  }
}

template <typename T>
struct LstmForwardPass : LstmForward<T> {
  using Shape = LstmForward<T>;
  using Shape::B, Shape::D, Shape::H, Shape::I, Shape::T_;

  static constexpr int64_t kBlock = 4 * kPanel<T>;  // pre-activations of one block of units
  Columns<T> units{H, Columns<T>::kGates};
  int64_t blocks = units.blocks();
  bool unpacked;          // weights are read where they are
  int64_t chunk;          // steps whose input projection is made at once
  T *w_ih, *w_hh, *bias;  // packed, per direction
  T* sums;                // [D, blocks, chunk, B, kBlock] pre-activations of the current chunk, in the order of time

  explicit LstmForwardPass(const LstmForward<T>& call) : LstmForward<T>(call) {
    unpacked = T_ * B < kUnpackedRows;
    chunk = std::max<int64_t>(1, std::min(T_, std::max(kChunkRows, kChunkElements / (4 * H)) / B));
  }

  int64_t panel_elements() const { return units.panels() * kPanel<T>; }
  int64_t scratch() const {
    return D * (panel_elements() * (1 + (unpacked ? 0 : I + H)) + blocks * chunk * B * kBlock) + 4 * 16;
  }

  void take(Arena<T>& arena) {
    w_ih = unpacked ? nullptr : arena.take(D * panel_elements() * I);
    w_hh = unpacked ? nullptr : arena.take(D * panel_elements() * H);
    bias = arena.take(D * panel_elements());
    sums = arena.take(D * blocks * chunk * B * kBlock);
  }

  int64_t step(int64_t d, int64_t s) const { return d == 0 ? s : T_ - 1 - s; }  // the s-th step in a direction's order

  // Pre-activations of a block of units at a direction's s-th step, [B, kBlock].
  T* sums_of(int64_t d, int64_t block, int64_t s) const {
    const int64_t position = d == 0 ? s % chunk : chunk - 1 - s % chunk;
    return sums + (((d * blocks + block) * chunk + position) * B) * kBlock;
  }

  void run(const Share& my, Team& team) const {
    for (int64_t d = my.direction; d < my.direction_end; ++d) {
      pack(d, my);
      for (int64_t b = my.row; b < my.row_end; ++b)
        for (int64_t u = my.block * kPanel<T>; u < std::min(H, my.block_end * kPanel<T>); ++u)
          this->c_n[(d * B + b) * H + u] = this->c0 ? this->c0[(d * B + b) * H + u] : T(0);
    }
    if (!my.waits) team.barrier(my.rank, my.first, my.count);  // packing was shared
    for (int64_t s = 0; s < T_; ++s) {
      for (int64_t d = my.direction; d < my.direction_end; ++d) {
        if (!unpacked && s % chunk == 0) project(d, s, std::min(T_, s + chunk), my);
        advance(d, s, my);
      }
      if (my.waits && s + 1 < T_) team.barrier(my.rank, my.first, my.count);
    }
  }

  // Whoever owns units packs their panels; where rows are split, everybody packs a part.
  void pack(int64_t d, const Share& my) const {
    const auto& w = this->weights[d];
    const int64_t member = my.rank - my.first;
    const int64_t begin = 4 * (my.waits ? my.block : blocks * member / my.count);
    const int64_t end = 4 * (my.waits ? my.block_end : blocks * (member + 1) / my.count);
    if (!unpacked) {
      pack_transposed(units, begin, end, w.w_ih, I, I, w_ih + d * panel_elements() * I);
      pack_transposed(units, begin, end, w.w_hh, H, H, w_hh + d * panel_elements() * H);
    }
    for (int64_t panel = begin; panel < end; ++panel)
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lanes = units.lanes(panel, v);
        const int64_t column = units.first(panel, v);
        store(bias + d * panel_elements() + panel * kPanel<T> + v * kLanes<T>,
              w.b_ih && lanes ? load(w.b_ih + column, lanes) + load(w.b_hh + column, lanes) : Vec<T>{});
      }
  }

  // sums = W_ih x for steps [from, to) of a direction, for my rows and units.
  void project(int64_t d, int64_t from, int64_t to, const Share& my) const {
    const Packed<T> w{w_ih + d * panel_elements() * I, I};
    const int64_t earliest = d == 0 ? from : to - 1, steps = to - from, batch = my.row_end - my.row;
    const T* x = this->x + step(d, earliest) * this->x_t + my.row * this->x_b;
    const auto rows = [&](int64_t first, int64_t x_row, int64_t offset, int64_t count) {
      const int64_t most = block_rows<T>(I);
      for (int64_t row = 0; row < count; row += most)
        for (int64_t block = my.block; block < my.block_end; ++block)
          multiply_panels<T>(w, 4 * block, 4, 4 * (block + 1 < my.block_end ? block + 1 : my.block),
                             {x + first + row * x_row, x_row}, std::min(most, count - row),
                             sums_of(d, block, earliest) + (offset + row) * kBlock, kBlock, false);
    };
    if (batch == B && this->x_t == B * this->x_b)  // all rows are evenly spaced
      rows(0, this->x_b, 0, steps * B);
    else if (B == 1)
      rows(0, this->x_t, 0, steps);
    else
      for (int64_t s = 0; s < steps; ++s) rows(s * this->x_t, this->x_b, s * B + my.row, batch);
  }

  // One step of one direction, for my rows and units.
  void advance(int64_t d, int64_t s, const Share& my) const {
    const T* h = s > 0 ? this->y + step(d, s - 1) * B * D * H + d * H : this->h0 ? this->h0 + d * B * H : nullptr;
    const int64_t h_row = s > 0 ? D * H : H;
    const Packed<T> w{w_hh + d * panel_elements() * H, H};
    const int64_t most = block_rows<T>(H);
    for (int64_t row = my.row; row < my.row_end; row += most) {
      const int64_t row_end = std::min(my.row_end, row + most);
      to_and_fro(my.block, my.block_end, s % 2, [&](int64_t block, int64_t next) {
        T* a = sums_of(d, block, s) + row * kBlock;
        if (unpacked)
          block_from_weights(d, s, block, row, row_end, h, h_row, a);
        else if (h)
          multiply_panels<T>(w, 4 * block, 4, 4 * next, {h + row * h_row, h_row}, row_end - row, a, kBlock, true);
        activate(d, s, block, row, row_end, a);
      });
    }
  }

  // a = W_ih x + W_hh h of one block of units, from weights where they are.
  void block_from_weights(int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end, const T* h, int64_t h_row,
                          T* a) const {
    const auto& w = this->weights[d];
    const int64_t first = block * kPanel<T>, count = std::min<int64_t>(kPanel<T>, H - first);
    for (int64_t u = 0; u < count; ++u)
      for (int64_t b = row; b < row_end; ++b) {
        T gates[4] = {};
        dot_four<T>(w.w_ih + (first + u) * I, H * I, this->x + step(d, s) * this->x_t + b * this->x_b, I, gates);
        if (h) dot_four<T>(w.w_hh + (first + u) * H, H * H, h + b * h_row, H, gates);
        for (int k = 0; k < 4; ++k) a[(b - row) * kBlock + k * kPanel<T> + u] = gates[k];
      }
  }

  // Gates, cell and output of one block of units in rows [row, row_end) from the pre-activations a.
  FASTSEQ_INLINE void activate(int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end, const T* a) const {
    if (units.lanes(4 * block, kPanelVectors - 1) == kLanes<T>)
      activate_lanes<true>(d, s, block, row, row_end, a);
    else
      activate_lanes<false>(d, s, block, row, row_end, a);
  }

  template <bool kFull>
  FASTSEQ_INLINE void activate_lanes(int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end, const T* a) const {
    const int64_t t = step(d, s), G = 4 * H;
    const T* b_block = bias + d * panel_elements() + block * kBlock;
    for (int64_t b = row; b < row_end; ++b, a += kBlock)
      for (int v = 0; v < kPanelVectors; ++v) {
        const int lanes = kFull ? kLanes<T> : units.lanes(4 * block, v);
        if (lanes == 0) continue;
        const int64_t u = block * kPanel<T> + v * kLanes<T>;
        const auto gate = [&](int k) { return load(a + k * kPanel<T> + v * kLanes<T>) + load(b_block + k * kPanel<T> + v * kLanes<T>); };
        T* c_state = this->c_n + (d * B + b) * H + u;
        const Vec<T> i = sigmoid<T>(gate(0)), f = sigmoid<T>(gate(1)), g = tanh<T>(gate(2)), o = sigmoid<T>(gate(3));
        const Vec<T> c = f * load(c_state, lanes) + i * g, h = o * tanh<T>(c);
        store(c_state, c, lanes);
        store(this->y + (t * B + b) * D * H + d * H + u, h, lanes);
        if (this->gates) {
          T* tape = this->gates + ((d * T_ + t) * B + b) * G + u;
          store(tape, i, lanes);
          store(tape + H, f, lanes);
          store(tape + 2 * H, g, lanes);
          store(tape + 3 * H, o, lanes);
          store(this->cells + ((d * T_ + t) * B + b) * H + u, c, lanes);
        }
        if (s == T_ - 1) store(this->h_n + (d * B + b) * H + u, h, lanes);
      }
  }
};

template <typename T>
void lstm_forward(const LstmForward<T>& call, Threads threads) {
  LstmForwardPass<T> pass(call);
  Arena<T> arena(pass.scratch());
  pass.take(arena);
  const int size = team_size(threads, call);
  in_team(threads, size, [&](int rank, Team& team) {
    pass.run(share_of(rank, team.size(), call.D, call.B, pass.blocks), team);
  });
}

// Steps are taken back in chunks: da_t for every step of a chunk, one after the other, then what the chunk adds to the
// gradients of the input and of the weights, as products over all of its rows at once.
template <typename T>
struct LstmBackwardPass : LstmBackward<T> {
  using Shape = LstmBackward<T>;
  using Shape::B, Shape::D, Shape::H, Shape::I, Shape::T_;

  struct Chunk {  // steps [begin, end) in the order of each direction
    int64_t begin, end;
  };

  Columns<T> hidden{H, Columns<T>::kPlain}, input{I, Columns<T>::kPlain};
  int64_t G = 4 * H, width = hidden.panels() * kPanel<T>;
  bool unpacked;   // weights are read where they are
  int64_t chunk;   // the most steps of a chunk
  T *w_hh, *w_ih;  // packed for products with the gates' gradients from the left, per direction
  T* da;           // [D, chunk, B, 4H] gradients of the pre-activations, in the order of time
  T *dh, *dc;      // [D, B, H], rows padded to whole panels: what reaches h and c from later steps
  T* outer;        // per member: scratch of multiply_outer

  explicit LstmBackwardPass(const LstmBackward<T>& call) : LstmBackward<T>(call) {
    unpacked = T_ * B < kUnpackedRows;
    chunk = std::max<int64_t>(1, std::min(T_, kOuterDepth / std::max<int64_t>(B, 1)));
  }

  int64_t panel_elements(const Columns<T>& columns) const { return unpacked ? 0 : columns.panels() * G * kPanel<T>; }
  int64_t outer_elements() const { return Arena<T>::padded(scratch_for_outer<T>(std::max(I, H))); }

  int64_t scratch(int members) const {
    return D * (panel_elements(hidden) + (this->dx ? panel_elements(input) : 0) + chunk * B * G + 2 * B * width) +
           members * outer_elements() + 6 * 16;
  }

  void take(Arena<T>& arena, int members) {
    w_hh = arena.take(D * panel_elements(hidden));
    w_ih = this->dx ? arena.take(D * panel_elements(input)) : nullptr;
    da = arena.take(D * chunk * B * G);
    dh = arena.take(D * B * width);
    dc = arena.take(D * B * width);
    outer = arena.take(members * outer_elements());
  }

  int64_t step(int64_t d, int64_t s) const { return d == 0 ? s : T_ - 1 - s; }
  int64_t earliest(int64_t d, Chunk c) const { return std::min(step(d, c.begin), step(d, c.end - 1)); }
  T* da_of(int64_t d, Chunk c, int64_t s) const { return da + (d * chunk + step(d, s) - earliest(d, c)) * B * G; }

  void run(const Share& my, Team& team) const {
    const int members = team.size();
    // With nobody to ask for dh0, the last product is not needed, nor is W_hh if there is no other.
    const bool state = this->dh0 != nullptr;
    prepare(my, members, T_ > 1 || state);
    team.barrier(my.rank, 0, members);
    for (int64_t end = T_; end > 0; end -= (end - 1) % chunk + 1) {
      const Chunk c{(end - 1) / chunk * chunk, end};
      for (int64_t s = c.end - 1; s >= c.begin; --s) {
        for (int64_t d = my.direction; d < my.direction_end; ++d) gates_backward(d, c, s, my);
        if (my.waits) team.barrier(my.rank, my.first, my.count);
        if (s == 0 && !state) break;
        for (int64_t d = my.direction; d < my.direction_end; ++d) state_backward(d, c, s, my);
      }
      team.barrier(my.rank, 0, members);
      for (int64_t d = 0; d < D; ++d) {
        if (this->dx) input_backward(d, c, my.rank, members);
        weights_backward(d, c, my.rank, members);
        if (D == 2) team.barrier(my.rank, 0, members);  // both directions add to the same rows of dx
      }
      if (D == 1 && c.begin > 0) team.barrier(my.rank, 0, members);  // da is about to be written again
    }
    if (state)
      for (int64_t d = my.direction; d < my.direction_end; ++d)
        each_row(my, [&](int64_t b, int64_t u, int64_t count) {
          const int64_t row = d * B + b;
          memcpy(this->dh0 + row * H + u, dh + row * width + u, count * sizeof(T));
          memcpy(this->dc0 + row * H + u, dc + row * width + u, count * sizeof(T));
        });
  }

  void prepare(const Share& my, int members, bool recurrent) const {
    for (int64_t d = my.direction; d < my.direction_end; ++d) {
      if (recurrent && !unpacked) {
        const int64_t member = my.rank - my.first, panels = hidden.panels();
        const int64_t begin = my.waits ? my.block : panels * member / my.count;
        const int64_t end = my.waits ? my.block_end : panels * (member + 1) / my.count;
        const T* w = this->weights[d].w_hh;
        pack_rows<T>(hidden, begin, end, [&](int64_t k) { return w + k * H; }, G, w_hh + d * panel_elements(hidden));
      }
      each_row(my, [&](int64_t b, int64_t u, int64_t count) {
        const int64_t row = d * B + b;
        memcpy(dh + row * width + u, this->dh_n + row * H + u, count * sizeof(T));
        memcpy(dc + row * width + u, this->dc_n + row * H + u, count * sizeof(T));
      });
    }
    if (!this->dx) return;
    const int64_t panels = input.panels(), begin = panels * my.rank / members, end = panels * (my.rank + 1) / members;
    for (int64_t d = 0; d < D && !unpacked; ++d) {
      const T* w = this->weights[d].w_ih;
      pack_rows<T>(input, begin, end, [&](int64_t k) { return w + k * I; }, G, w_ih + d * panel_elements(input));
    }
    const int64_t elements = T_ * B * I;
    if (D == 2) std::fill(this->dx + elements * my.rank / members, this->dx + elements * (my.rank + 1) / members, T(0));
  }

  // body(row, first unit, count) for every row of my rectangle.
  template <typename Body>
  FASTSEQ_INLINE void each_row(const Share& my, const Body& body) const {
    const int64_t u = std::min(H, my.block * kPanel<T>), end = std::min(H, my.block_end * kPanel<T>);
    for (int64_t b = my.row; b < my.row_end; ++b) body(b, u, end - u);
  }

  // da_t from dh_t and dc_t, which becomes dc_{t-1}.
  void gates_backward(int64_t d, Chunk c, int64_t s, const Share& my) const {
    const int64_t t = step(d, s);
    each_row(my, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t at = (d * T_ + t) * B + b;
      const T* before = s > 0 ? this->cells + ((d * T_ + step(d, s - 1)) * B + b) * H
                              : this->c0 ? this->c0 + (d * B + b) * H : nullptr;
      const T *dy = this->dy + t * this->dy_t + b * this->dy_b + d * H, *gates = this->gates + at * G,
              *cells = this->cells + at * H, *dh_row = dh + (d * B + b) * width;
      T *da_row = da_of(d, c, s) + b * G, *dc_row = dc + (d * B + b) * width;
      const auto units = [&](int64_t u, int lanes) __attribute__((always_inline)) {
        const Vec<T> i = load(gates + u, lanes), f = load(gates + H + u, lanes), g = load(gates + 2 * H + u, lanes),
                     o = load(gates + 3 * H + u, lanes), s_t = tanh<T>(load(cells + u, lanes)),
                     c_before = before ? load(before + u, lanes) : Vec<T>{};
        const Vec<T> dh_t = load(dh_row + u, lanes) + load(dy + u, lanes);
        const Vec<T> dc_t = load(dc_row + u, lanes) + dh_t * o * (T(1) - s_t * s_t);
        store(da_row + u, dc_t * g * (i * (T(1) - i)), lanes);
        store(da_row + H + u, dc_t * c_before * (f * (T(1) - f)), lanes);
        store(da_row + 2 * H + u, dc_t * i * (T(1) - g * g), lanes);
        store(da_row + 3 * H + u, dh_t * s_t * (o * (T(1) - o)), lanes);
        store(dc_row + u, dc_t * f, lanes);
      };
      int64_t u = first;
      for (; u + kLanes<T> <= first + count; u += kLanes<T>) units(u, kLanes<T>);
      if (u < first + count) units(u, int(first + count - u));
    });
  }

  // dh_{t-1} = W_hh^T da_t, for my rows and units.
  void state_backward(int64_t d, Chunk c, int64_t s, const Share& my) const {
    if (unpacked)
      return each_row(my, [&](int64_t b, int64_t u, int64_t count) {
        multiply_row<T>(da_of(d, c, s) + b * G, this->weights[d].w_hh, H, G, u, u + count, dh + (d * B + b) * width, false);
      });
    const Packed<T> w{w_hh + d * panel_elements(hidden), G};
    const int64_t most = block_rows<T>(G);
    for (int64_t row = my.row; row < my.row_end; row += most) {
      const int64_t rows = std::min(most, my.row_end - row);
      T* result = dh + (d * B + row) * width;
      // In groups of panels, as many as a tile of few rows wants.
      constexpr int64_t kGroup = 4;
      to_and_fro(0, (my.block_end - my.block + kGroup - 1) / kGroup, s % 2, [&](int64_t group, int64_t next) {
        const int64_t panel = my.block + group * kGroup;
        multiply_panels<T>(w, panel, std::min(kGroup, my.block_end - panel), my.block + next * kGroup,
                           {da_of(d, c, s) + row * G, G}, rows, result + panel * kPanel<T>, width, false);
      });
    }
  }

  // dx_t (+)= W_ih^T da_t for the chunk's steps; each member does some rows, or some columns where there are few rows.
  void input_backward(int64_t d, Chunk c, int rank, int members) const {
    if (unpacked) {
      const int64_t panels = input.panels(), first = std::min(I, panels * rank / members * kPanel<T>),
                    last = std::min(I, panels * (rank + 1) / members * kPanel<T>);
      for (int64_t row = 0; row < T_ * B; ++row)
        multiply_row<T>(rows_of(d) + row * G, this->weights[d].w_ih, I, G, first, last, this->dx + row * I, D == 2);
      return;
    }
    const int64_t rows = (c.end - c.begin) * B, begin = rows * rank / members, end = rows * (rank + 1) / members;
    multiply<T>({w_ih + d * panel_elements(input), G}, input, 0, input.panels(), {rows_of(d) + begin * G, G}, end - begin,
                this->dx + (earliest(d, c) * B + begin) * I, I,
                [this](const T* out, int64_t, int, int lanes) { return D == 2 ? load(out, lanes) : Vec<T>{}; });
  }

  // The chunk's part of the weights' gradients; each member does some of the 4H gates.
  void weights_backward(int64_t d, Chunk c, int rank, int members) const {
    const int64_t begin = G * rank / members, end = G * (rank + 1) / members;
    const int64_t rows = (c.end - c.begin) * B, t0 = earliest(d, c);
    const bool add = c.end < T_;
    const auto& dw = this->dweights[d];
    const T* left = rows_of(d);
    T* scratch = outer + rank * outer_elements();
    if (dw.w_ih)
      multiply_outer<T>([&](int64_t k) { return left + k * G; },
                        [&](int64_t k) { return this->x + (t0 + k / B) * this->x_t + k % B * this->x_b; }, rows, begin, end, I,
                        dw.w_ih, add, scratch);
    if (dw.w_hh) {
      // Beside da_t stands h_{t-1}: y one step earlier in the direction's order, or h0, which may be zeros and left out.
      const int64_t none = c.begin == 0 && !this->h0 ? B : 0, skipped = d == 0 ? none : 0;
      const auto before = [&](int64_t k) {
        const int64_t t = t0 + (skipped + k) / B + (d == 0 ? -1 : 1), b = (skipped + k) % B;
        return t < 0 || t == T_ ? this->h0 + (d * B + b) * H : this->y + (t * B + b) * D * H + d * H;
      };
      multiply_outer<T>([&](int64_t k) { return left + (skipped + k) * G; }, before, rows - none, begin, end, H, dw.w_hh, add,
                        scratch);
    }
    T* bias = dw.b_ih ? dw.b_ih : dw.b_hh;
    if (!bias) return;
    if (!add) std::fill(bias + begin, bias + end, T(0));
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t m = begin; m < end; ++m) bias[m] += left[k * G + m];
    if (c.begin == 0 && dw.b_ih && dw.b_hh) std::copy(bias + begin, bias + end, dw.b_hh + begin);
  }

  const T* rows_of(int64_t d) const { return da + d * chunk * B * G; }
};

template <typename T>
void lstm_backward(const LstmBackward<T>& call, Threads threads) {
  LstmBackwardPass<T> pass(call);
  const int size = team_size(threads, call);
  Arena<T> arena(pass.scratch(size));
  pass.take(arena, size);
  in_team(threads, size, [&](int rank, Team& team) {
    pass.run(share_of(rank, team.size(), call.D, call.B, pass.hidden.panels()), team);
  });
}

}  // namespace fastseq::FASTSEQ_ISA
