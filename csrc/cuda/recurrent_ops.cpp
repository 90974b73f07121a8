// The loops over a recurrent layer's steps as ops, for fastseq/ops/recurrent_cuda.py: they change their arguments.
//
// Tests build this file once more, for CPU tensors and an emulated GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/recurrent_plan.h"

#ifndef FASTSEQ_CUDA_NAMESPACE
#define FASTSEQ_CUDA_NAMESPACE fastseq_native
#define FASTSEQ_CUDA_KEY CUDA
#endif
// So that macros are replaced in what the registration makes names of.
#define FASTSEQ_OPS(space, m) STABLE_TORCH_LIBRARY_FRAGMENT(space, m)
#define FASTSEQ_OPS_IMPL(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)

namespace fastseq::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

constexpr uint64_t kPatience = 20'000'000'000;  // ns

struct Cell {
  const char* name;
  int gates, tape, slots;
  bool has_cell, keeps_h;
  const RecurrentKernels& kernels;
};
const Cell kCells[] = {
    {"lstm", 4, 4, 4, true, false, lstm_kernels},
    {"gru", 3, 4, 4, false, true, gru_kernels},
    {"rnn_tanh", 1, 0, 1, false, false, rnn_tanh_kernels},
    {"rnn_relu", 1, 0, 1, false, false, rnn_relu_kernels},
};

// A call's sizes, and its tensors one by one as the kernels take them: each is checked when it is asked for.
struct Call {
  const Cell& cell;
  const Tensor& first;  // whose device and dtype the others share
  int64_t T, B, N, H, D;

  static const Cell& cell_of(const std::string& name) {
    for (const Cell& cell : kCells)
      if (name == cell.name) return cell;
    throw std::runtime_error("recurrent_steps: cell must be lstm, gru, rnn_tanh or rnn_relu, got " + name);
  }

  ScalarType dtype() const { return first.scalar_type(); }
  int64_t width() const {
    const int64_t at_once = 16 / int64_t(first.element_size());
    return tiles(H, at_once) * at_once;
  }

  [[noreturn]] void fail(const char* name, const std::string& expected) const {
    throw std::runtime_error(std::string(cell.name) + " steps: " + name + " must be " + expected);
  }

  void* operator()(const char* name, const Tensor& t, Sizes sizes, std::optional<ScalarType> other = {}) const {
    std::string expected = "contiguous [";
    for (const int64_t size : sizes) expected += (expected.back() == '[' ? "" : ", ") + std::to_string(size);
    bool fits = t.dim() == int64_t(sizes.size()) && t.is_contiguous() && t.scalar_type() == other.value_or(dtype());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t.size(int64_t(i)) == sizes.begin()[i];
    fits = fits && t.get_device_index() == first.get_device_index() && t.is_cpu() == first.is_cpu();
    if (!fits) fail(name, expected + "], of the right dtype and on the device of the others");
    return const_cast<void*>(t.const_data_ptr());
  }
  void* operator()(const char* name, const MaybeTensor& t, Sizes sizes, std::optional<ScalarType> other = {}) const {
    return t ? (*this)(name, *t, sizes, other) : nullptr;
  }
  // What has to be there, or must not.
  void require(bool is_there, bool is_wanted, const char* name) const {
    if (is_there != is_wanted) fail(name, is_wanted ? "given" : "left out");
  }
  // Vectors that are read 16 bytes at once.
  void* aligned(const char* name, const MaybeTensor& t, Sizes sizes) const {
    void* p = (*this)(name, t, sizes);
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail(name, "at an address that 16 divides");
    return p;
  }

  // Which kernel of a choice, for how the numbers are multiplied.
  Math math(bool exact) const {
    switch (dtype()) {
      case ScalarType::BFloat16:
        return kBfloat16;
      case ScalarType::Half:
        return kFloat16;
      case ScalarType::Float:
        return exact ? kExact : kTf32;
      default:
        fail("weights", "bfloat16, float16 or float32");
    }
  }

  Plan plan_of(Steps& p, int stack, int64_t K, const Chip& chip) const {
    const auto found = plan({stack, int(H), K, int(B), int(D)}, chip.multiprocessors, chip.shared);
    if (!found) fail("weights", "few enough to stay on the chip");
    p.unit_tiles = found->unit_tiles, p.row_groups = found->row_groups, p.row_tiles = found->row_tiles;
    return *found;
  }

