// The LSTM's kernels.
#include "cuda/recurrent_kernel.h"
#include "cells/lstm.h"

namespace fastseq::gpu {

const RecurrentKernels lstm_kernels = kernels_of<Lstm>();

}  // namespace fastseq::gpu
