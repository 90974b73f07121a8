// Depthwise causal convolution, bias and SiLU in one pass over memory: fastseq/reference/causal_conv1d.py.
//
// Vectors lie along times, of one channel at a time, or along channels, of a stripe of them: whichever follow each
// other in memory. The inputs before the first, e[0 .. K-2], are elsewhere than x; the first times read from a copy of
// both, all others from x itself.
#pragma once
#include "cpu/activation_kernel.h"
#include "cpu/causal_conv1d.h"
#include "cpu/pass.h"
#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

// kTaps: K if it is one of those that are unrolled, else 0.
template <typename T, typename Call, int kTaps, bool kByTime>
struct CausalConvPass : Call {
  static constexpr int64_t kStripe = kByTime ? 8 * kLanes<T> : 1;  // channels that are gone through together
  static constexpr int64_t kLeastTimes = kByTime ? 64 : 1024;      // so that what a block needs stays in the cache
  static constexpr int kTile = 4;                                  // times that share a load of the weights
  int64_t block, blocks, stripes, first_times;
  mutable std::atomic<int64_t> next{0};

  explicit CausalConvPass(const Call& call) : Call(call) {
    // Gradients look K - 1 times beyond the block's: a small part of it.
    block = std::max(kLeastTimes, 4 * before());
    blocks = std::max<int64_t>(1, (this->times + block - 1) / block);
    stripes = (this->C + kStripe - 1) / kStripe;
    const int64_t vectors = (before() + kLanes<T> - 1) / kLanes<T>;
    first_times = std::min(this->times, kByTime ? before() : vectors * kLanes<T>);
  }

  int64_t taps() const { return kTaps ? kTaps : this->K; }
  int64_t before() const { return taps() - 1; }

  int team_size(const Threads& threads) const {
    const int64_t useful = this->B * this->C * this->times / kElementsPerThread + 1;
    return int(std::min<int64_t>({threads.count, Team::kMost, useful}));
  }

  // One row's channels [first, first + channels), and what is kept of them.
  struct Stripe {
    int64_t row = -1, first = -1, channels = 0;
    T *weights, *head;  // weights are [K][kStripe], if by time; head is e, of so many times, [..][kStripe]

    void take(Pieces<T>& pieces, int64_t taps, int64_t times) {
      weights = pieces.take(kByTime ? taps * kStripe : 0);
      head = pieces.take((taps - 1 + times) * kStripe);
    }
  };

  template <typename Element>
  void enter(Stripe& s, int64_t row, int64_t stripe) const {
    const int64_t first = stripe * kStripe;
    if (kByTime && s.first != first) {
      const int64_t channels = std::min(kStripe, this->C - first);
      for (int64_t k = 0; k < taps(); ++k)
        for (int64_t c = 0; c < kStripe; ++c)
          s.weights[k * kStripe + c] = c < channels ? this->weight[(first + c) * taps() + k] : T(0);
    }
    s.row = row, s.first = first, s.channels = std::min(kStripe, this->C - first);
    Element* head = reinterpret_cast<Element*>(s.head);
    const Element* state = state_of<Element>(this->state, s);
    for (int64_t i = 0; i < before(); ++i, head += kStripe)
      for (int64_t c = 0; c < s.channels; ++c) head[c] = state ? state[c * before() + i] : Element{};
    for (int64_t t = 0; t < first_times; ++t, head += kStripe) {
      const Element* x = this->x.template at<Element>(row, first, t);
      std::copy(x, x + s.channels, head);
    }
  }

  template <typename Element>
  const Element* state_of(const void* states, const Stripe& s) const {
    return states ? static_cast<const Element*>(states) + (s.row * this->C + s.first) * before() : nullptr;
  }

  // Calls body(begin, end, e, step) for the times [begin, end) in one or two parts: e[t + k] for t = begin is found
  // k * step from e.
  template <typename Element, typename Body>
  FASTSEQ_INLINE void each_part(const Stripe& s, int64_t begin, int64_t end, const Body& body) const {
    const int64_t split = std::min(end, std::max(begin, first_times));
    if (begin < split) body(begin, split, reinterpret_cast<const Element*>(s.head) + begin * kStripe, kStripe);
    if (split < end) body(split, end, this->x.template at<const Element>(s.row, s.first, split - before()), this->x.t);
  }

