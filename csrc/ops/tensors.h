// What the registrations of all ops need of torch's stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/stored.h"
#include "cpu/threads.h"

namespace fastseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A new CPU tensor, uninitialised, whose elements fill its memory.
inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides, ScalarType dtype) {
  const int32_t type = dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Half   ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::Byte   ? aoti_torch_dtype_uint8()
                                                     : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  // Tests set this: an element that a kernel forgot shows as NaN.
  static const bool poison = std::getenv("FASTSEQ_POISON") != nullptr;
  if (poison) std::memset(made.mutable_data_ptr(), 0xff, size_t(made.numel()) * made.element_size());
  return made;
}

// A new contiguous one.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(sizes, strides, dtype);
}

inline void check(bool sound, const char* op, const char* name, const char* expected) {
  if (!sound) throw std::runtime_error(std::string(op) + ": " + name + " must be " + expected);
}

inline void check(const Tensor& t, const char* op, const char* name, std::initializer_list<int64_t> sizes,
                  ScalarType dtype) {
  check(t.is_cpu() && t.scalar_type() == dtype, op, name, "on the CPU and have the right dtype");
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(int64_t(i)) == sizes.begin()[i];
  if (same) return;
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "[" : ", ") + std::to_string(size);
  check(false, op, name, (expected + "]").c_str());
}

// A copy in another dtype, contiguous.
inline Tensor converted(const Tensor& t, ScalarType dtype) {
  Tensor made = empty(t.sizes(), dtype);
  return torch::stable::copy_(made, t);
}

// The dtype that elements of this floating tensor are computed in: half precision in float32.
inline ScalarType computed_in(const Tensor& t, const char* op, const char* name) {
  const ScalarType dtype = t.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  check(half || dtype == ScalarType::Float || dtype == ScalarType::Double, op, name,
        "float32, float64, bfloat16 or float16");
  return half ? ScalarType::Float : dtype;
}

// How a kernel reads tensors of this dtype.
inline Stored stored_as(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Stored::kBfloat16
         : dtype == ScalarType::Half   ? Stored::kFloat16
                                       : Stored::kSame;
}

// A tensor with elements in order in the last dimension, and in all of them unless `rows` will do.
inline Tensor laid_out(const Tensor& t, bool rows = false) {
  const bool fine = rows ? t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 : t.is_contiguous();
  return fine ? t : torch::stable::contiguous(t);
}

inline Rows rows_of(const Tensor& t) {
  if (!t.numel()) return {};
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0)};
}
inline Rows rows_of(const MaybeTensor& t) { return t ? rows_of(*t) : Rows{}; }

// [columns] beside rows of the dtype `given`, made what is computed in, `dtype`.
inline void prepare_columns(MaybeTensor& t, const char* op, const char* name, int64_t columns, ScalarType given,
                            ScalarType dtype) {
  if (!t) return;
  const ScalarType own = t->scalar_type();
  check(own == given || own == dtype, op, name, "of x's dtype, or float32 beside half precision");
  check(*t, op, name, {columns}, own);
  t = own == dtype ? laid_out(*t) : converted(*t, dtype);
}

inline void check_dropout(const char* op, const MaybeTensor& seed, double p) {
  check(p >= 0 && p <= 1, op, "dropout_p", "between 0 and 1");
  if (p > 0)
    check(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op, "seed",
          "one int64 on the CPU");
}

template <typename T>
Dropout<T> dropout_of(const MaybeTensor& seed, double p) {
  Dropout<T> made{};
  if (p == 0) return made;
  std::memcpy(&made.seed, seed->const_data_ptr(), sizeof made.seed);
  made.dropped = uint32_t(std::min(65536.0, std::nearbyint(p * 65536)));
  made.kept = made.dropped < 65536 ? T(65536.0 / (65536 - made.dropped)) : T(0);
  return made;
}

// Calls run(0, kernel) with the zero and the kernel of the dtype that is computed in.
template <typename Run, typename Float, typename Double>
void run_in(ScalarType dtype, const Run& run, const Float& of_float, const Double& of_double) {
  if (dtype == ScalarType::Float)
    run(0.0f, of_float);
  else
    run(0.0, of_double);
}

inline Threads threads() {
  return {int(torch::stable::get_num_threads()), [](int count, void (*body)(void*, int), void* context) {
            if (count == 1) return body(context, 1);
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              body(context, int((count + end - begin - 1) / (end - begin)));
            });
          }};
}

}  // namespace fastseq
