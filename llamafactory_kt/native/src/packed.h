/* Products with rows of codes: few tokens multiply the factors of a chunk right away, and its sums get its scales. For more, rows are unpacked
 * into weights of the dtype that the CPU multiplies, in the order of the activations.
 */
#pragma once
#include "tile_products.h"
#include "shorts.h"

namespace kt {
namespace {
namespace kernels_ {

/* Some rows of a packed weight. C: the dtype of its scales; S: how many belong to a chunk. */
template <class T, class C, int S>
struct PackedRows {
    static constexpr int V = Unpacking<T>::FACTORS, BYTES = CHUNK<T> * BITS<T> / 8;
    const kt_weight &w;
    const kt_packing &packing;
    int64_t k;
    Unpacking<T> unpacking{packing};
    float unit = Arranged<T>::unit_of(packing);
    int shift = packing.group >= k ? 63 : S > 1 ? 0 : __builtin_ctzll(uint64_t(packing.group / CHUNK<T>)); /* chunks of a scale, as a power of two */

    /* Call f(codes, scales in lanes, chunk, which of U) for the chunks of a row. Behind its end are zeros. */
    template <int U, class Call>
    void chunks(int64_t n, Call f) const {
        const uint8_t *codes = static_cast<const uint8_t *>(w.weight) + n * w.stride * BITS<T> / 8;
        const C *scales = static_cast<const C *>(w.scales) + n / packing.rows_of_scale * w.scale_stride;
        auto scale_of = [&](int64_t c) { return scales + (S > 1 ? c * S : c >> shift); };
        const int64_t whole = k / CHUNK<T>;
        int64_t c = 0;
        for (; c + U <= whole; c += U) {
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) {
                if (u * BYTES % 64 == 0) _mm_prefetch(reinterpret_cast<const char *>(codes + (c + u) * BYTES) + 2048, _MM_HINT_T1);
                f(codes + (c + u) * BYTES, spread<S>(scale_of(c + u)), c + u, u);
            }
        }
        for (; c < whole; c++) f(codes + c * BYTES, spread<S>(scale_of(c)), c, 0);
        if (const int64_t rest = k - whole * CHUNK<T>) {
            uint8_t bytes[BYTES] = {};
            C some[S] = {};
            memcpy(bytes, codes + whole * BYTES, size_t(rest * BITS<T> / 8));
            memcpy(some, scale_of(whole), S > 1 ? size_t((rest + packing.group - 1) / packing.group) * sizeof(C) : sizeof(C));
            f(bytes, spread<S>(some), whole, 0);
        }
    }

    template <int R>
    void multiply_row(int64_t n, const X<T> *const *x, float *out, int64_t ldo) const {
        constexpr int U = R == 1 ? 4 : 1;
        F sums[R][U];
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) sums[r][u] = zero();
        chunks<U>(n, [&](const uint8_t *codes, F scales, int64_t c, int u) {
            Factor factors[V];
            unpacking(codes, factors);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r][u] = fma(Arranged<T>::multiply_chunk(factors, x[r] + c * Arranged<T>::CHUNK_OF_X), scales, sums[r][u]);
        });
        for (int r = 0; r < R; r++) {
            for (int u = 1; u < U; u++) sums[r][0] = add(sums[r][0], sums[r][u]);
            out[r * ldo] = sum(sums[r][0]) * Arranged<T>::unit(x[r], k) * unit;
        }
    }

    void multiply_rows(int64_t first, int64_t last, const X<T> *const *x, int64_t tokens, float *out, int64_t ldo) const {
        for (int64_t r = 0; r < tokens; r += SIDE) /* whose activations stay in the first cache */
            for (int64_t n = first; n < last; n++) {
                float *to = out + r * ldo + n - first;
                switch (tokens - r) {
                    case 1: multiply_row<1>(n, x + r, to, ldo); break;
                    case 2: multiply_row<2>(n, x + r, to, ldo); break;
                    case 3: multiply_row<3>(n, x + r, to, ldo); break;
                    default: multiply_row<SIDE>(n, x + r, to, ldo);
                }
            }
    }

