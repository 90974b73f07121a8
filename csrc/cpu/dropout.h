// What the CPU's kernels are told about dropout. No torch in here.
#pragma once
#include <cstdint>

namespace fastseq {

template <typename T>
struct Dropout {
  uint64_t seed;
  uint32_t dropped;  // how many of 65536 values drop an element, 0 where nothing is dropped
  T kept;            // what elements that are kept are multiplied by

  explicit operator bool() const { return dropped != 0; }
};

}  // namespace fastseq
