// The GRU's kernels.
#include "cuda/recurrent_kernel.h"
#include "cells/gru.h"

namespace fastseq::gpu {

const RecurrentKernels gru_kernels = kernels_of<Gru>();

}  // namespace fastseq::gpu
