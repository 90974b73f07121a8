// fastseq_native::rnn_tanh, rnn_relu and their backwards.
#include "ops/recurrent.h"

FASTSEQ_RECURRENT_OP(rnn_tanh, 1, 0, false)
FASTSEQ_RECURRENT_OP(rnn_relu, 1, 0, false)
