// All CPU kernels, for the instruction set that the including source names.
#include "cpu/activation_kernel.h"
#include "cpu/attention_kernel.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/gru_kernel.h"
#include "cpu/lstm_kernel.h"
#include "cpu/norm_kernel.h"
#include "cpu/rnn_kernel.h"

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

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {norm_forward<float>, norm_forward<double>, norm_backward<float>,
                                  norm_backward<double>};
extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {activation_forward<float>, activation_forward<double>,
                                              activation_backward<float>, activation_backward<double>};
extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {cross_entropy_forward<float>, cross_entropy_forward<double>,
                                                   cross_entropy_backward<float>, cross_entropy_backward<double>};

}  // namespace fastseq::FASTSEQ_ISA
