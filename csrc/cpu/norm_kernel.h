// Dropout, residual and LayerNorm or RMSNorm on the CPU: the formulas of fastseq/reference/norm.py. A row comes from
// memory once; what is computed on it again reads it from the cache.
#pragma once
#include "cpu/dropout_kernel.h"
#include "cpu/norm.h"
#include "cpu/pass.h"

namespace fastseq::FASTSEQ_ISA {

// Elements of a task: as many take about as long as to start a thread for them.
constexpr int64_t kNormWork = 16 * 1024;
// Tasks at most, each of which adds up gradients of weight and bias by itself.
constexpr int64_t kNormTasks = 32;

template <typename T>
struct TwoSums {
  T first, second;
};

// Adds up two things over E columns: body(e, n, first, second) adds a vector to each.
template <typename T, typename Body>
FASTSEQ_INLINE TwoSums<T> add_up(int64_t E, const Body& body) {
  constexpr int kChains = 4;  // additions under way at once hide how long one takes
  constexpr int64_t kStep = kChains * kLanes<T>;
  Vec<T> first[kChains] = {}, second[kChains] = {};
  int64_t e = 0;
  for (; e + kStep <= E; e += kStep)
    for (int i = 0; i < kChains; ++i) body(e + i * kLanes<T>, kLanes<T>, first[i], second[i]);
  for (; e + kLanes<T> <= E; e += kLanes<T>) body(e, kLanes<T>, first[0], second[0]);
  if (e < E) body(e, int(E - e), first[0], second[0]);
  return {sum<T>((first[0] + first[1]) + (first[2] + first[3])),
          sum<T>((second[0] + second[1]) + (second[2] + second[3]))};
}

// v with zeros in the lanes from n on.
template <typename T>
FASTSEQ_INLINE Vec<T> first_lanes(Vec<T> v, int n) {
  if (n == kLanes<T>) return v;
  T lanes[kLanes<T>];
  store(lanes, v);
  return load_part<T>(lanes, n);
}

// Calls body with the kind as a constant.
template <typename Body>
FASTSEQ_INLINE void with_kind(NormKind kind, const Body& body) {
  if (kind == NormKind::kLayer) return body(std::integral_constant<NormKind, NormKind::kLayer>{});
  if (kind == NormKind::kRms) return body(std::integral_constant<NormKind, NormKind::kRms>{});
  body(std::integral_constant<NormKind, NormKind::kNone>{});
}

// A call's rows cut into tasks by the shape alone, so that sums do not depend on the number of threads.
template <typename T, typename Call>
struct Norm : Call {
  using Call::E, Call::rows;

  int64_t block = std::max((rows + kNormTasks - 1) / kNormTasks, (kNormWork + E - 1) / E);  // rows of a task
  int64_t blocks = std::max<int64_t>(1, (rows + block - 1) / block);
  int64_t padded = (E + kDrawn - 1) / kDrawn * kDrawn;
  mutable std::atomic<int64_t> next{0};  // task to be done

  explicit Norm(const Call& call) : Call(call) {}

  int team_size(const Threads& threads) const { return int(std::min<int64_t>({threads.count, Team::kMost, blocks})); }

  // Calls body(element, kind, task, first row, row after the last) for one task after the other, as long as there are.
  template <typename Body>
  void each_task(const Body& body) const {
    with_stored<T>(this->stored, [&](auto element) {
      with_kind(this->kind, [&](auto kind) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < blocks;)
          body(element, kind, task, task * block, std::min(rows, (task + 1) * block));
      });
    });
  }

  // What dropout multiplies row r by, for which there is room for whole draws.
  void draw_factors(int64_t r, T* factors) const {
    for (int64_t e = 0; e < E; e += kDrawn) draw_row(this->dropout, 0, r, e, factors + e);
  }
};

template <typename T>
struct NormForwardPass : Norm<T, NormForward<T>> {
  using Base = Norm<T, NormForward<T>>;
  using Base::Base;
  using Base::E, Base::padded;

