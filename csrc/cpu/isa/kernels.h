// All CPU kernels, for the instruction set that the including source names.
#include "cpu/lstm_kernel.h"

namespace fastseq::FASTSEQ_ISA {

extern const LstmKernels lstm_kernels;
const LstmKernels lstm_kernels = {lstm_forward<float>, lstm_forward<double>, lstm_backward<float>, lstm_backward<double>};

}  // namespace fastseq::FASTSEQ_ISA
