// All CPU kernels, for the instruction set that the including source names.
#include "cpu/attention_kernel.h"
#include "cpu/gru_kernel.h"
#include "cpu/lstm_kernel.h"
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

}  // namespace fastseq::FASTSEQ_ISA
