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

// A multiply-add of a thread takes about 0.02 ns from the L2 cache; starting a parallel region costs 3 us, a barrier 0.2 us.
constexpr int64_t kWorkPerThread = 64 * 1024, kWorkPerBarrier = 4 * 1024;
// With fewer rows than this for each thread the weights' way from the L3 cache limits a step: split the units instead.
constexpr int64_t kRowsPerThread = 8;
// Up to this many rows in all, packing a weight matrix costs more than it saves.
constexpr int64_t kUnpackedRows = 8;
// The input projection is made for so many elements of gates at a time, to find them in the cache again (1 MB).
constexpr int64_t kChunkElements = 256 * 1024;

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
  const int64_t useful = std::min(1 + call.T_ * step / kWorkPerThread, std::max(call.D, step / kWorkPerBarrier));
  return int(std::max<int64_t>(1, std::min<int64_t>({threads.count, Team::kMost, useful})));
}

// Calls body(rank, team) on every member of a team of about `size` threads.
template <typename Body>
void in_team(const Threads& threads, int size, const Body& body) {
  struct Context {
    Team team;
    const Body& body;
  } context{Team(size), body};
  threads.run(size, [](void* opaque) {
    auto& context = *static_cast<Context*>(opaque);
    const int rank = context.team.join();
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

  Columns<T> units{H, Columns<T>::kGates};
  int64_t G = 4 * H;
  bool unpacked;    // weights are read where they are
  int64_t chunk;    // steps whose input projection is made at once
  T *w_ih, *w_hh, *bias;  // packed, per direction
  T* projected;     // [D, chunk, B, 4H], unless the tape's gates take it

  explicit LstmForwardPass(const LstmForward<T>& call) : LstmForward<T>(call) {
    unpacked = T_ * B < kUnpackedRows;
    chunk = std::max<int64_t>(1, std::min(T_, std::max(kTileRows / B, kChunkElements / (B * G))));
  }

  int64_t panel_elements() const { return units.panels() * kPanel<T>; }

  int64_t scratch() const {
    const int64_t packed = unpacked ? 0 : panel_elements() * (I + H + 1) + 3 * 16;
    return D * (packed + (this->gates ? 0 : Arena<T>::padded(chunk * B * G)));
  }

  void take(Arena<T>& arena) {
    if (!unpacked) {
      w_ih = arena.take(D * panel_elements() * I);
      w_hh = arena.take(D * panel_elements() * H);
      bias = arena.take(D * panel_elements());
    }
    projected = this->gates ? nullptr : arena.take(D * chunk * B * G);
  }

  int64_t step(int64_t d, int64_t s) const { return d == 0 ? s : T_ - 1 - s; }  // the s-th step in a direction's order

  // The gates of a direction's s-th step: the tape keeps them all, else they are those of the current chunk. In both, steps
  // follow each other in the order of time.
  T* gates_of(int64_t d, int64_t s) const {
    if (this->gates) return this->gates + (d * T_ + step(d, s)) * B * G;
    const int64_t position = d == 0 ? s % chunk : chunk - 1 - s % chunk;
    return projected + (d * chunk + position) * B * G;
  }

  void run(const Share& my, Team& team) const {
    for (int64_t d = my.direction; d < my.direction_end; ++d) {
      if (!unpacked) pack(d, my);
      for (int64_t b = my.row; b < my.row_end; ++b)
        for (int64_t u = my.block * kLanes<T>; u < std::min(H, my.block_end * kLanes<T>); ++u)
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
    const int64_t blocks = units.blocks(), member = my.rank - my.first;
    const int64_t begin = 2 * (my.waits ? my.block : blocks * member / my.count);
    const int64_t end = 2 * (my.waits ? my.block_end : blocks * (member + 1) / my.count);
    pack_transposed(units, begin, end, w.w_ih, I, I, w_ih + d * panel_elements() * I);
    pack_transposed(units, begin, end, w.w_hh, H, H, w_hh + d * panel_elements() * H);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int v = 0; v < kPanelVectors; ++v)
        for (int i = 0; i < kLanes<T>; ++i) {
          const int64_t column = units.first(panel, v) + i;
          bias[d * panel_elements() + panel * kPanel<T> + v * kLanes<T> + i] =
              w.b_ih && i < units.lanes(panel, v) ? w.b_ih[column] + w.b_hh[column] : T(0);
        }
  }

  // gates = W_ih x + b for steps [from, to) of a direction.
  void project(int64_t d, int64_t from, int64_t to, const Share& my) const {
    const int64_t earliest = d == 0 ? from : to - 1, steps = to - from;
    const T* x = this->x + step(d, earliest) * this->x_t;
    T* result = gates_of(d, earliest);
    const int64_t x_t = this->x_t, x_b = this->x_b;
    const Packed<T> w{w_ih + d * panel_elements() * I, I};
    const auto rows = [&](const T* a, int64_t a_row, T* r, int64_t r_row, int64_t count) {
      multiply<T>(w, units, 2 * my.block, 2 * my.block_end, {a, a_row}, count, r, r_row,
                  [&](const T*, int64_t panel, int v, int) {
                    return load(bias + d * panel_elements() + panel * kPanel<T> + v * kLanes<T>);
                  });
    };
    const int64_t batch = my.row_end - my.row;
    if (batch == B && x_t == B * x_b) {  // all rows are evenly spaced
      rows(x, x_b, result, G, steps * B);
    } else if (steps > batch) {
      for (int64_t b = my.row; b < my.row_end; ++b) rows(x + b * x_b, x_t, result + b * G, B * G, steps);
    } else {
      for (int64_t s = 0; s < steps; ++s)
        rows(x + s * x_t + my.row * x_b, x_b, result + (s * B + my.row) * G, G, batch);
    }
  }

  // One step of one direction, for my rows and units.
  void advance(int64_t d, int64_t s, const Share& my) const {
    const int64_t t = step(d, s);
    const T* h = s > 0 ? this->y + step(d, s - 1) * B * D * H + d * H : this->h0 ? this->h0 + d * B * H : nullptr;
    const int64_t h_row = s > 0 ? D * H : H;
    T* gates = gates_of(d, s);
    if (unpacked) {
      for (int64_t u = my.block * kLanes<T>; u < std::min(H, my.block_end * kLanes<T>); ++u)
        for (int64_t b = my.row; b < my.row_end; ++b) unit(d, t, u, b, h ? h + b * h_row : nullptr, gates + b * G);
      for (int64_t block = my.block; block < my.block_end; ++block) activate(d, s, block, my.row, my.row_end, nullptr);
      return;
    }
    const Packed<T> w{w_hh + d * panel_elements() * H, H};
    Sums<T> sums;
    for (int64_t row = my.row; row < my.row_end; row += kBlockRows) {
      const int64_t row_end = std::min(my.row_end, row + kBlockRows);
      to_and_fro(my.block, my.block_end, s % 2, [&](int64_t block, int64_t next) {
        if (h) multiply_panels<T>(w, 2 * block, 2, 2 * next, {h + row * h_row, h_row}, row_end - row, sums);
        activate(d, s, block, row, row_end, h ? sums : nullptr);
      });
    }
  }

  // The four pre-activations of one unit in one row, from weights where they are.
  void unit(int64_t d, int64_t t, int64_t u, int64_t b, const T* h, T* gates) const {
    const auto& w = this->weights[d];
    T sums[4] = {};
    dot_four<T>(w.w_ih + u * I, H * I, this->x + t * this->x_t + b * this->x_b, I, sums);
    if (h) dot_four<T>(w.w_hh + u * H, H * H, h, H, sums);
    for (int64_t k = 0; k < 4; ++k) gates[k * H + u] = sums[k] + (w.b_ih ? w.b_ih[k * H + u] + w.b_hh[k * H + u] : T(0));
  }

  // Gates, cell and output of one block of units in rows [row, row_end), from what has been projected and, if there is a
  // h_{t-1}, the block's part of W_hh h_{t-1} in `sums`.
  FASTSEQ_INLINE void activate(int64_t d, int64_t s, int64_t block, int64_t row, int64_t row_end, const T* sums) const {
    const int64_t t = step(d, s), u = block * kLanes<T>;
    const int lanes = units.lanes(2 * block, 0);
    T* gates = gates_of(d, s) + u;
    for (int64_t b = row; b < row_end; ++b) {
      T* a = gates + b * G;
      Vec<T> gate[4];
      for (int k = 0; k < 4; ++k) {
        gate[k] = load(a + k * H, lanes);
        if (sums) gate[k] += load(sums + ((b - row) * 4 + k) * kLanes<T>);
      }
      T* c_state = this->c_n + (d * B + b) * H + u;
      const Vec<T> i = sigmoid<T>(gate[0]), f = sigmoid<T>(gate[1]), g = tanh<T>(gate[2]), o = sigmoid<T>(gate[3]);
      const Vec<T> c = f * load(c_state, lanes) + i * g, h = o * tanh<T>(c);
      store(c_state, c, lanes);
      store(this->y + (t * B + b) * D * H + d * H + u, h, lanes);
      if (this->gates) {
        store(a, i, lanes);
        store(a + H, f, lanes);
        store(a + 2 * H, g, lanes);
        store(a + 3 * H, o, lanes);
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
    pass.run(share_of(rank, team.size(), call.D, call.B, pass.units.blocks()), team);
  });
}

template <typename T>
struct LstmBackwardPass : LstmBackward<T> {
  using Shape = LstmBackward<T>;
  using Shape::B, Shape::D, Shape::H, Shape::I, Shape::T_;

  Columns<T> hidden{H, Columns<T>::kPlain}, input{I, Columns<T>::kPlain};
  int64_t G = 4 * H;
  T *w_hh, *w_ih;        // packed for products with the gates' gradients from the left, per direction
  T* da;                 // [D, T, B, 4H] gradients of the pre-activations
  T *dh, *dc;            // [D, B, H] what reaches h and c from later steps
  T* outer;              // per member: scratch of multiply_outer

  explicit LstmBackwardPass(const LstmBackward<T>& call) : LstmBackward<T>(call) {}

  int64_t panel_elements(const Columns<T>& columns) const { return columns.panels() * G * kPanel<T>; }
  int64_t outer_elements() const { return Arena<T>::padded(scratch_for_outer<T>(std::max(I, H))); }

  int64_t scratch(int members) const {
    return D * (panel_elements(hidden) + (this->dx ? panel_elements(input) : 0) + T_ * B * G + 2 * B * H) +
           members * outer_elements() + 5 * 16;
  }

  void take(Arena<T>& arena, int members) {
    w_hh = arena.take(D * panel_elements(hidden));
    w_ih = this->dx ? arena.take(D * panel_elements(input)) : nullptr;
    da = arena.take(D * T_ * B * G);
    dh = arena.take(D * B * H);
    dc = arena.take(D * B * H);
    outer = arena.take(members * outer_elements());
  }

  int64_t step(int64_t d, int64_t s) const { return d == 0 ? s : T_ - 1 - s; }
  T* da_of(int64_t d, int64_t t) const { return da + (d * T_ + t) * B * G; }

  void run(const Share& my, Team& team) const {
    const int members = team.size();
    // With nobody to ask for dh0, the last product is not needed, nor is W_hh if there is no other.
    const bool state = this->dh0 != nullptr;
    for (int64_t d = my.direction; d < my.direction_end; ++d) {
      if (T_ > 1 || state) {
        const int64_t member = my.rank - my.first, panels = hidden.panels();
        const int64_t begin = my.waits ? my.block : panels * member / my.count;
        const int64_t end = my.waits ? my.block_end : panels * (member + 1) / my.count;
        const T* w = this->weights[d].w_hh;
        pack_rows<T>(hidden, begin, end, [&](int64_t k) { return w + k * H; }, G, w_hh + d * panel_elements(hidden));
      }
      each_row(my, [&](int64_t b, int64_t u, int64_t count) {
        const int64_t at = (d * B + b) * H + u;
        memcpy(dh + at, this->dh_n + at, count * sizeof(T));
        memcpy(dc + at, this->dc_n + at, count * sizeof(T));
      });
    }
    if (this->dx) {
      const int64_t panels = input.panels(), begin = panels * my.rank / members, end = panels * (my.rank + 1) / members;
      for (int64_t d = 0; d < D; ++d) {
        const T* w = this->weights[d].w_ih;
        pack_rows<T>(input, begin, end, [&](int64_t k) { return w + k * I; }, G, w_ih + d * panel_elements(input));
      }
    }
    if (!my.waits) team.barrier(my.rank, my.first, my.count);
    for (int64_t s = T_ - 1; s >= 0; --s) {
      for (int64_t d = my.direction; d < my.direction_end; ++d) gates_backward(d, s, my);
      if (my.waits) team.barrier(my.rank, my.first, my.count);
      if (s == 0 && !state) break;
      for (int64_t d = my.direction; d < my.direction_end; ++d) state_backward(d, s, my);
    }
    if (state)
      for (int64_t d = my.direction; d < my.direction_end; ++d)
        each_row(my, [&](int64_t b, int64_t u, int64_t count) {
          const int64_t at = (d * B + b) * H + u;
          memcpy(this->dh0 + at, dh + at, count * sizeof(T));
          memcpy(this->dc0 + at, dc + at, count * sizeof(T));
        });
    team.barrier(my.rank, 0, members);
    if (this->dx) input_backward(my.rank, members);
    weights_backward(my.rank, members);
  }

  // body(row, first unit, count) for every row of my rectangle.
  template <typename Body>
  void each_row(const Share& my, const Body& body) const {
    const int64_t u = std::min(H, my.block * kPanel<T>), end = std::min(H, my.block_end * kPanel<T>);
    for (int64_t b = my.row; b < my.row_end; ++b) body(b, u, end - u);
  }

  // da_t from dh_t and dc_t, which becomes dc_{t-1}.
  void gates_backward(int64_t d, int64_t s, const Share& my) const {
    const int64_t t = step(d, s);
    each_row(my, [&](int64_t b, int64_t first, int64_t count) {
      const T* dy = this->dy + t * this->dy_t + b * this->dy_b + d * H;
      const T* gates = this->gates + ((d * T_ + t) * B + b) * G;
      const T* cells = this->cells + ((d * T_ + t) * B + b) * H;
      const T* before = s > 0 ? this->cells + ((d * T_ + step(d, s - 1)) * B + b) * H
                              : this->c0 ? this->c0 + (d * B + b) * H : nullptr;
      T* da = da_of(d, t) + b * G;
      T* dc_row = dc + (d * B + b) * H;
      const T* dh_row = dh + (d * B + b) * H;
      for (int64_t u = first; u < first + count; u += kLanes<T>) {
        const int lanes = int(std::min<int64_t>(kLanes<T>, first + count - u));
        const Vec<T> i = load(gates + u, lanes), f = load(gates + H + u, lanes), g = load(gates + 2 * H + u, lanes),
                     o = load(gates + 3 * H + u, lanes), s_t = tanh<T>(load(cells + u, lanes)),
                     c_before = before ? load(before + u, lanes) : Vec<T>{};
        const Vec<T> dh_t = load(dh_row + u, lanes) + load(dy + u, lanes);
        const Vec<T> dc_t = load(dc_row + u, lanes) + dh_t * o * (T(1) - s_t * s_t);
        store(da + u, dc_t * g * (i * (T(1) - i)), lanes);
        store(da + H + u, dc_t * c_before * (f * (T(1) - f)), lanes);
        store(da + 2 * H + u, dc_t * i * (T(1) - g * g), lanes);
        store(da + 3 * H + u, dh_t * s_t * (o * (T(1) - o)), lanes);
        store(dc_row + u, dc_t * f, lanes);
      }
    });
  }

  // dh_{t-1} = W_hh^T da_t, for my rows and units.
  void state_backward(int64_t d, int64_t s, const Share& my) const {
    multiply<T>({w_hh + d * panel_elements(hidden), G}, hidden, my.block, my.block_end,
                {da_of(d, step(d, s)) + my.row * G, G}, my.row_end - my.row, dh + (d * B + my.row) * H, H,
                [](const T*, int64_t, int, int) { return Vec<T>{}; });
  }

  void input_backward(int rank, int members) const {
    const int64_t rows = T_ * B, begin = rows * rank / members, end = rows * (rank + 1) / members;
    for (int64_t d = 0; d < D; ++d)
      multiply<T>({w_ih + d * panel_elements(input), G}, input, 0, input.panels(), {da_of(d, 0) + begin * G, G}, end - begin,
                  this->dx + begin * I, I,
                  [d](const T* out, int64_t, int, int lanes) { return d == 0 ? Vec<T>{} : load(out, lanes); });
  }

  // Each member makes the gradients of its part of the 4H gates.
  void weights_backward(int rank, int members) const {
    const int64_t begin = G * rank / members, end = G * (rank + 1) / members, rows = T_ * B;
    T* scratch = outer + rank * outer_elements();
    for (int64_t d = 0; d < D; ++d) {
      const auto& dw = this->dweights[d];
      const auto left = [&](int64_t first) { return [this, d, first](int64_t k) { return da_of(d, 0) + (first + k) * G; }; };
      if (dw.w_ih)
        multiply_outer<T>(left(0), [&](int64_t k) { return this->x + k / B * this->x_t + k % B * this->x_b; }, rows, begin,
                          end, I, dw.w_ih, false, scratch);
      if (dw.w_hh) {
        // h_{t-1} is y one step earlier in the direction's order, and h0 at the first step.
        const T* y = this->y + d * H;
        const int64_t later = d == 0 ? B : 0, earlier = d == 0 ? 0 : B;
        multiply_outer<T>(left(later), [&](int64_t k) { return y + (earlier + k) * D * H; }, rows - B, begin, end, H, dw.w_hh,
                          false, scratch);
        if (this->h0)
          multiply_outer<T>(left(step(d, 0) * B), [&](int64_t k) { return this->h0 + (d * B + k) * H; }, B, begin, end, H,
                            dw.w_hh, true, scratch);
      }
      for (T* bias : {dw.b_ih, dw.b_hh}) {
        if (!bias) continue;
        std::fill(bias + begin, bias + end, T(0));
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t m = begin; m < end; ++m) bias[m] += da_of(d, 0)[k * G + m];
      }
    }
  }
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