  // Calls body(i, c, lanes, sum) for vectors of sum_k weight[k] e[i + k], or of weight[K - 1 - k], for i < count.
  template <bool kReversed, typename Element, typename Body>
  FASTSEQ_INLINE void convolve(const Stripe& s, const T* bias, const Element* e, int64_t step, int64_t count,
                               const Body& body) const {
    const auto place = [&](int64_t k) { return kReversed ? taps() - 1 - k : k; };
    if constexpr (kByTime) {
      const auto rows = [&](int64_t i, auto tile) __attribute__((always_inline)) {
        constexpr int kRows = decltype(tile)::value;
        each_vector<T>(0, s.channels, [&](int64_t c, int lanes) __attribute__((always_inline)) {
          const Vec<T> start = bias ? load(bias + s.first + c, lanes) : Vec<T>{};
          Vec<T> sums[kRows];
          for (int n = 0; n < kRows; ++n) sums[n] = start;
          for (int64_t k = 0; k < taps(); ++k) {
            const Vec<T> w = load(s.weights + place(k) * kStripe + c);
            for (int n = 0; n < kRows; ++n) sums[n] += w * load_as<T>(e + (i + n + k) * step + c, lanes);
          }
          for (int n = 0; n < kRows; ++n) body(i + n, c, lanes, sums[n]);
        });
      };
      int64_t i = 0;
      for (; i + kTile <= count; i += kTile) rows(i, std::integral_constant<int, kTile>{});
      for (; i < count; ++i) rows(i, std::integral_constant<int, 1>{});
    } else {
      const T* const weights = this->weight + s.first * taps();
      const Vec<T> start = (bias ? bias[s.first] : T(0)) - Vec<T>{};
      each_vector<T>(0, count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        Vec<T> sum = start;
        for (int64_t k = 0; k < taps(); ++k) sum += weights[place(k)] * load_as<T>(e + i + k, lanes);
        body(i, 0, lanes, sum);
      });
    }
  }
};

template <typename T, int kTaps, bool kByTime>
struct CausalConvForwardPass : CausalConvPass<T, CausalConvForward<T>, kTaps, kByTime> {
  using Base = CausalConvPass<T, CausalConvForward<T>, kTaps, kByTime>;
  using Base::Base, Base::kStripe, Base::block, Base::blocks, Base::before;
  using typename Base::Stripe;
  T* scratch;
  int64_t of_thread;

  int64_t lay_out(T* start, int threads) {
    scratch = start;
    Pieces<T> pieces{nullptr};
    Stripe{}.take(pieces, this->taps(), this->first_times);
    of_thread = pieces.count;
    return threads * of_thread;
  }

  void run(int rank, Team&) const {
    Stripe s;
    Pieces<T> pieces{scratch + rank * of_thread};
    s.take(pieces, this->taps(), this->first_times);
    // Stripe by stripe, whose weights are kept, then row by row; as many at once as make up for the drawing.
    const int64_t tasks = this->stripes * this->B * blocks, work = kStripe * std::min(block, this->times) + kStripe;
    const int64_t drawn = std::max<int64_t>(1, 4096 / work);
    with_stored<T>(this->stored, [&](auto element) {
      using Element = decltype(element);
      for (int64_t task; (task = this->next.fetch_add(drawn, std::memory_order_relaxed)) < tasks;)
        for (int64_t i = task; i < std::min(tasks, task + drawn); ++i)
          block_of<Element>(s, i / blocks % this->B, i / blocks / this->B, i % blocks);
    });
  }

  template <typename Element>
  void block_of(Stripe& s, int64_t row, int64_t stripe, int64_t index) const {
    if (index == 0 || s.row != row || s.first != stripe * kStripe) this->template enter<Element>(s, row, stripe);
    const int64_t end = std::min(this->times, (index + 1) * block);
    this->template each_part<Element>(
        s, index * block, end, [&](int64_t t, int64_t stop, const Element* e, int64_t step) {
          Element* const y = this->y.template at<Element>(row, s.first, t);
          const int64_t apart = this->y.t;
          const bool silu = this->silu;
          this->template convolve<false>(s, this->bias, e, step, stop - t,
                                         [&](int64_t i, int64_t c, int lanes, Vec<T> sum)
                                             __attribute__((always_inline)) {
                                               Vec<T> unused{};
                                               if (silu) sum = activate<Activation::kSilu, T>(sum, unused);
                                               store_as<T>(y + i * apart + c, sum, lanes);
                                             });
        });
    if (index == blocks - 1) finish<Element>(s);
  }

