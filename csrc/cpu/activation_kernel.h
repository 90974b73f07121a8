// Bias, activation, gate and dropout in one pass over memory: fastseq/reference/activation.py.
#pragma once
#include "cpu/activation.h"
#include "cpu/dropout_kernel.h"
#include "cpu/pass.h"
#include "cpu/simd.h"

namespace fastseq::FASTSEQ_ISA {

// The normal distribution's tail over z >= 0 is exp(-z^2/2) P(z) / Q(z). The rational function interpolates at
// Chebyshev nodes of (z - a) / (z + a); its relative error is in the comment. No coefficient is negative: nothing
// cancels. Beyond kLimit the tail vanishes.
template <typename T>
struct NormalTail;

template <>
struct NormalTail<float> {  // 6.4e-9, a = 3
  static constexpr float kP[] = {0.500000001715f, 0.435255897502f, 0.180943538519f, 0.039849036551f, 0.00399661197046f};
  static constexpr float kQ[] = {
      1.0f, 1.66839662983f, 1.19307157677f, 0.463410969793f, 0.0998940496278f, 0.0100178796009f};
  static constexpr float kLimit = 13.5f;
  static constexpr int32_t kHighHalf = -0x1000;  // the mask of a number whose square is exact
};

template <>
struct NormalTail<double> {  // 8.5e-17, a = 4
  static constexpr double kP[] = {0.49999999999999998585,   0.77511941188981906221,    0.59437323055910735685,
                                  0.2895469439671930828,    0.097786479513487685549,   0.023645988881752528372,
                                  0.0040935746011201027666, 0.00049090567749318151103, 0.000037284026137846140505,
                                  1.3861428858608091743e-6};
  static constexpr double kQ[] = {1.0,
                                  2.3481233845824972973,
                                  2.562277856536973641,
                                  1.7153956581257810264,
                                  0.78263220720496042584,
                                  0.25518849858459042531,
                                  0.060495273680801233872,
                                  0.010354527022982380806,
                                  0.0012339925965190595579,
                                  0.000093457194107214169136,
                                  3.4745449503868773231e-6};
  static constexpr double kLimit = 38.0;
  static constexpr int64_t kHighHalf = -0x8000000;
};

template <typename T, int kCount>
FASTSEQ_INLINE Vec<T> polynomial(const T (&coefficients)[kCount], Vec<T> x) {
  Vec<T> value = coefficients[kCount - 1] - Vec<T>{};
  for (int i = kCount - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// The standard normal distribution and its density, within 4 ulp where they are normal numbers: of large negative x,
// too, where 1 + erf would cancel.
template <typename T>
FASTSEQ_INLINE void normal(Vec<T> x, Vec<T>& below, Vec<T>& density) {
  using C = NormalTail<T>;
  const Vec<T> z = smaller<T>(C::kLimit - Vec<T>{}, larger<T>(-x, x));
  // What z^2 loses when it is rounded would be a relative error of exp(-z^2/2) as large as z^2/2 ulp.
  typename Simd<T>::IntVec bits;
  memcpy(&bits, &z, sizeof bits);
  bits &= C::kHighHalf;
  Vec<T> high;
  memcpy(&high, &bits, sizeof high);
  const Vec<T> square = z * z, lost = (z - high) * (z + high) + (high * high - square);
  Vec<T> e = exp<T>(square * T(-0.5));
  e = e - e * (lost * T(0.5));
  const Vec<T> tail = e * (polynomial(C::kP, z) / polynomial(C::kQ, z));
  below = x < T(0) ? tail : T(1) - tail;
  density = e * T(0.39894228040143267794);
}

// sigmoid(x) and 1 - sigmoid(x), each exact to some ulp, and 0 where it would be subnormal.
template <typename T>
FASTSEQ_INLINE void sigmoids(Vec<T> x, Vec<T>& of_x, Vec<T>& of_minus_x) {
  const Vec<T> e = exp<T>(smaller<T>(-x, x)), large = T(1) / (e + T(1)), small = e * large;
  const auto negative = x < T(0);
  of_x = negative ? small : large;
  of_minus_x = negative ? large : small;
}

// The activation of x, and `given`, which is the gradient of that, times its slope.
template <Activation kKind, typename T>
FASTSEQ_INLINE Vec<T> activate(Vec<T> x, Vec<T>& given) {
  const Vec<T> zeros{};
  if constexpr (kKind == Activation::kRelu) {
    given = x <= zeros ? zeros : given;
    return x <= zeros ? zeros : x;
  } else if constexpr (kKind == Activation::kGelu) {
    Vec<T> below, density;
    normal<T>(x, below, density);
    given *= x * density + below;
    return x * below;
  } else if constexpr (kKind == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u). Far out the slope is constant, but a square may overflow.
    constexpr T kTwice = T(1.59576912160573071176), kCubed = T(0.044715);
    const Vec<T> near = clamp<T>(x, T(64)), square = near * near;
    Vec<T> s, rest;
    sigmoids<T>(kTwice * near * (kCubed * square + T(1)), s, rest);
    given *= x * (s * rest) * (kTwice * (3 * kCubed * square + T(1))) + s;
    return x * s;
  } else if constexpr (kKind == Activation::kSilu) {
    Vec<T> s, rest;
    sigmoids<T>(x, s, rest);
    given *= s * (x * rest + T(1));
    return x * s;
  } else {
    return x;
  }
}

template <typename T, typename Element>
FASTSEQ_INLINE Vec<T> biased(const Element* x, const T* bias, int64_t c, int lanes) {
  const Vec<T> value = load_as<T>(x + c, lanes);
  return bias ? value + load(bias + c, lanes) : value;
}

// A thread for each so many elements: waking it costs what they cost.
constexpr int64_t kElementsPerThread = 32768;

template <typename T, typename Call>
struct ActivationPass : Call {
  // Tasks are blocks of rows and columns. They depend on the shape alone, since sums over rows are made of the blocks'
  // sums: of so many rows that these cost little, and few enough that there is something to share.
  static constexpr int64_t kColumns = 2048, kLeastRows = 16, kMostRows = 256, kWantedTasks = 128;
  int64_t block_rows, row_blocks, column_blocks;
  mutable std::atomic<int64_t> next{0};

  explicit ActivationPass(const Call& call) : Call(call) {
    static_assert(kColumns % kDrawn == 0);
    column_blocks = (this->F + kColumns - 1) / kColumns;
    block_rows = std::min(kMostRows, std::max(kLeastRows, this->rows * column_blocks / kWantedTasks));
    row_blocks = (this->rows + block_rows - 1) / block_rows;
  }

  int team_size(const Threads& threads) const {
    const int64_t useful = this->rows * this->F / kElementsPerThread + 1;
    return int(std::min<int64_t>({threads.count, Team::kMost, useful}));
  }

  // Calls body(row, first, end, factors, element) for pieces of rows until there are no more tasks: dropout's factors
  // of its columns, or null, and a number as it is stored. begin(block, first, end) is called before each task.
  template <typename Begin, typename Body>
  void run_tasks(const Begin& begin, const Body& body) const {
    with_stored<T>(this->stored, [&](auto element) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < row_blocks * column_blocks;) {
        const int64_t block = task / column_blocks, first = task % column_blocks * kColumns;
        const int64_t end = std::min(this->F, first + kColumns);
        begin(block, first, end);
        for (int64_t r = block * block_rows; r < std::min(this->rows, (block + 1) * block_rows); ++r) {
          if (!this->dropout) {
            body(r, first, end, static_cast<const T*>(nullptr), element);
            continue;
          }
          T factors[kDrawn];
          for (int64_t c = first; c < end; c += kDrawn) {
            draw_row(this->dropout, 0, r, c, factors);
            body(r, c, std::min(end, c + kDrawn), factors, element);
          }
        }
      }
    });
  }
};