    void unpack_rows(int64_t first, int64_t last, Unpacked *to, int64_t stride) const {
        for (int64_t n = first; n < last; n++, to += stride)
            chunks<1>(n, [&](const uint8_t *codes, F scales, int64_t c, int) {
                Factor factors[V];
                unpacking(codes, factors);
                constexpr int EACH = V / VECTORS_OF_X<T>; /* factors whose sum is one */
#pragma GCC unroll 8
                for (int v = 0; v < V; v += EACH) {
                    Unpacked *own = to + c * CHUNK<T> + v / EACH * LANES_OF_X;
#ifdef KT_BF16_PAIRS
                    F even, odd;
                    floats_of(factors[v], &even, &odd);
                    if constexpr (EACH == 2) {
                        F even_more, odd_more;
                        floats_of(factors[v + 1], &even_more, &odd_more);
                        even = add(even, even_more), odd = add(odd, odd_more);
                    }
                    _mm512_storeu_ps(own, pair(mul(even, scales), mul(odd, scales)));
#else
                    store(own, mul(factors[v], scales));
#endif
                }
            });
    }
};

/* Call f(PackedRows) of the types that fit. */
template <class T, class Call>
inline void with_packing(const kt_weight &w, const kt_packing &packing, int64_t k, Call f) {
    auto with_scales = [&](auto tag) {
        using C = typename decltype(tag)::type;
        const int64_t scales = packing.group < CHUNK<T> && packing.group < k ? CHUNK<T> / packing.group : 1;
        if constexpr (CHUNK<T> >= 128)
            if (scales == 4) return f(PackedRows<T, C, 4>{w, packing, k});
        if constexpr (!__is_same(T, e4m3) && CHUNK<T> >= 64)
            if (scales == 2) return f(PackedRows<T, C, 2>{w, packing, k});
        return f(PackedRows<T, C, 1>{w, packing, k});
    };
    if (packing.scale_dtype == KT_BF16) with_scales(Tag<bf16>{});
    else with_scales(Tag<float>{});
}

/* From so many tokens on, unpacking rows costs less than multiplying codes again and again. */
template <class T>
constexpr bool worth_unpacking(int64_t tokens) {
    return coded<T> && !of_shorts<T> && tokens >= PANEL;
}

/* Values between two unpacked rows. */
template <class T>
constexpr int64_t unpacked_stride(int64_t k) {
    return apart<Unpacked>(arranged<T>(k));
}

/* Values of the memory that each thread needs to unpack rows of k values. */
template <class T>
constexpr int64_t unpacked_size(int64_t k, int64_t tokens) {
    return worth_unpacking<T>(tokens) ? TILE * unpacked_stride<T>(k) : 0;
}

/* The rows [first, last) of a weight, at most TILE, for products with `tokens` tokens in all. memory: unpacked_size values. */
template <class T>
class Rows {
    kt_weight w_;
    const kt_packing *packing_;
    int64_t first_, last_, k_, rank_;
    bool unpacked_ = false;

   public:
    Rows(const kt_weight &w, const kt_packing *packing, int64_t first, int64_t last, int64_t k, int64_t rank, [[maybe_unused]] int64_t tokens,
         [[maybe_unused]] Unpacked *memory)
        : w_(w), packing_(packing), first_(first), last_(last), k_(k), rank_(rank) {
        if constexpr (coded<T> && !of_shorts<T>) {
            if (!worth_unpacking<T>(tokens)) return;
            const int64_t stride = unpacked_stride<T>(k);
            with_packing<T>(w, *packing, k, [&](const auto &rows) { rows.unpack_rows(first, last, memory, stride); });
            w_.weight = memory - first * stride, w_.stride = stride, unpacked_ = true;
        }
    }

    /* As product. */
    void multiply(const Tokens<T> &tokens, float *out, int64_t ldo) const {
        if constexpr (!coded<T>) {
            product<T>(w_, first_, last_, k_, rank_, tokens, out, ldo);
        } else {
            if constexpr (!of_shorts<T>)
                if (unpacked_) {
                    product<Unpacked>(w_, first_, last_, arranged<T>(k_), rank_, {tokens.x, tokens.low, tokens.count, tokens.panels}, out, ldo);
                    return add_offsets(tokens, out, ldo);
                }
            with_packing<T>(w_, *packing_, k_, [&](const auto &rows) { rows.multiply_rows(first_, last_, tokens.x, tokens.count, out, ldo); });
            add_rest(w_, first_, last_, rank_, tokens, out, ldo);
            add_offsets(tokens, out, ldo);
        }
    }

   private:
    void add_offsets(const Tokens<T> &tokens, float *out, int64_t ldo) const {
        add_low(w_.offsets, first_, last_, groups_of(*packing_, k_), tokens.groups, tokens.count, out, ldo);
    }
};

}  // namespace kernels_
}  // namespace
}  // namespace kt
