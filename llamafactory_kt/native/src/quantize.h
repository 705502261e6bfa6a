/* Codes and scales of float weights: symmetric, a bf16 scale for each 32 values of a row.
 *
 * Four bits: several scales that put the value of the largest magnitude near the code -8, which has no positive counterpart, are tried; each is
 * then fitted to its codes by least squares; the codes are those of the scale with the smallest squared error. Eight bits: the largest magnitude is 127.
 */
#pragma once
#include "packed.h"

namespace kt {
namespace {
namespace kernels_ {

constexpr int GROUP = 32;

/* L groups at once, each in a lane: value i of all of them is x[i]. */
struct Groups {
    F x[GROUP], codes[GROUP], scale;

    static F rounded(F v) { /* to bf16 */
        bf16 narrow[L];
        store(narrow, v);
        return load(narrow);
    }
    /* 1 / scale; zeros for a scale too small to divide by. */
    static F inverse(F scale) { return zero_below(div(all(1), scale), max(scale, sub(zero(), scale)), 1e-37f); }

    template <int LOW, int HIGH>
    static F nearest(F v, F inverse) {
        return min(max(round(mul(v, inverse)), all(LOW)), all(HIGH));
    }

    void four_bits() {
        F high = zero(), low = zero(), squares_of_x = zero();
        for (int i = 0; i < GROUP; i++) high = max(high, x[i]), low = min(low, x[i]), squares_of_x = fma(x[i], x[i], squares_of_x);
        const F most = larger(high, low);
        constexpr float REACHES[] = {-1 / 7.2f, -1 / 7.6f, -1 / 8.f, -1 / 8.4f, -1 / 8.8f};
        F least = all(__builtin_inff());
        scale = zero();
        for (int t = 0; t < int(sizeof REACHES / sizeof *REACHES); t++) {
            const F tried = inverse(rounded(mul(most, all(REACHES[t]))));
            F products = zero(), squares = zero();
            for (int i = 0; i < GROUP; i++) {
                const F code = nearest<-8, 7>(x[i], tried);
                products = fma(code, x[i], products), squares = fma(code, code, squares);
            }
            const F fitted = rounded(mul(products, inverse(squares)));
            /* sum of (code fitted - x)^2 */
            const F error = fma(fitted, sub(mul(fitted, squares), add(products, products)), squares_of_x);
            scale = where_less(error, least, fitted, scale), least = min(error, least);
        }
        const F best = inverse(scale);
        for (int i = 0; i < GROUP; i++) codes[i] = nearest<-8, 7>(x[i], best);
    }

    void eight_bits() {
        F most = zero();
        for (int i = 0; i < GROUP; i++) most = max(most, max(x[i], sub(zero(), x[i])));
        scale = rounded(mul(most, all(1.f / 127)));
        const F best = inverse(scale);
        for (int i = 0; i < GROUP; i++) codes[i] = nearest<-127, 127>(x[i], best);
    }
};

/* Some groups of a row, at most L; false if a value is not finite. */
template <class T, class W>
bool quantize_groups(const W *from, int64_t values, uint8_t *to, bf16 *scales) {
    constexpr bool four = __is_same(T, int4);
    alignas(64) float numbers[L * GROUP] = {}; /* behind the values are zeros */
    convert(from, numbers, values);
    F total = zero();
    Groups groups;
    for (int i = 0; i < GROUP; i += L) {
        for (int g = 0; g < L; g++) groups.x[i + g] = load(numbers + g * GROUP + i), total = fma(groups.x[i + g], zero(), total);
        transpose(groups.x + i);
    }
    four ? groups.four_bits() : groups.eight_bits();
    for (int i = 0; i < GROUP; i += L) {
        transpose(groups.codes + i);
        for (int g = 0; g < L; g++) store(numbers + g * GROUP + i, groups.codes[i + g]);
    }
    for (int64_t i = 0; i < values; i += four ? 2 : 1)
        *to++ = four ? uint8_t((int(numbers[i]) + 8) | (int(numbers[i + 1]) + 8) << 4) : uint8_t(int8_t(numbers[i]));
    bf16 rounded[L];
    store(rounded, groups.scale);
    memcpy(scales, rounded, size_t((values + GROUP - 1) / GROUP) * sizeof *scales);
    return sum(total) == 0; /* 0 * inf and 0 * NaN are NaN */
}

template <class T, class W>
bool quantize_row(const W *from, int64_t cols, uint8_t *to, bf16 *scales) {
    constexpr int64_t STEP = L * GROUP;
    bool finite = true;
    for (int64_t i = 0; i < cols; i += STEP)
        finite &= quantize_groups<T>(from + i, cols - i < STEP ? cols - i : STEP, to + i * BITS<T> / 8, scales + i / GROUP);
    return finite;
}

int quantize(const kt_quantization &q, int threads) {
    struct Call {
        const kt_quantization &q;
        bool infinite;
    } call = {q, false};
    in_team(
        threads,
        [](void *context, const Team &team) {
            Call &own = *static_cast<Call *>(context);
            const kt_quantization &q = own.q;
            const Range mine(q.rows, 1, team);
            bool finite = true;
            with_dtype(q.dtype, [&](auto tag) {
                using W = typename decltype(tag)::type;
                for (int64_t n = mine.first; n < mine.last; n++) {
                    const W *from = static_cast<const W *>(q.weight) + n * q.stride;
                    bf16 *scales = static_cast<bf16 *>(q.scales) + n * ((q.cols + GROUP - 1) / GROUP);
                    finite &= q.bits == 4 ? quantize_row<int4>(from, q.cols, q.codes + n * q.cols / 2, scales)
                                          : quantize_row<int8>(from, q.cols, q.codes + n * q.cols, scales);
                }
            });
            if (!finite) __atomic_store_n(&own.infinite, true, __ATOMIC_RELAXED);
        },
        &call);
    return call.infinite ? -1 : 0;
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
