#define KT_ISA avx2
#include "vector_avx2.h"
#include "products.h"
#include "experts.h"
#include "linear.h"
#include "attention.h"
#include "steps.h"
#include "quantize.h"
#include "table.h"
