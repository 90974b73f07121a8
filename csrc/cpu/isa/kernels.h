// All CPU kernels, for the instruction set that the including source names.
#include "cpu/activation_kernel.h"
#include "cpu/attention_decoder_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/causal_conv1d_kernel.h"
#include "cpu/conv_pool_kernel.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/norm_kernel.h"
#include "cpu/recurrent_kernel.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

namespace fastseq::FASTSEQ_ISA {

template <typename Cell>
constexpr RecurrentKernels kernels_of() {
  return {forward<Cell, float>, forward<Cell, double>, backward<Cell, float>, backward<Cell, double>};
}

extern const RecurrentKernels lstm_kernels, gru_kernels, rnn_tanh_kernels, rnn_relu_kernels;
const RecurrentKernels lstm_kernels = kernels_of<Lstm>(), gru_kernels = kernels_of<Gru>(),
                       rnn_tanh_kernels = kernels_of<Rnn<false>>(), rnn_relu_kernels = kernels_of<Rnn<true>>();

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {attention_forward<float>, attention_forward<double>,
                                            attention_backward<float>, attention_backward<double>};
extern const AttentionDecoderKernels attention_decoder_kernels;
const AttentionDecoderKernels attention_decoder_kernels = {
    attention_decoder_forward<float>, attention_decoder_forward<double>, attention_decoder_backward<float>,
    attention_decoder_backward<double>};

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {norm_forward<float>, norm_forward<double>, norm_backward<float>,
                                  norm_backward<double>};
extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {activation_forward<float>, activation_forward<double>,
                                              activation_backward<float>, activation_backward<double>};
extern const CausalConvKernels causal_conv1d_kernels;
const CausalConvKernels causal_conv1d_kernels = {causal_conv1d_forward<float>, causal_conv1d_forward<double>,
                                                 causal_conv1d_backward<float>, causal_conv1d_backward<double>};
extern const ConvPoolKernels conv_pool_kernels;
const ConvPoolKernels conv_pool_kernels = {conv_pool_forward<float>, conv_pool_forward<double>,
                                           conv_pool_backward<float>, conv_pool_backward<double>};
extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {cross_entropy_forward<float>, cross_entropy_forward<double>,
                                                   cross_entropy_backward<float>, cross_entropy_backward<double>};

}  // namespace fastseq::FASTSEQ_ISA
