// fastseq_native::lstm and lstm_backward: the contract of fastseq/ops/lstm.py for CPU tensors in float32 and float64.
#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

namespace portable {
extern const LstmKernels lstm_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LstmKernels lstm_kernels;
}
namespace avx512 {
extern const LstmKernels lstm_kernels;
}
#else
namespace avx2 = portable;
namespace avx512 = portable;
#endif

namespace {

const LstmKernels& kernels() { return chosen(portable::lstm_kernels, avx2::lstm_kernels, avx512::lstm_kernels); }

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct Inputs {
  Tensor x;
  std::optional<Tensor> h0, c0;
  std::vector<Tensor> weights;
  int64_t T, B, I, H, D, per_direction;
  ScalarType dtype;

  Inputs(Tensor x_, std::optional<Tensor> h0_, std::optional<Tensor> c0_, std::vector<Tensor> weights_,
         bool bidirectional)
      : x(std::move(x_)), h0(std::move(h0_)), c0(std::move(c0_)), weights(std::move(weights_)) {
    STD_TORCH_CHECK(x.dim() == 3, "lstm: x must be [T, B, I]");
    dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "lstm: x must be float32 or float64");
    D = bidirectional ? 2 : 1;
    per_direction = int64_t(weights.size()) / D;
    STD_TORCH_CHECK((per_direction == 2 || per_direction == 4) && int64_t(weights.size()) == D * per_direction,
                    "lstm: weights must hold 2 or, with biases, 4 tensors a direction");
    T = x.size(0), B = x.size(1), I = x.size(2);
    STD_TORCH_CHECK(weights[1].dim() == 2, "lstm: w_hh must be [4H, H]");
    H = weights[1].size(1);
    STD_TORCH_CHECK(T > 0 && I > 0 && H > 0, "lstm: T, I and H must be positive");
    check(x, "x", {T, B, I}, dtype);
    for (size_t k = 0; k < weights.size(); ++k) {
      switch (int64_t(k) % per_direction) {
        case 0: check(weights[k], "w_ih", {4 * H, I}, dtype); break;
        case 1: check(weights[k], "w_hh", {4 * H, H}, dtype); break;
        default: check(weights[k], "a bias", {4 * H}, dtype);
      }
      weights[k] = laid_out(weights[k]);
    }
    x = laid_out(x, true);
    for (auto* state : {&h0, &c0}) {
      if (!state->has_value()) continue;
      check(**state, "h0 or c0", {D, B, H}, dtype);
      *state = laid_out(**state);
    }
  }

  template <typename Scalar>
  void fill(LstmShape<Scalar>& shape) const {
    const auto data = [](const Tensor& t) { return static_cast<const Scalar*>(t.const_data_ptr()); };
    shape.T_ = T, shape.B = B, shape.I = I, shape.H = H, shape.D = D;
    shape.x = data(x), shape.x_t = x.stride(0), shape.x_b = x.stride(1);
    shape.h0 = h0 ? data(*h0) : nullptr, shape.c0 = c0 ? data(*c0) : nullptr;
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* w = weights.data() + d * per_direction;
      const bool bias = per_direction == 4;
      shape.weights[d] = {data(w[0]), data(w[1]), bias ? data(w[2]) : nullptr, bias ? data(w[3]) : nullptr};
    }
  }
};

// Stand for a tape that was not asked for: always the same empty tensors, since making one costs a microsecond.
const Tensor& no_gates(ScalarType dtype) {
  static const Tensor floats = empty({0}, ScalarType::Float), doubles = empty({0}, ScalarType::Double);
  return dtype == ScalarType::Float ? floats : doubles;
}

