// The attention decoder on the CPU, for any cell. Formulas: fastseq/reference/attention_decoder.py.
//
// Every row of the batch is a chain of its own. Where there are enough rows they are dealt out, by falling length, to
// as many groups as there are members of the team, and nobody waits for anybody. Else there is one group, of which
// every member does some columns of each product and some rows of the rest, and they wait for each other in between.
#pragma once
#include "cpu/attention_decoder.h"
#include "cpu/recurrent_kernel.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace fastseq::FASTSEQ_ISA {

// With fewer rows than this for each member, members share the products' columns.
constexpr int64_t kDealtRows = 4;
// tanh from exps is right to some 1e-7 (in double 2e-16) of 1, not of itself: where scores add up more than so much of
// it, it is computed in full.
constexpr double kMostOfV = 64;
// exp(2k) of all keys is kept where it does not come to more than this.
constexpr int64_t kKeptKeys = int64_t(64) << 20;

// A group of rows, and the caller's place among its members. The group's i-th row has rank i * groups + group.
struct Deal {
  int64_t group, groups, first_row;  // first_row: the group's first in scratch
  int member, members;

  Deal(int64_t group, int64_t groups, int64_t B, int member, int members)
      : group(group),
        groups(groups),
        first_row(group * ((B + groups - 1) / groups)),
        member(member),
        members(members) {}
  int64_t begin(int64_t count) const { return share(count, member, members); }
  int64_t end(int64_t count) const { return share(count, member + 1, members); }
  int64_t rank_of(int64_t i) const { return i * groups + group; }
  // How many rows of the group are among the first `count` of all.
  int64_t rows(int64_t count) const { return (count - group + groups - 1) / groups; }
};

// 1/x of normal numbers, within 2 ulp. A division takes as long as ten multiplications.
template <typename T>
FASTSEQ_INLINE Vec<T> reciprocal(Vec<T> x) {
#if FASTSEQ_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
#if FASTSEQ_VECTOR_BYTES == 64
    const Vec<T> guess = _mm512_maskz_rcp14_ps(0xffff, x);  // by a mask, or GCC warns
#else
    const Vec<T> guess = _mm256_rcp_ps(x);
#endif
    return guess + guess * (T(1) - x * guess);
  }
#endif
  return T(1) / x;
}

// Within +-kBound, exp(2p) exp(2k) is a normal number.
template <typename T>
constexpr T kBound = T(sizeof(T) == 4 ? 21 : 175);

// Whether all numbers of a row are: NaN is not.
template <typename T>
class Bounded {
 public:
  FASTSEQ_INLINE void look_at(Vec<T> x) { inside_ &= IntVec(x <= kBound<T>) & IntVec(x >= -kBound<T>); }
  bool holds() const {
    for (int i = 0; i < kLanes<T>; ++i)
      if (!inside_[i]) return false;
    return true;
  }

 private:
  using IntVec = typename Simd<T>::IntVec;
  IntVec inside_ = ~IntVec{};
};

// A matrix that rows are multiplied by: packed, or read where it is. It is stored as [columns][K] if `transposed`, else
// as [K][columns].
template <typename T>
struct Right {
  const T* w;
  int64_t ld, K;
  Columns<T> columns;
  bool transposed;
  T* packed = nullptr;

  int64_t elements() const { return columns.panels() * K * kPanel<T>; }

  void pack(int member, int members) const {
    if (!packed) return;
    const int64_t begin = share(columns.panels(), member, members), end = share(columns.panels(), member + 1, members);
    if (transposed)
      pack_transposed(columns, begin, end, w, ld, K, packed);
    else
      pack_rows<T>(columns, begin, end, [&](int64_t k) { return w + k * ld; }, K, packed);
  }

  // sums[rows][width] (+)= left times `count` panels; `next` is the panel that will be wanted after them.
  void multiply(int64_t panel, int64_t count, int64_t next, Left<T> left, int64_t rows, T* sums, int64_t width,
                bool add) const {
    if (packed) return multiply_panels<T>({packed, K}, panel, count, next, left, rows, sums, width, add);
    if (!transposed) {
      const int64_t begin = panel * kPanel<T>, end = std::min(columns.count, (panel + count) * kPanel<T>);
      for (int64_t i = 0; i < rows; ++i)
        multiply_row<T>(left.data + i * left.stride, w, ld, K, begin, end, sums + i * width - begin, add);
      return;
    }
    for (int64_t q = 0; q < count * kPanelVectors; ++q) {
      const int64_t at = panel + q / kPanelVectors;
      const int v = int(q % kPanelVectors), lanes = columns.lanes(at, v);
      for (int64_t i = 0; i < rows; ++i) {
        T* out = sums + i * width + q * kLanes<T>;
        const Vec<T> before = add ? load(out) : Vec<T>{};
        if (lanes > 0) dot_each(w + columns.first(at, v) * ld, ld, left.data + i * left.stride, K, lanes, out);
        store(out, lanes > 0 ? load(out) + before : before);
      }
    }
  }
};

// What forward and backward share: rows, steps and the memory that they look at. Scratch has a group's rows together.
template <typename Cell, typename T, typename Call>
struct DecoderPass : Call {
  using Call::A, Call::B, Call::F, Call::H, Call::M, Call::S, Call::T_;

