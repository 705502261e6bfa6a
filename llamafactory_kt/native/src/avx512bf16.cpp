#define KT_ISA avx512bf16
#define KT_BF16_PAIRS
#include "vector_avx512.h"
#include "products.h"
#include "experts.h"
#include "linear.h"
#include "heads.h"
#include "attention.h"
#include "steps.h"
#include "quantize.h"
#include "table.h"
