// The kernels of Elman's RNN, with tanh and with ReLU.
#include "cuda/recurrent_kernel.h"
#include "cells/rnn.h"

namespace fastseq::gpu {

const RecurrentKernels rnn_tanh_kernels = kernels_of<Rnn<false>>(), rnn_relu_kernels = kernels_of<Rnn<true>>();

}  // namespace fastseq::gpu
