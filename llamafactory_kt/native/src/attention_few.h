/* Attention of few queries: each part of the keys is one thread's work, and keys and values are read once for all rows of a key head.
 *
 * The lanes of a vector are keys while the scores are computed (squares of keys and words are transposed in registers), and the values' columns
 * while these are summed.
 */
#pragma once
#include "attention_shape.h"

namespace kt {
namespace {
namespace kernels_ {

/* Rows come into the second cache line by line, in memory order: what is computed reads columns of them, and would wait for memory. */
template <class T>
struct Ahead {
    const char *next;
    const int64_t lines, jump;
    int64_t left;
    Ahead(const T *rows, int64_t stride, int64_t n)
        : next(reinterpret_cast<const char *>(rows)), lines((bytes_of_row<T>(n) + 63) / 64), jump(stride * int64_t(sizeof(T)) - lines * 64),
          left(lines) {}
    void line() {
        _mm_prefetch(next, _MM_HINT_T1);
        next += 64;
        if (!--left) left = lines, next += jump;
    }
};

template <class T, class C>
struct FewQueries {
    static constexpr bool CODED = __is_same(C, code8); /* queries and weights are shorts then, each row with a scale */
    static constexpr int64_t PART = 256;          /* keys; whose sums of shorts and codes stay within 32 bits */
    static constexpr int MOST = ROWS_AT_ONCE;     /* rows whose sums stay in registers */
    static constexpr int64_t WORDS = PART / PER_WORD<C>;
    static_assert(PART * MOST_SHORT * MOST_CODE < 1ll << 31);
    const Shape<T, C> shape;
    const kt_attention &a;
    const int64_t begin; /* the first key that a query sees */
    Parts<Shape<T, C>> joined;
    struct Memory {
        X<C> *queries;            /* [MOST][width] */
        float *scores, *weights;  /* [MOST][PART], [MOST][WORDS] */
        float *key_scales, *value_scales, *query_scales, *weight_scales; /* of codes: [PART], [PART], [MOST], [MOST] */
    };
    int64_t width; /* key_dim and zeros */
    char *memory;
    int64_t bytes;

    FewQueries(const kt_attention &attention, int threads, Scratch &scratch)
        : shape(attention), a(attention), begin(shape.first(0)), joined(shape, parts_of(a.keys - begin), parts_of(a.keys), scratch) {
        width = whole(a.key_dim, L * PER_WORD<C>);
        Scratch own(nullptr);
        lay(own);
        bytes = own.used(), memory = scratch.take<char>(bytes * threads);
    }

    static int64_t parts_of(int64_t keys) { return (keys + PART - 1) / PART; }

    Memory lay(Scratch &s) const {
        Memory m;
        m.queries = s.take<X<C>>(MOST * width), m.scores = s.take<float>(MOST * PART);
        m.weights = pairs<C> ? s.take<float>(MOST * WORDS) : m.scores;
        if (CODED) m.key_scales = s.take<float>(PART), m.value_scales = s.take<float>(PART), m.query_scales = s.take<float>(MOST), m.weight_scales = s.take<float>(MOST);
        return m;
    }

    void compute(const Team &team) {
        Scratch own(memory + team.thread * bytes);
        const Memory m = lay(own);
        memset(m.queries, 0, MOST * width * sizeof(X<C>));
        const Range mine(shape.key_heads * joined.parts, 1, team);
        for (int64_t n = mine.first; n < mine.last; n++) {
            const int64_t head = n / joined.parts, part = n % joined.parts;
            for (int64_t r = 0; r < shape.rows; r += MOST)
                with_count<MOST>(shape.rows - r, [&](auto count) { rows<decltype(count)::n>(m, head, part, r, n + 1 < mine.last ? n + 1 : n); });
            joined.done(head);
        }
    }

    template <int N>
    void rows(const Memory &m, int64_t head, int64_t part, int64_t row, int64_t next) {
        const int64_t last = shape.last(row + N - 1), from = begin + part * PART, keys = last - from < PART ? last - from : PART;
        for (int n = 0; n < N; n++)
            if constexpr (CODED) m.query_scales[n] = to_whole(shape.query(head, row + n), m.queries + n * width, a.key_dim, most_short(a.key_dim));
            else convert(shape.query(head, row + n), m.queries + n * width, a.key_dim);
        for (int64_t k = 0; k < keys; k += L) {
            const C *own = shape.key(head, from + k), *values = shape.value(head, from + k);
            const int64_t count = keys - k < L ? keys - k : L;
            if constexpr (N == 1) scores<1, true>(own, values, count, m.queries, m.scores + k);
            else if constexpr (N == 2) scores<2, true>(own, values, count, m.queries, m.scores + k);
            else scores<4, true>(own, values, count, m.queries, m.scores + k);
            if constexpr (N > 4) scores<4, false>(own, values, count, m.queries + 4 * width, m.scores + 4 * PART + k);
        }
        if constexpr (CODED) {
            scales_of(shape.key(head, from), shape.key_stride, a.key_dim, keys, m.key_scales);
            scales_of(shape.value(head, from), shape.value_stride, a.value_dim, keys, m.value_scales);
        }
        for (int n = 0; n < N; n++) softmax(m, n, from, keys, head, part, row + n);
        Ahead<C> ahead(shape.key(next / joined.parts, begin + next % joined.parts * PART), shape.key_stride, a.key_dim);
        for (int64_t d = 0; d < a.value_dim; d += 2 * L)
            columns<N>(ahead, shape.value(head, from) + d, keys, a.value_dim - d, m, joined.weighted + joined.at(head, part, row) * a.value_dim + d);
    }

