// fastseq_native::gru and gru_backward.
#include "ops/recurrent.h"

FASTSEQ_RECURRENT_OP(gru, 3, 4, false)
