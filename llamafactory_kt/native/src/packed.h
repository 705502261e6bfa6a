/* Weights of four or eight bits, used as they lie in a checkpoint: codes one after the other, and a scale for each group of a row.
 *
 * A chunk is as many bytes of codes as a vector has. A few operations turn it into vectors of factors, without moving a code to another lane:
 * the activations are put into the order of those vectors instead, once for all rows (place). Few tokens multiply the factors right away and
 * each chunk's sums get its scales. For more, rows are unpacked into weights of the dtype that the CPU multiplies, in the same order.
 */
#pragma once
#include "tile_products.h"

namespace kt {
namespace {
namespace kernels_ {

struct int4 {};  /* sixteen values of a table; the lower half of a byte comes first */
struct int8 {};
struct e4m3 {};  /* without infinities */

template <class T>
constexpr int BITS = 0;
template <>
constexpr int BITS<int4> = 4;
template <>
constexpr int BITS<int8> = 8;
template <>
constexpr int BITS<e4m3> = 8;
template <class T>
constexpr bool coded = BITS<T> != 0;

#ifdef KT_BF16_PAIRS
using Unpacked = bf16;
template <>
struct Multiplied<int4> : Multiplied<bf16> {};
template <>
struct Multiplied<int8> : Multiplied<bf16> {};
template <>
struct Multiplied<e4m3> : Multiplied<bf16> {};
#else
using Unpacked = float;
#endif
using Factor = Vector<Unpacked>;

constexpr int LANES_OF_X = int(sizeof(Factor) / sizeof(X<Unpacked>));             /* activations of a vector */
template <class T>
constexpr int CHUNK = int(sizeof(Codes)) * 8 / BITS<T>;                           /* codes of a chunk */
template <class T>
constexpr int VECTORS_OF_X = CHUNK<T> / LANES_OF_X;

/* Where value k of a chunk stands among the activations. */
template <class T>
constexpr int place(int k) {
    if constexpr (!__is_same(T, e4m3)) return k % VECTORS_OF_X<T> * LANES_OF_X + k / VECTORS_OF_X<T>;
    else if constexpr (pairs<T>) return k / 8 % 2 * LANES_OF_X + k / 16 * 8 + k % 8;
    else return k;
}

/* The factors of a chunk: FACTORS vectors, of which number v multiplies the activations number v * VECTORS_OF_X / FACTORS. */
template <class T>
struct Unpacking;

#ifdef KT_BF16_PAIRS
template <>
struct Unpacking<int4> {
    static constexpr int FACTORS = 4;
    PairsTable table;
    explicit Unpacking(const kt_packing &p) : table(p.table) {}
    void operator()(const uint8_t *p, Factor *f) const {
        const Codes codes = load_codes(p);
        f[0] = look_up<0>(codes, table), f[1] = look_up<4>(codes, table), f[2] = look_up<8>(codes, table), f[3] = look_up<12>(codes, table);
    }
};
template <>
struct Unpacking<int8> { /* each byte is the sum of two halves, both exact in bf16 */
    static constexpr int FACTORS = 4;
    static constexpr float LOW[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static constexpr float HIGH[] = {0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16};
    PairsTable low, high;
    explicit Unpacking(const kt_packing &) : low(LOW), high(HIGH) {}
    void operator()(const uint8_t *p, Factor *f) const {
        const Codes codes = load_codes(p);
        f[0] = look_up<0>(codes, low), f[1] = look_up<4>(codes, high), f[2] = look_up<8>(codes, low), f[3] = look_up<12>(codes, high);
    }
};
template <>
struct Unpacking<e4m3> {
    static constexpr int FACTORS = 2;
    explicit Unpacking(const kt_packing &) {}
    void operator()(const uint8_t *p, Factor *f) const { e4m3_pairs(load_codes(p), f); }
};
#else
template <>
struct Unpacking<int4> {
    static constexpr int FACTORS = 8;
    Table table;
    explicit Unpacking(const kt_packing &p) : table(p.table) {}
    void operator()(const uint8_t *p, Factor *f) const {
        const Codes codes = load_codes(p);
        f[0] = look_up<0>(codes, table), f[1] = look_up<4>(codes, table), f[2] = look_up<8>(codes, table), f[3] = look_up<12>(codes, table);
        f[4] = look_up<16>(codes, table), f[5] = look_up<20>(codes, table), f[6] = look_up<24>(codes, table), f[7] = look_up<28>(codes, table);
    }
};
template <>
struct Unpacking<int8> {
    static constexpr int FACTORS = 4;
    explicit Unpacking(const kt_packing &) {}
    void operator()(const uint8_t *p, Factor *f) const {
        const Codes codes = load_codes(p);
        f[0] = signed_byte<0>(codes), f[1] = signed_byte<8>(codes), f[2] = signed_byte<16>(codes), f[3] = signed_byte<24>(codes);
    }
};
template <>
struct Unpacking<e4m3> {
    static constexpr int FACTORS = 4;
    explicit Unpacking(const kt_packing &) {}
    void operator()(const uint8_t *p, Factor *f) const {
        for (int v = 0; v < FACTORS; v++) f[v] = mul(load_e4m3(p + v * L), all(256));
    }
};
#endif

/* Put n activations of a row, from number `first` on, where the factors of T find them. */
template <class T, class S>
inline void arrange(const S *from, X<T> *row, int64_t first, int64_t n, int64_t k) {
    if constexpr (!coded<T>) {
        convert(from, row + first, n);
    } else {
        constexpr int C = CHUNK<T>;
        X<T> rounded[C];
        for (int64_t i = 0, some; i < n; i += some) {
            const int64_t within = (first + i) % C;
            some = n - i < C - within ? n - i : C - within;
            convert(from + i, rounded, some);
            X<T> *chunk = row + first + i - within;
            for (int64_t j = 0; j < some; j++) chunk[place<T>(int(within + j))] = rounded[j];
        }
        if (first + n == k)
            for (int64_t j = k; j % C; j++) row[j / C * C + place<T>(int(j % C))] = X<T>{};
    }
}

/* Values of a row of activations, in whole chunks. */
template <class T>
constexpr int64_t arranged(int64_t k) {
    if constexpr (!coded<T>) return k;
    else return (k + CHUNK<T> - 1) / CHUNK<T> * CHUNK<T>;
}

/* How many groups a row of k values has. */
inline int64_t groups_of(const kt_packing &packing, int64_t k) { return packing.group < k ? (k + packing.group - 1) / packing.group : 1; }

/* The sums of the groups of a row of k arranged activations, which a group's offset multiplies. */
template <class T>
inline void sum_groups(const X<T> *row, int64_t k, const kt_packing &packing, float *sums) {
    if constexpr (coded<T>) {
        constexpr int C = CHUNK<T>;
        for (int64_t i = 0, n = groups_of(packing, k); n--; sums++) {
            *sums = 0;
            for (const int64_t end = packing.group < k - i ? i + packing.group : k; i < end; i++)
                *sums += float_of(row[i / C * C + place<T>(int(i % C))]);
        }
    }
}

/* Some rows of a packed weight. C: the dtype of its scales; S: how many belong to a chunk. */
template <class T, class C, int S>
struct PackedRows {
    static constexpr int V = Unpacking<T>::FACTORS, BYTES = int(sizeof(Codes));
    const kt_weight &w;
    const kt_packing &packing;
    int64_t k;
    Unpacking<T> unpacking{packing};
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
                _mm_prefetch(reinterpret_cast<const char *>(codes + (c + u) * BYTES) + 2048, _MM_HINT_T1);
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
            for (int r = 0; r < R; r++) {
                const X<T> *own = x[r] + c * CHUNK<T>;
                F sum = zero();
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) sum = multiply(sum, factors[v], load_factor<Unpacked>(own + v * VECTORS_OF_X<T> / V * LANES_OF_X));
                sums[r][u] = fma(sum, scales, sums[r][u]);
            }
        });
        for (int r = 0; r < R; r++) {
            for (int u = 1; u < U; u++) sums[r][0] = add(sums[r][0], sums[r][u]);
            out[r * ldo] = sum(sums[r][0]);
        }
    }

    void multiply_rows(int64_t first, int64_t last, const X<T> *const *x, int64_t tokens, float *out, int64_t ldo) const {
        for (int64_t n = first; n < last; n++)
            for (int64_t r = 0; r < tokens; r += SIDE) {
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
    return coded<T> && tokens >= PANEL;
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
        if constexpr (coded<T>) {
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
        } else if (unpacked_) {
            product<Unpacked>(w_, first_, last_, arranged<T>(k_), rank_, {tokens.x, tokens.low, tokens.count, tokens.panels}, out, ldo);
            add_offsets(tokens, out, ldo);
        } else {
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

/* Call f(Tag<T>) for the type of a weight. */
template <class Call>
inline auto with_weight(int32_t dtype, Call call) {
    return dtype == KT_INT4   ? call(Tag<int4>{})
           : dtype == KT_INT8 ? call(Tag<int8>{})
           : dtype == KT_E4M3 ? call(Tag<e4m3>{})
                              : with_dtype(dtype, call);
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
