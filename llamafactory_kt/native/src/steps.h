/* The steps of a decoder layer for one token, one after the other: what lies between the products is small, and a call from Python for each of
 * it takes longer than computing it. All but the products runs on the calling thread. */
#pragma once
#include "cached.h"
#include "norm.h"

namespace kt {
namespace {
namespace kernels_ {

constexpr int PIECE = 256; /* floats that lie in the first cache between loading and storing */

/* n values of a dtype, each stride apart (0: one value), as floats. */
inline void load_row(const void *from, int32_t dtype, int64_t stride, float *to, int64_t n) {
    if (dtype == KT_BOOL) {
        for (int64_t i = 0; i < n; i++) to[i] = static_cast<const uint8_t *>(from)[i * stride];
        return;
    }
    with_dtype(dtype, [&](auto tag) {
        const auto *values = static_cast<const typename decltype(tag)::type *>(from);
        if (stride == 1)
            convert(values, to, n);
        else
            for (int64_t i = 0; i < n; i++) to[i] = value(values[i * stride]);
    });
}

inline void store_row(const float *from, void *to, int32_t dtype, int64_t stride, int64_t n) {
    if (dtype == KT_BOOL) {
        for (int64_t i = 0; i < n; i++) static_cast<uint8_t *>(to)[i * stride] = from[i] != 0;
        return;
    }
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        T *values = static_cast<T *>(to);
        if (stride == 1)
            convert(from, values, n);
        else
            for (int64_t i = 0; i < n; i++) values[i * stride] = as<T>(from[i]);
    });
}

inline int64_t itemsize(int32_t dtype) { return dtype == KT_F32 ? 4 : dtype == KT_BOOL ? 1 : dtype == KT_I64 || dtype == KT_C64 ? 8 : 2; }

/* x[i] = f(x[i], y[i]) for n floats; both have room for a vector more. */
template <class Call>
inline void map(float *x, const float *y, int64_t n, Call f) {
    for (int64_t i = 0; i < n; i += L) store(x + i, f(load(x + i), load(y + i)));
}

inline F sigmoid(F x) { return div(all(1.f), add(all(1.f), exponential(sub(zero(), x)))); }

inline void compute(const kt_step &s, float *x, float *y, int64_t n) {
    const F alpha = all(float(s.alpha)), beta = all(float(s.beta));
    auto one = [&](auto f) { map(x, x, n, [&](F v, F) { return f(v); }); };
    switch (s.op) {
        case KT_STEP_COPY: return;
        case KT_STEP_FILL: return one([&](F) { return alpha; });
        case KT_STEP_ADD: return map(x, y, n, [&](F a, F b) { return fma(b, alpha, a); });
        case KT_STEP_MUL: return map(x, y, n, [](F a, F b) { return mul(a, b); });
        case KT_STEP_DIV: return map(x, y, n, [](F a, F b) { return div(a, b); });
        case KT_STEP_RSUB: return map(x, y, n, [&](F a, F b) { return sub(b, mul(a, alpha)); });
        case KT_STEP_SILU: return one([](F v) { return mul(v, sigmoid(v)); });
        case KT_STEP_SIGMOID: return one([](F v) { return sigmoid(v); });
        case KT_STEP_GELU: return one([](F v) { return gelu(v); });
        case KT_STEP_GELU_TANH: return one([](F v) { return gelu_tanh(v); });
        case KT_STEP_EXP: return one([](F v) { return exponential(v); });
        case KT_STEP_CLAMP: return one([&](F v) { return min(max(v, alpha), beta); });
        case KT_STEP_NEG: return one([](F v) { return sub(zero(), v); });
        case KT_STEP_SQUARE: return one([](F v) { return mul(v, v); });
        case KT_STEP_RSQRT:
            for (int64_t i = 0; i < n; i++) x[i] = 1.f / sqrtf(x[i]);
            return;
        case KT_STEP_SQRT:
            for (int64_t i = 0; i < n; i++) x[i] = sqrtf(x[i]);
            return;
        case KT_STEP_NOT:
            for (int64_t i = 0; i < n; i++) x[i] = x[i] == 0;
            return;
        case KT_STEP_FILL_WHERE:
            for (int64_t i = 0; i < n; i++) x[i] = y[i] != 0 ? float(s.alpha) : x[i];
            return;
    }
}

/* n products of complex numbers, pairs of floats. */
inline void complex_row(const kt_step &s, int64_t to, int64_t a, int64_t b, int64_t n) {
    const float *x = static_cast<const float *>(s.a) + 2 * a, *y = static_cast<const float *>(s.b) + 2 * b;
    float *out = static_cast<float *>(s.out) + 2 * to;
    for (int64_t i = 0; i < n; i++) {
        const float *u = x + 2 * i * s.strides[1][3], *v = y + 2 * i * s.strides[2][3];
        const float real = u[0] * v[0] - u[1] * v[1], imaginary = u[0] * v[1] + u[1] * v[0];
        float *found = out + 2 * i * s.strides[0][3];
        found[0] = real, found[1] = imaginary;
    }
}

/* out = f(a, b) element by element, over four dimensions; without b, the second operand is the number beta. */
inline void elementwise(const kt_step &s) {
    alignas(64) float x[PIECE + 16], y[PIECE + 16];
    const int64_t *sizes = s.sizes, size_a = itemsize(s.dtypes[1]), size_b = itemsize(s.dtypes[2]), size_out = itemsize(s.dtypes[0]);
    for (int i = 0; i < PIECE + 16; i++) x[i] = 0, y[i] = float(s.beta);
    for (int64_t i = 0; i < sizes[0]; i++)
        for (int64_t j = 0; j < sizes[1]; j++)
            for (int64_t k = 0; k < sizes[2]; k++)
                for (int64_t l = 0; l < sizes[3]; l += PIECE) {
                    const int64_t n = sizes[3] - l < PIECE ? sizes[3] - l : PIECE;
                    auto at = [&](int which) {
                        const int64_t *t = s.strides[which];
                        return i * t[0] + j * t[1] + k * t[2] + l * t[3];
                    };
                    if (s.op == KT_STEP_COMPLEX_MUL) {
                        complex_row(s, at(0), at(1), at(2), n);
                        continue;
                    }
                    if (s.a) load_row(static_cast<const char *>(s.a) + at(1) * size_a, s.dtypes[1], s.strides[1][3], x, n);
                    if (s.b) load_row(static_cast<const char *>(s.b) + at(2) * size_b, s.dtypes[2], s.strides[2][3], y, n);
                    compute(s, x, y, n);
                    store_row(x, static_cast<char *>(s.out) + at(0) * size_out, s.dtypes[0], s.strides[0][3], n);
                }
}

/* The largest n of each row of floats, in order, of equal ones the first; and where they stand. */
inline void top(const float *x, int64_t width, int64_t n, float *found, int64_t *index) {
    int64_t held = 0;
    for (int64_t i = 0; i < width; i++) {
        if (held == n && !(x[i] > found[n - 1]) && x[i] == x[i]) continue;
        int64_t at = held < n ? held++ : n - 1;
        for (; at > 0 && (x[i] > found[at - 1] || (x[i] != x[i] && found[at - 1] == found[at - 1])); at--) found[at] = found[at - 1], index[at] = index[at - 1];
        found[at] = x[i], index[at] = i;
    }
}

/* Steps over whole rows: a [sizes[0], width], contiguous, floats of any dtype. */
inline void row_wise(const kt_step &s, float *x) {
    const int64_t width = s.sizes[1];
    int64_t *index = static_cast<int64_t *>(s.b);
    for (int64_t r = 0; r < s.sizes[0]; r++) {
        char *out = static_cast<char *>(s.out);
        if (s.op == KT_STEP_SCATTER) {
            const float value = float(s.alpha);
            for (int64_t i = 0; i < s.n; i++)
                store_row(&value, out + (r * width + index[r * s.n + i]) * itemsize(s.dtypes[0]), s.dtypes[0], 1, 1);
            continue;
        }
        load_row(static_cast<const char *>(s.a) + r * width * itemsize(s.dtypes[1]), s.dtypes[1], 1, x, width);
        if (s.op == KT_STEP_SUM) {
            F sums = zero();
            int64_t i = 0;
            for (; i + L <= width; i += L) sums = add(sums, load(x + i));
            float found = sum(sums);
            for (; i < width; i++) found += x[i];
            found *= float(s.alpha);
            store_row(&found, out + r * itemsize(s.dtypes[0]), s.dtypes[0], 1, 1);
        } else if (s.op == KT_STEP_SOFTMAX) {
            float most = -INFINITY, total = 0;
            for (int64_t i = 0; i < width; i++) most = x[i] > most || x[i] != x[i] ? x[i] : most;
            for (int64_t i = width; i % L; i++) x[i] = -INFINITY;
            for (int64_t i = 0; i < width; i += L) store(x + i, zero_below(exponential(sub(load(x + i), all(most))), load(x + i), -3e38f));
            for (int64_t i = 0; i < width; i++) total += x[i];
            for (int64_t i = 0; i < width; i++) x[i] /= total;
            store_row(x, out + r * width * itemsize(s.dtypes[0]), s.dtypes[0], 1, width);
        } else if (s.op == KT_STEP_TOPK) {
            float *found = x + (width + 15) / 16 * 16;
            top(x, width, s.n, found, index + r * s.n);
            store_row(found, out + r * s.n * itemsize(s.dtypes[0]), s.dtypes[0], 1, s.n);
        } else if (s.op == KT_STEP_GATHER) {
            float *found = x + (width + 15) / 16 * 16;
            for (int64_t i = 0; i < s.n; i++) found[i] = x[index[r * s.n + i]];
            store_row(found, out + r * s.n * itemsize(s.dtypes[0]), s.dtypes[0], 1, s.n);
        }
    }
}

/* Floats that row_wise needs beside a row: those it chooses. */
inline int64_t row_floats(const kt_step &s) { return (s.sizes[1] + 15) / 16 * 16 + s.n + 32; }

int64_t step_scratch(const kt_step &s, int threads) {
    switch (s.op) {
        case KT_STEP_LINEAR: return linears_scratch(*static_cast<const kt_linears *>(s.call), s.n, threads);
        case KT_STEP_EXPERTS: return experts_scratch(*static_cast<const kt_experts *>(s.call), s.n, s.sizes[0], threads);
        case KT_STEP_HEADS: return heads_scratch(*static_cast<const kt_heads *>(s.call), s.n, threads);
        case KT_STEP_ATTENTION: return attention_scratch(*static_cast<const kt_attention *>(s.call), MOST_THREADS);
        case KT_STEP_SUM: case KT_STEP_SOFTMAX: case KT_STEP_TOPK: case KT_STEP_GATHER: case KT_STEP_SCATTER: return row_floats(s) * 4;
        default: return 0;
    }
}

int step(const kt_step &s, void *memory, int threads) {
    switch (s.op) {
        case KT_STEP_LINEAR: linears(*static_cast<const kt_linears *>(s.call), s.a, s.dtypes[1], s.n, memory, threads); return 0;
        case KT_STEP_EXPERTS: {
            const kt_experts &e = *static_cast<const kt_experts *>(s.call);
            const int64_t *index = static_cast<const int64_t *>(s.b), top = s.sizes[0];
            for (int64_t i = 0; i < s.n * top; i++)
                if (index[i] < -e.experts || index[i] >= e.experts) return -1;
            return experts(e, s.a, s.dtypes[1], s.n, index, static_cast<const float *>(s.c), top, s.out, memory, threads);
        }
        case KT_STEP_NORM: norm(*static_cast<const kt_norm *>(s.call), s.a, s.dtypes[1], s.n, s.out, threads); return 0;
        case KT_STEP_HEADS: heads(*static_cast<const kt_heads *>(s.call), s.a, s.dtypes[1], s.n, s.out, memory, threads); return 0;
        case KT_STEP_ATTENTION: attention(*static_cast<const kt_attention *>(s.call), memory, threads); return 0;
        case KT_STEP_SUM: case KT_STEP_SOFTMAX: case KT_STEP_TOPK: case KT_STEP_GATHER: case KT_STEP_SCATTER: row_wise(s, static_cast<float *>(memory)); return 0;
        case KT_STEP_ENCODE: encode(s, threads); return 0;
        case KT_STEP_MEMCPY: memmove(s.out, s.a, size_t(s.n)); return 0;
        default: elementwise(s); return 0;
    }
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