  int64_t G = Cell::kGates * H;
  bool after = this->w_out != nullptr;  // whether the state looks after its step
  int64_t h_width = padded_to_panels<T>(H), a_width = padded_to_panels<T>(A), m_width = padded_to_panels<T>(M),
          f_width = padded_to_panels<T>(F);
  int64_t s_width = Arena<T>::padded(S) + Arena<T>::padded(kLanes<T>);  // with room for a vector at any place
  int64_t groups = 1, scratch_rows = 0;
  bool unpacked = all_steps() < kUnpackedRows;
  bool keeps_keys = this->v && T_ > 1 && sum_of_v() <= kMostOfV
                    && B * S* a_width <= kKeptKeys / int64_t(sizeof(T));  // see `exp_keys`

  T* v_padded;   // [a_width], zeros behind A
  T* exp_keys;   // [B, S, a_width] exp(2k)
  T* bounded;    // [B] 1 where all present keys of a row are within kBound
  T* exp_query;  // per member [a_width]
  T* scores;     // per member [s_width]

  explicit DecoderPass(const Call& call) : Call(call) {}

  int64_t active(int64_t t) const { return this->running ? this->running[t] : B; }
  int64_t row_of(int64_t rank) const { return this->order ? this->order[rank] : rank; }
  int64_t row_of(const Deal& my, int64_t i) const { return row_of(my.rank_of(i)); }
  int64_t length(int64_t rank) const {
    int64_t t = T_;
    while (t > 0 && active(t - 1) <= rank) --t;
    return t;
  }
  double sum_of_v() const {
    double total = 0;
    for (int64_t a = 0; a < A; ++a) total += std::abs(double(this->v[a]));
    return total;
  }
  int64_t all_steps() const {
    int64_t count = 0;
    for (int64_t t = 0; t < T_; ++t) count += active(t);
    return count;
  }

  int team_size(const Threads& threads) const {
    const int64_t per_row = G * (F + H) + (this->v ? A * (H + 4 * S) : A * S) + S * M + (after ? F * (M + H) : 0);
    const int64_t useful = std::min(all_steps() * per_row / kWorkPerThread, B * per_row / kWorkPerBarrier);
    return int(std::max<int64_t>(1, std::min<int64_t>({threads.count, Team::kMost, useful})));
  }

  void lay_out_memory(Pieces<T>& pieces, int members) {
    groups = B >= kDealtRows * members ? members : 1;
    scratch_rows = B + groups - 1;
    v_padded = pieces.take(this->v ? a_width : 0);
    exp_keys = pieces.take(keeps_keys ? B * S * a_width : 0);
    bounded = pieces.take(B);
    exp_query = pieces.take(members * a_width);
    scores = pieces.take(members * s_width);
  }

  void take(Pieces<T>& pieces, Right<T>& w, bool wanted) const {
    T* at = pieces.take(unpacked || !wanted ? 0 : w.elements());
    w.packed = unpacked || !wanted ? nullptr : at;
  }

  // Calls body(first, end) for each run of places that are not absent.
  template <typename Body>
  FASTSEQ_INLINE void each_run(int64_t b, const Body& body) const {
    if (!this->absent) return body(0, S);
    const bool* absent = this->absent + b * S;
    const auto find = [&](int64_t s, bool what) {
      const void* found = s < S ? memchr(absent + s, what, S - s) : nullptr;
      return found ? static_cast<const bool*>(found) - absent : S;
    };
    for (int64_t s = find(0, false); s < S;) {
      const int64_t end = find(s, true);
      body(s, end);
      s = find(end, false);
    }
  }

  // Calls body(deal, wait) for each group that this member is of. How rows are grouped does not depend on how many
  // members have come.
  template <typename Body>
  void each_group(int rank, Team& team, const Body& body) const {
    if (groups == 1) return body(Deal(0, 1, B, rank, team.size()), [&] { team.barrier(rank, 0, team.size()); });
    for (int64_t group = rank; group < groups; group += team.size()) body(Deal(group, groups, B, 0, 1), [] {});
  }

  void pad_v(int rank) const {
    if (rank > 0 || !this->v) return;
    std::copy_n(this->v, A, v_padded);
    std::fill(v_padded + A, v_padded + a_width, T(0));
  }

  // What of the keys is needed at every step.
  void prepare_keys(const Deal& my) const {
    const int64_t rows = my.rows(active(0));
    for (int64_t i = my.begin(rows); keeps_keys && i < my.end(rows); ++i) {
      const int64_t b = row_of(my, i);
      Bounded<T> all;
      each_run(b, [&](int64_t first, int64_t end) {
        for (int64_t s = first; s < end; ++s)
          for (int64_t c = 0; c < a_width; c += kLanes<T>) {
            const int lanes = int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, A - c)));
            const Vec<T> k = load(this->keys + (b * S + s) * A + c, lanes);
            all.look_at(k);
            store(exp_keys + (b * S + s) * a_width + c, exp<T>(clamp<T>(k + k, 2 * kBound<T>)));
          }
      });
      bounded[b] = all.holds();
    }
  }

  // exp(2p) where tanh(p + k) of the row can be had from it and exp(2k), else null.
  const T* exp_of_query(int64_t b, const T* p, int rank) const {
    if (!keeps_keys || bounded[b] == 0) return nullptr;
    T* e = exp_query + rank * a_width;
    Bounded<T> all;
    for (int64_t c = 0; c < a_width; c += kLanes<T>) {
      const int lanes = int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, A - c)));
      const Vec<T> x = load(p + c, lanes);
      all.look_at(x);
      store(e + c, exp<T>(clamp<T>(x + x, 2 * kBound<T>)));
    }
    return all.holds() ? e : nullptr;
  }

  // result[rows][width] (+)= left times my part of w's columns.
  void product(const Right<T>& w, Left<T> left, int64_t rows, T* result, int64_t width, bool add, const Deal& my,
               bool back) const {
    // In groups of panels, as many as a tile of few rows wants.
    constexpr int64_t kGroup = 4;
    const int64_t most = block_rows<T>(w.K), begin = my.begin(w.columns.panels()), end = my.end(w.columns.panels());
    for (int64_t row = 0; row < rows; row += most)
      to_and_fro(0, (end - begin + kGroup - 1) / kGroup, back, [&](int64_t group, int64_t next) {
        const int64_t panel = begin + group * kGroup;
        w.multiply(panel, std::min(kGroup, end - panel), begin + next * kGroup,
                   {left.data + row * left.stride, left.stride}, std::min(most, rows - row),
                   result + row * width + panel * kPanel<T>, width, add);
      });
  }

  // Zeros past the rows' ends in an output [T, B, width], which may be null.
  void clear_padding(T* output, int64_t width, int rank, int members) const {
    if (!this->running || !output) return;
    for (int64_t t = share(T_, rank, members); t < share(T_, rank + 1, members); ++t)
      for (int64_t at = active(t); at < B; ++at) std::fill_n(output + (t * B + row_of(at)) * width, width, T(0));
  }
};

