// How numbers lie in memory. No torch in here.
#pragma once

namespace fastseq {

// As what they are computed in, or in half precision beside float32.
enum class Stored { kSame, kBfloat16, kFloat16 };

}  // namespace fastseq
