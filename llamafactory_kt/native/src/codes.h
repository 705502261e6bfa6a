/* Weights of four or eight bits, used as they lie in a checkpoint: codes one after the other, and a scale for each group of a row.
 *
 * A chunk is as many bytes of codes as a vector has. A few operations turn it into vectors of factors, without moving a code to another lane:
 * the activations are put into the order of those vectors instead, once for all rows (place).
 */
#pragma once
#include "products.h"

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

/* How many groups a row of k values has. */
inline int64_t groups_of(const kt_packing &packing, int64_t k) { return packing.group < k ? (k + packing.group - 1) / packing.group : 1; }

/* A row of activations, as the factors of T find them. */
template <class T>
struct Arranged {
    static constexpr int64_t CHUNK_OF_X = CHUNK<T>; /* values of a chunk */

    /* Values of a row, in whole chunks. */
    static constexpr int64_t size(int64_t k) { return (k + CHUNK<T> - 1) / CHUNK<T> * CHUNK<T>; }

    /* Put n activations, from number `first` on. */
    template <class S>
    static void put(const S *from, X<T> *row, int64_t first, int64_t n, int64_t k) {
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

    /* Activation number i. */
    static float value(const X<T> *row, int64_t i, int64_t) { return float_of(row[i / CHUNK<T> * CHUNK<T> + place<T>(int(i % CHUNK<T>))]); }

    /* The product of a chunk's factors with its activations, lane by lane. */
    static F multiply_chunk(const Factor *factors, const X<T> *x) {
        constexpr int V = Unpacking<T>::FACTORS;
        F sum = zero();
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum = multiply(sum, factors[v], load_factor<Unpacked>(x + v * VECTORS_OF_X<T> / V * LANES_OF_X));
        return sum;
    }

    /* What a row's products are multiplied by, and those of a weight. */
    static float unit(const X<T> *, int64_t) { return 1; }
    static float unit_of(const kt_packing &) { return 1; }
};

template <class T>
constexpr int64_t arranged(int64_t k) {
    if constexpr (!coded<T>) return k;
    else return Arranged<T>::size(k);
}
template <class T, class S>
inline void arrange(const S *from, X<T> *row, int64_t first, int64_t n, int64_t k) {
    if constexpr (!coded<T>) convert(from, row + first, n);
    else Arranged<T>::put(from, row, first, n, k);
}

/* The sums of the groups of a row of k arranged activations, which a group's offset multiplies. */
template <class T>
inline void sum_groups(const X<T> *row, int64_t k, const kt_packing &packing, float *sums) {
    if constexpr (coded<T>)
        for (int64_t i = 0, n = groups_of(packing, k); n--; sums++) {
            *sums = 0;
            for (const int64_t end = packing.group < k - i ? i + packing.group : k; i < end; i++) *sums += Arranged<T>::value(row, i, k);
        }
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
