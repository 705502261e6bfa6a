/* Products of each head's input with its own part of a weight: what multi-head latent attention does to queries before the softmax and to values
 * after it. Weights are read where they lie, the transposed ones too. */
#pragma once
#include "attention_shape.h"
#include "linear.h"

namespace kt {
namespace {
namespace kernels_ {

/* sums[t][c] += sum over n rows of w[row][c] x[t][row], for some tokens; the rows come in memory order. */
template <class T>
inline void add_rows(const T *w, int64_t stride, int64_t rows, int64_t cols, const float *x, int64_t x_stride, int64_t tokens, float *sums, int64_t between) {
    constexpr int64_t N = 8; /* rows at once: sums are loaded and stored once for all of them */
    int64_t r = 0;
    for (; r + N <= rows; r += N, w += N * stride) {
        int64_t c = 0;
        for (; c + L <= cols; c += L) {
            F own[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                _mm_prefetch(reinterpret_cast<const char *>(w + (N + n) * stride + c), _MM_HINT_T1);
                own[n] = load(w + n * stride + c);
            }
            for (int64_t t = 0; t < tokens; t++) {
                F sum = load(sums + t * between + c);
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) sum = fma(own[n], all(x[t * x_stride + r + n]), sum);
                store(sums + t * between + c, sum);
            }
        }
        for (; c < cols; c++)
            for (int64_t t = 0; t < tokens; t++)
                for (int n = 0; n < N; n++) sums[t * between + c] += value(w[n * stride + c]) * x[t * x_stride + r + n];
    }
    for (; r < rows; r++, w += stride)
        for (int64_t t = 0; t < tokens; t++) {
            const float one = x[t * x_stride + r];
            int64_t c = 0;
            for (; c + L <= cols; c += L) store(sums + t * between + c, fma(load(w + c), all(one), load(sums + t * between + c)));
            for (; c < cols; c++) sums[t * between + c] += value(w[c]) * one;
        }
}

template <class T>
struct Heads {
    static constexpr int64_t TOKENS = 16; /* whose sums stay in the first cache */
    const kt_heads &h;
    const int64_t tokens, in, out;
    int64_t between, between_wide; /* values between two rows of the input */
    const void *x;
    int32_t x_dtype;
    void *to;
    X<T> *xs;   /* [tokens * heads, in], as weights multiply it */
    float *fs;  /* the same in float32 */
    float *low; /* [tokens * heads, rank] */
    float *sums; /* of each thread, [tokens or TOKENS, out] */

    Heads(const kt_heads &heads, int64_t tokens, int threads, Scratch &scratch)
        : h(heads), tokens(tokens), in(heads.transposed ? heads.rows : heads.cols), out(heads.transposed ? heads.cols : heads.rows) {
        between = apart<X<T>>(in), between_wide = apart<float>(in);
        const bool wide = heads.transposed || heads.rank;
        xs = !heads.transposed ? scratch.take<X<T>>(tokens * h.heads * between) : nullptr;
        fs = wide ? scratch.take<float>(tokens * h.heads * between_wide) : nullptr;
        low = scratch.take<float>(tokens * h.heads * h.rank);
        sums = heads.transposed ? scratch.take<float>(threads * (tokens < TOKENS ? tokens : TOKENS) * apart<float>(out)) : nullptr;
    }

    const T *weight(int64_t head) const { return static_cast<const T *>(h.weight) + head * h.head_stride; }

    template <class S>
    void prepare(const S *given, const Team &team) {
        const Range mine(tokens * h.heads, 1, team);
        for (int64_t i = mine.first; i < mine.last; i++) {
            if (xs) convert(given + i * in, xs + i * between, in);
            if (fs) convert(given + i * in, fs + i * between_wide, in);
            if (!h.rank) continue;
            float *own = low + i * h.rank;
            const float *wide = fs + i * between_wide;
            if (h.transposed) {
                memset(own, 0, h.rank * sizeof(float));
                add_rows<float>(h.b + i % h.heads * h.rows * h.rank, h.rank, h.rows, h.rank, wide, 0, 1, own, 0);
            } else {
                product<float>({h.a, h.cols, nullptr, nullptr, nullptr, nullptr, 0}, 0, h.rank, h.cols, 0, {&wide, nullptr, 1}, own, h.rank);
            }
        }
    }