template <typename T, Activation kKind>
struct ActivationForwardPass : ActivationPass<T, ActivationForward<T>> {
  using ActivationPass<T, ActivationForward<T>>::ActivationPass;

  int64_t lay_out(T*, int) { return 0; }

  void run(int, Team&) const {
    const auto row = [&](int64_t r, int64_t first, int64_t end, const T* factors, auto element) {
      using Element = decltype(element);
      const Element *x = this->x.template row<Element>(r), *up = this->up.template row<Element>(r);
      Element* y = this->y.template row<Element>(r);
      const T* bias = this->bias;
      each_vector<T>(first, end, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        Vec<T> unused{}, value = activate<kKind, T>(biased(x, bias, c, lanes), unused);
        if (up) value *= load_as<T>(up + c, lanes);
        if (factors) value *= load(factors + c - first);
        store_as<T>(y + c, value, lanes);
      });
    };
    this->run_tasks([](int64_t, int64_t, int64_t) {}, row);
  }
};

template <typename T, Activation kKind>
struct ActivationBackwardPass : ActivationPass<T, ActivationBackward<T>> {
  using ActivationPass<T, ActivationBackward<T>>::ActivationPass;
  T* sums;  // [row_blocks][padded F] of each block's dx, if the bias's gradient is wanted