  // The state of the next call.
  template <typename Element>
  void finish(const Stripe& s) const {
    Element* final = const_cast<Element*>(this->template state_of<Element>(this->final, s));
    const Element* state = this->template state_of<Element>(this->state, s);
    const int64_t count = s.channels * before(), kept = std::max<int64_t>(0, before() - this->times);
    // What is left of the old state is the same places of all channels, so many elements further on.
    if (kept && state) std::copy(state + this->times, state + count, final);
    if (kept && !state) std::fill(final, final + count, Element{});
    for (int64_t j = kept; j < before(); ++j) {
      const Element* x = this->x.template at<const Element>(s.row, s.first, this->times - before() + j);
      for (int64_t c = 0; c < s.channels; ++c) final[c * before() + j] = x[c];
    }
  }
};

template <typename T, int kTaps, bool kByTime>
struct CausalConvBackwardPass : CausalConvPass<T, CausalConvBackward<T>, kTaps, kByTime> {
  using Base = CausalConvPass<T, CausalConvBackward<T>, kTaps, kByTime>;
  using Base::kStripe, Base::block, Base::blocks, Base::stripes, Base::before;
  using typename Base::Stripe;
  static constexpr int64_t kWide = kByTime ? kStripe : kLanes<T>;  // of sums
  static constexpr int64_t kWantedTasks = 64;
  // A task adds up a stripe's gradients of weights over a part of rows and blocks: which ones depends on the shape
  // alone, and parts are added in their order.
  int64_t units, parts;
  T* scratch;
  T* totals;  // [parts][K + 1][padded C] of dweight and, last, dbias
  int64_t of_thread;

  explicit CausalConvBackwardPass(const CausalConvBackward<T>& call) : Base(call) {
    units = this->B * blocks;
    parts = stripes ? std::min(units, (kWantedTasks + stripes - 1) / stripes) : 0;
  }

  int64_t padded() const { return Arena<T>::padded(this->C); }
  bool has_sums() const { return this->dweight || this->dbias; }

  struct Scratch {
    Stripe stripe;
    T *da, *de, *sums;  // [block + 2 (K - 1)][kStripe], [block + K - 1][kStripe], [K + 1][kWide]
  };

  Scratch cut(T* start, int64_t& count) const {
    Pieces<T> pieces{start};
    Scratch made;
    made.stripe.take(pieces, this->taps(), this->first_times);
    made.da = pieces.take((block + 2 * before()) * kStripe + kLanes<T>);
    made.de = pieces.take((block + before()) * kStripe + kLanes<T>);
    made.sums = pieces.take((this->taps() + 1) * kWide);
    count = pieces.count;
    return made;
  }

  int64_t lay_out(T* start, int threads) {
    cut(nullptr, of_thread);
    scratch = start;
    totals = start ? start + threads * of_thread : nullptr;
    return threads * of_thread + (has_sums() ? parts * (this->taps() + 1) * padded() : 0);
  }

  void run(int rank, Team& team) const {
    int64_t unused;
    Scratch s = cut(scratch + rank * of_thread, unused);
    with_stored<T>(this->stored, [&](auto element) {
      using Element = decltype(element);
      for (int64_t task; (task = this->next.fetch_add(1, std::memory_order_relaxed)) < stripes * parts;) {
        const int64_t stripe = task / parts, part = task % parts;
        std::fill(s.sums, s.sums + (this->taps() + 1) * kWide, T(0));
        for (int64_t unit = share(units, part, parts); unit < share(units, part + 1, parts); ++unit) {
          const int64_t row = unit / blocks, index = unit % blocks;
          if (s.stripe.row != row || s.stripe.first != stripe * kStripe)
            this->template enter<Element>(s.stripe, row, stripe);
          block_of<Element>(s, index);
        }
        if (has_sums()) keep_sums(s, part);
      }
    });
    if (!has_sums()) return;
    team.barrier(rank, 0, team.size());
    add_parts(share(this->C, rank, team.size()), share(this->C, rank + 1, team.size()));
  }

