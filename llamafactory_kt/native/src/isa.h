/* One table of kernels for each instruction set; api.cpp chooses. */
#pragma once
#include "kt_native.h"

namespace kt {

struct Kernels {
    const char *name;
    int64_t (*experts_scratch)(const kt_experts &, int64_t tokens, int64_t top, int threads);
    int (*experts)(const kt_experts &, const void *x, int32_t x_dtype, int64_t tokens, const int64_t *index, const float *scores,
                   int64_t top, void *out, void *scratch, int threads);
    int64_t (*linears_scratch)(const kt_linears &, int64_t tokens, int threads);
    void (*linears)(const kt_linears &, const void *x, int32_t x_dtype, int64_t tokens, void *scratch, int threads);
    int64_t (*heads_scratch)(const kt_heads &, int64_t tokens, int threads);
    void (*heads)(const kt_heads &, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *scratch, int threads);
    int64_t (*attention_scratch)(const kt_attention &, int threads);
    void (*attention)(const kt_attention &, void *scratch, int threads);
    void (*norm)(const kt_norm &, const void *x, int32_t x_dtype, int64_t rows, void *out, int threads);
    int64_t (*step_scratch)(const kt_step &, int threads);
    int (*step)(const kt_step &, void *scratch, int threads);
    int (*quantize)(const kt_quantization &, int threads);
};

extern const Kernels avx2, avx512, avx512bf16, amx;

}  // namespace kt
