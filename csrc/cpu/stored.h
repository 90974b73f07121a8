// How numbers lie in memory. No torch in here.
#pragma once
#include <cstdint>

namespace fastseq {

// As what they are computed in, or in half precision beside float32.
enum class Stored { kSame, kBfloat16, kFloat16 };

// Rows that are so many elements apart, each contiguous; without data if there are none.
struct Rows {
  void* data;
  int64_t stride;
  template <typename Element>
  Element* row(int64_t r) const {
    return data ? static_cast<Element*>(data) + r * stride : nullptr;
  }
};

}  // namespace fastseq