  // Gradients of a block, and what it adds to the sums. da and de begin K - 1 times before those of x do, in the first
  // block, where these are the state's.
  template <typename Element>
  void block_of(Scratch& s, int64_t index) const {
    const int64_t begin = index * block, end = std::min(this->times, begin + block);
    const int64_t first = index ? begin : -before(), seen = std::min(this->times, end + before());
    T* const da = s.da - first * kStripe;
    std::fill(da + first * kStripe, da + begin * kStripe, T(0));
    std::fill(da + seen * kStripe, da + (end + before()) * kStripe, T(0));
    this->template each_part<Element>(
        s.stripe, begin, seen, [&](int64_t t, int64_t stop, const Element* e, int64_t step) {
          const Element* const dy = this->dy.template at<const Element>(s.stripe.row, s.stripe.first, t);
          sums_gradient(s.stripe, dy, e, step, stop - t, da + t * kStripe);
        });
    if (has_sums())
      this->template each_part<Element>(s.stripe, begin, end,
                                        [&](int64_t t, int64_t stop, const Element* e, int64_t step) {
                                          add_products(s, da + t * kStripe, e, step, stop - t);
                                        });
    if (!this->dx.data && !this->dstate) return;
    T* const de = s.de - first * kStripe;
    this->template convolve<true>(s.stripe, nullptr, da + first * kStripe, kStripe, end - first,
                                  [&](int64_t i, int64_t c, int lanes, Vec<T> sum) __attribute__((always_inline)) {
                                    store(de + (first + i) * kStripe + c, sum, kByTime ? kLanes<T> : lanes);
                                  });
    const int64_t last = std::max(first, this->times - before());
    if (const Element* dfinal = this->template state_of<Element>(this->dfinal, s.stripe))
      for (int64_t t = last; t < end; ++t)
        for (int64_t c = 0; c < s.stripe.channels; ++c)
          de[t * kStripe + c] += value_of<T>(dfinal + c * before() + t - (this->times - before()));
    if (this->dx.data)
      each_row(s.stripe, begin, end, [&](int64_t t, int64_t c, int lanes) {
        store_as<T>(this->dx.template at<Element>(s.stripe.row, s.stripe.first, t) + c,
                    load(de + t * kStripe + c, lanes), lanes);
      });
    Element* dstate = const_cast<Element*>(this->template state_of<Element>(this->dstate, s.stripe));
    if (dstate && index == 0)
      for (int64_t c = 0; c < s.stripe.channels; ++c)
        for (int64_t j = 0; j < before(); ++j) {
          Vec<T> value{};
          value[0] = de[(j - before()) * kStripe + c];
          store_as<T>(dstate + c * before() + j, value, 1);
        }
  }

  // Calls body(t, c, lanes) for the vectors of the times [begin, end).
  template <typename Body>
  FASTSEQ_INLINE void each_row(const Stripe& s, int64_t begin, int64_t end, const Body& body) const {
    if constexpr (kByTime) {
      for (int64_t t = begin; t < end; ++t)
        each_vector<T>(0, s.channels, [&](int64_t c, int lanes) __attribute__((always_inline)) { body(t, c, lanes); });
    } else {
      each_vector<T>(begin, end, [&](int64_t t, int lanes) __attribute__((always_inline)) { body(t, 0, lanes); });
    }
  }

  template <typename Element>
  void sums_gradient(const Stripe& s, const Element* dy, const Element* e, int64_t step, int64_t count, T* da) const {
    const int64_t apart = this->dy.t;
    if (!this->silu)
      return each_row(s, 0, count, [&](int64_t i, int64_t c, int lanes) __attribute__((always_inline)) {
        store(da + i * kStripe + c, load_as<T>(dy + i * apart + c, lanes), kByTime ? kLanes<T> : lanes);
      });
    this->template convolve<false>(s, this->bias, e, step, count,
                                   [&](int64_t i, int64_t c, int lanes, Vec<T> sum) __attribute__((always_inline)) {
                                     Vec<T> given = load_as<T>(dy + i * apart + c, lanes);
                                     activate<Activation::kSilu, T>(sum, given);
                                     store(da + i * kStripe + c, given, kByTime ? kLanes<T> : lanes);
                                   });
  }

