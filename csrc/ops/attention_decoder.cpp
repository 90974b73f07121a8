// fastseq_native::attention_decoder and attention_decoder_backward: the contract of
// fastseq/reference/attention_decoder.py for CPU tensors in float32 and float64.
#include "cpu/attention_decoder.h"

#include <numeric>
#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(AttentionDecoderKernels, attention_decoder_kernels, kernels)

namespace {

constexpr const char* kName = "attention_decoder";

// How many gates each cell has, and how many of them are on its tape.
struct CellShape {
  int64_t gates, tape;
};
constexpr CellShape kCells[] = {{4, 4}, {3, 4}, {1, 0}};

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct AttentionDecoderInputs {
  Tensor gates, h0;
  MaybeTensor c0, feed0;
  Tensor keys, values;
  MaybeTensor absent, lengths;
  Tensor w_feed, w_hh;
  MaybeTensor b_hh, w_query, v, w_out;
  int64_t cell;
  int64_t T, B, S, H, A, M, F, G;  // G = gates of the cell * H
  bool has_cell;
  ScalarType dtype;
  std::vector<int64_t> order, running;  // empty where all rows run at all steps

  void prepare() {
    dtype = gates.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, kName, "gates", "float32 or float64");
    check(cell >= 0 && cell <= int64_t(DecoderCell::kRnnTanh), kName, "cell", "0 to 2");
    check(gates.dim() == 3, kName, "gates", "[T, B, G*H]");
    check(h0.dim() == 2, kName, "h0", "[B, H]");
    check(keys.dim() == 3, kName, "keys", "[B, S, A]");
    check(values.dim() == 3, kName, "values", "[B, S, M]");
    has_cell = cell == int64_t(DecoderCell::kLstm);
    T = gates.size(0), B = gates.size(1), H = h0.size(1), G = kCells[cell].gates * H;
    S = keys.size(1), A = keys.size(2), M = values.size(2), F = w_out ? w_out->size(0) : M;
    check(T > 0 && S > 0 && H > 0 && A > 0 && M > 0 && F > 0, kName, "each of T, S, H, A, M and F", "positive");
    check(gates, kName, "gates", {T, B, G}, dtype), gates = laid_out(gates, true);
    rows(h0, "h0", {B, H});
    check(bool(c0) == has_cell, kName, "c0", "given for an LSTM, and for no other cell");
    check(bool(feed0) == bool(w_out), kName, "feed0", "given with w_out, and only then");
    check(bool(w_query) == bool(v), kName, "w_query and v", "given both or neither");
    check(w_query || A == H, kName, "keys", "as wide as the state where there is no w_query");
    rows(c0, "c0", {B, H}), rows(feed0, "feed0", {B, F});
    rows(keys, "keys", {B, S, A}), rows(values, "values", {B, S, M});
    check(w_feed, kName, "w_feed", {G, F}, dtype), w_feed = laid_out(w_feed, true);
    rows(w_hh, "w_hh", {G, H}), rows(b_hh, "b_hh", {G});
    rows(w_query, "w_query", {A, H}), rows(v, "v", {A}), rows(w_out, "w_out", {F, M + H});
    if (absent) {
      check(*absent, kName, "absent", {B, S}, ScalarType::Bool);
      *absent = laid_out(*absent);
    }
    if (lengths) read_lengths();
  }

  template <typename Scalar>
  static const Scalar* data(const MaybeTensor& t) {
    return t ? static_cast<const Scalar*>(t->const_data_ptr()) : nullptr;
  }

  template <typename Scalar>
  void fill(AttentionDecoderShape<Scalar>& shape) const {
    shape.T_ = T, shape.B = B, shape.S = S, shape.H = H, shape.A = A, shape.M = M, shape.F = F;
    shape.cell = DecoderCell(cell);
    shape.order = order.empty() ? nullptr : order.data();
    shape.running = running.empty() ? nullptr : running.data();
    shape.h0 = data<Scalar>(h0), shape.c0 = data<Scalar>(c0), shape.feed0 = data<Scalar>(feed0);
    shape.keys = data<Scalar>(keys), shape.values = data<Scalar>(values), shape.absent = data<bool>(absent);
    shape.w_feed = data<Scalar>(w_feed), shape.w_feed_row = w_feed.stride(0);
    shape.w_hh = data<Scalar>(w_hh), shape.b_hh = data<Scalar>(b_hh);
    shape.w_query = data<Scalar>(w_query), shape.v = data<Scalar>(v), shape.w_out = data<Scalar>(w_out);
  }

