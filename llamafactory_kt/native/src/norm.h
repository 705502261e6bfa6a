/* RMSNorm: each row divided by the root of its mean square, times a weight. */
#pragma once
#include "activation.h"

namespace kt {
namespace {
namespace kernels_ {

template <class T, class W>
inline void norm_row(const T *x, const W *weight, const kt_norm &norm, T *out) {
    const int64_t n = norm.width;
    F sums = zero();
    int64_t i = 0;
    for (; i + L <= n; i += L) sums = fma(load(x + i), load(x + i), sums);
    float total = sum(sums);
    for (; i < n; i++) total += value(x[i]) * value(x[i]);
    const float factor = 1.f / sqrtf(total / float(n) + norm.eps);
    const F factors = all(factor), offset = all(norm.offset);
    for (i = 0; i + L <= n; i += L) {
        F found = mul(load(x + i), factors);
        if (norm.round_first) {
            alignas(64) T rounded[L];
            store(rounded, found);
            found = load(rounded);
        }
        store(out + i, mul(found, add(load(weight + i), offset)));
    }
    for (; i < n; i++) {
        float found = value(x[i]) * factor;
        if (norm.round_first) found = value(as<T>(found));
        out[i] = as<T>(found * (value(weight[i]) + norm.offset));
    }
}

void norm(const kt_norm &norm, const void *x, int32_t x_dtype, int64_t rows, void *out, int threads) {
    struct Call {
        const kt_norm &norm;
        const void *x;
        int32_t x_dtype;
        int64_t rows;
        void *out;
    } call{norm, x, x_dtype, rows, out};
    auto compute = [](void *context, const Team &team) {
        const Call &c = *static_cast<Call *>(context);
        const Range mine(c.rows, 1, team);
        with_dtype(c.x_dtype, [&](auto of_x) {
            with_dtype(c.norm.dtype, [&](auto of_weight) {
                using T = typename decltype(of_x)::type;
                using W = typename decltype(of_weight)::type;
                for (int64_t r = mine.first; r < mine.last; r++)
                    norm_row(static_cast<const T *>(c.x) + r * c.norm.width, static_cast<const W *>(c.norm.weight), c.norm,
                             static_cast<T *>(c.out) + r * c.norm.width);
            });
        });
    };
    in_team(rows * norm.width < 1 << 15 ? 1 : threads, compute, &call); /* waking threads takes longer than a token's norm */
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