template <typename Cell, typename T>
struct DecoderForwardPass : DecoderPass<Cell, T, AttentionDecoderForward<T>> {
  using Base = DecoderPass<Cell, T, AttentionDecoderForward<T>>;
  using Base::A, Base::a_width, Base::active, Base::after, Base::B, Base::F, Base::f_width, Base::G, Base::H,
      Base::h_width, Base::M, Base::m_width, Base::S, Base::s_width, Base::scratch_rows, Base::T_;

  static constexpr int kBlockPanels = Cell::kGates * Cell::kUnitPanels;
  static constexpr int64_t kUnits = Cell::kUnitPanels * kPanel<T>;                // units of a block
  static constexpr int64_t kBlock = Cell::kSlots * kUnits;                        // its pre-activations
  static constexpr int64_t kHiddenSlot = (Cell::kSlots - Cell::kGates) * kUnits;  // the first that W_hh adds to

  Right<T> from_feed{this->w_feed, this->w_feed_row, F, {H, Cell::kGates, Cell::kFirstGate}, true},
      from_h{this->w_hh, H, H, {H, Cell::kGates, 0}, true}, to_query{this->w_query, H, H, {A}, true},
      from_context{this->w_out, M + H, M, {F}, true},
      from_state{after ? this->w_out + M : nullptr, M + H, H, {F}, true};
  int64_t blocks = (H + kUnits - 1) / kUnits, most = std::min(B, block_rows<T>(std::max(F, H)));
  T* bias;                // [blocks, kBlock] b_hh
  T* sums;                // per member [most, kBlock] pre-activations
  T *state, *cell_state;  // [2, rows, h_width], read at even and odd steps, and [rows, h_width]
  T* context;             // [rows, m_width]
  T* feed;                // [rows, f_width]; the context if the state looks before its step
  T* p;                   // [rows, a_width] queries