  void fill(Steps& p, const MaybeTensor& reset, const MaybeTensor& lengths, const MaybeTensor& starts,
            const Tensor& status) const {
    if (T < 1 || B < 1 || H < 1 || D < 1 || D > 2) fail("each of T, B, H and D", "positive, and D at most 2");
    if (std::max({T, B, H}) > INT32_MAX / 2) fail("each of T, B and H", "less than 2^30");
    if (T > INT32_MAX / tiles(B, kTileRows) - 1) fail("T", "smaller");
    require(lengths.has_value(), lengths.has_value() || starts.has_value(), "lengths");
    if (!starts && N != T * B) fail("pre and da", "of T*B rows");
    p.T = int(T), p.B = int(B), p.H = int(H), p.D = int(D), p.N = N, p.width = int(width());
    p.reset = static_cast<const uint8_t*>((*this)("reset", reset, {T, B}, ScalarType::Byte));
    p.lengths = static_cast<const int32_t*>((*this)("lengths", lengths, {B}, ScalarType::Int));
    p.starts = static_cast<const int64_t*>((*this)("starts", starts, {T}, ScalarType::Long));
    if (!status.is_cpu() || status.scalar_type() != ScalarType::Int || status.numel() != 1)
      fail("status", "one int32 in (pinned) host memory");
    p.status = static_cast<uint32_t*>(const_cast<void*>(status.const_data_ptr()));
    p.patience = kPatience;
  }
};

void recurrent_steps(std::string name, Tensor pre, Tensor weights, MaybeTensor inner_bias, Tensor h0, MaybeTensor carry,
                     Tensor exchange, MaybeTensor y, Tensor h_n, MaybeTensor cells, MaybeTensor reset,
                     MaybeTensor reset_h, MaybeTensor reset_carry, MaybeTensor lengths, MaybeTensor starts,
                     Tensor status, int64_t T, int64_t B, bool save, bool exact, int64_t stream) {
  const Cell& cell = Call::cell_of(name);
  const bool sound = pre.dim() == 3 && h_n.dim() == 3;
  const Call in{cell, pre, T, B, sound ? pre.size(1) : 0, sound ? h_n.size(2) : 0, sound ? pre.size(0) : 0};
  const int64_t N = in.N, H = in.H, D = in.D, E = in.width(), G = cell.gates;
  const int64_t saved = save ? cell.tape : 0;
  ForwardSteps p{};
  in.fill(p, reset, lengths, starts, status);
  p.pre_width = std::max(G, saved) * H, p.save = saved > 0;
  p.pre = in("pre", pre, {D, N, p.pre_width});
  p.weights = in.aligned("weights", weights, {D, G * H, E});
  p.inner_bias = in("inner_bias", inner_bias, {D, H});
  p.h0 = in.aligned("h0", h0, {D, B, E});
  in.require(carry.has_value(), cell.has_cell || cell.keeps_h, "carry");
  p.carry = static_cast<float*>(in("carry", carry, {D, B, H}, ScalarType::Float));
  p.exchange = in.aligned("exchange", exchange, {N, D, E});
  in.require(y.has_value(), y.has_value() || E != H, "y");
  p.y = in("y", y, {N, D, H});
  p.h_n = in("h_n", h_n, {D, B, H});
  in.require(cells.has_value(), cells.has_value() && cell.has_cell, "cells");
  p.cells = in("cells", cells, {D, N, H});
  p.reset_h = in.aligned("reset_h", reset_h, {D, B, E});
  p.reset_carry = in("reset_carry", reset_carry, {D, B, H});

  const int device = in.first.get_device_index();
  const Plan plan = in.plan_of(p, cell.gates, E * int64_t(pre.element_size()), chip_of(device));
  launch_together(cell.kernels.forward[in.math(exact)][plan.choice], plan.blocks(int(D)), kThreads, plan.shared, device,
                  reinterpret_cast<void*>(stream), p);
}

