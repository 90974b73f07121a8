// Softmax cross entropy on the CPU. Formulas: fastseq/reference/cross_entropy.py.
//
// Forward reads a row once, block by block: a block's maximum is found, then, while the block is in the L1 cache, its
// sum of exp(x - maximum) (online softmax, Milakov and Gimelshein 2018). Backward reads it once and writes the
// gradient.
//
// A task is some rows or, where there are few, a part of one. What is summed up, and in which order, depends on nothing
// but shapes: results are the same bits whatever the number of threads.
#pragma once
#include "cpu/cross_entropy.h"
#include "cpu/pass.h"
#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

// Logits of a block, 8 KB of float64 at most.
constexpr int64_t kLogitsBlock = 1024;
// Tasks that there are to be if rows can be split, and the logits of a task for which that pays.
constexpr int64_t kLogitsTasks = 64, kLogitsTask = 4 * kLogitsBlock;
// Logits that are worth a thread.
constexpr int64_t kLogitsPerThread = 16 * 1024;
// Vectors that are summed up side by side: chains that do not wait for each other, and short ones, which round less.
constexpr int kChains = 4;

template <typename T, typename Call>
struct CrossEntropy : Call {
  using Call::label_smoothing, Call::rows, Call::V, Call::weight;

  static constexpr T kMinusInfinity = -__builtin_inf();
  static constexpr int64_t kStep = kChains * kLanes<T>;
  static_assert(kLogitsBlock % kStep == 0);

  int64_t some_rows = std::max<int64_t>(1, kLogitsTask / V);  // of a task
  int64_t parts, part_size;                                   // of a row
  bool smooth = label_smoothing > 0;
  T own = T(1 - label_smoothing), spread = T(label_smoothing / V);  // what the target gets, and each class
  T* blocks;                                                        // one for each member
  mutable std::atomic<int64_t> next{0};                             // task to be done

  explicit CrossEntropy(const Call& call) : Call(call) {
    const int64_t wanted = (kLogitsTasks + rows - 1) / std::max<int64_t>(1, rows);
    parts = std::max<int64_t>(1, std::min(wanted, V / kLogitsTask));
    part_size = ((V + parts - 1) / parts + kLogitsBlock - 1) / kLogitsBlock * kLogitsBlock;
    parts = (V + part_size - 1) / part_size;
  }

  int team_size(const Threads& threads) const {
    return int(std::min<int64_t>({threads.count, Team::kMost, rows * V / kLogitsPerThread + 1}));
  }

  bool ignored(int64_t row) const { return this->target[row] == this->ignore_index; }
  T weight_of(int64_t c) const { return weight ? weight[c] : T(1); }

  template <typename Element>
  const Element* row_of(int64_t row) const {
    return static_cast<const Element*>(this->logits) + row * this->stride;
  }

  // Calls body(row, part, first, last), for logits [first, last) of a row, until there are no tasks.
  template <typename Body>
  void each_part(const Body& body) const {
    const int64_t tasks = (rows + some_rows - 1) / some_rows * parts;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t row = task / parts * some_rows, part = task % parts;
      for (int64_t i = row; i < std::min(rows, row + some_rows); ++i)
        body(i, part, part * part_size, std::min(V, (part + 1) * part_size));
    }
  }

  // A block's logits as numbers to compute with, followed by -inf up to a whole step: where they are, or in `room`.
  template <typename Element>
  FASTSEQ_INLINE const T* block_of(const Element* x, int64_t count, T* room) const {
    if constexpr (sizeof(Element) == sizeof(T))
      if (count % kStep == 0) return x;
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(room + i, load_as<T>(x + i));
    for (; i < count; ++i) room[i] = value_of<T>(x + i);
    for (; i % kStep; ++i) room[i] = kMinusInfinity;
    return room;
  }

  // Sums up body(i), a vector, for every place i of a vector, kChains of them side by side.
  template <typename Body>
  static FASTSEQ_INLINE T sum_of_vectors(int64_t count, const Body& body) {
    Vec<T> sums[kChains] = {};
    for (int64_t i = 0; i < count; i += kStep)
      for (int k = 0; k < kChains; ++k) sums[k] += body(i + k * kLanes<T>);
    return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // The sum of exp(x - high - low) over a block, -inf counting for nothing.
  static FASTSEQ_INLINE T sum_of_exp(const T* x, int64_t count, T high, T low = T(0)) {
    return sum_of_vectors(count, [&](int64_t i) { return exp<T>((load(x + i) - high) - low); });
  }
};

