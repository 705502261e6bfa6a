/* What both kernels of attention share: which keys a query sees, exponentials, and how parts of the keys are joined. */
#pragma once
#include "cached.h"

namespace kt {
namespace {
namespace kernels_ {

constexpr int MOST_THREADS = 256;
inline int at_most(int threads) { return threads < MOST_THREADS ? threads : MOST_THREADS; }
constexpr float LOWEST = -3e38f; /* in place of -inf where a difference follows */
constexpr float LOG2_E = 1.44269504f;

/* 2^x for x <= 0, by the Taylor polynomial of the fraction; 0 for -inf. Weights that are rounded to bf16 need fewer terms. */
template <class T>
inline F power2(F x) {
    x = max(x, all(-200.f));
    const F n = round(x), r = sub(x, n);
    constexpr float terms[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f};
    F p = pairs<T> ? all(terms[1]) : fma(all(1.52527338e-5f), r, all(terms[0]));
#pragma GCC unroll 8
    for (int i = pairs<T> ? 2 : 1; i < 7; i++) p = fma(p, r, all(terms[i]));
    return scale2(p, n);
}

/* T: of queries and results, C: of keys and values. */
template <class T, class C>
struct Shape {
    static constexpr int64_t UNIT = __is_same(C, code8) ? CODES_OF_WORD : 1; /* of the strides of keys and values */
    const kt_attention &a;
    const int64_t group, rows, key_heads; /* a key head's rows: its queries one after the other, each with the heads of the group */
    const int64_t key_stride, value_stride;

    explicit Shape(const kt_attention &attention)
        : a(attention), group(a.heads / a.kv_heads), rows(group * a.queries), key_heads(a.batch * a.kv_heads),
          key_stride(UNIT * a.k_strides[2]), value_stride(UNIT * a.v_strides[2]) {}

    /* The keys [first, last) that a row sees. */
    int64_t first(int64_t row) const {
        const int64_t end = last(row);
        return a.window && end > a.window ? end - a.window : 0;
    }
    int64_t last(int64_t row) const { return a.keys - a.queries + row / group + 1; }

    const T *query(int64_t head, int64_t row) const {
        return static_cast<const T *>(a.q) + head / a.kv_heads * a.q_strides[0] +
               (head % a.kv_heads * group + row % group) * a.q_strides[1] + row / group * a.q_strides[2];
    }
    const C *key(int64_t head, int64_t n) const {
        return static_cast<const C *>(a.k) + UNIT * (head / a.kv_heads * a.k_strides[0] + head % a.kv_heads * a.k_strides[1]) + n * key_stride;
    }
    const C *value(int64_t head, int64_t n) const {
        return static_cast<const C *>(a.v) + UNIT * (head / a.kv_heads * a.v_strides[0] + head % a.kv_heads * a.v_strides[1]) + n * value_stride;
    }
    T *out(int64_t head, int64_t row) const {
        return static_cast<T *>(a.out) + ((head / a.kv_heads * a.queries + row / group) * a.heads + head % a.kv_heads * group + row % group) * a.value_dim;
    }
    const uint8_t *mask(int64_t head) const { return a.mask ? a.mask + head / a.kv_heads * a.keys : nullptr; }
    float sink(int64_t head, int64_t row) const { return a.sinks ? a.sinks[head % a.kv_heads * group + row % group] * LOG2_E : LOWEST; }
};

/* The softmax's state of each row after each part of the keys: the largest score, the sum of exponentials relative to it, and the values
 * weighted with them; scores are logarithms to base 2. The thread that is the last to finish a key head joins its parts. */
template <class S>
struct Parts {
    const S &shape;
    const int64_t parts;               /* of the keys */
    int64_t items;                     /* pieces of work of a key head */
    float *most, *total, *weighted;    /* [key_heads, parts, rows], weighted: [.., value_dim] */
    int64_t *finished;                 /* [key_heads] */

    /* `room`: parts that there is memory for, so that more keys never need less. */
    Parts(const S &shape, int64_t parts, int64_t room, Scratch &scratch) : shape(shape), parts(parts), items(parts) {
        const int64_t rows = shape.key_heads * room * shape.rows;
        most = scratch.take<float>(rows), total = scratch.take<float>(rows), weighted = scratch.take<float>(rows * shape.a.value_dim);
        finished = scratch.take<int64_t>(shape.key_heads);
        if (finished) memset(finished, 0, shape.key_heads * sizeof(int64_t));
    }
    int64_t at(int64_t head, int64_t part, int64_t row) const { return (head * parts + part) * shape.rows + row; }

    void done(int64_t head) {
        if (__atomic_add_fetch(finished + head, 1, __ATOMIC_ACQ_REL) == items)
            for (int64_t row = 0; row < shape.rows; row++) join(head, row);
    }

    void join(int64_t head, int64_t row) {
        const int64_t dim = shape.a.value_dim;
        const float sink = shape.sink(head, row);
        float top = sink, sum_of = 0, *found = weighted + at(head, 0, row) * dim;
        for (int64_t p = 0; p < parts; p++) top = most[at(head, p, row)] > top ? most[at(head, p, row)] : top;
        for (int64_t p = 0; p < parts; p++) {
            const float factor = exp2f(most[at(head, p, row)] - top), *from = weighted + at(head, p, row) * dim;
            sum_of += factor * total[at(head, p, row)];
            if (p)
                for (int64_t d = 0; d < dim; d++) found[d] += factor * from[d];
            else
                for (int64_t d = 0; d < dim; d++) found[d] *= factor;
        }
        if (shape.a.sinks) sum_of += exp2f(sink - top);
        const float inverse = sum_of == 0 ? 0 : 1 / sum_of; /* a row that sees nothing */
        for (int64_t d = 0; d < dim; d++) found[d] *= inverse;
        convert(found, shape.out(head, row), dim);
    }
};

}  // namespace kernels_
}  // namespace
}  // namespace kt
