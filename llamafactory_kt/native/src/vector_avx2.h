/* Eight floats at a time, and the checkpoint's dtypes as they are loaded into them. */
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

using F = __m256;
constexpr int L = 8;            /* floats of a vector */

inline F zero() { return _mm256_setzero_ps(); }
inline F all(float v) { return _mm256_set1_ps(v); }
inline F load(const float *p) { return _mm256_loadu_ps(p); }
inline F load(const bf16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
inline F load(const f16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
inline F load_part(const float *p, int n) {
    alignas(32) static const int32_t lanes[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(lanes + 8 - n)));
}
inline void store(float *p, F v) { _mm256_storeu_ps(p, v); }
inline void store(bf16 *p, F v) { /* to nearest, ties to even; NaN stays NaN */
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(halves));
}
inline void store(f16 *p, F v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(b, a); } /* the operand order keeps NaN of a */
inline F max(F a, F b) { return _mm256_max_ps(b, a); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale2(F a, F power) { /* a * 2^power in two steps, so that neither factor leaves the normal numbers */
    __m256i whole = _mm256_cvtps_epi32(power), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    __m256i bias = _mm256_set1_epi32(127);
    F first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    return mul(mul(a, first), _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
inline F zero_below(F v, F x, float bound) { return _mm256_andnot_ps(_mm256_cmp_ps(x, all(bound), _CMP_LT_OQ), v); }
inline float sum(F v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline F larger(F high, F low) { return _mm256_blendv_ps(low, high, _mm256_cmp_ps(high, _mm256_sub_ps(zero(), low), _CMP_GE_OQ)); } /* of two, by magnitude */
inline F where_less(F a, F b, F v, F w) { return _mm256_blendv_ps(w, v, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F at_least(F v, F x, F bound) { /* v where x >= bound, elsewhere -inf */
    return _mm256_blendv_ps(all(-__builtin_inff()), v, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
}
template <class Add>
inline F sums_of(F *each, Add add) { /* lane i: the sum of each[i] */
#pragma GCC unroll 8
    for (int i = 0; i < L; i += 2) each[i] = add(_mm256_unpacklo_ps(each[i], each[i + 1]), _mm256_unpackhi_ps(each[i], each[i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < L; i += 4) {
        const __m256d a = _mm256_castps_pd(each[i]), b = _mm256_castps_pd(each[i + 2]);
        each[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return add(_mm256_permute2f128_ps(each[0], each[4], 0x20), _mm256_permute2f128_ps(each[0], each[4], 0x31));
}
inline void transpose(F *rows) { /* of a square of L rows */
    F a[L], b[L];
#pragma GCC unroll 8
    for (int i = 0; i < L; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]), a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < L; i++) {
        const __m256d x = _mm256_castps_pd(a[i / 4 * 4 + i / 2 % 2]), y = _mm256_castps_pd(a[i / 4 * 4 + i / 2 % 2 + 2]);
        b[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20), rows[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

/* Codes of weights: bytes as they lie in memory. */
using Codes = __m256i;
inline Codes load_codes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
struct Table { /* sixteen values */
    F first, second;
    explicit Table(const float *p) : first(load(p)), second(load(p + 8)) {}
};
template <int SHIFT>
inline F look_up(Codes codes, const Table &table) { /* lane i: of four bits of the word i */
    const __m256i index = _mm256_srli_epi32(codes, SHIFT);
    const F a = _mm256_permutevar8x32_ps(table.first, index), b = _mm256_permutevar8x32_ps(table.second, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
template <int SHIFT>
inline F signed_byte(Codes codes) { /* lane i: a byte of the word i */
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - SHIFT), 24));
}
inline F load_e4m3(const uint8_t *p) { /* times 2^-8: its bits within those of a half number, whose exponent is wider by one bit. NaN stays NaN */
    const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), ones = _mm_set1_epi16(127);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(words, ones), ones);
    const __m128i halves = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(int16_t(0xbfff)));
    return _mm256_cvtph_ps(_mm_or_si128(halves, _mm_slli_epi16(nan, 10)));
}
template <int N>
inline F spread(const float *p) { /* each of N values in L / N lanes */
    if constexpr (N == 1) return all(*p);
    return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
}
inline float float_of(float v) { return v; }
inline float float_of(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}
template <int N>
inline F spread(const bf16 *p) {
    if constexpr (N == 1) return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi16(int16_t(p->bits)), _mm256_set1_epi32(int32_t(0xffff0000))));
    int32_t both;
    memcpy(&both, p, sizeof both);
    const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(both), upper));
}

/* Codes of a cache, multiplied as pairs of shorts; these, and their sums of 32 bits, stand in vectors of floats. */
struct code8 {
    int8_t code;
};
inline F load(const code8 *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
inline F load_shorts(const code8 *p) { return _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p))); }
inline F load_shorts(const int16_t *p) { return _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline __m128i shorts_of(F v) { /* to nearest */
    const __m256i whole = _mm256_cvtps_epi32(v);
    return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}
inline void store(code8 *p, F v) { _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(shorts_of(v), shorts_of(v))); }
inline void store(int16_t *p, F v) { _mm_storeu_si128((__m128i *)p, shorts_of(v)); }
inline F add_whole(F a, F b) { return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
inline F dot_shorts(F sums, F a, F b) {
    return add_whole(sums, _mm256_castsi256_ps(_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b))));
}
inline F floats_of_whole(F v) { return _mm256_cvtepi32_ps(_mm256_castps_si256(v)); }
inline void interleave(F a, F b, F *pairs) { /* of each four neighbors of a and b: the first half of the words, the second */
    pairs[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    pairs[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline void in_order(F *halves) { /* the floats of words that were interleaved */
    const F low = _mm256_permute2f128_ps(halves[0], halves[1], 0x20), high = _mm256_permute2f128_ps(halves[0], halves[1], 0x31);
    halves[0] = low, halves[1] = high;
}

/* Bytes without a sign from half bytes, and their products with numbers of 16 bits. They, and sums of 32 bits, stand in vectors of floats. */
struct BytesTable { /* sixteen values * factor + offset, whole numbers from 0 to 63 */
    __m256i values;
    BytesTable(const float *p, float factor, int offset) {
        alignas(16) uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = uint8_t(int(p[i] * factor) + offset);
        values = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)bytes));
    }
};
inline void look_up_bytes(Codes codes, const BytesTable &table, F *halves) { /* of the lower halves of bytes, of the upper ones */
    const __m256i mask = _mm256_set1_epi8(15);
    halves[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(table.values, _mm256_and_si256(codes, mask)));
    halves[1] = _mm256_castsi256_ps(_mm256_shuffle_epi8(table.values, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask)));
}
inline F dot_bytes(F low, F high, const int8_t *x) { /* x: upper bytes for low and for high, lower bytes for both, what is added to the sums */
    auto part = [](const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); };
    const __m256i a = _mm256_castps_si256(low), b = _mm256_castps_si256(high);
    const __m256i upper = _mm256_add_epi16(_mm256_maddubs_epi16(a, part(x)), _mm256_maddubs_epi16(b, part(x + 32)));
    const __m256i lower = _mm256_add_epi16(_mm256_maddubs_epi16(a, part(x + 64)), _mm256_maddubs_epi16(b, part(x + 96)));
    const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(upper, _mm256_set1_epi16(256)), _mm256_madd_epi16(lower, _mm256_set1_epi16(1)));
    return _mm256_castsi256_ps(_mm256_add_epi32(sums, part(x + 128)));
}

/* out[r * ldo + n] = the sum of s[n][r]. */
inline void sum_blocks(const F (&s)[4][3], float *out, int64_t ldo) {
    for (int r = 0; r < 3; r++) {
        F all_of = _mm256_hadd_ps(_mm256_hadd_ps(s[0][r], s[1][r]), _mm256_hadd_ps(s[2][r], s[3][r]));
        _mm_storeu_ps(out + r * ldo, _mm_add_ps(_mm256_castps256_ps128(all_of), _mm256_extractf128_ps(all_of, 1)));
    }
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
