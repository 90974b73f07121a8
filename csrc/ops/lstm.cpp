// fastseq_native::lstm and lstm_backward.
#include "ops/recurrent.h"

FASTSEQ_RECURRENT_OP(lstm, 4, 4, true)