// What is known of some logits of a row.
template <typename T>
struct Logits {
  T top = -__builtin_inf();
  T sum = 0;     // of exp(x - base())
  T gap = 0;     // of w (base() - x), if there is smoothing
  T weight = 0;  // of w, likewise

  T base() const { return top == -__builtin_inf() ? T(0) : top; }

  // Makes everything relative to a larger maximum.
  void raise(T higher) {
    if (higher == top) return;
    const T before = top, base_before = base();
    top = higher;
    sum *= exp<T>((before - base()) - Vec<T>{})[0];
    gap += weight * (base() - base_before);
  }

  void add(Logits more) {
    const T higher = std::max(top, more.top);
    raise(higher), more.raise(higher);
    sum += more.sum, gap += more.gap, weight += more.weight;
  }
};

template <typename T>
struct CrossEntropyForwardPass : CrossEntropy<T, CrossEntropyForward<T>> {
  using Base = CrossEntropy<T, CrossEntropyForward<T>>;
  using Base::Base, Base::kStep, Base::own, Base::parts, Base::rows, Base::smooth, Base::spread, Base::weight;

  Logits<T>* found;  // [rows, parts]

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->blocks = pieces.take(members * kLogitsBlock);
    static_assert(sizeof(Logits<T>) == 4 * sizeof(T));
    found = reinterpret_cast<Logits<T>*>(pieces.take(parts > 1 ? rows * parts * 4 : 0));
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    this->each_part([&](int64_t row, int64_t part, int64_t first, int64_t last) {
      Logits<T> some;
      if (!this->ignored(row))
        with_stored<T>(this->stored, [&](auto element) {
          some = read<decltype(element)>(row, first, last, this->blocks + rank * kLogitsBlock);
        });
      if (parts == 1)
        finish(row, some);
      else
        found[row * parts + part] = some;
    });
    if (parts == 1) return;
    team.barrier(rank, 0, team.size());
    for (int64_t row = share(rows, rank, team.size()); row < share(rows, rank + 1, team.size()); ++row) {
      Logits<T> all = found[row * parts];
      for (int64_t part = 1; part < parts; ++part) all.add(found[row * parts + part]);
      finish(row, all);
    }
  }

  template <typename Element>
  Logits<T> read(int64_t row, int64_t first, int64_t last, T* room) const {
    Logits<T> my;
    for (int64_t c = first; c < last; c += kLogitsBlock) {
      const int64_t count = std::min(kLogitsBlock, last - c);
      const T* x = this->block_of(this->template row_of<Element>(row) + c, count, room);
      my.raise(std::max(my.top, largest(x, count)));
      my.sum += Base::sum_of_exp(x, count, my.base());
      if (smooth) add_gap(my, x, c, count);
    }
    return my;
  }

  static FASTSEQ_INLINE T largest(const T* x, int64_t count) {
    Vec<T> high[kChains];
    for (int k = 0; k < kChains; ++k) high[k] = load(x + k * kLanes<T>);
    for (int64_t i = kStep; i < count; i += kStep)
      for (int k = 0; k < kChains; ++k) high[k] = larger<T>(high[k], load(x + i + k * kLanes<T>));
    T lanes[kLanes<T>];
    store(lanes, larger<T>(larger<T>(high[0], high[1]), larger<T>(high[2], high[3])));
    return *std::max_element(lanes, lanes + kLanes<T>);
  }

  void add_gap(Logits<T>& my, const T* x, int64_t c, int64_t count) const {
    const T base = my.base();
    const int64_t whole = count / kStep * kStep;
    const T* w = weight ? weight + c : nullptr;
    if (w) {
      my.gap += Base::sum_of_vectors(whole, [&](int64_t i) { return load(w + i) * (base - load(x + i)); });
      my.weight += Base::sum_of_vectors(whole, [&](int64_t i) { return load(w + i); });
    } else {
      my.gap += Base::sum_of_vectors(whole, [&](int64_t i) { return base - load(x + i); });
      my.weight += T(whole);
    }
    for (int64_t i = whole; i < count; ++i) {
      my.gap += this->weight_of(c + i) * (base - x[i]);
      my.weight += this->weight_of(c + i);
    }
  }

  void finish(int64_t row, const Logits<T>& all) const {
    this->loss[row] = this->lse[row] = 0;
    if (this->ignored(row)) return;
    const T log = std::log(all.sum), base = all.base();
    const int64_t target = this->target[row];
    T logit;
    with_stored<T>(this->stored,
                   [&](auto element) { logit = value_of<T>(this->template row_of<decltype(element)>(row) + target); });
    // Not lse - x, of which less is left where logits are large.
    T loss = this->weight_of(target) * ((base - logit) + log);
    if (smooth) loss = own * loss + spread * (all.gap + all.weight * log);
    this->loss[row] = loss, this->lse[row] = base + log;
  }
};

