/* Products of codes with numbers of 16 bits (shorts), where the CPU does not multiply pairs of bf16: a byte is multiplied in one operation, where a float has to be
 * made of each code first.
 *
 * A token becomes shorts with a scale for each row, the largest magnitude of the row / 32512. That is off by at most 2^-16 of the
 * largest; bf16 is off by 2^-9 of each. A sum of a chunk's products is exact.
 */
#pragma once
#include "codes.h"

namespace kt {
namespace {
namespace kernels_ {

template <class T>
struct Shorts {}; /* the codes of T, multiplied by shorts */

template <class T>
constexpr bool of_shorts = false;

#ifndef KT_BF16_PAIRS
template <class T>
constexpr bool of_shorts<Shorts<T>> = true;
template <class T>
constexpr int BITS<Shorts<T>> = BITS<T>;
template <>
constexpr int CHUNK<Shorts<int8>> = 32;
template <class T>
struct Multiplied<Shorts<T>> {
    using type = int16_t;
    static constexpr bool pairs = false;
};

/* A row's scale stands behind it. */
struct ShortsRow {
    static constexpr float LARGEST = 127 * 256; /* both bytes of which have a sign */

    /* The scale of k values; 0 if all are too small to divide by, NaN if one is not finite. */
    template <class S>
    static float scale_of(const S *from, int64_t k) {
        float most = 0, other = 0; /* 0 * inf and 0 * NaN are NaN */
        int64_t i = 0;
        F vector = zero(), others = zero();
        for (; i + L <= k; i += L) {
            const F v = load(from + i);
            vector = max(vector, max(v, sub(zero(), v))), others = fma(v, zero(), others);
        }
        alignas(64) float lanes[L];
        store(lanes, vector);
        for (int j = 0; j < L; j++) most = lanes[j] > most ? lanes[j] : most;
        for (; i < k; i++) {
            const float v = fabsf(as<float>(from[i]));
            most = v > most ? v : most, other += v * 0;
        }
        other += sum(others);
        return other == 0 ? most < 1e-30f ? 0 : most / LARGEST : other;
    }

    /* n values over the scale, to nearest; behind them are zeros. */
    template <class S>
    static void round_to(int16_t *to, const S *from, int64_t n, int64_t padded, float scale) {
        const float inverse = scale > 0 ? 1 / scale : 0;
        int64_t i = 0;
        for (; i + L <= n; i += L) store(to + i, mul(load(from + i), all(inverse)));
        for (; i < padded; i++) to[i] = i < n ? int16_t(nearbyintf(as<float>(from[i]) * inverse)) : int16_t(0);
    }
    static const float &scale(const int16_t *row, int64_t size) { return *reinterpret_cast<const float *>(row + size); }
};

/* Bytes are multiplied as shorts, in their own order. */
template <>
struct Arranged<Shorts<int8>> : ShortsRow {
    static constexpr int64_t CHUNK_OF_X = CHUNK<Shorts<int8>>;
    static constexpr int64_t size(int64_t k) { return (k + CHUNK_OF_X - 1) / CHUNK_OF_X * CHUNK_OF_X; }
    template <class S>
    static void put(const S *from, int16_t *row, int64_t, int64_t, int64_t k) {
        const float scale = scale_of(from, k);
        round_to(row, from, k, size(k), scale);
        memcpy(row + size(k), &scale, sizeof scale);
    }
    static float value(const int16_t *row, int64_t i, int64_t k) { return row[i] * scale(row, size(k)); }
    static F multiply_chunk(const F *factors, const int16_t *x) {
        F sums = zero();
#pragma GCC unroll 2
        for (int v = 0; v < CHUNK_OF_X / (2 * L); v++) sums = dot_shorts(sums, factors[v], load_shorts(x + 2 * L * v));
        return floats_of_whole(sums);
    }
    static float unit(const int16_t *row, int64_t k) { return scale(row, size(k)); }
    static float unit_of(const kt_packing &) { return 1; }
};
template <>
struct Unpacking<Shorts<int8>> {
    static constexpr int FACTORS = CHUNK<Shorts<int8>> / (2 * L);
    explicit Unpacking(const kt_packing &) {}
    void operator()(const uint8_t *p, F *f) const {
        for (int v = 0; v < FACTORS; v++) f[v] = load_shorts(reinterpret_cast<const code8 *>(p) + 2 * L * v);
    }
};

/* Half bytes stand for bytes without a sign, their value (times 2 in a table with halves) + 32, which multiply the upper and then the lower byte of
 * each number. A chunk of activations is: the upper bytes of the even ones, of the odd ones, the lower bytes likewise, and for each eight numbers
 * -32 times their sum. */
template <>
struct Arranged<Shorts<int4>> : ShortsRow {
    static constexpr int C = CHUNK<Shorts<int4>>;
    static constexpr int64_t CHUNK_OF_X = C + C / 4;
    static constexpr int OFFSET = 32;
    static constexpr int64_t size(int64_t k) { return (k + C - 1) / C * CHUNK_OF_X; }
    template <class S>
    static void put(const S *from, int16_t *row, int64_t, int64_t, int64_t k) {
        const float scale = scale_of(from, k);
        memcpy(row + size(k), &scale, sizeof scale);
        for (int64_t i = 0; i < k; i += C, row += CHUNK_OF_X) {
            int16_t numbers[C];
            int8_t bytes[2 * C];
            int32_t sums[C / 8];
            round_to(numbers, from + i, k - i < C ? k - i : C, C, scale);
            for (int j = 0; j < C / 2; j++) {
                const int16_t even = numbers[2 * j], odd = numbers[2 * j + 1];
                bytes[j] = int8_t((even + 128) >> 8), bytes[C / 2 + j] = int8_t((odd + 128) >> 8);
                bytes[C + j] = int8_t(even), bytes[C + C / 2 + j] = int8_t(odd); /* their lowest eight bits, with a sign */
            }
            for (int j = 0; j < C / 8; j++) {
                sums[j] = 0;
                for (int n = 0; n < 8; n++) sums[j] -= OFFSET * numbers[8 * j + n];
            }
            memcpy(row, bytes, sizeof bytes), memcpy(row + C, sums, sizeof sums);
        }
    }
    static float value(const int16_t *row, int64_t i, int64_t k) {
        const int8_t *bytes = reinterpret_cast<const int8_t *>(row + i / C * CHUNK_OF_X) + i % 2 * (C / 2) + i % C / 2;
        return (bytes[0] * 256 + bytes[C]) * scale(row, size(k));
    }
    static F multiply_chunk(const F *factors, const int16_t *x) {
        return floats_of_whole(dot_bytes(factors[0], factors[1], reinterpret_cast<const int8_t *>(x)));
    }

