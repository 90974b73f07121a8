// The ops of the recurrent cells: the contract of fastseq/ops/recurrent.py for CPU tensors in float32 and float64.
#pragma once
#include <algorithm>
#include <numeric>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/recurrent.h"
#include "ops/tensors.h"

namespace fastseq {

// What sets one op apart. `tape`: gates on the tape.
struct RecurrentOp {
  const char* name;
  int64_t gates, tape;
  bool has_cell;
  const RecurrentKernels& (*kernels)();
};

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct RecurrentInputs {
  const RecurrentOp& op;
  Tensor x;
  MaybeTensor h0, c0, reset, reset_h, reset_c;
  std::vector<Tensor> weights;
  int64_t T, B, I, H, P, D, N, per_direction;
  bool packed, biased, projected;
  ScalarType dtype, stored;                     // of everything, and of weights in particular
  std::vector<int64_t> before, order, step_of;  // empty where all rows run at all steps

  RecurrentInputs(const RecurrentOp& op, Tensor x_, MaybeTensor h0_, MaybeTensor c0_, std::vector<Tensor> weights_,
                  bool bidirectional, const MaybeTensor& batch_sizes, const MaybeTensor& lengths, MaybeTensor reset_,
                  MaybeTensor reset_h_, MaybeTensor reset_c_, bool may_be_half)
      : op(op),
        x(std::move(x_)),
        h0(std::move(h0_)),
        c0(std::move(c0_)),
        reset(std::move(reset_)),
        reset_h(std::move(reset_h_)),
        reset_c(std::move(reset_c_)),
        weights(std::move(weights_)),
        packed(batch_sizes) {
    dtype = x.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op.name, "x", "float32 or float64");
    check(x.dim() == (packed ? 2 : 3), op.name, "x", packed ? "packed, [N, I]" : "[T, B, I]");
    D = bidirectional ? 2 : 1;
    per_direction = int64_t(weights.size()) / D;
    biased = per_direction >= 4, projected = per_direction % 2 == 1;
    check(per_direction >= 2 && per_direction <= (op.has_cell ? 5 : 4) && (op.has_cell || !projected) &&
              int64_t(weights.size()) == D * per_direction,
          op.name, "weights", "w_ih, w_hh, then both biases if any, then w_hr if any, of each direction");
    check(weights[1].dim() == 2, op.name, "w_hh", "[G*H, P]");
    I = x.size(-1), P = weights[1].size(1), H = projected ? weights[1].size(0) / op.gates : P;
    check(!projected || P != H, op.name, "w_hr", "smaller or larger than the state, not square");
    if (packed)
      read_batch_sizes(*batch_sizes);
    else
      T = x.size(0), B = x.size(1), N = T * B;
    check(T > 0 && I > 0 && H > 0 && P > 0, op.name, "each of T, I and H", "positive");
    const ScalarType given = weights[0].scalar_type();
    const bool half =
        (given == ScalarType::BFloat16 || given == ScalarType::Half) && dtype == ScalarType::Float && may_be_half;
    stored = half ? given : dtype;
    for (size_t k = 0; k < weights.size(); ++k) {
      const int64_t kind = int64_t(k) % per_direction;
      const int64_t G = op.gates * H;
      if (kind == 0)
        check(weights[k], op.name, "w_ih", {G, I}, stored);
      else if (kind == 1)
        check(weights[k], op.name, "w_hh", {G, P}, stored);
      else if (projected && kind == per_direction - 1)
        check(weights[k], op.name, "w_hr", {P, H}, stored);
      else
        check(weights[k], op.name, "a bias", {G}, stored);
      weights[k] = laid_out(weights[k]);
    }
    x = packed ? laid_out(x) : laid_out(x, true);
    state(h0, "h0", P), state(c0, "c0", H), state(reset_h, "reset_h", P), state(reset_c, "reset_c", H);
    if (lengths) {
      check(!packed, op.name, "lengths", "left out for packed input");
      read_lengths(*lengths);
    }
    if (reset) {
      check(!packed, op.name, "reset", "left out for packed input");
      check(*reset, op.name, "reset", {T, B}, ScalarType::Bool);
      *reset = laid_out(*reset);
    }
  }

  template <typename Scalar>
  static const Scalar* data(const MaybeTensor& t) {
    return t ? static_cast<const Scalar*>(t->const_data_ptr()) : nullptr;
  }

