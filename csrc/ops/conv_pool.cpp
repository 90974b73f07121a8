// fastseq_native::conv_pool and conv_pool_backward: the contract of fastseq/ops/conv_pool.py for CPU tensors.
#include "cpu/conv_pool.h"

#include <tuple>

#include "cpu/isa.h"
#include "ops/tensors.h"

namespace fastseq {

FASTSEQ_CHOSEN_KERNELS(ConvPoolKernels, conv_pool_kernels, kernels)

namespace {

constexpr const char* kName = "conv_pool";
constexpr int64_t kMostStep = 64;

// Whether [B, C, H, W] lies in memory as [B, H, W, C], and not as it is.
bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

// The same in one of the two orders.
Tensor in_order(const Tensor& t) { return is_channels_last(t) ? t : laid_out(t); }

Tensor empty_image(int64_t B, int64_t C, Extent size, bool channels_last, ScalarType dtype) {
  if (!channels_last) return empty({B, C, size.h, size.w}, dtype);
  const int64_t strides[] = {C * size.h * size.w, 1, C * size.w, C};
  return empty_strided({B, C, size.h, size.w}, strides, dtype);
}

Extent extent_of(const std::vector<int64_t>& given, const char* name, int64_t least) {
  check(given.size() == 2 && given[0] >= least && given[1] >= least, kName, name,
        least ? "two positive numbers" : "two numbers, 0 or more");
  return {given[0], given[1]};
}

// The tensors of a call in the layout that the kernels read, alive for as long as they run.
struct ConvPoolInputs {
  Tensor x, weight;
  Extent stride, padding, window;
  int64_t B, C, O;
  Extent in, kernel, out;
  ScalarType dtype;
  bool channels_last;

  void prepare() {
    dtype = x.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, kName, "x", "float32 or float64");
    check(x.dim() == 4 && x.size(1) > 0, kName, "x", "[B, C, H, W] with at least one channel");
    check(weight.dim() == 4 && weight.size(0) > 0, kName, "weight", "[O, C, kH, kW] with at least one output channel");
    B = x.size(0), C = x.size(1), O = weight.size(0);
    in = {x.size(2), x.size(3)}, kernel = {weight.size(2), weight.size(3)};
    check(x, kName, "x", {B, C, in.h, in.w}, dtype);
    check(weight, kName, "weight", {O, C, kernel.h, kernel.w}, dtype);
    check(kernel.h > 0 && kernel.w > 0, kName, "weight", "not empty");
    // Of larger ones, sizes and what lies between the pixels that are read would outgrow everything.
    for (const int64_t step : {stride.h, stride.w}) check(step <= kMostStep, kName, "stride", "at most 64");
    for (const int64_t zeros : {padding.h, padding.w}) check(zeros <= kMostStep, kName, "padding", "at most 64");
    check(window.h < 256 && window.w < 256 && window.h * window.w < 256, kName, "pool", "of less than 256 pixels");
    const auto windows = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t window) {
      const int64_t seen = size + 2 * padding - kernel;
      return seen < 0 ? 0 : (seen / stride + 1) / window;
    };
    out = {windows(in.h, kernel.h, stride.h, padding.h, window.h),
           windows(in.w, kernel.w, stride.w, padding.w, window.w)};
    check(out.h > 0 && out.w > 0 && in.h > 0 && in.w > 0, kName, "x", "large enough for one window of the pooling");
    x = in_order(x), weight = laid_out(weight);
    channels_last = is_channels_last(x);
  }

  template <typename Scalar>
  void fill(ConvPoolShape<Scalar>& shape) const {
    shape.B = B, shape.C = C, shape.O = O;
    shape.in = in, shape.kernel = kernel, shape.stride = stride, shape.padding = padding, shape.window = window;
    shape.out = out;
    shape.channels_last = channels_last;
    shape.x = static_cast<const Scalar*>(x.const_data_ptr());
    shape.weight = static_cast<const Scalar*>(weight.const_data_ptr());
  }
};