void recurrent_steps_backward(std::string name, Tensor weights, MaybeTensor dy, MaybeTensor dcells, MaybeTensor gates,
                              MaybeTensor before, MaybeTensor after, Tensor exchange, MaybeTensor da, Tensor dh,
                              MaybeTensor dc, MaybeTensor dreset_h, MaybeTensor dreset_c, MaybeTensor reset,
                              MaybeTensor lengths, MaybeTensor starts, Tensor status, int64_t T, int64_t B, bool exact,
                              int64_t stream) {
  const Cell& cell = Call::cell_of(name);
  const bool sound = exchange.dim() == 3 && dh.dim() == 3;
  const Call in{cell, exchange, T, B, sound ? exchange.size(1) : 0, sound ? dh.size(2) : 0, sound ? dh.size(0) : 0};
  const int64_t N = in.N, H = in.H, D = in.D, E = in.width(), G = cell.gates, A = cell.slots;
  BackwardSteps p{};
  in.fill(p, reset, lengths, starts, status);
  p.weights = in.aligned("weights", weights, {D, H, G * E});
  p.dy = in("dy", dy, {N, D, H});
  in.require(dcells.has_value(), dcells.has_value() && cell.has_cell, "dcells");
  p.dcells = in("dcells", dcells, {D, N, H});
  in.require(gates.has_value(), cell.tape > 0, "gates");
  p.gates = in("gates", gates, {D, N, cell.tape * H});
  in.require(before.has_value(), cell.has_cell || cell.keeps_h, "before");
  p.before = in("before", before, {D, N, H});
  in.require(after.has_value(), !cell.keeps_h, "after");
  p.after = cell.has_cell ? in("after", after, {D, N, H}) : in("after", after, {N, D, H});
  in.require(da.has_value(), E != H, "da");
  p.exchange_width = da ? G * E : A * H;
  p.exchange = in.aligned("exchange", exchange, {D, N, p.exchange_width});
  p.da = in("da", da, {D, N, A * H});
  p.dh = static_cast<float*>(in("dh", dh, {D, B, H}, ScalarType::Float));
  in.require(dc.has_value(), cell.has_cell, "dc");
  p.dc = static_cast<float*>(in("dc", dc, {D, B, H}, ScalarType::Float));
  in.require(dreset_h.has_value(), reset.has_value(), "dreset_h");
  p.dreset_h = static_cast<float*>(in("dreset_h", dreset_h, {D, B, H}, ScalarType::Float));
  in.require(dreset_c.has_value(), reset.has_value() && cell.has_cell, "dreset_c");
  p.dreset_c = static_cast<float*>(in("dreset_c", dreset_c, {D, B, H}, ScalarType::Float));

  const int device = in.first.get_device_index();
  const Plan plan = in.plan_of(p, 1, G * E * int64_t(exchange.element_size()), chip_of(device));
  launch_together(cell.kernels.backward[in.math(exact)][plan.choice], plan.blocks(int(D)), kThreads, plan.shared,
                  device, reinterpret_cast<void*>(stream), p);
}

std::vector<int64_t> recurrent_plan(int64_t stack, int64_t units, int64_t K, int64_t B, int64_t D,
                                    int64_t multiprocessors, int64_t shared) {
  const auto found = plan({int(stack), int(units), K, int(B), int(D)}, int(multiprocessors), int(shared));
  if (!found) return {};
  return {found->choice, found->unit_tiles, found->row_groups, found->row_tiles, found->shared};
}

}  // namespace
}  // namespace fastseq::gpu

FASTSEQ_OPS(FASTSEQ_CUDA_NAMESPACE, m) {
  m.def(
      "recurrent_steps(str cell, Tensor(a!) pre, Tensor weights, Tensor? inner_bias, Tensor h0, Tensor(b!)? carry,"
      " Tensor(c!) exchange, Tensor(d!)? y, Tensor(e!) h_n, Tensor(f!)? cells, Tensor? reset, Tensor? reset_h,"
      " Tensor? reset_carry, Tensor? lengths, Tensor? starts, Tensor(g!) status, int T, int B, bool save, bool exact,"
      " int stream) -> ()");
  m.def(
      "recurrent_steps_backward(str cell, Tensor weights, Tensor? dy, Tensor? dcells, Tensor? gates, Tensor? before,"
      " Tensor? after, Tensor(a!) exchange, Tensor(b!)? da, Tensor(c!) dh, Tensor(d!)? dc, Tensor(e!)? dreset_h,"
      " Tensor(f!)? dreset_c, Tensor? reset, Tensor? lengths, Tensor? starts, Tensor(g!) status, int T, int B,"
      " bool exact, int stream) -> ()");
  m.def("recurrent_plan(int stack, int units, int K, int B, int D, int multiprocessors, int shared) -> int[]");
}

FASTSEQ_OPS_IMPL(FASTSEQ_CUDA_NAMESPACE, FASTSEQ_CUDA_KEY, m) {
  m.impl("recurrent_steps", TORCH_BOX(&fastseq::gpu::recurrent_steps));
  m.impl("recurrent_steps_backward", TORCH_BOX(&fastseq::gpu::recurrent_steps_backward));
}

FASTSEQ_OPS_IMPL(FASTSEQ_CUDA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("recurrent_plan", TORCH_BOX(&fastseq::gpu::recurrent_plan));
}
