/* Sixteen floats at a time, and the checkpoint's dtypes as they are loaded into them. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace kt {
namespace {
namespace kernels_ {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

using F = __m512;
constexpr int L = 16;            /* floats of a vector */

inline F zero() { return _mm512_setzero_ps(); }
inline F all(float v) { return _mm512_set1_ps(v); }
inline F load(const float *p) { return _mm512_loadu_ps(p); }
inline F load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline F load(const f16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline F load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline void store(float *p, F v) { _mm512_storeu_ps(p, v); }
inline __m512i bf16_bits(F v) { /* to nearest, ties to even; NaN stays NaN */
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
inline void store(bf16 *p, F v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bf16_bits(v))); }
inline void store(f16 *p, F v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(b, a); } /* the operand order keeps NaN of a */
inline F max(F a, F b) { return _mm512_max_ps(b, a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale2(F a, F power) { return _mm512_scalef_ps(a, power); }
inline F zero_below(F v, F x, float bound) { return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, all(bound), _CMP_LT_OQ), zero()); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
inline F larger(F high, F low) { return _mm512_mask_mov_ps(low, _mm512_cmp_ps_mask(high, _mm512_sub_ps(zero(), low), _CMP_GE_OQ), high); } /* of two, by magnitude */
inline F where_less(F a, F b, F v, F w) { return _mm512_mask_mov_ps(w, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), v); }
inline F at_least(F v, F x, F bound) { /* v where x >= bound, elsewhere -inf */
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), all(-__builtin_inff()), v);
}
template <class Add>
inline F sums_of(F *each, Add add) { /* lane i: the sum of each[i] */
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2) each[i] = add(_mm512_unpacklo_ps(each[i], each[i + 1]), _mm512_unpackhi_ps(each[i], each[i + 1]));
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 4) {
        const __m512d a = _mm512_castps_pd(each[i]), b = _mm512_castps_pd(each[i + 2]);
        each[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < L; i += 8)
        each[i] = add(_mm512_shuffle_f32x4(each[i], each[i + 4], 0x88), _mm512_shuffle_f32x4(each[i], each[i + 4], 0xdd));
    return add(_mm512_shuffle_f32x4(each[0], each[8], 0x88), _mm512_shuffle_f32x4(each[0], each[8], 0xdd));
}
inline void transpose(F *rows) { /* of a square of L rows */
    F a[L], b[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]), a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) { /* b[4 m + c]: column c, and three others of its lane, of the rows 4 m .. 4 m + 3 */
        const __m512d x = _mm512_castps_pd(a[i / 4 * 4 + i / 2 % 2]), y = _mm512_castps_pd(a[i / 4 * 4 + i / 2 % 2 + 2]);
        b[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88), a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
        rows[i / 4 * 4 + i % 4] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
        rows[8 + i / 4 * 4 + i % 4] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    }
}

