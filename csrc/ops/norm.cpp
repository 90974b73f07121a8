// fastseq_native::norm and norm_backward: the contract of fastseq/ops/norm.py for CPU tensors. Half precision is how x,
// residual, y, total and their gradients are stored; everything else is float32 then.
#include "cpu/norm.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(NormKernels, norm_kernels, kernels)

namespace {

constexpr const char* kName = "norm";

// What both directions are given, in the layout that the kernels read, alive for as long as they run.
struct NormInputs {
  Tensor x;  // or in its place what backward reads, total
  MaybeTensor weight, seed;
  int64_t kind;
  double dropout_p;
  int64_t rows, E;
  ScalarType given, dtype;  // of x, and what is computed in
  ScalarType weights;       // of weight as it was given, of x if there is none

  void prepare(const char* name) {
    given = x.scalar_type(), dtype = computed_in(x, kName, name);
    check(x.dim() == 2 && x.size(1) > 0, kName, name, "[rows, E] with at least one column");
    rows = x.size(0), E = x.size(1);
    check_rows(x, name);
    check(kind >= 0 && kind <= 2, kName, "kind", "0, 1 or 2");
    check_dropout(kName, seed, dropout_p);
    weights = weight ? weight->scalar_type() : given;
    prepare_columns(weight, kName, "weight", E, given, dtype);
  }

  // [rows, E] like x, whose rows may have any stride.
  void check_rows(Tensor& t, const char* name) const {
    check(t, kName, name, {rows, E}, given);
    t = laid_out(t, true);
  }
  void check_rows(MaybeTensor& t, const char* name) const {
    if (t) check_rows(*t, name);
  }

  template <typename Scalar>
  void fill(NormShape<Scalar>& shape) const {
    shape.rows = rows, shape.E = E, shape.kind = NormKind(kind), shape.stored = stored_as(given);
    shape.dropout = dropout_of<Scalar>(seed, dropout_p);
    shape.weight = columns_of<Scalar>(weight);
  }

  template <typename Scalar>
  static const Scalar* columns_of(const MaybeTensor& t) {
    return t ? static_cast<const Scalar*>(t->const_data_ptr()) : nullptr;
  }
};

template <typename Scalar>
Scalar* data_of(const Tensor& t) {
  return t.numel() ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm(Tensor x, MaybeTensor residual, MaybeTensor weight, MaybeTensor bias,
                                                MaybeTensor seed, int64_t kind, double eps, double dropout_p,
                                                bool save_total) {
  NormInputs in{x, weight, seed, kind, dropout_p};
  in.prepare("x");
  in.check_rows(residual, "residual");
  prepare_columns(bias, kName, "bias", in.E, in.given, in.dtype);
  const auto [rows, E] = std::tuple(in.rows, in.E);
  const bool normalised = kind != int64_t(NormKind::kNone), totalled = save_total && (residual || dropout_p > 0);
  const auto there = [&](bool wanted) { return wanted ? empty({rows}, in.dtype) : empty({0}, in.dtype); };
  Tensor y = normalised ? empty({rows, E}, in.given) : empty({0}, in.given);
  Tensor total = totalled ? empty({rows, E}, in.given) : empty({0}, in.given);
  Tensor mean = there(kind == int64_t(NormKind::kLayer)), rstd = there(normalised);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    NormForward<Scalar> call{};
    in.fill(call);
    call.x = rows_of(in.x), call.residual = rows_of(residual);
    call.bias = NormInputs::columns_of<Scalar>(bias), call.eps = Scalar(eps);
    call.y = rows_of(y), call.total = rows_of(total);
    call.mean = data_of<Scalar>(mean), call.rstd = data_of<Scalar>(rstd);
    if (rows > 0 && (normalised || totalled)) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(MaybeTensor dy, MaybeTensor dtotal, Tensor total,
                                                         MaybeTensor weight, MaybeTensor seed, Tensor mean, Tensor rstd,
                                                         int64_t kind, double dropout_p, std::vector<bool> needs) {
  NormInputs in{total, weight, seed, kind, dropout_p};
  in.prepare("total");
  in.check_rows(dy, "dy"), in.check_rows(dtotal, "dtotal");
  const auto [rows, E] = std::tuple(in.rows, in.E);
  check(needs.size() == 4, kName, "needs", "a flag for x, residual, weight and bias");
  check(!dy || kind != int64_t(NormKind::kNone), kName, "dy", "left out without a kind");
  if (!dy) in.kind = int64_t(NormKind::kNone);  // what is left is to hand on dtotal
  if (in.kind != int64_t(NormKind::kNone)) check(rstd, kName, "rstd", {rows}, in.dtype), rstd = laid_out(rstd);
  if (in.kind == int64_t(NormKind::kLayer)) check(mean, kName, "mean", {rows}, in.dtype), mean = laid_out(mean);
  const auto like_rows = [&](bool need) { return need ? empty({rows, E}, in.given) : empty({0}, in.given); };
  const auto like_columns = [&](bool need) { return need ? empty({E}, in.dtype) : empty({0}, in.dtype); };
  Tensor dx = like_rows(needs[0]), dresidual = like_rows(needs[1]);
  Tensor dweight = like_columns(needs[2]), dbias = like_columns(needs[3]);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    NormBackward<Scalar> call{};
    in.fill(call);
    call.dy = rows_of(dy), call.dtotal = rows_of(dtotal);
    call.total = rows_of(in.x);
    call.mean = data_of<const Scalar>(mean), call.rstd = data_of<const Scalar>(rstd);
    call.dx = rows_of(dx), call.dresidual = rows_of(dresidual);
    call.dweight = data_of<Scalar>(dweight), call.dbias = data_of<Scalar>(dbias);
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  if (in.weights != in.dtype) dweight = converted(dweight, in.weights), dbias = converted(dbias, in.weights);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int kind, float eps,"
      " float dropout_p, bool save_total) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor? dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor? seed, Tensor mean, Tensor rstd,"
      " int kind, float dropout_p, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("norm", TORCH_BOX(&fastseq::norm));
  m.impl("norm_backward", TORCH_BOX(&fastseq::norm_backward));
}
