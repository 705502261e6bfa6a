#define KT_ISA amx
#define KT_BF16_PAIRS
#define KT_TILES
#include "vector_avx512.h"
#include "products.h"
#include "experts.h"
#include "linear.h"
#include "heads.h"
#include "attention.h"
#include "steps.h"
#include "quantize.h"
#include "table.h"