  template <typename Scalar>
  void fill(RecurrentShape<Scalar>& shape) const {
    shape.T_ = T, shape.B = B, shape.I = I, shape.H = H, shape.P = P, shape.D = D, shape.N = N;
    shape.x = static_cast<const Scalar*>(x.const_data_ptr());
    shape.packed = packed;
    if (!packed) shape.x_t = x.stride(0), shape.x_b = x.stride(1);
    shape.before = before.empty() ? nullptr : before.data();
    shape.order = order.empty() ? nullptr : order.data();
    shape.step_of = before.empty() ? nullptr : step_of.data();
    shape.reset = data<bool>(reset);
    shape.reset_h = data<Scalar>(reset_h), shape.reset_c = data<Scalar>(reset_c);
    shape.h0 = data<Scalar>(h0), shape.c0 = data<Scalar>(c0);
    shape.stored = stored_as(stored);
    each_weight(weights, [](const Tensor& t) { return static_cast<const Scalar*>(t.const_data_ptr()); }, shape.weights);
  }

  // Sorts a list like `weights` into what the kernels know them by.
  template <typename Pointer, typename Weights>
  void each_weight(const std::vector<Tensor>& list, const Pointer& pointer, Weights* by_name) const {
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* w = list.data() + d * per_direction;
      by_name[d] = {pointer(w[0]), pointer(w[1]), nullptr, nullptr, nullptr};
      if (biased) by_name[d].b_ih = pointer(w[2]), by_name[d].b_hh = pointer(w[3]);
      if (projected) by_name[d].w_hr = pointer(w[per_direction - 1]);
    }
  }

 private:
  void state(MaybeTensor& t, const char* name, int64_t width) const {
    if (!t) return;
    check(*t, op.name, name, {D, B, width}, dtype);
    t = laid_out(*t);
  }

  void read_batch_sizes(const Tensor& sizes) {
    check(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1, op.name, "batch_sizes",
          "int64 [T] on the CPU");
    const Tensor ordered = laid_out(sizes);
    const auto* rows = static_cast<const int64_t*>(ordered.const_data_ptr());
    T = sizes.size(0), B = T > 0 ? rows[0] : 0;
    for (int64_t t = 0; t < T; ++t)
      check(rows[t] > 0 && rows[t] <= (t > 0 ? rows[t - 1] : B), op.name, "batch_sizes", "positive and not rising");
    count_rows([&](int64_t t) { return rows[t]; });
    N = before[T];
    check(N == x.size(0), op.name, "x", "as long as the sum of batch_sizes");
    if (rows[T - 1] == B) before.clear(), step_of.clear();  // no row ends early
  }

  void read_lengths(const Tensor& given) {
    check(given, op.name, "lengths", {B}, ScalarType::Long);
    const Tensor ordered = laid_out(given);
    const auto* length = static_cast<const int64_t*>(ordered.const_data_ptr());
    bool all = true;
    for (int64_t b = 0; b < B; ++b) {
      check(length[b] >= 0 && length[b] <= T, op.name, "each of lengths", "between 0 and T");
      all = all && length[b] == T;
    }
    if (all) return;
    order.resize(B);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    int64_t rows = B;
    count_rows([&](int64_t t) {
      while (rows > 0 && length[order[rows - 1]] <= t) --rows;
      return rows;
    });
  }

  template <typename Rows>
  void count_rows(const Rows& rows_at) {
    before.assign(T + 1, 0);
    for (int64_t t = 0; t < T; ++t) {
      before[t + 1] = before[t] + rows_at(t);
      step_of.insert(step_of.end(), before[t + 1] - before[t], t);
    }
  }
};

// Stand for what a call does not return: always the same empty tensors, one for each place, since making one costs a
// microsecond. They are made when the extension is loaded, outside of inference mode: those of a call in that mode
// could not be saved for backward by a later one.
inline std::vector<Tensor> make_nothing(ScalarType dtype) {
  return {empty({0}, dtype), empty({0}, dtype), empty({0}, dtype)};
}
inline const std::vector<Tensor> no_floats = make_nothing(ScalarType::Float),
                                 no_doubles = make_nothing(ScalarType::Double);
