// fastseq_native::cross_entropy and cross_entropy_backward: the contract of fastseq/ops/cross_entropy.py for CPU
// tensors. Half precision is how logits and their gradient are stored; everything else is float32 then.
#include "cpu/cross_entropy.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(CrossEntropyKernels, cross_entropy_kernels, kernels)

namespace {

constexpr const char* kName = "cross_entropy";

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct CrossEntropyInputs {
  Tensor logits, target;
  MaybeTensor weight;
  double label_smoothing;
  int64_t ignore_index;
  int64_t rows, V;
  ScalarType given, dtype;  // of logits, and what is computed in

  void prepare() {
    given = logits.scalar_type(), dtype = computed_in(logits, kName, "logits");
    check(logits.dim() == 2 && logits.size(1) > 0, kName, "logits", "[rows, V] with at least one class");
    rows = logits.size(0), V = logits.size(1);
    check(logits, kName, "logits", {rows, V}, given), logits = laid_out(logits, true);
    check(target, kName, "target", {rows}, ScalarType::Long), target = laid_out(target);
    if (weight) check(*weight, kName, "weight", {V}, dtype), *weight = laid_out(*weight);
    check(label_smoothing >= 0 && label_smoothing <= 1, kName, "label_smoothing", "between 0 and 1");
    const int64_t* at = static_cast<const int64_t*>(target.const_data_ptr());
    bool sound = true;
    for (int64_t i = 0; i < rows; ++i) sound = sound && ((at[i] >= 0 && at[i] < V) || at[i] == ignore_index);
    check(sound, kName, "target", "within [0, V) or ignore_index");
  }

  template <typename Scalar>
  void fill(CrossEntropyShape<Scalar>& shape) const {
    shape.rows = rows, shape.V = V;
    shape.stored = stored_as(given);
    shape.logits = logits.const_data_ptr(), shape.stride = logits.stride(0);
    shape.target = static_cast<const int64_t*>(target.const_data_ptr());
    if (weight) shape.weight = static_cast<const Scalar*>(weight->const_data_ptr());
    shape.label_smoothing = label_smoothing, shape.ignore_index = ignore_index;
  }
};

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, MaybeTensor weight, double label_smoothing,
                                         int64_t ignore_index) {
  CrossEntropyInputs in{logits, target, weight, label_smoothing, ignore_index};
  in.prepare();
  Tensor loss = empty({in.rows}, in.dtype), lse = empty({in.rows}, in.dtype);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    CrossEntropyForward<Scalar> call{};
    in.fill(call);
    call.loss = static_cast<Scalar*>(loss.mutable_data_ptr());
    call.lse = static_cast<Scalar*>(lse.mutable_data_ptr());
    if (in.rows) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {loss, lse};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, MaybeTensor weight, Tensor lse,
                              double label_smoothing, int64_t ignore_index) {
  CrossEntropyInputs in{logits, target, weight, label_smoothing, ignore_index};
  in.prepare();
  check(dloss, kName, "dloss", {in.rows}, in.dtype), dloss = laid_out(dloss);
  check(lse, kName, "lse", {in.rows}, in.dtype), lse = laid_out(lse);
  Tensor dlogits = empty({in.rows, in.V}, in.given);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    CrossEntropyBackward<Scalar> call{};
    in.fill(call);
    call.dloss = static_cast<const Scalar*>(dloss.const_data_ptr());
    call.lse = static_cast<const Scalar*>(lse.const_data_ptr());
    call.dlogits = dlogits.mutable_data_ptr();
    if (in.rows) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  return dlogits;
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_CROSS_ENTROPY_OPTIONS "float label_smoothing, int ignore_index"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? weight, " FASTSEQ_CROSS_ENTROPY_OPTIONS
        ") -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor "
      "lse, " FASTSEQ_CROSS_ENTROPY_OPTIONS ") -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&fastseq::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastseq::cross_entropy_backward));
}