const Tensor& no_cells(ScalarType dtype) {
  static const Tensor floats = empty({0}, ScalarType::Float), doubles = empty({0}, ScalarType::Double);
  return dtype == ScalarType::Float ? floats : doubles;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(Tensor x, std::optional<Tensor> h0,
                                                        std::optional<Tensor> c0, std::vector<Tensor> weights,
                                                        bool bidirectional, bool save_tape) {
  const Inputs in(std::move(x), std::move(h0), std::move(c0), std::move(weights), bidirectional);
  const auto [T, B, H, D] = std::tuple(in.T, in.B, in.H, in.D);
  Tensor y = empty({T, B, D * H}, in.dtype), h_n = empty({D, B, H}, in.dtype), c_n = empty({D, B, H}, in.dtype);
  Tensor gates = save_tape ? empty({D, T, B, 4 * H}, in.dtype) : no_gates(in.dtype);
  Tensor cells = save_tape ? empty({D, T, B, H}, in.dtype) : no_cells(in.dtype);

  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<Scalar*>(t.mutable_data_ptr()); };
    LstmForward<Scalar> call{};
    in.fill(call);
    call.y = data(y), call.h_n = data(h_n), call.c_n = data(c_n);
    call.gates = save_tape ? data(gates) : nullptr, call.cells = save_tape ? data(cells) : nullptr;
    if (in.B > 0) kernel(call, threads());
  };
  if (in.dtype == ScalarType::Float)
    run(0.0f, kernels().forward_float);
  else
    run(0.0, kernels().forward_double);
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const Tensor& dy_, const Tensor& dh_n_, const Tensor& dc_n_, Tensor x, std::optional<Tensor> h0,
    std::optional<Tensor> c0, std::vector<Tensor> weights, bool bidirectional, const Tensor& y_, const Tensor& gates_,
    const Tensor& cells_, std::vector<bool> needs) {
  const Inputs in(std::move(x), std::move(h0), std::move(c0), std::move(weights), bidirectional);
  const auto [T, B, I, H, D] = std::tuple(in.T, in.B, in.I, in.H, in.D);
  check(dy_, "dy", {T, B, D * H}, in.dtype);
  check(dh_n_, "dh_n", {D, B, H}, in.dtype);
  check(dc_n_, "dc_n", {D, B, H}, in.dtype);
  check(y_, "y", {T, B, D * H}, in.dtype);
  check(gates_, "gates", {D, T, B, 4 * H}, in.dtype);
  check(cells_, "cells", {D, T, B, H}, in.dtype);
  STD_TORCH_CHECK(needs.size() == 3 + in.weights.size(), "lstm_backward: needs must hold a flag for x, h0, c0 and each weight");
  const Tensor dy = laid_out(dy_, true), dh_n = laid_out(dh_n_), dc_n = laid_out(dc_n_), y = laid_out(y_),
               gates = laid_out(gates_), cells = laid_out(cells_);

  const bool state = needs[1] || needs[2];
  Tensor dx = needs[0] ? empty({T, B, I}, in.dtype) : empty({0}, in.dtype);
  Tensor dh0 = state ? empty({D, B, H}, in.dtype) : empty({0}, in.dtype);
  Tensor dc0 = state ? empty({D, B, H}, in.dtype) : empty({0}, in.dtype);
  std::vector<Tensor> dweights;
  for (size_t k = 0; k < in.weights.size(); ++k) {
    const int64_t kind = int64_t(k) % in.per_direction;
    dweights.push_back(!needs[3 + k] ? empty({0}, in.dtype)
                       : kind == 0   ? empty({4 * H, I}, in.dtype)
                       : kind == 1   ? empty({4 * H, H}, in.dtype)
                                     : empty({4 * H}, in.dtype));
  }

  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    const auto in_data = [](const Tensor& t) { return static_cast<const Scalar*>(t.const_data_ptr()); };
    const auto data = [](const Tensor& t) { return t.numel() ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr; };
    LstmBackward<Scalar> call{};
    in.fill(call);
    call.dy = in_data(dy), call.dy_t = dy.stride(0), call.dy_b = dy.stride(1);
    call.dh_n = in_data(dh_n), call.dc_n = in_data(dc_n);
    call.y = in_data(y), call.gates = in_data(gates), call.cells = in_data(cells);
    call.dx = data(dx), call.dh0 = data(dh0), call.dc0 = data(dc0);
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* dw = dweights.data() + d * in.per_direction;
      call.dweights[d] = {data(dw[0]), data(dw[1]), nullptr, nullptr};
      if (in.per_direction == 4) call.dweights[d].b_ih = data(dw[2]), call.dweights[d].b_hh = data(dw[3]);
    }
    kernel(call, threads());
  };
  if (in.dtype == ScalarType::Float)
    run(0.0f, kernels().backward_float);
  else
    run(0.0, kernels().backward_double);
  return {dx, dh0, dc0, dweights};
}

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY(fastseq_native, m) {
  m.def(
      "lstm(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, bool save_tape)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights,"
      " bool bidirectional, Tensor y, Tensor gates, Tensor cells, bool[] needs)"
      " -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("lstm", TORCH_BOX(&fastseq::lstm));
  m.impl("lstm_backward", TORCH_BOX(&fastseq::lstm_backward));
}