/* out[r * ldo + n] = the sum of s[n][r], for all sixteen at once: halves, quarters and neighbors of two vectors are added in one. */
inline void sum_blocks(const F (&s)[4][4], float *out, int64_t ldo) {
    F rows[4]; /* of each n: lane r has four parts of the sum of s[n][r] */
    for (int n = 0; n < 4; n++) {
        F a = add(_mm512_shuffle_f32x4(s[n][0], s[n][1], 0x44), _mm512_shuffle_f32x4(s[n][0], s[n][1], 0xee));
        F b = add(_mm512_shuffle_f32x4(s[n][2], s[n][3], 0x44), _mm512_shuffle_f32x4(s[n][2], s[n][3], 0xee));
        rows[n] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    F a = add(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    F b = add(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    F all_of = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    _mm_storeu_ps(out, _mm512_extractf32x4_ps(all_of, 0)), _mm_storeu_ps(out + ldo, _mm512_extractf32x4_ps(all_of, 1));
    _mm_storeu_ps(out + 2 * ldo, _mm512_extractf32x4_ps(all_of, 2)), _mm_storeu_ps(out + 3 * ldo, _mm512_extractf32x4_ps(all_of, 3));
}

/* Codes of weights: bytes as they lie in memory. */
using Codes = __m512i;
inline Codes load_codes(const uint8_t *p) { return _mm512_loadu_si512(p); }
struct Table { /* sixteen values */
    F values;
    explicit Table(const float *p) : values(load(p)) {}
};
template <int SHIFT>
inline F look_up(Codes codes, const Table &table) { /* lane i: of four bits of the word i */
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, SHIFT), table.values);
}
template <int SHIFT>
inline F signed_byte(Codes codes) { /* lane i: a byte of the word i */
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - SHIFT), 24));
}
inline F load_e4m3(const uint8_t *p) { /* times 2^-8: its bits within those of a half number, whose exponent is wider by one bit. NaN stays NaN */
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), ones = _mm256_set1_epi16(127);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(words, ones), ones);
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(int16_t(0xbfff)));
    return _mm512_cvtph_ps(_mm256_or_si256(halves, _mm256_slli_epi16(nan, 10)));
}
inline float float_of(float v) { return v; }
inline float float_of(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}
template <int N>
inline F spread(const float *p) { /* each of N values in L / N lanes */
    if constexpr (N == 1) return all(*p);
    const __m512i lanes = _mm512_srli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), N == 2 ? 3 : 2);
    float values[4] = {};
    memcpy(values, p, N * sizeof *p);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(values)));
}
template <int N>
inline F spread(const bf16 *p) {
    uint64_t bits = 0;
    memcpy(&bits, p, N * sizeof *p);
    if constexpr (N == 1) return _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(uint32_t(bits) << 16)));
    alignas(64) static const uint16_t two[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
    alignas(64) static const uint16_t four[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 0, 2, 0, 2, 0, 2, 0, 3, 0, 3, 0, 3, 0, 3};
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(N == 2 ? two : four), _mm512_castsi128_si512(_mm_cvtsi64_si128(int64_t(bits)))));
}

/* Codes of a cache, multiplied as pairs of shorts; these, and their sums of 32 bits, stand in vectors of floats. */
struct code8 {
    int8_t code;
};
inline F load(const code8 *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline F load_shorts(const code8 *p) { return _mm512_castsi512_ps(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p))); }
inline F load_shorts(const int16_t *p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
inline void store(code8 *p, F v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); } /* to nearest */
inline void store(int16_t *p, F v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v))); }
inline F dot_shorts(F sums, F a, F b) {
#ifdef __AVX512VNNI__
    return _mm512_castsi512_ps(_mm512_dpwssd_epi32(_mm512_castps_si512(sums), _mm512_castps_si512(a), _mm512_castps_si512(b)));
#else
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sums), _mm512_madd_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b))));
#endif
}
inline F add_whole(F a, F b) { return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); }
inline F floats_of_whole(F v) { return _mm512_cvtepi32_ps(_mm512_castps_si512(v)); }