  int64_t padded() const { return Arena<T>::padded(this->F); }

  int64_t lay_out(T* start, int) {
    sums = start;
    return this->dbias ? this->row_blocks * padded() : 0;
  }

  void run(int rank, Team& team) const {
    T* of_block = nullptr;
    const auto begin = [&](int64_t block, int64_t first, int64_t end) {
      if (!this->dbias) return;
      of_block = sums + block * padded();
      std::fill(of_block + first, of_block + Arena<T>::padded(end), T(0));
    };
    const auto row = [&](int64_t r, int64_t first, int64_t end, const T* factors, auto element) {
      using Element = decltype(element);
      const Element *x = this->x.template row<Element>(r), *up = this->up.template row<Element>(r),
                    *dy = this->dy.template row<Element>(r);
      Element *dx = this->dx.template row<Element>(r), *dup = this->dup.template row<Element>(r);
      const T* bias = this->bias;
      T* const totals = of_block;
      each_vector<T>(first, end, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        Vec<T> given = load_as<T>(dy + c, lanes);
        if (factors) given *= load(factors + c - first);
        Vec<T> gradient = up ? given * load_as<T>(up + c, lanes) : given;
        const Vec<T> value = activate<kKind, T>(biased(x, bias, c, lanes), gradient);
        if (dup) store_as<T>(dup + c, given * value, lanes);
        if (dx) store_as<T>(dx + c, gradient, lanes);
        if (totals) store(totals + c, load(totals + c) + gradient);
      });
    };
    this->run_tasks(begin, row);
    if (!this->dbias) return;
    team.barrier(rank, 0, team.size());
    const int64_t vectors = padded() / kLanes<T>, end = share(vectors, rank + 1, team.size()) * kLanes<T>;
    for (int64_t c = share(vectors, rank, team.size()) * kLanes<T>; c < std::min(end, this->F); c += kLanes<T>) {
      Vec<T> total{};
      for (int64_t block = 0; block < this->row_blocks; ++block) total += load(sums + block * padded() + c);
      store(this->dbias + c, total, int(std::min<int64_t>(kLanes<T>, this->F - c)));
    }
  }
};

template <typename T, template <typename, Activation> typename Pass, typename Call>
void run_activation(const Call& call, const Threads& threads) {
  const auto run = [&](auto kind) {
    Pass<T, decltype(kind)::value> pass(call);
    run_pass<decltype(pass), T>(pass, threads);
  };
  switch (call.kind) {
    case Activation::kIdentity:
      return run(std::integral_constant<Activation, Activation::kIdentity>{});
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return run(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return run(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

template <typename T>
void activation_forward(const ActivationForward<T>& call, Threads threads) {
  run_activation<T, ActivationForwardPass>(call, threads);
}

template <typename T>
void activation_backward(const ActivationBackward<T>& call, Threads threads) {
  run_activation<T, ActivationBackwardPass>(call, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