inline const Tensor& nothing(int place, ScalarType dtype) {
  return (dtype == ScalarType::Float ? no_floats : no_doubles)[place];
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(const RecurrentOp& op,
                                                                            const RecurrentInputs& in, bool save_tape,
                                                                            bool save_cells) {
  const auto [T, B, H, P, D, N] = std::tuple(in.T, in.B, in.H, in.P, in.D, in.N);
  const ScalarType dtype = in.dtype;
  Tensor y = in.packed ? empty({N, D * P}, dtype) : empty({T, B, D * P}, dtype);
  Tensor h_n = empty({D, B, P}, dtype), c_n = op.has_cell ? empty({D, B, H}, dtype) : nothing(0, dtype);
  Tensor gates = save_tape && op.tape ? empty({D, N, op.tape * H}, dtype) : nothing(1, dtype);
  Tensor cells = (save_tape || save_cells) && op.has_cell ? empty({D, N, H}, dtype) : nothing(2, dtype);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    const auto data = [](const Tensor& t) { return t.numel() ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr; };
    RecurrentForward<Scalar> call{};
    in.fill(call);
    call.y = data(y), call.h_n = data(h_n), call.c_n = data(c_n), call.gates = data(gates), call.cells = data(cells);
    if (B > 0) kernel(call, threads());
  };
  run_in(dtype, run, op.kernels().forward_float, op.kernels().forward_double);
  return {y, h_n, c_n, gates, cells};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> recurrent_backward(
    const RecurrentOp& op, const RecurrentInputs& in, const MaybeTensor& dy_, const MaybeTensor& dh_n_,
    const MaybeTensor& dc_n_, const MaybeTensor& dcells_, const Tensor& y_, const Tensor& gates_, const Tensor& cells_,
    const std::vector<bool>& needs) {
  const auto [T, B, I, H, P, D, N] = std::tuple(in.T, in.B, in.I, in.H, in.P, in.D, in.N);
  const ScalarType dtype = in.dtype;
  const size_t inputs = 5;  // x, h0, c0, reset_h, reset_c
  check(needs.size() == inputs + in.weights.size(), op.name, "needs",
        "a flag for x, h0, c0, reset_h, reset_c and each weight");
  const auto rows = [&](const MaybeTensor& t, const char* name, int64_t width, bool strided) -> MaybeTensor {
    if (!t) return t;
    if (in.packed)
      check(*t, op.name, name, {N, width}, dtype);
    else
      check(*t, op.name, name, {T, B, width}, dtype);
    return laid_out(*t, strided);
  };
  const auto states = [&](const MaybeTensor& t, const char* name, int64_t width) -> MaybeTensor {
    if (!t) return t;
    check(*t, op.name, name, {D, B, width}, dtype);
    return laid_out(*t);
  };
  const auto tape = [&](const Tensor& t, const char* name, int64_t width) {
    if (width == 0) return t;
    check(t, op.name, name, {D, N, width}, dtype);
    return laid_out(t);
  };
  MaybeTensor dy = rows(dy_, "dy", D * P, true), y = rows(y_, "y", D * P, false);
  if (!dy) {
    dy = in.packed ? empty({N, D * P}, dtype) : empty({T, B, D * P}, dtype);
    std::memset(dy->mutable_data_ptr(), 0, size_t(dy->numel()) * dy->element_size());
  }
  const MaybeTensor dh_n = states(dh_n_, "dh_n", P), dc_n = op.has_cell ? states(dc_n_, "dc_n", H) : std::nullopt;
  const Tensor gates = tape(gates_, "gates", op.tape * H), cells = tape(cells_, "cells", op.has_cell ? H : 0);
  MaybeTensor dcells;
  if (dcells_ && op.has_cell) dcells = tape(*dcells_, "dcells", H);

  const auto wanted = [&](bool need, std::initializer_list<int64_t> sizes) {
    return need ? empty(sizes, dtype) : empty({0}, dtype);
  };
  const bool state = needs[1] || needs[2], reset_state = (needs[3] || needs[4]) && in.reset;
  Tensor dx = in.packed ? wanted(needs[0], {N, I}) : wanted(needs[0], {T, B, I});
  Tensor dh0 = wanted(state, {D, B, P}), dc0 = wanted(state && op.has_cell, {D, B, H});
  Tensor dreset_h = wanted(reset_state, {D, B, P}), dreset_c = wanted(reset_state && op.has_cell, {D, B, H});
  std::vector<Tensor> dweights;
  for (size_t k = 0; k < in.weights.size(); ++k) {
    const Tensor& w = in.weights[k];
    dweights.push_back(w.dim() == 1 ? wanted(needs[inputs + k], {w.size(0)})
                                    : wanted(needs[inputs + k], {w.size(0), w.size(1)}));
  }

  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    const auto in_data = [](const Tensor& t) {
      return t.numel() ? static_cast<const Scalar*>(t.const_data_ptr()) : nullptr;
    };
    const auto data = [](const Tensor& t) { return t.numel() ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr; };
    RecurrentBackward<Scalar> call{};
    in.fill(call);
    call.dy = static_cast<const Scalar*>(dy->const_data_ptr()), call.dy_t = dy->stride(0),
    call.dy_b = in.packed ? 0 : dy->stride(1);
    call.dcells = in.template data<Scalar>(dcells);
    call.dh_n = in.template data<Scalar>(dh_n), call.dc_n = in.template data<Scalar>(dc_n);
    call.y = in_data(*y), call.gates = in_data(gates), call.cells = in_data(cells);
    call.dx = data(dx), call.dh0 = data(dh0), call.dc0 = data(dc0), call.dreset_h = data(dreset_h),
    call.dreset_c = data(dreset_c);
    in.each_weight(dweights, data, call.dweights);
    kernel(call, threads());
  };
  run_in(dtype, run, op.kernels().backward_float, op.kernels().backward_double);
  return {dx, dh0, dc0, dreset_h, dreset_c, dweights};
}

}  // namespace fastseq

