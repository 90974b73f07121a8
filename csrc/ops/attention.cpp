// fastseq_native::attention and attention_backward: the contract of fastseq/ops/attention.py for CPU tensors. Half
// precision is how query, key, value, out and their gradients are stored; everything else is float32 then.
#include "cpu/attention.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(AttentionKernels, attention_kernels, kernels)

namespace {

constexpr const char* kName = "attention";

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct AttentionInputs {
  Tensor q, k, v;
  MaybeTensor mask, padding, slopes, ends_q, ends_k, seed;
  double scale, softcap, dropout_p;
  int64_t left, right;
  bool bottom_right;
  int64_t N, H, Hk, L, S, E, Ev;
  ScalarType given, dtype;  // of query, and what is computed in

  void prepare() {
    given = q.scalar_type(), dtype = computed_in(q, kName, "query");
    check(q.dim() == 4, kName, "query", "[N, H, L, E]");
    check(k.dim() == 4, kName, "key", "[N, Hk, S, E]");
    check(v.dim() == 4, kName, "value", "[N, Hk, S, Ev]");
    N = q.size(0), H = q.size(1), L = q.size(2), E = q.size(3), Hk = k.size(1), S = k.size(2), Ev = v.size(3);
    check(E > 0 && Ev > 0, kName, "the width of a head", "positive");
    check(Hk > 0 ? H % Hk == 0 : H == 0, kName, "key's heads", "a divisor of query's");
    check(q, kName, "query", {N, H, L, E}, given);
    check(k, kName, "key", {N, Hk, S, E}, given);
    check(v, kName, "value", {N, Hk, S, Ev}, given);
    q = laid_out(q, true), k = laid_out(k, true), v = laid_out(v, true);
    if (mask) {
      const ScalarType type = mask->scalar_type();
      check(mask->is_cpu() && (type == dtype || type == given || type == ScalarType::Bool), kName, "mask",
            "on the CPU, and bool, of query's dtype, or float32 beside half precision");
      const int64_t sizes[] = {N, H, L, S};
      bool fits = mask->dim() == 4;
      for (int i = 0; fits && i < 4; ++i) fits = mask->size(i) == sizes[i] || mask->size(i) == 1;
      check(fits, kName, "mask", "broadcastable to [N, H, L, S]");
      if (type != dtype && type != ScalarType::Bool) mask = converted(*mask, dtype);
      if (mask->size(3) > 1 && mask->stride(3) > 1) *mask = torch::stable::contiguous(*mask);
    }
    if (padding) check(*padding, kName, "key_padding", {N, S}, ScalarType::Bool), *padding = laid_out(*padding);
    if (slopes) {
      if (slopes->scalar_type() == given && given != dtype) slopes = converted(*slopes, dtype);
      check(*slopes, kName, "slopes", {H}, dtype), *slopes = laid_out(*slopes);
    }
    check(bool(ends_q) == bool(ends_k), kName, "cu_seqlens_q and cu_seqlens_k", "given together");
    if (ends_q) {
      check(N == 1 && !mask && !padding, kName, "cu_seqlens_q", "left out with a batch, a mask or key_padding");
      check(ends_q->dim() == 1 && ends_q->size(0) > 0, kName, "cu_seqlens_q", "[sequences + 1]");
      read_ends(*ends_q, "cu_seqlens_q", L), read_ends(*ends_k, "cu_seqlens_k", S);
    }
    check_dropout(kName, seed, dropout_p);
  }

  static Heads heads(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
  }

  template <typename Scalar>
  void fill(AttentionShape<Scalar>& shape) const {
    shape.N = N, shape.H = H, shape.Hk = Hk, shape.L = L, shape.S = S, shape.E = E, shape.Ev = Ev;
    shape.stored = stored_as(given);
    shape.q = heads(q), shape.k = heads(k), shape.v = heads(v);
    if (mask) {
      if (mask->scalar_type() == ScalarType::Bool)
        shape.allowed = static_cast<const bool*>(mask->const_data_ptr());
      else
        shape.bias = static_cast<const Scalar*>(mask->const_data_ptr());
      int64_t* strides[] = {&shape.m_n, &shape.m_h, &shape.m_l, &shape.m_s};
      for (int i = 0; i < 4; ++i) *strides[i] = mask->size(i) > 1 ? mask->stride(i) : 0;
    }
    if (padding) shape.padding = static_cast<const bool*>(padding->const_data_ptr());
    if (slopes) shape.slopes = static_cast<const Scalar*>(slopes->const_data_ptr());
    shape.sequences = N;
    if (ends_q) {
      shape.sequences = ends_q->size(0) - 1;
      shape.ends_q = static_cast<const int64_t*>(ends_q->const_data_ptr());
      shape.ends_k = static_cast<const int64_t*>(ends_k->const_data_ptr());
    }
    shape.dropout = dropout_of<Scalar>(seed, dropout_p);
    shape.scale = Scalar(scale), shape.softcap = Scalar(softcap);
    shape.left = left, shape.right = right, shape.bottom_right = bottom_right;
  }

 private:
  void read_ends(Tensor& ends, const char* name, int64_t rows) const {
    check(ends, kName, name, {ends_q->size(0)}, ScalarType::Long);
    ends = laid_out(ends);
    const auto* at = static_cast<const int64_t*>(ends.const_data_ptr());
    bool rising = at[0] == 0 && at[ends.size(0) - 1] == rows;
    for (int64_t i = 1; i < ends.size(0); ++i) rising = rising && at[i - 1] <= at[i];
    check(rising, kName, name, "rising from 0 to the number of rows");
  }
};

// Whether heads come after the places in memory.
bool are_places_first(const Tensor& t) { return t.stride(1) < t.stride(2); }

// A new tensor with the sizes of `like`, but for the width, and this order in memory.
Tensor empty_heads(const Tensor& like, bool places_first, int64_t width, ScalarType dtype) {
  const int64_t N = like.size(0), H = like.size(1), L = like.size(2);
  const int64_t strides[] = {H * L * width, places_first ? width : L * width, places_first ? H * width : width, 1};
  return empty_strided({N, H, L, width}, strides, dtype);
}

std::tuple<Tensor, Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, MaybeTensor mask,
                                             MaybeTensor key_padding, MaybeTensor slopes, MaybeTensor cu_seqlens_q,
                                             MaybeTensor cu_seqlens_k, MaybeTensor seed, double scale, double softcap,
                                             double dropout_p, int64_t left, int64_t right, bool bottom_right,
                                             int64_t return_weights) {
  AttentionInputs in{query, key,   value,   mask,      key_padding, slopes, cu_seqlens_q, cu_seqlens_k,
                     seed,  scale, softcap, dropout_p, left,        right,  bottom_right};
  in.prepare();
  const auto [N, H, L, S] = std::tuple(in.N, in.H, in.L, in.S);
  check(return_weights >= 0 && return_weights <= 2 && !(return_weights && cu_seqlens_q), kName, "return_weights",
        "0, 1 or 2, and 0 with cu_seqlens_q");
  const auto wanted = Weights(return_weights);
  Tensor out = empty_heads(in.q, are_places_first(query), in.Ev, in.given), lse = empty({N, H, L}, in.dtype);
  Tensor weights = wanted == Weights::kNone       ? empty({0}, in.dtype)
                   : wanted == Weights::kEachHead ? empty({N, H, L, S}, in.dtype)
                                                  : empty({N, L, S}, in.dtype);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    AttentionForward<Scalar> call{};
    in.fill(call);
    call.out = AttentionInputs::heads(out);
    call.lse = static_cast<Scalar*>(lse.mutable_data_ptr());
    call.weights = weights.numel() ? static_cast<Scalar*>(weights.mutable_data_ptr()) : nullptr;
    call.wanted = wanted;
    if (lse.numel()) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {out, lse, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    MaybeTensor dout, MaybeTensor dlse, Tensor query, Tensor key, Tensor value, MaybeTensor mask,
    MaybeTensor key_padding, MaybeTensor slopes, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor seed,
    double scale, double softcap, double dropout_p, int64_t left, int64_t right, bool bottom_right, Tensor out,
    Tensor lse, std::vector<bool> needs) {
  AttentionInputs in{query, key,   value,   mask,      key_padding, slopes, cu_seqlens_q, cu_seqlens_k,
                     seed,  scale, softcap, dropout_p, left,        right,  bottom_right};
  in.prepare();
  const auto [N, H, L] = std::tuple(in.N, in.H, in.L);
  check(needs.size() == 4, kName, "needs", "a flag for query, key, value and mask");
  check(!needs[3] || (mask && mask->scalar_type() != ScalarType::Bool), kName, "mask",
        "added, if its gradient is needed");
  check(out, kName, "out", {N, H, L, in.Ev}, in.given);
  check(lse, kName, "lse", {N, H, L}, in.dtype);
  out = laid_out(out, true), lse = laid_out(lse);
  const auto zeros = [&](Tensor t) {
    std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
    return t;
  };
  if (dout)
    check(*dout, kName, "dout", {N, H, L, in.Ev}, in.given), *dout = laid_out(*dout, true);
  else
    dout = zeros(empty_heads(out, are_places_first(out), in.Ev, in.given));
  if (dlse) check(*dlse, kName, "dlse", {N, H, L}, in.dtype), *dlse = laid_out(*dlse);
  const auto wanted = [&](bool need, const Tensor& t) {
    return need ? empty_heads(t, are_places_first(t), t.size(3), in.given) : empty({0}, in.given);
  };
  Tensor dq = wanted(needs[0], query), dk = wanted(needs[1], key), dv = wanted(needs[2], value);
  Tensor dmask = empty({0}, in.given);
  if (needs[3]) dmask = zeros(empty({mask->size(0), mask->size(1), mask->size(2), mask->size(3)}, in.dtype));
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    AttentionBackward<Scalar> call{};
    in.fill(call);
    call.dout = AttentionInputs::heads(*dout), call.out = AttentionInputs::heads(out);
    call.lse = static_cast<const Scalar*>(lse.const_data_ptr());
    if (dlse) call.dlse = static_cast<const Scalar*>(dlse->const_data_ptr());
    if (dq.numel()) call.dq = AttentionInputs::heads(dq);
    if (dk.numel()) call.dk = AttentionInputs::heads(dk);
    if (dv.numel()) call.dv = AttentionInputs::heads(dv);
    if (dmask.numel()) {
      call.dbias = static_cast<Scalar*>(dmask.mutable_data_ptr());
      int64_t* strides[] = {&call.d_n, &call.d_h, &call.d_l, &call.d_s};
      for (int i = 0; i < 4; ++i) *strides[i] = dmask.size(i) > 1 ? dmask.stride(i) : 0;
    }
    if (N * H > 0) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  if (needs[3] && mask->scalar_type() != in.dtype) dmask = converted(dmask, mask->scalar_type());
  return {dq, dk, dv, dmask};
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_ATTENTION_ARGUMENTS                                                                                  \
  "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_padding, Tensor? slopes, Tensor? cu_seqlens_q," \
  " Tensor? cu_seqlens_k, Tensor? seed, float scale, float softcap, float dropout_p, int left, int right,"           \
  " bool bottom_right"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("attention(" FASTSEQ_ATTENTION_ARGUMENTS ", int return_weights) -> (Tensor, Tensor, Tensor)");
  m.def("attention_backward(Tensor? dout, Tensor? dlse, " FASTSEQ_ATTENTION_ARGUMENTS
        ", Tensor out, Tensor lse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastseq::attention));
  m.impl("attention_backward", TORCH_BOX(&fastseq::attention_backward));
}
