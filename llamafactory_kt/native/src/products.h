/* Products of a weight's rows with tokens, both as they lie in memory: blocks of four rows and some tokens, whose sums stay in registers.
 *
 * So nothing is packed. With one token, the rows are read one by one in memory order, which is as fast as memory delivers them. With more, the
 * next rows come into the second cache meanwhile, in that order too.
 */
#pragma once
#include <math.h>

#include "isa.h"
#include "team.h"

namespace kt {
namespace {
namespace kernels_ {

/* The dtype in which a weight multiplies activations. */
template <class T>
struct Multiplied {
    using type = float;
    static constexpr bool pairs = false;
};
#ifdef KT_BF16_PAIRS
template <>
struct Multiplied<bf16> {
    using type = bf16;
    static constexpr bool pairs = true;
};
#endif
template <class T>
using X = typename Multiplied<T>::type;
template <class T>
constexpr bool pairs = Multiplied<T>::pairs;

constexpr int SIDE = 4;     /* rows of a block */
constexpr int ACROSS = L == 16 ? 4 : 3; /* and tokens: AVX2 has registers for twelve sums, not for sixteen */
constexpr int TILE = 64;    /* rows, and at most so many tokens, that stay in the second cache */
constexpr int PANEL = 16;   /* rows of a weight that one thread takes at least, and of a panel of LoRA's B */

inline float value(float v) { return v; }
inline float value(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}
inline float value(f16 v) { return _cvtsh_ss(v.bits); }

template <class D, class S>
inline D as(S v) {
    if constexpr (__is_same(D, S)) {
        return v;
    } else if constexpr (__is_same(D, float)) {
        return value(v);
    } else {
        D rounded[L];
        store(rounded, all(value(v)));
        return rounded[0];
    }
}

/* Convert n values. */
template <class S, class D>
inline void convert(const S *from, D *to, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store(to + i, load(from + i));
    for (; i < n; i++) to[i] = as<D>(from[i]);
}

template <int V>
struct Number {
    static constexpr int value = V;
};

/* A vector of factors: floats, or pairs of bf16 where the CPU multiplies those. */
template <class T, bool PAIRS = pairs<T>>
struct Factors {
    using type = F;
    template <class S>
    static F load_from(const S *p) {
        return load(p);
    }
};
inline F multiply(F sums, F a, F b) { return fma(a, b, sums); }
#ifdef KT_BF16_PAIRS
template <class T>
struct Factors<T, true> {
    using type = __m512i;
    static __m512i load_from(const bf16 *p) { return load_pairs(p); }
};
inline F multiply(F sums, __m512i a, __m512i b) { return dot_pairs(sums, a, b); }
#endif
template <class T>
using Vector = typename Factors<T>::type;
template <class T, class S>
inline Vector<T> load_factor(const S *p) {
    return Factors<T>::load_from(p);
}

/* out[r * ldo + n] = w[n] . x[r] for N rows of w and R tokens. FIRST: the rows come from memory. */
template <class T, int N, int R, bool FIRST>
inline void block(const T *w, int64_t stride, const X<T> *const *x, int64_t k, float *out, int64_t ldo) {
    constexpr int U = N * R == 1 ? 8 : 1; /* a lone row wants many sums in flight: each load waits for memory */
    F sums[N][R][U];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) sums[n][r][u] = zero();
    [[maybe_unused]] const char *ahead = reinterpret_cast<const char *>(w + N * stride);
    int64_t i = 0;
    constexpr int64_t wide = (pairs<T> ? 2 : 1) * L; /* values of a vector */
    auto advance = [&](auto some) { /* by so many vectors at a time */
        constexpr int W = decltype(some)::value;
        for (; i + wide * W <= k; i += wide * W) {
            if constexpr (FIRST && N > 1)
                for (int n = 0; n < N; n++) _mm_prefetch(ahead + (i * N + n * wide) * int64_t(sizeof(T)), _MM_HINT_T1);
            if constexpr (N * R == 1) /* memory delivers in order, and faster if it is asked early */
                for (int u = 0; u < W; u++) _mm_prefetch(reinterpret_cast<const char *>(w + i + wide * u) + 2048, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int u = 0; u < W; u++) {
                Vector<T> tokens[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) tokens[r] = load_factor<T>(x[r] + i + wide * u);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    Vector<T> weights = load_factor<T>(w + n * stride + i + wide * u);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) sums[n][r][u] = multiply(sums[n][r][u], weights, tokens[r]);
                }
            }
        }
    };
    if constexpr (U > 1) advance(Number<U>{}), advance(Number<4>{});
    advance(Number<1>{});
    if constexpr (N == SIDE && R == ACROSS) {
        F whole[SIDE][ACROSS];
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) whole[n][r] = sums[n][r][0];
        sum_blocks(whole, out, ldo);
    } else {
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) {
                for (int u = 1; u < U; u++) sums[n][r][0] = add(sums[n][r][0], sums[n][r][u]);
                out[r * ldo + n] = sum(sums[n][r][0]);
            }
    }
    if (i < k) /* what fills no vector */
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++)
                for (int64_t j = i; j < k; j++) out[r * ldo + n] += value(w[n * stride + j]) * value(x[r][j]);
}