std::tuple<Tensor, Tensor> conv_pool(Tensor x, Tensor weight, MaybeTensor bias, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> pool, bool save_tape) {
  ConvPoolInputs in{x, weight, extent_of(stride, "stride", 1), extent_of(padding, "padding", 0),
                    extent_of(pool, "pool", 1)};
  in.prepare();
  prepare_columns(bias, kName, "bias", in.O, in.dtype, in.dtype);
  Tensor y = empty_image(in.B, in.O, in.out, in.channels_last, in.dtype);
  Tensor positions =
      save_tape ? empty({in.B, in.out.h, in.out.w, in.O}, ScalarType::Byte) : empty({0}, ScalarType::Byte);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    ConvPoolForward<Scalar> call{};
    in.fill(call);
    if (bias) call.bias = static_cast<const Scalar*>(bias->const_data_ptr());
    call.y = static_cast<Scalar*>(y.mutable_data_ptr());
    if (save_tape) call.positions = static_cast<uint8_t*>(positions.mutable_data_ptr());
    if (in.B > 0) kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().forward_float, kernels().forward_double);
  return {y, positions};
}

std::tuple<Tensor, Tensor, Tensor> conv_pool_backward(Tensor dy, Tensor positions, Tensor x, Tensor weight,
                                                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                      std::vector<int64_t> pool, std::vector<bool> needs) {
  ConvPoolInputs in{x, weight, extent_of(stride, "stride", 1), extent_of(padding, "padding", 0),
                    extent_of(pool, "pool", 1)};
  in.prepare();
  check(dy, kName, "dy", {in.B, in.O, in.out.h, in.out.w}, in.dtype), dy = in_order(dy);
  check(positions, kName, "positions", {in.B, in.out.h, in.out.w, in.O}, ScalarType::Byte);
  positions = laid_out(positions);
  check(needs.size() == 3, kName, "needs", "a flag for x, weight and bias");
  Tensor dx = needs[0] ? empty_image(in.B, in.C, in.in, in.channels_last, in.dtype) : empty({0}, in.dtype);
  Tensor dweight = needs[1] ? empty({in.O, in.C, in.kernel.h, in.kernel.w}, in.dtype) : empty({0}, in.dtype);
  Tensor dbias = needs[2] ? empty({in.O}, in.dtype) : empty({0}, in.dtype);
  const auto run = [&](auto zero, auto kernel) {
    using Scalar = decltype(zero);
    ConvPoolBackward<Scalar> call{};
    in.fill(call);
    call.dy = static_cast<const Scalar*>(dy.const_data_ptr()), call.dy_channels_last = is_channels_last(dy);
    call.positions = static_cast<const uint8_t*>(positions.const_data_ptr());
    const auto wanted = [](bool need, Tensor& t) {
      return need ? static_cast<Scalar*>(t.mutable_data_ptr()) : nullptr;
    };
    call.dx = wanted(needs[0] && in.B > 0, dx);
    call.dweight = wanted(needs[1], dweight), call.dbias = wanted(needs[2], dbias);
    kernel(call, threads());
  };
  run_in(in.dtype, run, kernels().backward_float, kernels().backward_double);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastseq

#define FASTSEQ_CONV_POOL_OPTIONS "int[] stride, int[] padding, int[] pool"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_native, m) {
  m.def("conv_pool(Tensor x, Tensor weight, Tensor? bias, " FASTSEQ_CONV_POOL_OPTIONS
        ", bool save_tape) -> (Tensor, Tensor)");
  m.def("conv_pool_backward(Tensor dy, Tensor positions, Tensor x, Tensor weight, " FASTSEQ_CONV_POOL_OPTIONS
        ", bool[] needs) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("conv_pool", TORCH_BOX(&fastseq::conv_pool));
  m.impl("conv_pool_backward", TORCH_BOX(&fastseq::conv_pool_backward));
}
