/* What lies between an expert's products. */
#pragma once
#include "products.h"

namespace kt {
namespace {
namespace kernels_ {

/* e^x, within 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial. */
inline F exponential(F x) {
    x = min(max(x, all(-87.3f)), all(88.7f));
    F n = round(mul(x, all(1.44269504f)));
    F r = fma(n, all(-0.693359375f), x); /* ln(2) in two parts */
    r = fma(n, all(2.12194440e-4f), r);
    constexpr float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    F p = all(1.f / 5040);
    for (float term : terms) p = fma(p, r, all(term));
    return scale2(p, n);
}

inline F gelu(F x) { /* 0.5 x (1 + erf(x / sqrt 2)), lane by lane: few models have it */
    alignas(64) float lanes[L];
    store(lanes, x);
    for (float &v : lanes) v = 0.5f * v * (1.f + erff(v * 0.70710678f));
    return load(lanes);
}

inline F gelu_tanh(F x) { /* 0.5 x (1 + tanh(y)) = x / (1 + e^-2y), y = sqrt(2 / pi) (x + 0.044715 x^3) */
    F y = mul(mul(x, all(0.79788456f)), fma(mul(x, x), all(0.044715f), all(1.f)));
    return div(x, add(all(1.f), exponential(mul(y, all(-2.f)))));
}

inline F activated(F x, const kt_experts &e) {
    switch (e.activation) {
        case KT_GELU: return gelu(x);
        case KT_GELU_TANH: return gelu_tanh(x);
        case KT_RELU: return max(x, zero());
        case KT_RELU2: return mul(max(x, zero()), max(x, zero()));
        default: return div(x, add(all(1.f), exponential(mul(x, all(-e.alpha)))));
    }
}

/* What down multiplies; see ExpertFormula.activate. */
inline F inner(F gate, F up, const kt_experts &e) {
    if (!e.gate) return activated(up, e);
    const F limit = all(e.limit);
    const bool limited = e.limit < INFINITY;
    if (limited) {
        up = max(min(up, limit), sub(zero(), limit));
        if (!e.limit_activated) gate = min(gate, limit);
    }
    F found = activated(gate, e);
    if (limited && e.limit_activated) found = min(found, limit);
    return mul(found, add(up, all(e.up_offset)));
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