  explicit DecoderForwardPass(const AttentionDecoderForward<T>& call) : Base(call) {}

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->lay_out_memory(pieces, members);
    this->take(pieces, from_feed, true), this->take(pieces, from_h, true), this->take(pieces, to_query, this->v);
    this->take(pieces, from_context, after), this->take(pieces, from_state, after);
    bias = pieces.take(blocks * kBlock);
    sums = pieces.take(members * most * kBlock);
    state = pieces.take(2 * scratch_rows * h_width);
    cell_state = pieces.take(Cell::kHasCell ? scratch_rows * h_width : 0);
    context = pieces.take(scratch_rows * m_width);
    feed = after ? pieces.take(scratch_rows * f_width) : context;
    p = pieces.take(this->v ? scratch_rows * a_width : 0);
    return pieces.count;
  }

  T* h_of(int64_t t, int64_t row) const { return state + (t % 2 * scratch_rows + row) * h_width; }

  void run(int rank, Team& team) const {
    pack(rank, team.size());
    team.barrier(rank, 0, team.size());
    this->each_group(rank, team, [&](const Deal& my, const auto& wait) { run_group(my, rank, wait); });
    const auto clear = [&](T* output, int64_t width) { this->clear_padding(output, width, rank, team.size()); };
    clear(this->h, H), clear(this->feeds, F), clear(this->weights, S), clear(this->contexts, M);
  }

  template <typename Wait>
  void run_group(const Deal& my, int rank, const Wait& wait) const {
    start(my);
    wait();
    for (int64_t t = 0; t < T_; ++t) {
      const int64_t rows = my.rows(active(t));
      if (rows == 0) return;
      const auto look = [&](int64_t with) {
        if (this->v) {
          this->product(to_query, {h_of(with, my.first_row), h_width}, rows, p + my.first_row * a_width, a_width, false,
                        my, t % 2);
          wait();
        }
        for (int64_t i = my.begin(rows); i < my.end(rows); ++i)
          this->look(t, this->row_of(my, i), my.first_row + i, h_of(with, my.first_row + i), rank);
        wait();
      };
      if (!after) look(t);
      step(my, t, rows, rank);
      wait();
      if (!after) continue;
      look(t + 1);
      put_out(my, t, rows);
      wait();
    }
  }

  void pack(int rank, int members) const {
    this->pad_v(rank);
    for (const Right<T>* w : {&from_feed, &from_h, &to_query, &from_context, &from_state}) w->pack(rank, members);
    for (int64_t block = share(blocks, rank, members); block < share(blocks, rank + 1, members); ++block)
      for (int slot = 0; slot < Cell::kSlots; ++slot)
        for (int64_t i = 0; i < kUnits; ++i) {
          const int64_t u = block * kUnits + i, gate = slot - (Cell::kSlots - Cell::kGates);
          bias[block * kBlock + slot * kUnits + i] = this->b_hh && u < H && gate >= 0 ? this->b_hh[gate * H + u] : T(0);
        }
  }

  // Sets the states to where they start.
  void start(const Deal& my) const {
    this->prepare_keys(my);
    const int64_t rows = my.rows(B);
    for (int64_t i = my.begin(rows); i < my.end(rows); ++i) {
      const int64_t b = this->row_of(my, i), row = my.first_row + i;
      std::copy_n(this->h0 + b * H, H, h_of(0, row));
      if (Cell::kHasCell) std::copy_n(this->c0 + b * H, H, cell_state + row * h_width);
      if (after) std::copy_n(this->feed0 + b * F, F, feed + row * f_width);
      if (my.rank_of(i) < active(0)) continue;
      std::copy_n(this->h0 + b * H, H, this->h_n + b * H);
      if (Cell::kHasCell) std::copy_n(this->c0 + b * H, H, this->c_n + b * H);
    }
  }

  // Weights and context of row b of the batch, which is `row` in scratch.
  void look(int64_t t, int64_t b, int64_t row, const T* q, int rank) const {
    const int64_t at = t * B + b;
    T *z = context + row * m_width, *e = this->scores + rank * s_width;
    std::fill_n(e, s_width, -T(INFINITY));
    score(b, q, p + row * a_width, e, rank);
    softmax(e, b, this->weights + at * S);
    bool none = true;
    this->each_run(b, [&](int64_t first, int64_t end) {
      multiply_row<T>(e + first, this->values + (b * S + first) * M, M, end - first, 0, M, z, !none);
      none = false;
    });
    if (none) std::fill_n(z, M, T(0));
    if (!after) std::copy_n(z, M, this->feeds + at * F);
    if (this->contexts) std::copy_n(z, M, this->contexts + at * M);
  }

  // Scores of the places that are not absent; others are left as they are.
  void score(int64_t b, const T* q, const T* p_row, T* e, int rank) const {
    const T* exp_p = this->v ? this->exp_of_query(b, p_row, rank) : nullptr;
    this->each_run(b, [&](int64_t first, int64_t end) {
      const T* k = this->keys + (b * S + first) * A;
      if (!this->v) {
        dot_each<T>(k, A, q, A, end - first, e + first);
        std::fill_n(e + end, kLanes<T>, -T(INFINITY));
        return;
      }
      const T *exp_k = this->exp_keys + (b * S + first) * a_width, *v = this->v_padded;
      for (int64_t s = first; s < end; ++s, k += A, exp_k += a_width) {
        Vec<T> total[kPanelVectors] = {};
        if (exp_p)
          for (int64_t a = 0; a < a_width; a += kPanel<T>)
            for (int j = 0; j < kPanelVectors; ++j) {
              const int64_t at = a + j * kLanes<T>;
              const Vec<T> r = reciprocal<T>(load(exp_p + at) * load(exp_k + at) + T(1));
              total[j] += (T(1) - (r + r)) * load(v + at);
            }
        else
          each_vector<T>(0, A, [&](int64_t a, int lanes) __attribute__((always_inline)) {
            total[0] += tanh<T>(load(p_row + a, lanes) + load(k + a, lanes)) * load(v + a);
          });
        e[s] = sum<T>(total[0] + total[1]);
      }
    });
  }

  // Scores become weights, in scratch and in the output. Places that are absent have a score of -inf.
  void softmax(T* e, int64_t b, T* weights) const {
    Vec<T> most = load(e), total{};
    for (int64_t s = kLanes<T>; s < S; s += kLanes<T>) most = larger<T>(load(e + s), most);
    T largest = most[0];
    for (int i = 1; i < kLanes<T>; ++i) largest = std::max(largest, most[i]);
    const bool none = largest == -T(INFINITY) && all_absent(b);
    if (none) largest = 0;
    for (int64_t s = 0; s < S; s += kLanes<T>) {
      const Vec<T> value = exp<T>(load(e + s) - largest);
      total += value;
      store(e + s, value);
    }
    const T sum_of_all = sum<T>(total), scale = none ? T(0) : 1 / sum_of_all;
    for (int64_t s = 0; s < S; s += kLanes<T>) store(e + s, load(e + s) * scale);
    if (this->absent && !(sum_of_all < T(INFINITY)))  // NaN takes no part where a place is absent
      for (int64_t s = 0; s < S; ++s)
        if (this->absent[b * S + s]) e[s] = 0;
    std::copy_n(e, S, weights);
  }

  bool all_absent(int64_t b) const {
    return this->absent &&
           std::all_of(this->absent + b * S, this->absent + (b + 1) * S, [](bool each) { return each; });
  }

  // The cell's step for a group's rows and my units.
  void step(const Deal& my, int64_t t, int64_t rows, int rank) const {
    T* a = sums + rank * most * kBlock;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t count = std::min(most, rows - first), row = my.first_row + first;
      to_and_fro(my.begin(blocks), my.end(blocks), t % 2, [&](int64_t block, int64_t next) {
        const int64_t panel = block * kBlockPanels,
                      panels = std::min(kBlockPanels, int(from_h.columns.panels() - panel));
        from_feed.multiply(panel, panels, panel, {feed + row * f_width, f_width}, count, a, kBlock, false);
        if constexpr (kHiddenSlot > 0)
          for (int64_t i = 0; i < count; ++i) std::fill_n(a + i * kBlock + Cell::kGates * kUnits, kHiddenSlot, T(0));
        from_h.multiply(panel, panels, next * kBlockPanels, {h_of(t, row), h_width}, count, a + kHiddenSlot, kBlock,
                        true);
        if ((block + 1) * kUnits <= H)
          activate<true>(my, t, block, first, count, a);
        else
          activate<false>(my, t, block, first, count, a);
      });
    }
  }

  // Cell and output of one block of units from the pre-activations a.
  template <bool kFull>
  FASTSEQ_INLINE void activate(const Deal& my, int64_t t, int64_t block, int64_t first, int64_t count,
                               const T* a) const {
    const T* b_block = bias + block * kBlock;
    const int64_t running_on = t + 1 < T_ ? active(t + 1) : 0;
    for (int64_t i = first; i < first + count; ++i, a += kBlock) {
      const int64_t b = this->row_of(my, i), at = t * B + b, row = my.first_row + i;
      const bool last = my.rank_of(i) >= running_on;
      const T *given = this->gates + t * this->gates_t + b * this->gates_b, *now = h_of(t, row);
      T *next = h_of(t + 1, row), *c_row = cell_state + row * h_width;
      for (int j = 0; j < Cell::kUnitPanels * kPanelVectors; ++j) {
        const int64_t u = block * kUnits + j * kLanes<T>;
        const int lanes = kFull ? kLanes<T> : int(std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, H - u)));
        if (lanes == 0) continue;
        const auto slot = [&](int k) __attribute__((always_inline)) {
          const int64_t s = k * kUnits + j * kLanes<T>;
          const Vec<T> own = load(a + s) + load(b_block + s);
          return k < Cell::kGates ? own + load(given + (k + Cell::kFirstGate) % Cell::kGates * H + u, lanes) : own;
        };
        const auto keep = [&](int k, Vec<T> value) __attribute__((always_inline)) {
          if (this->saved_gates) store(this->saved_gates + (at * Cell::kTape + k) * H + u, value, lanes);
        };
        Vec<T> c_t{};
        if constexpr (Cell::kHasCell) c_t = load(c_row + u, lanes);
        const Vec<T> h_t = Cell::template step<T>(slot, load(now + u, lanes), c_t, keep);
        if constexpr (Cell::kHasCell) {
          store(c_row + u, c_t, lanes);
          if (this->cells) store(this->cells + at * H + u, c_t, lanes);
          if (last) store(this->c_n + b * H + u, c_t, lanes);
        }
        store(next + u, h_t, lanes);
        store(this->h + at * H + u, h_t, lanes);
        if (last) store(this->h_n + b * H + u, h_t, lanes);
      }
    }
  }

  // f = tanh(W_out [z; h]) for a group's rows and my columns.
  void put_out(const Deal& my, int64_t t, int64_t rows) const {
    T* result = feed + my.first_row * f_width;
    this->product(from_context, {context + my.first_row * m_width, m_width}, rows, result, f_width, false, my, t % 2);
    this->product(from_state, {h_of(t + 1, my.first_row), h_width}, rows, result, f_width, true, my, t % 2);
    const int64_t panels = from_state.columns.panels();
    for (int64_t i = 0; i < rows; ++i) {
      T *out = this->feeds + (t * B + this->row_of(my, i)) * F, *f = result + i * f_width;
      each_vector<T>(my.begin(panels) * kPanel<T>, std::min(F, my.end(panels) * kPanel<T>),
                     [&](int64_t u, int lanes) __attribute__((always_inline)) {
                       const Vec<T> value = tanh<T>(load(f + u));
                       store(f + u, value, lanes);
                       store(out + u, value, lanes);
                     });
    }
  }
};

