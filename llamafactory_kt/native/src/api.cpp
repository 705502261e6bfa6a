/* Which kernels this CPU can run, and the calls of the interface. */
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "isa.h"

namespace kt {
namespace {

struct Cpu {
    bool avx2, avx512, avx512bf16, amx;
};

/* Whether CPU and system have tiles, and let this process use them: that makes its threads' state larger, and is asked once for all of them (Linux,
 * Documentation/arch/x86/xstate.rst). */
[[maybe_unused]] bool tiles([[maybe_unused]] unsigned leaf7_edx, [[maybe_unused]] unsigned xcr0) {
#ifdef KT_EMULATED_TILES
    return true;
#else
    constexpr long REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18;
    if (!(leaf7_edx >> 22 & 1) || !(leaf7_edx >> 24 & 1) || (xcr0 >> 17 & 3) != 3) return false; /* AMX-BF16, AMX-TILE */
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return permitted;
#endif
}

/* avx512bf16 has VNNI and VBMI, too: every CPU with BF16 does, but the first has no VBMI. Bits as in Intel's manual (CPUID leaves 1 and 7), and whether the system saves the registers (XCR0). */
Cpu detect() {
#ifdef KT_EMULATED_VECTORS
    return {true, true, true, true};
#else
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
    bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    bool avx2 = ymm && fma && f16c && (b >> 5 & 1);
    bool avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* F, DQ, BW, VL */
    const unsigned features = d, more = c;
    bool bf16 = avx512 && (more >> 1 & 1) && (more >> 11 & 1) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return {avx2, avx512, bf16, bf16 && tiles(features, low)};
#endif
}

const Kernels *runnable(const char *name) {
    const Cpu cpu = detect();
    const struct {
        bool there;
        const Kernels *kernels;
    } all[] = {{cpu.amx, &amx}, {cpu.avx512bf16, &avx512bf16}, {cpu.avx512, &avx512}, {cpu.avx2, &avx2}};
    for (auto &one : all)
        if (one.there && (!name || !strcmp(name, one.kernels->name))) return one.kernels;
    return nullptr;
}

const Kernels *&chosen() {
    static const Kernels *kernels = runnable(nullptr);
    return kernels;
}

}  // namespace
}  // namespace kt

using kt::chosen;

const char *kt_sources(void) { return KT_SOURCES; }

const char *kt_instruction_sets(void) {
    const kt::Cpu cpu = kt::detect();
    return cpu.amx ? "amx,avx512bf16,avx512,avx2" : cpu.avx512bf16 ? "avx512bf16,avx512,avx2" : cpu.avx512 ? "avx512,avx2" : cpu.avx2 ? "avx2" : "";
}

int kt_use(const char *name) {
    const kt::Kernels *kernels = kt::runnable(name);
    if (!kernels) return -1;
    chosen() = kernels;
    return 0;
}

const char *kt_in_use(void) { return chosen() ? chosen()->name : ""; }

int64_t kt_experts_scratch(const kt_experts *experts, int64_t tokens, int64_t top, int threads) {
    return chosen()->experts_scratch(*experts, tokens, top, threads);
}

int64_t kt_linear_scratch(const kt_linear *linear, int64_t tokens, int threads) {
    return chosen()->linears_scratch(kt_linears{1, {linear}, {}}, tokens, threads);
}

int kt_experts_forward(const kt_experts *experts, const void *x, int32_t x_dtype, int64_t tokens, const int64_t *index,
                       const float *scores, int64_t top, void *out, void *scratch, int threads) {
    for (int64_t i = 0; i < tokens * top; i++)
        if (index[i] < -experts->experts || index[i] >= experts->experts) return -1;
    return chosen()->experts(*experts, x, x_dtype, tokens, index, scores, top, out, scratch, threads);
}

void kt_linear_forward(const kt_linear *linear, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *scratch,
                       int threads) {
    chosen()->linears(kt_linears{1, {linear}, {out}}, x, x_dtype, tokens, scratch, threads);
}

int64_t kt_heads_scratch(const kt_heads *heads, int64_t tokens, int threads) { return chosen()->heads_scratch(*heads, tokens, threads); }

void kt_heads_forward(const kt_heads *heads, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *scratch, int threads) {
    chosen()->heads(*heads, x, x_dtype, tokens, out, scratch, threads);
}

int64_t kt_attention_scratch(const kt_attention *attention, int threads) {
    return chosen()->attention_scratch(*attention, threads);
}

void kt_attention_forward(const kt_attention *attention, void *scratch, int threads) {
    chosen()->attention(*attention, scratch, threads);
}

int64_t kt_run_scratch(const kt_step *steps, int64_t count, int threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t own = chosen()->step_scratch(steps[i], threads);
        if (own > most) most = own;
    }
    return most;
}

static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

int kt_run(const kt_step *steps, int64_t count, void *scratch, int threads, double *seconds) {
    for (int64_t i = 0; i < count; i++) {
        const double start = seconds ? now() : 0;
        if (const int failed = chosen()->step(steps[i], scratch, threads)) return failed;
        if (seconds) seconds[steps[i].op] += now() - start;
    }
    return 0;
}

int kt_quantize(const kt_quantization *quantization, int threads) { return chosen()->quantize(*quantization, threads); }

void kt_norm_forward(const kt_norm *norm, const void *x, int32_t x_dtype, int64_t rows, void *out, int threads) {
    chosen()->norm(*norm, x, x_dtype, rows, out, threads);
}
