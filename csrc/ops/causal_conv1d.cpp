// fastseq_native::causal_conv1d and causal_conv1d_backward: the contract of fastseq/ops/causal_conv1d.py for CPU
// tensors. Half precision is how sequences are stored; everything is computed in float32 then.
#include "cpu/causal_conv1d.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(CausalConvKernels, causal_conv1d_kernels, kernels)

namespace {

constexpr const char* kName = "causal_conv1d";

Sequences sequences_of(const Tensor& t) {
  if (!t.numel()) return {};
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct CausalConvInputs {
  Tensor x, weight;
  MaybeTensor bias, state;
  bool silu;
  int64_t B, C, T, K;
  bool like_by_time;        // results lie in memory as [B, T, C]
  bool by_time;             // channels follow each other, as they do in a single time, too
  ScalarType given, dtype;  // of x, and what is computed in
  ScalarType weight_type, bias_type;

  void prepare() {
    given = x.scalar_type(), dtype = computed_in(x, kName, "x");
    check(x.dim() == 3, kName, "x", "[B, C, T]");
    B = x.size(0), C = x.size(1), T = x.size(2);
    check(x, kName, "x", {B, C, T}, given);
    like_by_time = x.stride(1) == 1 && x.stride(2) != 1;
    by_time = like_by_time || T == 1;
    x = as_x(x);
    check(weight.dim() == 2 && weight.size(1) > 0, kName, "weight", "[C, K] with K > 0");
    K = weight.size(1);
    weight_type = weight.scalar_type();
    check(weight_type == given || weight_type == dtype, kName, "weight",
          "of x's dtype, or float32 beside half precision");
    check(weight, kName, "weight", {C, K}, weight_type);
    weight = weight_type == dtype ? laid_out(weight) : converted(weight, dtype);
    bias_type = bias ? bias->scalar_type() : given;
    prepare_columns(bias, kName, "bias", C, given, dtype);
    if (state) check(*state, kName, "state", {B, C, K - 1}, given), *state = laid_out(*state);
  }

  // The same values with channels or times next to each other, as the kernels go through them.
  Tensor as_x(const Tensor& t) const {
    if (by_time ? t.stride(1) == 1 || C == 1 : t.stride(2) == 1) return t;
    Tensor made = empty_like_x();
    return torch::stable::copy_(made, t);
  }

  Tensor empty_like_x() const {
    const int64_t channels = std::max<int64_t>(1, C), times = std::max<int64_t>(1, T);
    const int64_t sizes[] = {B, C, T}, by_time_strides[] = {times * channels, 1, channels};
    return like_by_time ? empty_strided({sizes, 3}, by_time_strides, given) : empty({B, C, T}, given);
  }

  template <typename Scalar>
  void fill(CausalConvShape<Scalar>& shape) const {
    shape.B = B, shape.C = C, shape.times = T, shape.K = K;
    shape.by_time = by_time, shape.silu = silu;
    shape.stored = stored_as(given);
    shape.x = sequences_of(x);
    shape.weight = static_cast<const Scalar*>(weight.const_data_ptr());
    if (bias) shape.bias = static_cast<const Scalar*>(bias->const_data_ptr());
    if (state) shape.state = state->const_data_ptr();
  }
};

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, bool silu) {
  CausalConvInputs in{x, weight, bias, state, silu};
  in.prepare();
  Tensor y = in.empty_like_x(), final = empty({in.B, in.C, in.K - 1}, in.given);
  const auto run = [&](auto zero, auto kernel) {
    CausalConvForward<decltype(zero)> call{};
    in.fill(call);
    call.y = sequences_of(y), call.final = final.mutable_data_ptr();
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {y, final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor dy, MaybeTensor dfinal, Tensor x,
                                                                  Tensor weight, MaybeTensor bias, MaybeTensor state,
                                                                  bool silu, std::vector<bool> needs) {
  CausalConvInputs in{x, weight, bias, state, silu};
  in.prepare();
  check(dy, kName, "dy", {in.B, in.C, in.T}, in.given);
  dy = in.as_x(dy);
  if (dfinal) check(*dfinal, kName, "dfinal", {in.B, in.C, in.K - 1}, in.given), *dfinal = laid_out(*dfinal);
  check(needs.size() == 4, kName, "needs", "a flag for x, weight, bias and state");
  check((!needs[2] || bias) && (!needs[3] || state), kName, "needs", "false for what is not given");
  const auto wanted = [&](bool need, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return need ? empty(sizes, dtype) : empty({0}, dtype);
  };
  Tensor dx = needs[0] ? in.empty_like_x() : empty({0}, in.given), dweight = wanted(needs[1], {in.C, in.K}, in.dtype),
         dbias = wanted(needs[2], {in.C}, in.dtype), dstate = wanted(needs[3], {in.B, in.C, in.K - 1}, in.given);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    CausalConvBackward<Scalar> call{};
    in.fill(call);
    call.dy = sequences_of(dy), call.dx = sequences_of(dx);
    if (dfinal) call.dfinal = dfinal->const_data_ptr();
    if (needs[3]) call.dstate = dstate.mutable_data_ptr();
    if (needs[1]) call.dweight = static_cast<Scalar*>(dweight.mutable_data_ptr());
    if (needs[2]) call.dbias = static_cast<Scalar*>(dbias.mutable_data_ptr());
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  if (in.weight_type != in.dtype) dweight = converted(dweight, in.weight_type);
  if (in.bias_type != in.dtype) dbias = converted(dbias, in.bias_type);
  return {dx, dweight, dbias, dstate};
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_CAUSAL_CONV1D_ARGUMENTS "Tensor x, Tensor weight, Tensor? bias, Tensor? state, bool silu"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("causal_conv1d(" FASTSEQ_CAUSAL_CONV1D_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("causal_conv1d_backward(Tensor dy, Tensor? dfinal, " FASTSEQ_CAUSAL_CONV1D_ARGUMENTS
        ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&fastseq::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&fastseq::causal_conv1d_backward));
}