template <typename Cell, typename T>
struct DecoderBackwardPass : DecoderPass<Cell, T, AttentionDecoderBackward<T>> {
  using Base = DecoderPass<Cell, T, AttentionDecoderBackward<T>>;
  using Base::A, Base::a_width, Base::active, Base::after, Base::B, Base::F, Base::f_width, Base::G, Base::H,
      Base::h_width, Base::M, Base::m_width, Base::S, Base::s_width, Base::scratch_rows, Base::T_;

  static constexpr bool kApart = Cell::kSlots > Cell::kGates;  // whether dgates_h differs from dgates

  Right<T> to_feed{this->w_feed, this->w_feed_row, G, {F}, false}, to_h{this->w_hh, H, G, {H}, false},
      to_query{this->w_query, H, H, {A}, true}, from_query{this->w_query, H, A, {H}, false},
      to_context{this->w_out, M + H, F, {M}, false}, to_state{after ? this->w_out + M : nullptr, M + H, F, {H}, false};
  int64_t g_width = Arena<T>::padded(G);
  bool keeps_dz = this->dvalues, keeps_de = !this->v && this->dkeys;
  T *da, *da_h;       // [rows, g_width] gradients of what the gates get from their input and from h
  T *dstate, *dcell;  // [rows, h_width] what reaches h and c from later steps
  T *df, *d_out;      // [rows, f_width] what reaches the feed from the next step, and W_out's gradient
  T* dz;              // [T, rows, m_width], or of one step if nobody asks for dvalues
  T *q, *p, *dp;      // [rows, h_width] states that look, [rows, a_width] twice
  T* de;              // [T, rows, s_width] where keys' gradients are made of it
  T* dv_of;           // [B, a_width] each row's part of dv
  T* outer;           // per member: scratch of multiply_outer

