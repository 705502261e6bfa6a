/* The table of one instruction set. */
#include "isa.h"

namespace kt {

#define KT_NAME_(isa) #isa
#define KT_NAME(isa) KT_NAME_(isa)

const Kernels KT_ISA = {KT_NAME(KT_ISA), kernels_::experts_scratch, kernels_::experts, kernels_::linears_scratch, kernels_::linears,
                        kernels_::heads_scratch, kernels_::heads,
                        kernels_::attention_scratch, kernels_::attention, kernels_::norm, kernels_::step_scratch, kernels_::step,
                        kernels_::quantize};

}  // namespace kt