template <typename T>
struct CrossEntropyBackwardPass : CrossEntropy<T, CrossEntropyBackward<T>> {
  using Base = CrossEntropy<T, CrossEntropyBackward<T>>;
  using Base::own, Base::smooth, Base::spread, Base::V, Base::weight;

  // The lse from which on its rounding makes probabilities wrong by more than 2^-19 of them, or by more than a fraction
  // of what is rounded anyway if gradients are stored in half precision.
  template <typename Element>
  static constexpr T kLarge = sizeof(Element) == 2 ? T(0x1p11)
                              : sizeof(T) == 4     ? T(0x1p5)
                                                   : T(0x1p34);

  T all_weights = T(V);

  explicit CrossEntropyBackwardPass(const CrossEntropyBackward<T>& call) : Base(call) {
    if (!smooth || !weight) return;
    double sum = 0;
    for (int64_t c = 0; c < V; ++c) sum += weight[c];
    all_weights = T(sum);
  }

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    this->blocks = pieces.take(members * kLogitsBlock);
    return pieces.count;
  }

  void run(int rank, Team&) const {
    with_stored<T>(this->stored, [&](auto element) {
      using Element = decltype(element);
      this->each_part([&](int64_t row, int64_t, int64_t first, int64_t last) {
        auto* dx = static_cast<Element*>(this->dlogits) + row * V;
        if (this->ignored(row)) {
          memset(static_cast<void*>(dx + first), 0, (last - first) * sizeof(Element));
          return;
        }
        const auto* x = this->template row_of<Element>(row);
        const T high = this->lse[row], low = rest(x, high, this->blocks + rank * kLogitsBlock);
        write(x, dx, row, high, low, first, last);
      });
    });
  }

  // What of the sum's logarithm has been lost when lse was rounded, where that is worth another look at the row.
  template <typename Element>
  T rest(const Element* x, T lse, T* room) const {
    if (!(std::abs(lse) > kLarge<Element>)) return 0;
    T sum = 0;
    for (int64_t c = 0; c < V; c += kLogitsBlock) {
      const int64_t count = std::min(kLogitsBlock, V - c);
      sum += Base::sum_of_exp(this->block_of(x + c, count, room), count, lse);
    }
    return std::log(sum);
  }

  template <typename Element>
  void write(const Element* x, Element* dx, int64_t row, T high, T low, int64_t first, int64_t last) const {
    const int64_t target = this->target[row];
    const T dloss = this->dloss[row], mine = own * this->weight_of(target);
    const T scale = dloss * (mine + spread * all_weights), taken = dloss * spread;
    const auto gradient = [&](Vec<T> x, Vec<T> w) __attribute__((always_inline)) {
      const Vec<T> p = exp<T>((x - high) - low) * scale;
      return smooth ? p - w * taken : p;
    };
    const Vec<T> one = T(1) - Vec<T>{};
    int64_t c = first;
    for (; c + kLanes<T> <= last; c += kLanes<T>)
      store_as<T>(dx + c, gradient(load_as<T>(x + c), smooth && weight ? load(weight + c) : one), kLanes<T>);
    if (const int n = int(last - c))
      store_as<T>(dx + c, gradient(load_as<T>(x + c, n), smooth && weight ? load(weight + c, n) : one), n);
    if (target < first || target >= last) return;
    const Vec<T> w = this->weight_of(target) - Vec<T>{};
    store_as<T>(dx + target, gradient(value_of<T>(x + target) - Vec<T>{}, w) - dloss * mine, 1);
  }
};

template <typename T>
void cross_entropy_forward(const CrossEntropyForward<T>& call, Threads threads) {
  CrossEntropyForwardPass<T> pass(call);
  run_pass<CrossEntropyForwardPass<T>, T>(pass, threads);
}

template <typename T>
void cross_entropy_backward(const CrossEntropyBackward<T>& call, Threads threads) {
  CrossEntropyBackwardPass<T> pass(call);
  run_pass<CrossEntropyBackwardPass<T>, T>(pass, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