inline void interleave(F a, F b, F *pairs) { /* of each four neighbors of a and b: the first half of the words, the second */
    pairs[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    pairs[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline void in_order(F *halves) { /* the floats of words that were interleaved */
    const F low = _mm512_shuffle_f32x4(halves[0], halves[1], 0x44), high = _mm512_shuffle_f32x4(halves[0], halves[1], 0xee);
    halves[0] = _mm512_shuffle_f32x4(low, low, 0xd8), halves[1] = _mm512_shuffle_f32x4(high, high, 0xd8);
}

/* Bytes without a sign from half bytes, and their products with numbers of 16 bits. They, and sums of 32 bits, stand in vectors of floats. */
struct BytesTable { /* sixteen values * factor + offset, whole numbers from 0 to 63 */
    __m512i values;
    BytesTable(const float *p, float factor, int offset) {
        alignas(16) uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = uint8_t(int(p[i] * factor) + offset);
        values = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)bytes));
    }
};
inline void look_up_bytes(Codes codes, const BytesTable &table, F *halves) { /* of the lower halves of bytes, of the upper ones */
    const __m512i mask = _mm512_set1_epi8(15);
    halves[0] = _mm512_castsi512_ps(_mm512_shuffle_epi8(table.values, _mm512_and_si512(codes, mask)));
    halves[1] = _mm512_castsi512_ps(_mm512_shuffle_epi8(table.values, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask)));
}
inline F dot_bytes(F low, F high, const int8_t *x) { /* x: upper bytes for low and for high, lower bytes for both, what is added to the sums */
    auto part = [](const int8_t *p) { return _mm512_loadu_si512(p); };
    const __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
    const __m512i upper = _mm512_add_epi16(_mm512_maddubs_epi16(a, part(x)), _mm512_maddubs_epi16(b, part(x + 64)));
    const __m512i lower = _mm512_add_epi16(_mm512_maddubs_epi16(a, part(x + 128)), _mm512_maddubs_epi16(b, part(x + 192)));
    const __m512i sums = _mm512_add_epi32(_mm512_madd_epi16(upper, _mm512_set1_epi16(256)), _mm512_madd_epi16(lower, _mm512_set1_epi16(1)));
    return _mm512_castsi512_ps(_mm512_add_epi32(sums, part(x + 256)));
}

#ifdef KT_BF16_PAIRS
inline F dot_pairs(F sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
inline __m512i load_pairs(const bf16 *p) { return _mm512_loadu_si512(p); }
inline F pair(F low, F high) { /* both rounded to bf16, lane by lane next to each other */
    alignas(64) static const uint16_t lanes[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(lanes), (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}

struct PairsTable { /* sixteen values, exact in bf16; twice, because a lookup takes five bits */
    __m512i values;
    explicit PairsTable(const float *p) {
        const __m256i once = _mm512_cvtepi32_epi16(bf16_bits(load(p)));
        values = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
    }
};
template <int SHIFT>
inline __m512i look_up(Codes codes, const PairsTable &table) { /* word j: of four bits of the word j */
    return _mm512_permutexvar_epi16(SHIFT ? _mm512_srli_epi16(codes, SHIFT) : codes, table.values);
}
struct E4m3Table { /* upper and lower bytes of the bf16 numbers that the lower seven bits of a code stand for */
    alignas(64) uint8_t upper[128] = {}, lower[128] = {};
    constexpr E4m3Table() {
        for (int code = 0; code < 128; code++) {
            const int exponent = code >> 3, rest = code & 7;
            const int bits = code == 127   ? 0x7fc0
                             : exponent    ? (exponent + 120) << 7 | rest << 4
                             : rest & 4    ? 120 << 7 | (rest & 3) << 5
                             : rest & 2    ? 119 << 7 | (rest & 1) << 6
                             : rest        ? 118 << 7
                                           : 0;
            upper[code] = uint8_t(bits >> 8), lower[code] = uint8_t(bits);
        }
    }
};
inline void e4m3_pairs(Codes codes, __m512i *pairs) { /* of each sixteen bytes, the first eight are in pairs[0] */
    static constexpr E4m3Table table;
    const __m512i *upper = (const __m512i *)table.upper, *lower = (const __m512i *)table.lower;
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(upper), codes, _mm512_load_si512(upper + 1));
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(lower), codes, _mm512_load_si512(lower + 1));
    high = _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8(-128), 0xf8); /* | codes & sign */
    pairs[0] = _mm512_unpacklo_epi8(low, high), pairs[1] = _mm512_unpackhi_epi8(low, high);
}
inline void floats_of(__m512i pairs, F *even, F *odd) {
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
}
#endif

}  // namespace kernels_
}  // namespace
}  // namespace kt