  void rows(Tensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    check(t, kName, name, sizes, dtype);
    t = laid_out(t);
  }
  void rows(MaybeTensor& t, const char* name, std::initializer_list<int64_t> sizes) const {
    if (t) rows(*t, name, sizes);
  }

 private:
  void read_lengths() {
    check(*lengths, kName, "lengths", {B}, ScalarType::Long);
    const Tensor ordered = laid_out(*lengths);
    const auto* length = static_cast<const int64_t*>(ordered.const_data_ptr());
    for (int64_t b = 0; b < B; ++b)
      check(length[b] >= 0 && length[b] <= T, kName, "each of lengths", "between 0 and T");
    if (std::all_of(length, length + B, [&](int64_t each) { return each == T; })) return;
    order.resize(B), running.resize(T);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    int64_t count = B;
    for (int64_t t = 0; t < T; ++t) {
      while (count > 0 && length[order[count - 1]] <= t) --count;
      running[t] = count;
    }
  }
};

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Ten = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Scalar>
Scalar* data_of(const Tensor& t) {
  return t.numel() ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr;
}

Eight attention_decoder(Tensor gates, Tensor h0, MaybeTensor c0, MaybeTensor feed0, Tensor keys, Tensor values,
                        MaybeTensor absent, MaybeTensor lengths, Tensor w_feed, Tensor w_hh, MaybeTensor b_hh,
                        MaybeTensor w_query, MaybeTensor v, MaybeTensor w_out, int64_t cell, bool save_tape) {
  AttentionDecoderInputs in{gates,  h0,   c0,   feed0,   keys, values, absent, lengths,
                            w_feed, w_hh, b_hh, w_query, v,    w_out,  cell};
  in.prepare();
  const auto made = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? empty(sizes, in.dtype) : empty({0}, in.dtype);
  };
  const int64_t T = in.T, B = in.B, H = in.H, tape = kCells[cell].tape;
  Tensor h = made(true, {T, B, H}), feeds = made(true, {T, B, in.F}), weights = made(true, {T, B, in.S});
  Tensor h_n = made(true, {B, H}), c_n = made(in.has_cell, {B, H});
  Tensor saved_gates = made(save_tape && tape, {T, B, tape * H}), cells = made(save_tape && in.has_cell, {T, B, H});
  Tensor contexts = made(save_tape && w_out, {T, B, in.M});
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    AttentionDecoderForward<Scalar> call{};
    in.fill(call);
    call.gates = static_cast<const Scalar*>(in.gates.const_data_ptr());
    call.gates_t = in.gates.stride(0), call.gates_b = in.gates.stride(1);
    call.h = data_of<Scalar>(h), call.feeds = data_of<Scalar>(feeds), call.weights = data_of<Scalar>(weights);
    call.h_n = data_of<Scalar>(h_n), call.c_n = data_of<Scalar>(c_n);
    call.saved_gates = data_of<Scalar>(saved_gates), call.cells = data_of<Scalar>(cells);
    call.contexts = data_of<Scalar>(contexts);
    if (B > 0) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {h, feeds, weights, h_n, c_n, saved_gates, cells, contexts};
}