    /* y[h] = W[h] x[h] + B[h] low[h]: a thread takes panels of rows. */
    template <class S>
    void rows(S *given, const Team &team) {
        alignas(64) float found[TILE * TILE];
        const int64_t padded = (h.rows + PANEL - 1) / PANEL * PANEL, tiles = (h.rows + TILE - 1) / TILE;
        const Range mine(h.heads * tiles, 1, team);
        for (int64_t i = mine.first; i < mine.last; i++) {
            const int64_t head = i / tiles, n = i % tiles * TILE, end = n + TILE < h.rows ? n + TILE : h.rows;
            const kt_weight own = {weight(head), h.stride, nullptr, h.rank ? h.b + head * padded * h.rank : nullptr, nullptr, nullptr, 0};
            for (int64_t t = 0; t < tokens; t += TILE) {
                const X<T> *of[TILE];
                const float *lows[TILE];
                const int64_t count = tokens - t < TILE ? tokens - t : TILE;
                for (int64_t r = 0; r < count; r++) of[r] = xs + ((t + r) * h.heads + head) * between, lows[r] = low + ((t + r) * h.heads + head) * h.rank;
                product<T>(own, n, end, h.cols, h.rank, {of, lows, count, nullptr}, found, TILE);
                for (int64_t r = 0; r < count; r++) convert(found + r * TILE, given + ((t + r) * h.heads + head) * h.rows + n, end - n);
            }
        }
    }

    /* y[h] = W[h]^T x[h] + A^T low[h]: a thread takes heads, or parts of their columns where there are few. */
    template <class S>
    void columns(S *given, const Team &team) {
        int64_t parts = 1;
        while (h.heads * parts < 2 * team.threads && h.cols / (2 * parts) >= 4 * L) parts *= 2;
        const int64_t width = whole((h.cols + parts - 1) / parts, L) /* what fills no vector is summed in another way */, apart_ = apart<float>(out);
        float *own = sums + team.thread * (tokens < TOKENS ? tokens : TOKENS) * apart_;
        const Range mine(h.heads * parts, 1, team);
        for (int64_t i = mine.first; i < mine.last; i++) {
            const int64_t head = i / parts, c = i % parts * width, n = h.cols - c < width ? h.cols - c : width;
            for (int64_t t = 0; n > 0 && t < tokens; t += TOKENS) {
                const int64_t count = tokens - t < TOKENS ? tokens - t : TOKENS, first = t * h.heads + head;
                memset(own, 0, count * apart_ * sizeof(float));
                add_rows<T>(weight(head) + c, h.stride, h.rows, n, fs + first * between_wide, h.heads * between_wide, count, own, apart_);
                if (h.rank) add_rows<float>(h.a + c, h.cols, h.rank, n, low + first * h.rank, h.heads * h.rank, count, own, apart_);
                for (int64_t r = 0; r < count; r++) convert(own + r * apart_, given + (first + r * h.heads) * h.cols + c, n);
            }
        }
    }

    void compute(const Team &team) {
        with_dtype(x_dtype, [&](auto tag) { prepare(static_cast<const typename decltype(tag)::type *>(x), team); });
        team.barrier();
        with_dtype(x_dtype, [&](auto tag) {
            auto *given = static_cast<typename decltype(tag)::type *>(to);
            h.transposed ? columns(given, team) : rows(given, team);
        });
    }
};

int64_t heads_scratch(const kt_heads &h, int64_t tokens, int threads) {
    threads = at_most(threads);
    return with_dtype(h.dtype, [&](auto tag) {
        Scratch scratch(nullptr);
        Heads<typename decltype(tag)::type> counted(h, tokens, threads, scratch);
        return scratch.used();
    });
}

void heads(const kt_heads &h, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *memory, int threads) {
    threads = at_most(threads);
    with_dtype(h.dtype, [&](auto tag) {
        using Call = Heads<typename decltype(tag)::type>;
        Scratch scratch(memory);
        Call call(h, tokens, threads, scratch);
        call.x = x, call.x_dtype = x_dtype, call.to = out;
        in_team(threads, [](void *context, const Team &team) { static_cast<Call *>(context)->compute(team); }, &call);
    });
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