    /* Scores of up to L keys and R rows: blocks of L sums. Meanwhile the values come, and the keys of the first part. */
    template <int R, bool AHEAD>
    void scores(const C *keys, const C *values, int64_t count, const X<C> *queries, float *out) {
        constexpr int step = L * PER_WORD<C>, K = L / R;
        const int64_t stride = shape.key_stride;
        Ahead<C> keys_ahead(keys + 2 * L * stride, stride, a.key_dim), values_ahead(values, shape.value_stride, a.value_dim);
        for (int64_t k = 0; k < count; k += K, keys += K * stride, out += K) {
            const bool all_there = count - k >= K;
            F sums[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) sums[i] = zero();
            for (int64_t i = 0; i < a.key_dim; i += step) {
                F rows[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) rows[r] = words_multiplied<C>(queries + r * width + i);
                const int64_t n = a.key_dim - i;
                if (all_there && n >= step) {
#pragma GCC unroll 16
                    for (int j = 0; j < K; j++) {
                        if (AHEAD) keys_ahead.line(), values_ahead.line();
                        const F own = words(keys + j * stride + i);
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) sums[r * K + j] = multiply_add<C>(own, rows[r], sums[r * K + j]);
                    }
                } else {
#pragma GCC unroll 16
                    for (int j = 0; j < K; j++) {
                        const F own = k + j < count ? words(keys + j * stride + i, n) : zero();
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) sums[r * K + j] = multiply_add<C>(own, rows[r], sums[r * K + j]);
                    }
                }
            }
            alignas(64) float found[L];
            if constexpr (CODED) store(found, floats_of_whole(sums_of(sums, add_whole)));
            else store(found, sums_of(sums, add));
            for (int r = 0; r < R; r++) memcpy(out + r * PART, found + r * K, K * sizeof(float));
        }
    }

    /* A row's weights: the exponentials of its scores relative to the largest, and zeros for keys that it does not see. */
    void softmax(const Memory &m, int64_t n, int64_t from, int64_t keys, int64_t head, int64_t part, int64_t row) {
        float *s = m.scores + n * PART;
        if constexpr (CODED)
            for (int64_t i = 0; i < keys; i += L) store(s + i, mul(load(s + i), load(m.key_scales + i)));
        float factor = (CODED ? m.query_scales[n] : 1) * a.scale * LOG2_E;
        if (factor < 1e-37f) factor = 1e-37f; /* of a query of zeros: the scores of keys that it does not see stay -inf. NaN stays NaN */
        const int64_t lower = shape.first(row) - from, upper = shape.last(row) - from;
        const uint8_t *mask = shape.mask(head);
        for (int64_t i = 0; i < lower && i < keys; i++) s[i] = -INFINITY;
        for (int64_t i = upper < 0 ? 0 : upper; i < whole(keys, L); i++) s[i] = -INFINITY;
        for (int64_t i = keys; i < whole(keys, L); i++) s[i] = -INFINITY;
        if (mask)
            for (int64_t i = 0; i < keys; i++)
                if (!mask[from + i]) s[i] = -INFINITY;
        F most = all(-INFINITY), sums = zero();
        for (int64_t i = 0; i < keys; i += L) most = max(load(s + i), most);
        float top = largest_of(most) * factor;
        if (!(top > LOWEST)) top = LOWEST;
        const F scale = all(factor), minus = all(-top);
        Whole found;
        X<C> *weights = reinterpret_cast<X<C> *>(m.weights + n * WORDS);
        for (int64_t i = 0; i < keys; i += L) {
            const F weight = power2<C>(fma(load(s + i), scale, minus));
            sums = add(sums, weight);
            if constexpr (CODED) {
                const F own = mul(weight, load(m.value_scales + i));
                store(s + i, own), found.see(own);
            } else {
                store(weights + i, weight);
            }
        }
        if constexpr (CODED) found.write(s, weights, whole(keys, L), MOST_SHORT), m.weight_scales[n] = found.scale;
        joined.most[joined.at(head, part, row)] = top, joined.total[joined.at(head, part, row)] = sum(sums);
    }

    /* Sums of two vectors of columns, n of them there, over the keys. Meanwhile the next part's keys come. */
    template <int N>
    void columns(Ahead<C> &ahead, const C *values, int64_t keys, int64_t n, const Memory &m, float *out) {
        F sums[N][2];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) sums[j][0] = sums[j][1] = zero();
        const int64_t stride = shape.value_stride;
        const float *weights = m.weights;
        for (int64_t k = 0; k < keys; k += PER_WORD<C>, values += PER_WORD<C> * stride, weights++) {
            F own[2];
            ahead.line(), ahead.line();
            if constexpr (pairs<C>) {
                interleave(words(values, n), k + 1 < keys ? words(values + stride, n) : zero(), own);
            } else {
                own[0] = floats(values, n), own[1] = n > L ? floats(values + L, n - L) : zero();
            }
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const F one = all(weights[j * WORDS]);
                sums[j][0] = multiply_add<C>(one, own[0], sums[j][0]), sums[j][1] = multiply_add<C>(one, own[1], sums[j][1]);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < N; j++, out += a.value_dim) {
            if constexpr (CODED)
                for (F &whole : sums[j]) whole = mul(floats_of_whole(whole), all(m.weight_scales[j]));
            if constexpr (pairs<C>) in_order(sums[j]);
            store_some(out, sums[j][0], n);
            if (n > L) store_some(out + L, sums[j][1], n - L);
        }
    }
};

}  // namespace kernels_
}  // namespace
}  // namespace kt