    /* The factor that makes the values of a table whole numbers; 0 if there is none, or they become too large. */
    static float factor(const float *table) {
        bool once = true, twice = true;
        for (int i = 0; i < 16; i++) {
            const float v = table[i];
            once &= v >= 1 - OFFSET && v < OFFSET && v == float(int(v));
            twice &= v >= (1 - OFFSET) / 2 && v < OFFSET / 2 && 2 * v == float(int(2 * v));
        }
        return once ? 1 : twice ? 2 : 0;
    }
    static float unit(const int16_t *row, int64_t k) { return scale(row, size(k)); }
    static float unit_of(const kt_packing &packing) { return 1 / factor(packing.table); }
};
template <>
struct Unpacking<Shorts<int4>> {
    static constexpr int FACTORS = 2;
    BytesTable table;
    explicit Unpacking(const kt_packing &p) : table(p.table, Arranged<Shorts<int4>>::factor(p.table), Arranged<Shorts<int4>>::OFFSET) {}
    void operator()(const uint8_t *p, F *f) const { look_up_bytes(load_codes(p), table, f); }
};
#endif

/* Whether a weight is multiplied so. */
inline bool in_shorts([[maybe_unused]] int32_t dtype, [[maybe_unused]] const kt_packing *packing) {
#ifdef KT_BF16_PAIRS
    return false;
#else
    return dtype == KT_INT8 || (dtype == KT_INT4 && Arranged<Shorts<int4>>::factor(packing->table));
#endif
}

/* Call f(Tag<T>) for the type of a weight. */
template <class Call>
inline auto with_weight(int32_t dtype, [[maybe_unused]] bool shorts, Call call) {
#ifndef KT_BF16_PAIRS
    if (shorts) return dtype == KT_INT4 ? call(Tag<Shorts<int4>>{}) : call(Tag<Shorts<int8>>{});
#endif
    return dtype == KT_INT4   ? call(Tag<int4>{})
           : dtype == KT_INT8 ? call(Tag<int8>{})
           : dtype == KT_E4M3 ? call(Tag<e4m3>{})
                              : with_dtype(dtype, call);
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