  explicit DecoderBackwardPass(const AttentionDecoderBackward<T>& call) : Base(call) {}

  int64_t outer_elements() const {
    return !keeps_dz && !keeps_de
               ? 0
               : Arena<T>::padded(scratch_for_outer<T>(std::max(keeps_dz ? M : 0, keeps_de ? A : 0)));
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->lay_out_memory(pieces, members);
    const bool additive = this->v;
    this->take(pieces, to_feed, true), this->take(pieces, to_h, true);
    this->take(pieces, to_query, additive), this->take(pieces, from_query, additive);
    this->take(pieces, to_context, after), this->take(pieces, to_state, after);
    da = pieces.take(scratch_rows * g_width);
    da_h = kApart ? pieces.take(scratch_rows * g_width) : da;
    dstate = pieces.take(scratch_rows * h_width);
    dcell = pieces.take(Cell::kHasCell ? scratch_rows * h_width : 0);
    df = pieces.take(after ? scratch_rows * f_width : 0);
    d_out = pieces.take(after ? scratch_rows * f_width : 0);
    dz = pieces.take((keeps_dz ? T_ : 1) * scratch_rows * m_width);
    q = pieces.take(additive ? scratch_rows * h_width : 0);
    p = pieces.take(additive ? scratch_rows * a_width : 0);
    dp = pieces.take(additive ? scratch_rows * a_width : 0);
    de = pieces.take(keeps_de ? T_ * scratch_rows * s_width : 0);
    dv_of = pieces.take(this->dv ? B * a_width : 0);
    outer = pieces.take(members * outer_elements());
    return pieces.count;
  }

  T* dz_of(int64_t t, int64_t row) const { return dz + ((keeps_dz ? t : 0) * scratch_rows + row) * m_width; }
  T* de_of(int64_t t, int64_t row, int rank) const {
    return keeps_de ? de + (t * scratch_rows + row) * s_width : this->scores + rank * s_width;
  }
  const T* h_before(int64_t t, int64_t b) const { return t > 0 ? this->h + ((t - 1) * B + b) * H : this->h0 + b * H; }
  const T* query(int64_t t, int64_t b) const { return after ? this->h + (t * B + b) * H : h_before(t, b); }

  void run(int rank, Team& team) const {
    pack(rank, team.size());
    team.barrier(rank, 0, team.size());
    this->each_group(rank, team, [&](const Deal& my, const auto& wait) { run_group(my, rank, wait); });
    const auto clear = [&](T* output, int64_t width) { this->clear_padding(output, width, rank, team.size()); };
    clear(this->dgates, G), clear(this->dgates_h, G), clear(this->dqueries, A), clear(this->douts, F);
    if (!this->dv) return;
    team.barrier(rank, 0, team.size());
    for (int64_t c = share(A, rank, team.size()); c < share(A, rank + 1, team.size()); ++c) {
      T total = 0;
      for (int64_t b = 0; b < B; ++b) total += dv_of[b * a_width + c];
      this->dv[c] = total;
    }
  }

  template <typename Wait>
  void run_group(const Deal& my, int rank, const Wait& wait) const {
    start(my);
    wait();
    const int64_t row = my.first_row;
    T *da_rows = da + row * g_width, *da_h_rows = da_h + row * g_width, *dh_rows = dstate + row * h_width,
      *df_rows = df + row * f_width;
    for (int64_t t = T_; t-- > 0;) {
      const int64_t rows = my.rows(active(t));
      const bool back = t % 2;
      const auto each_row = [&](const auto& body) {
        for (int64_t i = my.begin(rows); i < my.end(rows); ++i) body(t, this->row_of(my, i), row + i);
        wait();
      };
      const auto gates_to_state = [&] {
        this->product(to_h, {da_h_rows, g_width}, rows, dh_rows, h_width, true, my, back);
      };
      const auto queries = [&] {
        if (!this->v) return;
        this->product(to_query, {q + row * h_width, h_width}, rows, p + row * a_width, a_width, false, my, back);
      };
      const auto look = [&] {
        each_row([&](int64_t t, int64_t b, int64_t at) { look_back(t, b, at, rank); });
        if (!this->v) return;
        this->product(from_query, {dp + row * a_width, a_width}, rows, dh_rows, h_width, true, my, back);
        wait();
      };
      if (rows == 0) continue;
      if (after) {
        each_row([&](int64_t t, int64_t b, int64_t at) { out_back(t, b, at), keep_query(t, b, at); });
        const Left<T> left{d_out + row * f_width, f_width};
        this->product(to_context, left, rows, dz_of(t, row), m_width, false, my, back);
        this->product(to_state, left, rows, dh_rows, h_width, true, my, back);
        queries();
        wait();
        look();
        each_row([&](int64_t t, int64_t b, int64_t at) { step_back(t, b, at); });
        this->product(to_feed, {da_rows, g_width}, rows, df_rows, f_width, false, my, back);
        gates_to_state();
      } else {
        each_row([&](int64_t t, int64_t b, int64_t at) { step_back(t, b, at), keep_query(t, b, at); });
        this->product(to_feed, {da_rows, g_width}, rows, dz_of(t, row), m_width, false, my, back);
        gates_to_state();
        queries();
        wait();
        look();
      }
      wait();
    }
    finish(my, rank);
  }