template <class T, int N>
inline void blocks(const T *w, int64_t stride, const X<T> *const *x, int64_t k, int64_t tokens, float *out, int64_t ldo) {
    for (int64_t r = 0; r < tokens; r += ACROSS) {
        float *to = out + r * ldo;
        switch (tokens - r) {
            case 1: block<T, N, 1, true>(w, stride, x + r, k, to, ldo); break;
            case 2: block<T, N, 2, true>(w, stride, x + r, k, to, ldo); break;
            case 3: block<T, N, 3, true>(w, stride, x + r, k, to, ldo); break;
            default:
                if (r)
                    block<T, N, ACROSS, false>(w, stride, x + r, k, to, ldo);
                else
                    block<T, N, ACROSS, true>(w, stride, x + r, k, to, ldo);
        }
    }
}

/* What a product multiplies by a weight. */
template <class T>
struct Tokens {
    const X<T> *const *x;          /* [count], the row of each */
    const float *const *low;       /* A x of each, for a weight with B */
    int64_t count;
    const float *panels = nullptr; /* the same packed, if tiles multiply them (tile_products.h) */
    const float *const *groups = nullptr; /* the sums of x over each group, for a weight with offsets */
};

/* out[r * ldo + n - first] = weight row n . x[r], for the rows [first, last) and some tokens. */
template <class T>
inline void multiply_blocks(const kt_weight &w, int64_t first, int64_t last, int64_t k, const Tokens<T> &tokens, float *out, int64_t ldo) {
    for (int64_t n = first; n < last;) {
        const int rows = tokens.count > 1 && last - n >= SIDE ? SIDE : 1;
        const T *own = static_cast<const T *>(w.weight) + n * w.stride;
        if (rows == SIDE)
            blocks<T, SIDE>(own, w.stride, tokens.x, k, tokens.count, out + n - first, ldo);
        else
            blocks<T, 1>(own, w.stride, tokens.x, k, tokens.count, out + n - first, ldo);
        n += rows;
    }
}

/* A panel's rows for R tokens: out[r * ldo + lane] += sum over j of b[j][lane] t[r][j]. */
template <int R>
inline void add_panel(const float *b, const float *const *t, int64_t rank, float *out, int64_t ldo) {
    constexpr int V = PANEL / L;
    F sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = load(out + r * ldo + v * L);
    for (int64_t j = 0; j < rank; j++, b += PANEL) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = fma(load(b + v * L), all(t[r][j]), sums[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * ldo + v * L, sums[r][v]);
}

/* out[r * ldo + n - first] += row n of B . t[r], for B in panels or null. first stands at the start of a panel, and out has room for the whole of
 * the last one. */
inline void add_low(const float *panels, int64_t first, int64_t last, int64_t rank, const float *const *t, int64_t tokens, float *out, int64_t ldo) {
    constexpr int R = L / 2; /* as many sums as stay in registers */
    if (!panels) return;
    for (int64_t n = first; n < last; n += PANEL) {
        const float *b = panels + n * rank;
        float *to = out + n - first;
        int64_t r = 0;
        for (; r + R <= tokens; r += R) add_panel<R>(b, t + r, rank, to + r * ldo, ldo);
        for (; r < tokens; r++) add_panel<1>(b, t + r, rank, to + r * ldo, ldo);
    }
}

/* Values between two rows of scratch memory: rows a power of two apart would share their lines of the first cache. */
template <class T>
constexpr int64_t apart(int64_t k) {
    return (k + L - 1) / L * L + 64 / int64_t(sizeof(T));
}

/* The part of [0, all) that a thread takes, in whole blocks. */
struct Range {
    int64_t first, last;
    Range(int64_t all, int64_t block, const Team &team) {
        const int64_t blocks = (all + block - 1) / block;
        first = blocks * team.thread / team.threads * block, last = blocks * (team.thread + 1) / team.threads * block;
        if (first > all) first = all;
        if (last > all) last = all;
    }
};

/* Memory given out piece by piece; with a null base, its size is counted. */
class Scratch {
    char *base_;
    int64_t used_ = 0;

   public:
    explicit Scratch(void *base) : base_(static_cast<char *>(base)) {}
    template <class T>
    T *take(int64_t n) {
        T *found = base_ ? reinterpret_cast<T *>(base_ + used_) : nullptr;
        used_ += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
        return found;
    }
    int64_t used() const { return used_; }
};

/* How many tokens of k values stay in the second cache beside a tile's rows: with AVX2 alone a CPU may have 256 KiB of it, with AVX-512 it has 1 MiB. */
template <class T>
inline int64_t tile_of(int64_t k) {
    const int64_t fit = (L == 16 ? 512 : 128) * 1024 / (k * int64_t(sizeof(X<T>)) + 1), step = L == 16 ? PANEL : ACROSS;
    return fit < step ? step : (fit < TILE ? fit : TILE) / step * step;
}

/* Call f(Tag<T>) for the type of a dtype. */
template <class T>
struct Tag {
    using type = T;
};
template <class Call>
inline auto with_dtype(int32_t dtype, Call call) {
    return dtype == KT_F32 ? call(Tag<float>{}) : dtype == KT_BF16 ? call(Tag<bf16>{}) : call(Tag<f16>{});
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
