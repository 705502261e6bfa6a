/* Attention of many queries (Dao 2023, FlashAttention-2): rows are the lanes of a vector, keys and values come block by block.
 *
 * A thread takes some rows of a key head and goes once through the keys that they see. Each block of keys and values is packed once for all
 * of these rows; scores, weights and sums of a panel of rows stay in the caches, and each lane has a softmax of its own. So memory does not
 * grow with the queries, and a row's sums are the same whoever takes it.
 */
#pragma once
#include "attention_shape.h"

namespace kt {
namespace {
namespace kernels_ {

template <class T, class C>
struct ManyQueries {
    static constexpr bool CODED = __is_same(C, code8); /* each block is decoded for all of a thread's rows */
    static constexpr int PW = PER_WORD<T>;
    static constexpr int64_t TAKE = 256, PART = 1024, ITEMS = 64; /* rows; keys; pieces of work that keep many threads busy */
    const Shape<T, C> shape;
    const kt_attention &a;
    const int64_t block, room, part; /* keys of a block, parts and keys of one: where rows are few, these are pieces of work too */
    Parts<Shape<T, C>> joined;
    int64_t take, takes, value_width, key_panel, value_panel;
    struct Memory {
        float *keys, *values;           /* of a block: [block / L][words][L], [value_dim / L][words of keys][L] */
        T *decoded_keys, *decoded_values; /* of codes: [block][key_dim], [block][value_dim] */
        float *queries, *sums;          /* of each panel: [words][LANES], [value_dim][LANES] */
        float *most, *total;            /* [TAKE], so that more threads never need less */
        float *scores, *weights;        /* of a panel and block: [block][LANES], [words of keys][LANES] */
    };
    char *memory;
    int64_t bytes, next = 0;

    ManyQueries(const kt_attention &attention, int threads, Scratch &scratch)
        : shape(attention), a(attention), block(a.key_dim + a.value_dim > 512 ? 128 : 256), room(most_parts()),
          part(room ? whole((a.keys + room - 1) / room, PART) : a.keys), joined(shape, room ? (a.keys + part - 1) / part : 0, room, scratch) {
        for (take = TAKE; take > LANES && pieces(take) * (room + !room) < 4 * threads;) take /= 2;
        takes = (shape.rows + take - 1) / take, joined.items = takes * joined.parts;
        key_panel = panel_size<T>(a.key_dim), value_panel = block / PW * L + L, value_width = whole(a.value_dim, L);
        Scratch own(nullptr);
        lay(own);
        bytes = own.used(), memory = scratch.take<char>(bytes * threads);
    }

    int64_t pieces(int64_t rows) const { return shape.key_heads * ((shape.rows + rows - 1) / rows); }

    int64_t most_parts() const { /* 0: the keys are not divided */
        const int64_t wanted = ITEMS / pieces(LANES), there = (a.keys + PART - 1) / PART, found = wanted < there ? wanted : there;
        return found > 1 ? found : 0;
    }

    Memory lay(Scratch &s) const {
        Memory m;
        m.keys = s.take<float>(block / L * key_panel), m.values = s.take<float>(value_width / L * value_panel);
        if (CODED) m.decoded_keys = s.take<T>(block * a.key_dim), m.decoded_values = s.take<T>(block * a.value_dim);
        m.queries = s.take<float>(TAKE / L * key_panel), m.sums = s.take<float>(TAKE * value_width);
        m.most = s.take<float>(TAKE), m.total = s.take<float>(TAKE);
        m.scores = s.take<float>(block * LANES), m.weights = pairs<T> ? s.take<float>(block / PW * LANES) : m.scores;
        return m;
    }