  T* scratch;  // a row for each member

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    scratch = pieces.take(members * padded);
    return pieces.count;
  }

  void run(int rank, Team&) const {
    this->each_task([&](auto element, auto kind, int64_t, int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r) normalise<decltype(element), kind>(r, scratch + rank * padded);
    });
  }

  // What v is when it has been stored, which is done if there is a place for it.
  template <typename Element>
  static FASTSEQ_INLINE Vec<T> stored(Vec<T> v, Element* place, int n) {
    if constexpr (sizeof(Element) == sizeof(T)) {
      if (place) store(place, v, n);
      return v;
    } else {
      Element lanes[kLanes<T>];
      store_as<T>(lanes, v, kLanes<T>);
      if (place) memcpy(place, lanes, n * sizeof(Element));
      return load_as<T>(lanes);
    }
  }

  template <typename Element, NormKind kKind>
  void normalise(int64_t r, T* room) const {
    const Element* x = this->x.template row<Element>(r);
    const Element* residual = this->residual.template row<Element>(r);
    Element* total = this->total.template row<Element>(r);
    // A total that is x alone is asked for where dropout's probability rounds to none.
    const bool drops = bool(this->dropout), changed = drops || residual || total;
    const T count = T(E);
    if (drops) this->draw_factors(r, room);
    const T* row = room;
    if constexpr (sizeof(Element) == sizeof(T))
      if (!changed) row = x;
    const bool moved = row == room;
    const TwoSums<T> sums =
        add_up<T>(E, [=](int64_t e, int n, Vec<T>& plain, Vec<T>& squares) __attribute__((always_inline)) {
          Vec<T> v = load_as<T>(x + e, n);
          if (drops) v *= load(room + e);
          if (residual) v += load_as<T>(residual + e, n);
          if (changed) v = stored(v, total ? total + e : nullptr, n);
          if (moved) store(room + e, v);
          if constexpr (kKind == NormKind::kLayer) plain += v;
          if constexpr (kKind == NormKind::kRms) squares += v * v;
        });
    if constexpr (kKind == NormKind::kNone) return;
    T mean = 0, rstd;
    if constexpr (kKind == NormKind::kLayer) {
      mean = sums.first / count;
      const TwoSums<T> rest =
          add_up<T>(E, [&](int64_t e, int n, Vec<T>& plain, Vec<T>& squares) __attribute__((always_inline)) {
            const Vec<T> v = first_lanes<T>(load(row + e, n) - mean, n);
            plain += v, squares += v * v;
          });
      // What rounding has left of the mean is in the deviations, where it shows.
      const T missed = rest.first / count, variance = rest.second / count - missed * missed;
      mean += missed;
      rstd = 1 / std::sqrt((variance < 0 ? T(0) : variance) + this->eps);
      this->mean[r] = mean;
    } else {
      rstd = 1 / std::sqrt(sums.second / count + this->eps);
    }
    this->rstd[r] = rstd;
    Element* y = this->y.template row<Element>(r);
    const T *weight = this->weight, *bias = this->bias;
    each_vector<T>(0, E, [=](int64_t e, int n) __attribute__((always_inline)) {
      Vec<T> v = load(row + e, n);
      if constexpr (kKind == NormKind::kLayer) v -= mean;
      v *= rstd;
      if (weight) v *= load(weight + e, n);
      if (bias) v += load(bias + e, n);
      store_as<T>(y + e, v, n);
    });
  }
};

template <typename T>
struct NormBackwardPass : Norm<T, NormBackward<T>> {
  using Base = Norm<T, NormBackward<T>>;
  using Base::Base;
  using Base::blocks, Base::E, Base::padded;

  // Rows whose shares of the gradients of weight and bias are added at once.
  static constexpr int kTogether = 2;

  T *dweights, *dbiases;  // [blocks, padded], those of each task
  T* scratch;             // kTogether rows for each member, what dropout multiplies by

  int64_t lay_out(T* start, int members) {
    Pieces<T> pieces{start};
    scratch = pieces.take(this->dropout ? members * kTogether * padded : 0);
    dweights = pieces.take(this->dweight && blocks > 1 ? blocks * padded : 0);
    dbiases = pieces.take(this->dbias && blocks > 1 ? blocks * padded : 0);
    return pieces.count;
  }

  void run(int rank, Team& team) const {
    this->each_task([&](auto element, auto kind, int64_t task, int64_t first, int64_t end) {
      T* dweight = share_of_task(this->dweight, dweights, task);
      T* dbias = share_of_task(this->dbias, dbiases, task);
      T* room = scratch + rank * kTogether * padded;
      int64_t r = first;
      for (; r + kTogether <= end; r += kTogether)
        differentiate<decltype(element), kind, kTogether>(r, dweight, dbias, room);
      for (; r < end; ++r) differentiate<decltype(element), kind, 1>(r, dweight, dbias, room);
    });
    if (blocks == 1 || !(this->dweight || this->dbias)) return;
    team.barrier(rank, 0, team.size());
    const int64_t vectors = (E + kLanes<T> - 1) / kLanes<T>;
    const int64_t first = share(vectors, rank, team.size()) * kLanes<T>;
    const int64_t end = std::min(E, share(vectors, rank + 1, team.size()) * kLanes<T>);
    add_tasks(this->dweight, dweights, first, end), add_tasks(this->dbias, dbiases, first, end);
  }