  // Adds sum_t da[t] e[t + k] and, last, sum_t da[t]: vectors of which either channels or times are apart.
  template <typename Element>
  void add_products(Scratch& s, const T* da, const Element* e, int64_t step, int64_t count) const {
    const auto add = [&](int64_t k, auto tile, auto with_bias) __attribute__((always_inline)) {
      constexpr int kCount = decltype(tile)::value;
      constexpr bool kBias = decltype(with_bias)::value;
      Vec<T> sums[kCount + 1] = {};
      const auto one = [&](const T* of_da, const Element* of_e, int lanes) __attribute__((always_inline)) {
        const Vec<T> grad = load(of_da, kByTime ? kLanes<T> : lanes);
        for (int n = 0; n < kCount; ++n) sums[n] += grad * load_as<T>(of_e + (k + n) * step, lanes);
        if (kBias) sums[kCount] += grad;
      };
      const auto keep = [&](int64_t c) __attribute__((always_inline)) {
        for (int n = 0; n < kCount + kBias; ++n) {
          T* const total = s.sums + (n == kCount ? this->taps() : k + n) * kWide + c;
          store(total, load(total) + sums[n]);
          sums[n] = Vec<T>{};
        }
      };
      if constexpr (kByTime) {
        each_vector<T>(0, s.stripe.channels, [&](int64_t c, int lanes) __attribute__((always_inline)) {
          for (int64_t i = 0; i < count; ++i) one(da + i * kStripe + c, e + i * step + c, lanes);
          keep(c);
        });
      } else {
        each_vector<T>(0, count,
                       [&](int64_t i, int lanes) __attribute__((always_inline)) { one(da + i, e + i, lanes); });
        keep(0);
      }
    };
    if constexpr (kTaps) {
      add(0, std::integral_constant<int, kTaps>{}, std::true_type{});
    } else {
      constexpr int kTogether = 4;
      int64_t k = 0;
      for (; k + kTogether < this->K; k += kTogether)
        add(k, std::integral_constant<int, kTogether>{}, std::false_type{});
      for (; k + 1 < this->K; ++k) add(k, std::integral_constant<int, 1>{}, std::false_type{});
      add(k, std::integral_constant<int, 1>{}, std::true_type{});
    }
  }

  void keep_sums(const Scratch& s, int64_t part) const {
    for (int64_t k = 0; k <= this->taps(); ++k) {
      T* const kept = totals + (part * (this->taps() + 1) + k) * padded() + s.stripe.first;
      const T* const sums = s.sums + k * kWide;
      if constexpr (kByTime)
        std::copy(sums, sums + s.stripe.channels, kept);
      else
        *kept = sum<T>(load(sums));
    }
  }

  void add_parts(int64_t begin, int64_t end) const {
    for (int64_t k = 0; k <= this->taps(); ++k) {
      T* const result = k < this->taps() ? this->dweight : this->dbias;
      const int64_t apart = k < this->taps() ? this->taps() : 1;
      if (!result) continue;
      for (int64_t c = begin; c < end; ++c) {
        T total{};
        for (int64_t part = 0; part < parts; ++part) total += totals[(part * (this->taps() + 1) + k) * padded() + c];
        result[c * apart + (k < this->taps() ? k : 0)] = total;
      }
    }
  }
};

template <typename T, template <typename, int, bool> typename Pass, typename Call>
void run_causal_conv(const Call& call, const Threads& threads) {
  const auto run = [&](auto taps, auto by_time) {
    Pass<T, decltype(taps)::value, decltype(by_time)::value> pass(call);
    run_pass<decltype(pass), T>(pass, threads);
  };
  const auto with_taps = [&](auto by_time) {
    switch (call.K) {
      case 2:
        return run(std::integral_constant<int, 2>{}, by_time);
      case 3:
        return run(std::integral_constant<int, 3>{}, by_time);
      case 4:
        return run(std::integral_constant<int, 4>{}, by_time);
      default:
        return run(std::integral_constant<int, 0>{}, by_time);
    }
  };
  if (call.by_time)
    with_taps(std::true_type{});
  else
    with_taps(std::false_type{});
}

template <typename T>
void causal_conv1d_forward(const CausalConvForward<T>& call, Threads threads) {
  run_causal_conv<T, CausalConvForwardPass>(call, threads);
}

template <typename T>
void causal_conv1d_backward(const CausalConvBackward<T>& call, Threads threads) {
  run_causal_conv<T, CausalConvBackwardPass>(call, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