  void pack(int rank, int members) const {
    this->pad_v(rank);
    for (const Right<T>* w : {&to_feed, &to_h, &to_query, &from_query, &to_context, &to_state}) w->pack(rank, members);
  }

  // Sets what is summed up to where it starts.
  void start(const Deal& my) const {
    this->prepare_keys(my);
    const int64_t rows = my.rows(B);
    for (int64_t i = my.begin(rows); i < my.end(rows); ++i) {
      const int64_t b = this->row_of(my, i), row = my.first_row + i;
      copy_or_zero(dstate + row * h_width, this->dh_n ? this->dh_n + b * H : nullptr, H);
      if (Cell::kHasCell) copy_or_zero(dcell + row * h_width, this->dc_n ? this->dc_n + b * H : nullptr, H);
      if (after) std::fill_n(df + row * f_width, F, T(0));
      if (this->dkeys && this->v) std::fill_n(this->dkeys + b * S * A, S * A, T(0));
      if (this->dv) std::fill_n(dv_of + b * a_width, a_width, T(0));
    }
  }

  void keep_query(int64_t t, int64_t b, int64_t row) const {
    if (this->v) std::copy_n(query(t, b), H, q + row * h_width);
  }

  // The gradient in front of the feed's tanh.
  void out_back(int64_t t, int64_t b, int64_t row) const {
    const int64_t at = (t * B + b) * F;
    const T *f = this->feeds + at, *given = this->dfeeds ? this->dfeeds + at : nullptr, *carried = df + row * f_width;
    T *kept = d_out + row * f_width, *out = this->douts + at;
    each_vector<T>(0, F, [&](int64_t u, int lanes) __attribute__((always_inline)) {
      const Vec<T> value = load(f + u, lanes);
      Vec<T> gradient = load(carried + u, lanes);
      if (given) gradient += load(given + u, lanes);
      gradient = gradient * (T(1) - value * value);
      store(kept + u, gradient, lanes);
      store(out + u, gradient, lanes);
    });
  }

  // The cell's: dh and dc become what of dh_{t-1} and dc_{t-1} does not come through W_hh.
  void step_back(int64_t t, int64_t b, int64_t row) const {
    const int64_t at = t * B + b;
    const T *given = this->dh ? this->dh + at * H : nullptr, *h_row = this->h + at * H, *before = h_before(t, b),
            *gates = this->saved_gates + at * Cell::kTape * H, *c_row = this->cells + at * H,
            *c_before = t > 0 ? this->cells + (at - B) * H : this->c0 + b * H;
    T *dh_row = dstate + row * h_width, *dc_row = dcell + row * h_width, *da_row = da + row * g_width,
      *da_h_row = da_h + row * g_width, *out = this->dgates + at * G, *out_h = this->dgates_h + at * G;
    each_vector<T>(0, H, [&](int64_t u, int lanes) __attribute__((always_inline)) {
      const auto tape = [&](int k) __attribute__((always_inline)) { return load(gates + k * H + u, lanes); };
      const auto put = [&](int k, Vec<T> value) __attribute__((always_inline)) {
        if (k < Cell::kGates) {
          const int64_t to = (k + Cell::kFirstGate) % Cell::kGates * H + u;
          store(da_row + to, value, lanes);
          store(out + to, value, lanes);
        }
        if (kApart && k >= Cell::kSlots - Cell::kGates) {
          const int64_t to = (k - (Cell::kSlots - Cell::kGates)) * H + u;
          store(da_h_row + to, value, lanes);
          store(out_h + to, value, lanes);
        }
      };
      Back<T> at_t{};
      at_t.dh = load(dh_row + u, lanes);
      if (given) at_t.dh += load(given + u, lanes);
      if constexpr (Cell::kHasCell) {
        at_t.c = load(c_row + u, lanes), at_t.c_before = load(c_before + u, lanes);
        at_t.dc = load(dc_row + u, lanes);
      } else {
        at_t.h = load(h_row + u, lanes), at_t.h_before = load(before + u, lanes);
      }
      Cell::template step_back<T>(tape, at_t, put);
      store(dh_row + u, Cell::kKeepsH ? at_t.dh : Vec<T>{}, lanes);
      if constexpr (Cell::kHasCell) store(dc_row + u, at_t.dc, lanes);
    });
  }

