/* Takes the place of the compiler's own header: all vectors are SIMDe's, in plain C, so that a CPU without AVX-512 runs the kernels for it. What SIMDe
 * does not have is below. */
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <stdint.h>
#include <string.h>

#ifdef KT_BF16_PAIRS
#define __AVX512VNNI__ 1
#endif
#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
#endif
#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif
#undef _mm_prefetch
#undef _MM_HINT_T1
#define _MM_HINT_T1 2
#define _mm_prefetch(address, hint) ((void)(address))

static inline float emulated_cvtsh_ss(uint16_t half) {
    const simde__m128 floats = simde_mm_cvtph_ps(simde_mm_set1_epi16(int16_t(half)));
    float first;
    memcpy(&first, &floats, sizeof first);
    return first;
}
#define _cvtsh_ss emulated_cvtsh_ss

static inline simde__m256i emulated_512_cvtps_ph(simde__m512 v) {
    simde__m256 halves[2];
    simde__m128i found[2];
    simde__m256i whole;
    memcpy(halves, &v, sizeof halves);
    for (int i = 0; i < 2; i++) found[i] = simde_mm256_cvtps_ph(halves[i], 0);
    memcpy(&whole, found, sizeof whole);
    return whole;
}
#define _mm512_cvtps_ph(v, rounding) emulated_512_cvtps_ph(v)

static inline simde__m512i emulated_512_cvtne2ps_pbh(simde__m512 high, simde__m512 low) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits[32];
    uint16_t rounded[32];
    simde__m512i whole;
    memcpy(bits, &low, sizeof low), memcpy(bits + 16, &high, sizeof high);
    for (int i = 0; i < 32; i++) {
        const bool nan = (bits[i] & 0x7fffffff) > 0x7f800000;
        rounded[i] = uint16_t(nan ? bits[i] >> 16 | 64 : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
    memcpy(&whole, rounded, sizeof whole);
    return whole;
}
#define _mm512_cvtne2ps_pbh emulated_512_cvtne2ps_pbh
