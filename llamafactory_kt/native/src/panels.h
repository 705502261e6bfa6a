/* Products of panels: the lanes of a vector are rows, so what is done to each row (a softmax, a factor) needs no sums across lanes.
 *
 * A word is what a lane multiplies at once: one float, a pair of bf16 where the CPU multiplies pairs, or a pair of shorts. A panel has the words of L rows next to
 * one another: [words][L].
 */
#pragma once
#include "products.h"

namespace kt {
namespace {
namespace kernels_ {

template <>
struct Multiplied<code8> {
    using type = int16_t;
    static constexpr bool pairs = true;
};

template <class T>
constexpr int PER_WORD = pairs<T> ? 2 : 1;

constexpr int ROWS_AT_ONCE = L / 2; /* rows of a panel that are multiplied at once, and vectors of lanes: their sums stay in registers */
constexpr int VECTORS = 2;
constexpr int LANES = VECTORS * L;

constexpr int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Floats of a panel that holds n values of each row. */
template <class T>
constexpr int64_t panel_size(int64_t n) {
    return (n + L * PER_WORD<T> - 1) / (L * PER_WORD<T>) * L * L;
}

template <class T>
inline F multiply_add(F a, F b, F sums) {
    if constexpr (__is_same(T, code8)) return dot_shorts(sums, a, b);
#ifdef KT_BF16_PAIRS
    if constexpr (pairs<T>) return dot_pairs(sums, _mm512_castps_si512(a), _mm512_castps_si512(b));
#endif
    return fma(a, b, sums);
}

template <class T>
inline F words(const T *p) {
#ifdef KT_BF16_PAIRS
    if constexpr (pairs<T>) return _mm512_castsi512_ps(load_pairs(p));
#endif
    return load(p);
}
inline F words(const code8 *p) { return load_shorts(p); }

template <class T>
inline F words_multiplied(const X<T> *p) { /* of what is converted to the multiplied dtype already */
    if constexpr (__is_same(T, code8)) return load_shorts(p);
    else if constexpr (pairs<T>) return words<T>(p);
    else return load(p);
}

/* The first n values of as many words as a vector has; the rest are zeros. */
template <class T>
inline F words(const T *p, int64_t n) {
    if (n >= L * PER_WORD<T>) return words(p);
    T part[L * PER_WORD<T>] = {};
    memcpy(part, p, n * sizeof(T));
    return words(part);
}

/* The first n floats of a vector; the rest are zeros. */
template <class T>
inline F floats(const T *p, int64_t n) {
    if (n >= L) return load(p);
    T part[L] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

/* Store the first n floats of a vector, or all. */
template <class T>
inline void store_some(T *to, F v, int64_t n) {
    if (n >= L) return store(to, v);
    T part[L];
    store(part, v);
    memcpy(to, part, n * sizeof(T));
}

/* Call f(Count<n>) for n in 1 .. MOST; larger n count as MOST. */
template <int N>
struct Count {
    static constexpr int n = N;
};
template <int MOST, class Call>
inline void with_count(int64_t n, Call f) {
    if constexpr (MOST > 1) {
        if (n < MOST) return with_count<MOST - 1>(n, f);
    }
    f(Count<MOST>{});
}

/* The panel of up to L rows of n values; rows that are missing are zeros. `between`: floats between two words. */
template <class T, class Row>
void pack_rows(Row row, int64_t count, int64_t n, float *panel, int64_t between) {
    constexpr int step = L * PER_WORD<T>;
    for (int64_t i = 0; i < n; i += step) {
        F square[L];
#pragma GCC unroll 16
        for (int r = 0; r < L; r++) square[r] = r < count ? words<T>(row(r) + i, n - i) : zero();
        transpose(square);
#pragma GCC unroll 16
        for (int w = 0; w < L; w++) store(panel + (i / PER_WORD<T> + w) * between, square[w]);
    }
}

/* The panels of the columns of `count` rows of n values, for a sum over rows: [n / L][words of rows][L]. `size`: floats of a panel. Rows that
 * `outer` takes together with the last ones are zeros. */
template <class T>
void pack_columns(const T *from, int64_t stride, int64_t count, int64_t n, float *panels, int64_t size) {
    for (int64_t r = 0; r < whole(count, ROWS_AT_ONCE); r += PER_WORD<T>)
        for (int64_t i = 0; i < n; i += L) {
            const T *p = from + r * stride + i;
            F found = r < count ? floats(p, n - i) : zero();
#ifdef KT_BF16_PAIRS
            if constexpr (pairs<T>) found = pair(found, r + 1 < count ? floats(p + stride, n - i) : zero());
#endif
            store(panels + i / L * size + r / PER_WORD<T> * L, found);
        }
}

/* out[n][lane] = out[n][lane] * factors[lane] + sum over the words k of a[k][n] b[k][lane], for some rows n of a panel. */
template <class T, bool ADD>
inline void outer(const float *a, const float *b, int64_t k, const float *factors, float *out) {
    constexpr int N = ROWS_AT_ONCE, V = VECTORS;
    F sums[N][V];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sums[n][v] = ADD ? mul(load(out + n * LANES + v * L), load(factors + v * L)) : zero();
    for (int64_t i = 0; i < k; i++, a += L, b += LANES) {
        F lanes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) lanes[v] = load(b + v * L);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const F one = all(a[n]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[n][v] = multiply_add<T>(one, lanes[v], sums[n][v]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(out + n * LANES + v * L, sums[n][v]);
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