  // From dz to what reaches keys, v and the query.
  void look_back(int64_t t, int64_t b, int64_t row, int rank) const {
    const int64_t at = t * B + b;
    const T *weights = this->weights + at * S, *given = this->dweights ? this->dweights + at * S : nullptr;
    T *dz_row = dz_of(t, row), *e = de_of(t, row, rank);
    if (!after && this->dfeeds)
      each_vector<T>(0, M, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        store(dz_row + c, load(dz_row + c) + load(this->dfeeds + at * F + c, lanes), lanes);
      });
    std::fill_n(e, s_width, T(0));
    Vec<T> total{};
    this->each_run(b, [&](int64_t first, int64_t end) {
      dot_each<T>(this->values + (b * S + first) * M, M, dz_row, M, end - first, e + first);
      std::fill_n(e + end, kLanes<T>, T(0));
      each_vector<T>(first, end, [&](int64_t s, int lanes) __attribute__((always_inline)) {
        Vec<T> da_s = load(e + s);
        if (given) store(e + s, da_s += load(given + s, lanes));
        total += load(weights + s, lanes) * da_s;
      });
    });
    const T mean = sum<T>(total);
    this->each_run(b, [&](int64_t first, int64_t end) {
      each_vector<T>(first, end, [&](int64_t s, int lanes) __attribute__((always_inline)) {
        store(e + s, load(weights + s, lanes) * (load(e + s) - mean), lanes);
      });
    });
    if (this->v) {
      const T* exp_p = this->exp_of_query(b, p + row * a_width, rank);
      if (exp_p)
        additive_back<true>(at, b, row, exp_p, e);
      else
        additive_back<false>(at, b, row, p + row * a_width, e);
      return;
    }
    this->each_run(b, [&](int64_t first, int64_t end) {
      multiply_row<T>(e + first, this->keys + (b * S + first) * A, A, end - first, 0, A, dstate + row * h_width, true);
    });
  }

  // Through tanh(p + k), from exp(2p) and exp(2k) if kExps.
  template <bool kExps>
  void additive_back(int64_t at, int64_t b, int64_t row, const T* query, const T* e) const {
    const auto columns = [&](int64_t c, auto vectors, int lanes) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      Vec<T> queries[kVectors], v[kVectors], dp_c[kVectors] = {}, dv_c[kVectors] = {};
      for (int j = 0; j < kVectors; ++j)
        queries[j] = load(query + c + j * kLanes<T>), v[j] = load(this->v_padded + c + j * kLanes<T>);
      this->each_run(b, [&](int64_t first, int64_t end) {
        for (int64_t s = first; s < end; ++s)
          for (int j = 0; j < kVectors; ++j) {
            const int64_t place = b * S + s, k = place * A + c + j * kLanes<T>;
            Vec<T> u, slope;
            if constexpr (kExps) {
              const Vec<T> x = queries[j] * load(this->exp_keys + place * a_width + c + j * kLanes<T>);
              const Vec<T> r = reciprocal<T>(x + T(1));
              u = T(1) - (r + r), slope = x * r * (r * T(4));
            } else {
              u = tanh<T>(queries[j] + load(this->keys + k, lanes)), slope = T(1) - u * u;
            }
            slope *= e[s];
            dp_c[j] += slope, dv_c[j] += u * e[s];
            if (this->dkeys) store(this->dkeys + k, load(this->dkeys + k, lanes) + slope * v[j], lanes);
          }
      });
      for (int j = 0; j < kVectors; ++j) {
        const int64_t to = c + j * kLanes<T>;
        store(dp + row * a_width + to, dp_c[j] * v[j], lanes);
        store(this->dqueries + at * A + to, dp_c[j] * v[j], lanes);
        if (this->dv) store(dv_of + b * a_width + to, load(dv_of + b * a_width + to) + dv_c[j], lanes);
      }
    };
    int64_t c = 0;
    for (; c + kPanel<T> <= A; c += kPanel<T>) columns(c, std::integral_constant<int, kPanelVectors>(), kLanes<T>);
    for (; c + kLanes<T> <= A; c += kLanes<T>) columns(c, std::integral_constant<int, 1>(), kLanes<T>);
    if (c < A) columns(c, std::integral_constant<int, 1>(), int(A - c));
  }

  // Sums over all steps, and what is left at the first one.
  void finish(const Deal& my, int rank) const {
    T* scratch = outer + rank * outer_elements();
    const int64_t rows = my.rows(B);
    for (int64_t i = my.begin(rows); i < my.end(rows); ++i) {
      const int64_t b = this->row_of(my, i), row = my.first_row + i, steps = this->length(my.rank_of(i));
      std::copy_n(dstate + row * h_width, H, this->dh0 + b * H);
      if (Cell::kHasCell) std::copy_n(dcell + row * h_width, H, this->dc0 + b * H);
      if (after) std::copy_n(df + row * f_width, F, this->dfeed0 + b * F);
      if (keeps_dz)
        multiply_outer<T>([&](int64_t t) { return this->weights + (t * B + b) * S; },
                          [&](int64_t t) -> const T* { return dz_of(t, row); }, steps, 0, S, M,
                          this->dvalues + b * S * M, false, scratch);
      if (keeps_de)
        multiply_outer<T>([&](int64_t t) -> const T* { return de_of(t, row, rank); },
                          [&](int64_t t) { return query(t, b); }, steps, 0, S, A, this->dkeys + b * S * A, false,
                          scratch);
    }
  }
};

template <template <typename, typename> typename Pass, typename T, typename Call>
void run_decoder(const Call& call, const Threads& threads) {
  const auto run = [&](auto cell) {
    Pass<decltype(cell), T> pass(call);
    run_pass<Pass<decltype(cell), T>, T>(pass, threads);
  };
  switch (call.cell) {
    case DecoderCell::kLstm:
      return run(Lstm{});
    case DecoderCell::kGru:
      return run(Gru{});
    case DecoderCell::kRnnTanh:
      return run(Rnn<false>{});
  }
}

template <typename T>
void attention_decoder_forward(const AttentionDecoderForward<T>& call, Threads threads) {
  run_decoder<DecoderForwardPass, T>(call, threads);
}

template <typename T>
void attention_decoder_backward(const AttentionDecoderBackward<T>& call, Threads threads) {
  run_decoder<DecoderBackwardPass, T>(call, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