// Defines fastseq_native::<cell> and <cell>_backward.
#define FASTSEQ_RECURRENT_OP(cell, gates, tape, has_cell)                                                              \
  namespace fastseq {                                                                                                  \
  FASTSEQ_CHOSEN_KERNELS(RecurrentKernels, cell##_kernels, cell##_chosen)                                              \
  static const RecurrentOp cell##_op{#cell, gates, tape, has_cell, cell##_chosen};                                     \
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cell(Tensor x, MaybeTensor h0, MaybeTensor c0,             \
                                                                 std::vector<Tensor> weights, bool bidirectional,      \
                                                                 bool save_tape, bool save_cells,                      \
                                                                 MaybeTensor batch_sizes, MaybeTensor lengths,         \
                                                                 MaybeTensor reset, MaybeTensor reset_h,               \
                                                                 MaybeTensor reset_c) {                                \
    return recurrent_forward(                                                                                          \
        cell##_op,                                                                                                     \
        {cell##_op, std::move(x), std::move(h0), std::move(c0), std::move(weights), bidirectional, batch_sizes,        \
         lengths, std::move(reset), std::move(reset_h), std::move(reset_c), !save_tape},                               \
        save_tape, save_cells);                                                                                        \
  }                                                                                                                    \
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> cell##_backward(                      \
      MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, MaybeTensor dcells, Tensor x, MaybeTensor h0,                \
      MaybeTensor c0, std::vector<Tensor> weights, bool bidirectional, MaybeTensor batch_sizes, MaybeTensor lengths,   \
      MaybeTensor reset, MaybeTensor reset_h, MaybeTensor reset_c, Tensor y, Tensor gates_, Tensor cells,              \
      std::vector<bool> needs) {                                                                                       \
    return recurrent_backward(                                                                                         \
        cell##_op,                                                                                                     \
        {cell##_op, std::move(x), std::move(h0), std::move(c0), std::move(weights), bidirectional, batch_sizes,        \
         lengths, std::move(reset), std::move(reset_h), std::move(reset_c), false},                                    \
        dy, dh_n, dc_n, dcells, y, gates_, cells, needs);                                                              \
  }                                                                                                                    \
  }                                                                                                                    \
  STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {                                                                   \
    m.def(#cell                                                                                                        \
          "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, bool save_tape,"                   \
          " bool save_cells, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor? reset_h, Tensor? reset_c)"   \
          " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");                                                             \
    m.def(                                                                                                             \
        #cell                                                                                                          \
        "_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0,"          \
        " Tensor[] weights, bool bidirectional, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor? reset_h," \
        " Tensor? reset_c, Tensor y, Tensor gates, Tensor cells, bool[] needs)"                                        \
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");                                                     \
  }                                                                                                                    \
  STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {                                                                  \
    m.impl(#cell, TORCH_BOX(&fastseq::cell));                                                                          \
    m.impl(#cell "_backward", TORCH_BOX(&fastseq::cell##_backward));                                                   \
  }
