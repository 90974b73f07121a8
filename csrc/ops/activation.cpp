// fastseq_native::activation and activation_backward: the contract of fastseq/ops/activation.py for CPU tensors. Half
// precision is how matrices are stored; everything is computed in float32 then.
#include "cpu/activation.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(ActivationKernels, activation_kernels, kernels)

namespace {

constexpr const char* kName = "activation";

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct ActivationInputs {
  Tensor x;
  MaybeTensor up, bias, seed;
  int64_t kind;
  double dropout_p;
  int64_t rows, F;
  ScalarType given, dtype;  // of x, and what is computed in
  ScalarType bias_type;

  void prepare() {
    given = x.scalar_type(), dtype = computed_in(x, kName, "x");
    check(x.dim() == 2, kName, "x", "[rows, F]");
    rows = x.size(0), F = x.size(1);
    check(x, kName, "x", {rows, F}, given), x = laid_out(x, true);
    if (up) check(*up, kName, "up", {rows, F}, given), *up = laid_out(*up, true);
    if (bias) bias_type = bias->scalar_type();
    prepare_columns(bias, kName, "bias", F, given, dtype);
    check(kind >= 0 && kind <= int64_t(Activation::kSilu), kName, "kind", "0 to 4");
    check_dropout(kName, seed, dropout_p);
  }

  template <typename Scalar>
  void fill(ActivationShape<Scalar>& shape) const {
    shape.rows = rows, shape.F = F;
    shape.kind = Activation(kind);
    shape.stored = stored_as(given);
    shape.x = rows_of(x), shape.up = rows_of(up);
    if (bias) shape.bias = static_cast<const Scalar*>(bias->const_data_ptr());
    shape.dropout = dropout_of<Scalar>(seed, dropout_p);
  }
};

Tensor activation(Tensor x, MaybeTensor up, MaybeTensor bias, MaybeTensor seed, int64_t kind, double dropout_p) {
  ActivationInputs in{x, up, bias, seed, kind, dropout_p};
  in.prepare();
  Tensor y = empty({in.rows, in.F}, in.given);
  const auto run = [&](auto zero, auto kernel) {
    ActivationForward<decltype(zero)> call{};
    in.fill(call);
    call.y = rows_of(y);
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> activation_backward(Tensor dy, Tensor x, MaybeTensor up, MaybeTensor bias,
                                                       MaybeTensor seed, int64_t kind, double dropout_p,
                                                       std::vector<bool> needs) {
  ActivationInputs in{x, up, bias, seed, kind, dropout_p};
  in.prepare();
  check(dy, kName, "dy", {in.rows, in.F}, in.given);
  dy = laid_out(dy, true);
  check(needs.size() == 3, kName, "needs", "a flag for x, up and bias");
  check((!needs[1] || up) && (!needs[2] || bias), kName, "needs", "false for what is not given");
  const auto wanted = [&](bool need) { return need ? empty({in.rows, in.F}, in.given) : empty({0}, in.given); };
  Tensor dx = wanted(needs[0]), dup = wanted(needs[1]),
         dbias = needs[2] ? empty({in.F}, in.dtype) : empty({0}, in.given);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    ActivationBackward<Scalar> call{};
    in.fill(call);
    call.dy = rows_of(dy), call.dx = rows_of(dx), call.dup = rows_of(dup);
    if (needs[2]) call.dbias = static_cast<Scalar*>(dbias.mutable_data_ptr());
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  if (needs[2] && in.bias_type != in.dtype) dbias = converted(dbias, in.bias_type);
  return {dx, dup, dbias};
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_ACTIVATION_ARGUMENTS "Tensor x, Tensor? up, Tensor? bias, Tensor? seed, int kind, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("activation(" FASTSEQ_ACTIVATION_ARGUMENTS ") -> Tensor");
  m.def("activation_backward(Tensor dy, " FASTSEQ_ACTIVATION_ARGUMENTS ", bool[] needs) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("activation", TORCH_BOX(&fastseq::activation));
  m.impl("activation_backward", TORCH_BOX(&fastseq::activation_backward));
}