    void compute(const Team &team) {
        Scratch own(memory + team.thread * bytes);
        const Memory m = lay(own);
        const int64_t each = shape.key_heads * (joined.parts + !joined.parts);
        for (int64_t n; (n = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < takes * each;) /* rows that see most come first */
            rows(m, n % shape.key_heads, (takes - 1 - n / each) * take, n % each / shape.key_heads);
    }

    void rows(const Memory &m, int64_t head, int64_t row, int64_t number) {
        const int64_t count = shape.rows - row < take ? shape.rows - row : take;
        for (int64_t r = 0; r < whole(count, LANES); r += L)
            pack_rows<T>([&](int i) { return shape.query(head, row + r + i); }, count - r, a.key_dim,
                         m.queries + r / LANES * VECTORS * key_panel + r % LANES, LANES);
        for (int64_t r = 0; r < whole(count, LANES); r++) {
            const bool sink = a.sinks && !joined.parts;
            m.most[r] = sink && r < count ? shape.sink(head, row + r) : LOWEST, m.total[r] = sink;
        }
        memset(m.sums, 0, whole(count, LANES) * value_width * sizeof(float));
        const int64_t last = shape.last(row + count - 1), end = (number + 1) * part < last ? (number + 1) * part : last;
        const int64_t first = shape.first(row) / block * block;
        for (int64_t from = number * part > first ? number * part : first; from < end; from += block) {
            const int64_t keys = end - from < block ? end - from : block;
            const C *of_keys = shape.key(head, from), *of_values = shape.value(head, from);
            if constexpr (CODED) {
                decode_rows(of_keys, shape.key_stride, keys, a.key_dim, m.decoded_keys);
                decode_rows(of_values, shape.value_stride, keys, a.value_dim, m.decoded_values);
                pack(m, m.decoded_keys, a.key_dim, m.decoded_values, a.value_dim, keys);
            } else {
                pack(m, of_keys, shape.key_stride, of_values, shape.value_stride, keys);
            }
            for (int64_t r = 0; r < count; r += LANES) panel(m, r, head, row + r, count - r < LANES ? count - r : LANES, from, keys);
        }
        for (int64_t r = 0; r < count; r += L) write(m, r, head, row + r, count - r, number);
        if (joined.parts) joined.done(head);
    }

    void pack(const Memory &m, const T *of_keys, int64_t key_stride, const T *of_values, int64_t value_stride, int64_t keys) {
        for (int64_t k = 0; k < keys; k += L)
            pack_rows<T>([&](int i) { return of_keys + (k + i) * key_stride; }, keys - k, a.key_dim, m.keys + k / L * key_panel, L);
        pack_columns(of_values, value_stride, keys, a.value_dim, m.values, value_panel);
    }

    /* A panel of `count` rows and a block of keys: those that some row sees, in whole words. */
    void panel(const Memory &m, int64_t r, int64_t head, int64_t row, int64_t count, int64_t from, int64_t keys) {
        const int64_t first = shape.first(row) - from, last = shape.last(row + count - 1) - from;
        const int64_t begin = first < 0 ? 0 : first / ROWS_AT_ONCE * ROWS_AT_ONCE, end = whole(last < keys ? last : keys, ROWS_AT_ONCE);
        if (begin >= end) return;
        const float *queries = m.queries + r / L * key_panel;
        for (int64_t k = begin; k < end; k += ROWS_AT_ONCE)
            outer<T, false>(m.keys + k / L * key_panel + k % L, queries, (a.key_dim + PW - 1) / PW, nullptr, m.scores + k * LANES);
        F most[VECTORS];
        alignas(64) float factors[LANES];
        hide(m.scores, most, head, row, count, from, keys, begin, end);
        weigh(m, most, factors, r, begin, end);
        for (int64_t d = 0; d < value_width; d += ROWS_AT_ONCE)
            outer<T, true>(m.values + d / L * value_panel + begin / PW * L + d % L, m.weights + begin / PW * LANES, (end - begin) / PW, factors,
                           m.sums + r * value_width + d * LANES);
    }

    /* -inf for what a row does not see; each lane's largest score. */
    void hide(float *scores, F *most, int64_t head, int64_t row, int64_t count, int64_t from, int64_t keys, int64_t begin, int64_t end) {
        const int64_t lower = shape.first(row + count - 1) - from, upper = shape.last(row) - from; /* between them, all rows see all */
        const uint8_t *mask = shape.mask(head);
        F first[VECTORS], last[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            alignas(64) float of[2][L];
            for (int l = 0; l < L; l++) {
                const int64_t own = row + (v * L + l < count ? v * L + l : count - 1);
                of[0][l] = float(shape.first(own) - from), of[1][l] = float(shape.last(own) - 1 - from);
            }
            first[v] = load(of[0]), last[v] = load(of[1]), most[v] = all(-INFINITY);
        }
        for (int64_t k = begin; k < end; k++) {
            const bool edge = k < lower || k >= upper, unseen = k >= keys || (mask && !mask[from + k]);
            const F at = all(float(k));
            for (int v = 0; v < VECTORS; v++) {
                float *s = scores + k * LANES + v * L;
                F found = load(s);
                if (unseen) store(s, found = all(-INFINITY));
                if (edge) store(s, found = at_least(at_least(found, at, first[v]), last[v], at));
                most[v] = max(found, most[v]);
            }
        }
    }

    /* Exponentials relative to the largest score so far, and the factors of the sums so far. */
    void weigh(const Memory &m, const F *most, float *factors, int64_t r, int64_t begin, int64_t end) {
        const F scale = all(a.scale * LOG2_E);
        for (int v = 0; v < VECTORS; v++) {
            float *top = m.most + r + v * L, *total = m.total + r + v * L;
            const F now = max(max(mul(most[v], scale), load(top)), all(LOWEST)), factor = power2<float>(sub(load(top), now));
            const F minus = sub(zero(), now);
            F sums = mul(factor, load(total));
            const float *s = m.scores + begin * LANES + v * L;
            float *weights = m.weights + begin / PW * LANES + v * L;
            for (int64_t k = begin; k < end; k += PW, s += PW * LANES, weights += LANES) {
                F weight = power2<T>(fma(load(s), scale, minus));
                sums = add(sums, weight);
#ifdef KT_BF16_PAIRS
                if constexpr (pairs<T>) {
                    const F other = power2<T>(fma(load(s + LANES), scale, minus));
                    sums = add(sums, other), weight = pair(weight, other);
                }
#endif
                store(weights, weight);
            }
            store(top, now), store(total, sums), store(factors + v * L, factor);
        }
    }

    /* Up to L rows of the result, or of a part. */
    void write(const Memory &m, int64_t r, int64_t head, int64_t row, int64_t count, int64_t number) {
        const F total = load(m.total + r);
        const F factor = joined.parts ? all(1) : zero_below(div(all(1), total), total, 1e-37f); /* zeros for a row that sees nothing */
        const float *sums = m.sums + r / LANES * LANES * value_width + r % LANES;
        for (int64_t d = 0; d < a.value_dim; d += L) {
            F square[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) square[i] = mul(load(sums + (d + i) * LANES), factor);
            transpose(square);
            for (int i = 0; i < L && i < count; i++)
                if (joined.parts)
                    store_some(joined.weighted + joined.at(head, number, row + i) * a.value_dim + d, square[i], a.value_dim - d);
                else
                    store_some(shape.out(head, row + i) + d, square[i], a.value_dim - d);
        }
        for (int i = 0; joined.parts && i < L && i < count; i++) {
            const int64_t at = joined.at(head, number, row + i);
            joined.most[at] = m.most[r + i], joined.total[at] = m.total[r + i];
        }
    }
};

}  // namespace kernels_
}  // namespace
}  // namespace kt