  // Where a task adds up its share of a gradient, which is made zeros; null if nobody wants it.
  T* share_of_task(T* result, T* shares, int64_t task) const {
    if (!result) return nullptr;
    T* own = blocks > 1 ? shares + task * padded : result;
    std::fill_n(own, E, T(0));
    return own;
  }

  // Adds the tasks' shares of columns [first, end), in their order.
  void add_tasks(T* result, const T* shares, int64_t first, int64_t end) const {
    if (!result) return;
    for (int64_t e = first; e < end; e += kLanes<T>) {
      const int n = int(std::min<int64_t>(kLanes<T>, end - e));
      Vec<T> total = load(shares + e, n);
      for (int64_t task = 1; task < blocks; ++task) total += load(shares + task * padded + e, n);
      store(result + e, total, n);
    }
  }

  template <typename Element, NormKind kKind, int kCount>
  void differentiate(int64_t r, T* dweight, T* dbias, T* factors) const {
    const T* weight = this->weight;
    const int64_t E = this->E, padded = this->padded;
    const bool drops = this->dropout && this->dx.data;
    const Element *dy[kCount], *total[kCount], *dtotal[kCount];
    Element *dx[kCount], *dresidual[kCount];
    T mean[kCount] = {}, rstd[kCount] = {}, along_ones[kCount] = {}, along_row[kCount] = {};
    for (int i = 0; i < kCount; ++i) {
      dy[i] = this->dy.template row<Element>(r + i), total[i] = this->total.template row<Element>(r + i);
      dtotal[i] = this->dtotal.template row<Element>(r + i);
      dx[i] = this->dx.template row<Element>(r + i), dresidual[i] = this->dresidual.template row<Element>(r + i);
      if (drops) this->draw_factors(r + i, factors + i * padded);
      if constexpr (kKind == NormKind::kNone) continue;
      if constexpr (kKind == NormKind::kLayer) mean[i] = this->mean[r + i];
      rstd[i] = this->rstd[r + i];
      if (!dx[i] && !dresidual[i]) continue;
      const TwoSums<T> sums =
          add_up<T>(E, [=, dy = dy[i], total = total[i], mean = mean[i]](int64_t e, int n, Vec<T>& ones, Vec<T>& row)
                           __attribute__((always_inline)) {
                             Vec<T> g = load_as<T>(dy + e, n);
                             if (weight) g *= load(weight + e, n);
                             if constexpr (kKind == NormKind::kLayer) ones += g;
                             row += g * (load_as<T>(total + e, n) - mean);
                           });
      along_ones[i] = sums.first / T(E), along_row[i] = sums.second * rstd[i] / T(E);
    }
    each_vector<T>(0, E, [&](int64_t e, int n) __attribute__((always_inline)) {
      Vec<T> own_weight = T(1) - Vec<T>{}, weights{}, biases{};
      if (weight) own_weight = load(weight + e, n);
      if (dweight) weights = load(dweight + e, n);
      if (dbias) biases = load(dbias + e, n);
      for (int i = 0; i < kCount; ++i) {
        Vec<T> g{};
        if constexpr (kKind != NormKind::kNone) {
          const Vec<T> own = load_as<T>(dy[i] + e, n);
          const Vec<T> normal = (load_as<T>(total[i] + e, n) - mean[i]) * rstd[i];
          weights += own * normal, biases += own;
          g = (own * own_weight - along_ones[i] - normal * along_row[i]) * rstd[i];
        }
        if (dtotal[i]) g += load_as<T>(dtotal[i] + e, n);
        if (dresidual[i]) store_as<T>(dresidual[i] + e, g, n);
        if (!dx[i]) continue;
        if (drops) g *= load(factors + i * padded + e);
        store_as<T>(dx[i] + e, g, n);
      }
      if (dweight) store(dweight + e, weights, n);
      if (dbias) store(dbias + e, biases, n);
    });
  }
};

template <typename T>
void norm_forward(const NormForward<T>& call, Threads threads) {
  NormForwardPass<T> pass(call);
  run_pass<NormForwardPass<T>, T>(pass, threads);
}

template <typename T>
void norm_backward(const NormBackward<T>& call, Threads threads) {
  NormBackwardPass<T> pass(call);
  run_pass<NormBackwardPass<T>, T>(pass, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
