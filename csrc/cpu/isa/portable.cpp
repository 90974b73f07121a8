// The kernels in what every machine of this architecture has (SSE2, NEON).
#include "cpu/isa/standard.h"
#define FASTSEQ_ISA portable
#define FASTSEQ_VECTOR_BYTES 16
#include "cpu/isa/kernels.h"