Ten attention_decoder_backward(MaybeTensor dh, MaybeTensor dfeeds, MaybeTensor dweights, MaybeTensor dh_n,
                               MaybeTensor dc_n, Tensor gates, Tensor h0, MaybeTensor c0, MaybeTensor feed0,
                               Tensor keys, Tensor values, MaybeTensor absent, MaybeTensor lengths, Tensor w_feed,
                               Tensor w_hh, MaybeTensor b_hh, MaybeTensor w_query, MaybeTensor v, MaybeTensor w_out,
                               int64_t cell, Tensor h, Tensor feeds, Tensor weights, Tensor saved_gates, Tensor cells,
                               Tensor contexts, std::vector<bool> needs) {
  AttentionDecoderInputs in{gates,  h0,   c0,   feed0,   keys, values, absent, lengths,
                            w_feed, w_hh, b_hh, w_query, v,    w_out,  cell};
  in.prepare();
  const int64_t T = in.T, B = in.B, S = in.S, H = in.H, A = in.A, M = in.M, F = in.F, tape = kCells[cell].tape;
  in.rows(dh, "dh", {T, B, H}), in.rows(dfeeds, "dfeeds", {T, B, F}), in.rows(dweights, "dweights", {T, B, S});
  in.rows(dh_n, "dh_n", {B, H});
  if (!in.has_cell) dc_n = std::nullopt;
  in.rows(dc_n, "dc_n", {B, H});
  in.rows(h, "h", {T, B, H}), in.rows(feeds, "feeds", {T, B, F}), in.rows(weights, "weights", {T, B, S});
  if (tape) in.rows(saved_gates, "saved_gates", {T, B, tape * H});
  if (in.has_cell) in.rows(cells, "cells", {T, B, H});
  check(needs.size() == 3, kName, "needs", "a flag for keys, values and v");
  const auto made = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? empty(sizes, in.dtype) : empty({0}, in.dtype);
  };
  Tensor dgates = made(true, {T, B, in.G}), dgates_h = made(cell == int64_t(DecoderCell::kGru), {T, B, in.G});
  Tensor dqueries = made(bool(v), {T, B, A}), douts = made(bool(w_out), {T, B, F});
  Tensor dh0 = made(true, {B, H}), dc0 = made(in.has_cell, {B, H}), dfeed0 = made(bool(w_out), {B, F});
  Tensor dkeys = made(needs[0], {B, S, A}), dvalues = made(needs[1], {B, S, M}), dv = made(needs[2] && v, {A});
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    AttentionDecoderBackward<Scalar> call{};
    in.fill(call);
    call.dh = in.data<Scalar>(dh), call.dfeeds = in.data<Scalar>(dfeeds), call.dweights = in.data<Scalar>(dweights);
    call.dh_n = in.data<Scalar>(dh_n), call.dc_n = in.data<Scalar>(dc_n);
    call.h = in.data<Scalar>(h), call.feeds = in.data<Scalar>(feeds), call.weights = in.data<Scalar>(weights);
    call.saved_gates = in.data<Scalar>(saved_gates), call.cells = in.data<Scalar>(cells);
    call.dgates = data_of<Scalar>(dgates), call.dgates_h = data_of<Scalar>(dgates_h);
    call.dqueries = data_of<Scalar>(dqueries), call.douts = data_of<Scalar>(douts);
    call.dh0 = data_of<Scalar>(dh0), call.dc0 = data_of<Scalar>(dc0), call.dfeed0 = data_of<Scalar>(dfeed0);
    call.dkeys = data_of<Scalar>(dkeys), call.dvalues = data_of<Scalar>(dvalues), call.dv = data_of<Scalar>(dv);
    if (B > 0)
      kernel(call, threads());
    else if (call.dv)
      std::fill_n(call.dv, A, Scalar(0));
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  return {dgates, dgates_h, dqueries, douts, dh0, dc0, dfeed0, dkeys, dvalues, dv};
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_ATTENTION_DECODER_ARGUMENTS                                                                \
  "Tensor gates, Tensor h0, Tensor? c0, Tensor? feed0, Tensor keys, Tensor values, Tensor? absent,"        \
  " Tensor? lengths, Tensor w_feed, Tensor w_hh, Tensor? b_hh, Tensor? w_query, Tensor? v, Tensor? w_out," \
  " int cell"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("attention_decoder(" FASTSEQ_ATTENTION_DECODER_ARGUMENTS
        ", bool save_tape)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_decoder_backward(Tensor? dh, Tensor? dfeeds, Tensor? dweights, Tensor? dh_n, Tensor? dc_n,"
      " " FASTSEQ_ATTENTION_DECODER_ARGUMENTS
      ", Tensor h, Tensor feeds, Tensor weights, Tensor saved_gates, Tensor cells, Tensor contexts, bool[] needs)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("attention_decoder", TORCH_BOX(&fastseq::attention_decoder));
  m.impl("attention_decoder_backward", TORCH_BOX(&fastseq::attention_decoder_backward));
}
