/* Rows of a cache as codes: value = code * scale. A row is its codes, zeros up to a whole word of four, and the scale, a float.
 *
 * The largest magnitude of a row is the code 127. A row with NaN or infinities has NaN for a scale, so that all of it is NaN.
 */
#pragma once
#include "panels.h"

namespace kt {
namespace {
namespace kernels_ {

constexpr int64_t CODES_OF_WORD = 4, MOST_CODE = 127, MOST_SHORT = 32767;

/* The largest short that n products with codes leave room for in a sum of 32 bits. */
inline float most_short(int64_t n) {
    const int64_t most = ((1ll << 31) - 1) / (MOST_CODE * n);
    return float(most < MOST_SHORT ? most : MOST_SHORT);
}

template <class C>
constexpr int64_t bytes_of_row(int64_t n) {
    return __is_same(C, code8) ? whole(n, CODES_OF_WORD) + int64_t(sizeof(float)) : n * int64_t(sizeof(C));
}

inline float scale_of(const code8 *row, int64_t n) {
    float scale;
    memcpy(&scale, row + whole(n, CODES_OF_WORD), sizeof scale);
    return scale;
}

/* The scales of `count` rows; zeros behind them, up to whole vectors. */
inline void scales_of(const code8 *rows, int64_t stride, int64_t n, int64_t count, float *scales) {
    for (int64_t i = 0; i < count; i++) scales[i] = scale_of(rows + i * stride, n);
    for (int64_t i = count; i < whole(count, L); i++) scales[i] = 0;
}

inline float largest_of(F v) {
    alignas(64) float each[L];
    store(each, v);
    float largest = -INFINITY;
    for (float one : each) largest = one > largest ? one : largest;
    return largest;
}

/* Turns values into whole numbers, the largest magnitude into `most`. */
struct Whole {
    F magnitude = zero(), nothing = zero();
    float scale; /* what the whole numbers are multiplied with: NaN if a value is not finite */

    void see(F v) { magnitude = max(magnitude, max(v, sub(zero(), v))), nothing = fma(v, zero(), nothing); /* 0 * inf and 0 * NaN are NaN */ }

    /* What has been seen, n values. */
    template <class S, class D>
    void write(const S *from, D *to, int64_t n, float most) {
        const float largest = largest_of(magnitude);
        const bool zeros = !(largest > 1e-30f);
        const F inverse = all(zeros ? 0 : most / largest);
        for (int64_t i = 0; i < n; i += L) store_some(to + i, mul(floats(from + i, n - i), inverse), n - i);
        scale = (zeros ? 0 : largest / most) + sum(nothing);
    }
};

template <class S, class D>
inline float to_whole(const S *from, D *to, int64_t n, float most) {
    Whole found;
    for (int64_t i = 0; i < n; i += L) found.see(floats(from + i, n - i));
    found.write(from, to, n, most);
    return found.scale;
}

template <class S>
inline void encode_row(const S *from, int64_t n, code8 *row) {
    const float scale = to_whole(from, row, n, MOST_CODE);
    memset(row + n, 0, size_t(whole(n, CODES_OF_WORD) - n));
    memcpy(row + whole(n, CODES_OF_WORD), &scale, sizeof scale);
}

/* The values of `count` rows, one after the other. */
template <class D>
inline void decode_rows(const code8 *rows, int64_t stride, int64_t count, int64_t n, D *to) {
    for (int64_t r = 0; r < count; r++, rows += stride, to += n) {
        const F scale = all(scale_of(rows, n));
        for (int64_t i = 0; i < n; i += L) store_some(to + i, mul(floats(rows + i, n - i), scale), n - i);
    }
}

/* KT_STEP_ENCODE. */
void encode(const kt_step &s, int threads) {
    const int64_t rows = s.sizes[0] * s.sizes[1] * s.sizes[2];
    in_team(
        rows < 64 ? 1 : threads,
        [](void *context, const Team &team) {
            const kt_step &s = *static_cast<const kt_step *>(context);
            const Range mine(s.sizes[0] * s.sizes[1] * s.sizes[2], 1, team);
            for (int64_t r = mine.first; r < mine.last; r++) {
                const int64_t at[] = {r / s.sizes[2] / s.sizes[1], r / s.sizes[2] % s.sizes[1], r % s.sizes[2]};
                auto place = [&](int which) { return at[0] * s.strides[which][0] + at[1] * s.strides[which][1] + at[2] * s.strides[which][2]; };
                with_dtype(s.dtypes[1], [&](auto tag) {
                    encode_row(static_cast<const typename decltype(tag)::type *>(s.a) + place(1), s.sizes[3],
                               static_cast<code8 *>(s.out) + CODES_OF_WORD * place(0));
                });
            }
        },
        const_cast<kt_step *>(&s));
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
