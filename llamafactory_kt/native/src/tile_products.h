/* Products of a weight's rows with tokens: of many tokens by tiles where the CPU has them, of all others by blocks.
 *
 * A tile of the weight is 16 rows and 32 values of each, loaded from where they lie. A tile of tokens has 16 words (pairs of values) of 16 tokens
 * next to one another, as in a panel: many tokens are packed once for all rows. Two tiles by two give four of sums, [rows][tokens], so that what is
 * loaded is used twice. A row's sums with a token are the same whichever tiles they are in.
 */
#pragma once
#include "panels.h"
#ifdef KT_TILES
#include "tiles.h"
#endif

namespace kt {
namespace {
namespace kernels_ {

constexpr int64_t STRIP = 2 * PANEL; /* rows, and tokens, of four tiles of sums */

#ifdef KT_TILES
template <class T>
constexpr bool tiled = pairs<T>;
#else
template <class T>
constexpr bool tiled = false;
#endif

/* Whether tiles multiply so many tokens: fewer leave a part of each tile empty, and wait for memory anyway. */
template <class T>
constexpr bool many(int64_t tokens) {
    return tiled<T> && tokens >= PANEL;
}

/* Panels of so many tokens; none if they are not multiplied by tiles. */
template <class T>
constexpr int64_t panels_of(int64_t tokens) {
    return many<T>(tokens) ? (tokens + PANEL - 1) / PANEL : 0;
}

/* A thread's tiles, in use while this lives. Its state grows by 8 KiB for so long, which the system saves when it switches threads. */
class Tiles {
    [[maybe_unused]] const bool used_;

   public:
    explicit Tiles(bool used) : used_(used) {
#ifdef KT_TILES
        if (used_) TILE_CONFIGURE();
#endif
    }
    ~Tiles() {
#ifdef KT_TILES
        if (used_) TILE_RELEASE();
#endif
    }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
};

#ifdef KT_TILES
static_assert(L == PANEL, "a panel has the tokens of a tile");
constexpr int64_t DEPTH = 32; /* values of a row of a tile */

/* sums[n * STRIP + r] of A tiles of rows, of which `rows` are there, and B panels of tokens, `size` floats each. FIRST: the rows come from memory. */
template <int A, int B, bool FIRST>
inline void tile_sums(const bf16 *w, int64_t stride, int64_t rows, int64_t k, const float *panels, int64_t size, float *sums) {
    auto advance = [&](const bf16 *from, int64_t between, const float *tokens) {
        const int64_t bytes = between * int64_t(sizeof(bf16)), row = PANEL * int64_t(sizeof(float));
        TILE_LOAD(4, from, bytes);
        TILE_LOAD(6, tokens, row);
        TILE_MULTIPLY(0, 4, 6);
        if constexpr (B > 1) {
            TILE_LOAD(7, tokens + size, row);
            TILE_MULTIPLY(1, 4, 7);
        }
        if constexpr (A > 1) {
            TILE_LOAD(5, from + PANEL * between, bytes);
            TILE_MULTIPLY(2, 5, 6);
            if constexpr (B > 1) TILE_MULTIPLY(3, 5, 7);
        }
    };
    TILE_ZERO(0);
    if constexpr (B > 1) TILE_ZERO(1);
    if constexpr (A > 1) TILE_ZERO(2);
    if constexpr (A > 1 && B > 1) TILE_ZERO(3);
    [[maybe_unused]] const char *ahead = reinterpret_cast<const char *>(w + A * PANEL * stride);
    int64_t i = 0;
    for (; rows == A * PANEL && i + DEPTH <= k; i += DEPTH) {
        if constexpr (FIRST)
            for (int64_t line = 0; line < A * PANEL; line++) _mm_prefetch(ahead + (i * A * PANEL + line * DEPTH) * int64_t(sizeof(bf16)), _MM_HINT_T1);
        advance(w + i, stride, panels + i * PANEL / 2);
    }
    for (; i < k; i += DEPTH) { /* nothing is read behind a row or the last one: zeros stand there */
        alignas(64) bf16 whole[A * PANEL * DEPTH];
        const int64_t some = k - i < DEPTH ? k - i : DEPTH;
        memset(whole, 0, sizeof whole);
        for (int64_t n = 0; n < rows; n++) memcpy(whole + n * DEPTH, w + n * stride + i, size_t(some) * sizeof(bf16));
        advance(whole, DEPTH, panels + i * PANEL / 2);
    }
    constexpr int64_t between = STRIP * int64_t(sizeof(float));
    TILE_STORE(0, sums, between);
    if constexpr (B > 1) TILE_STORE(1, sums + PANEL, between);
    if constexpr (A > 1) TILE_STORE(2, sums + PANEL * STRIP, between);
    if constexpr (A > 1 && B > 1) TILE_STORE(3, sums + PANEL * STRIP + PANEL, between);
}

/* As multiply_blocks; out has room for a whole panel of rows at the end. */
inline void multiply_tiles(const kt_weight &w, int64_t first, int64_t last, int64_t k, const Tokens<bf16> &tokens, float *out, int64_t ldo) {
    alignas(64) float sums[STRIP * STRIP];
    const int64_t size = panel_size<bf16>(k);
    for (int64_t n = first; n < last; n += STRIP) {
        const bf16 *own = static_cast<const bf16 *>(w.weight) + n * w.stride;
        const int64_t rows = last - n < STRIP ? last - n : STRIP;
        float *to = out + n - first;
        for (int64_t r = 0; r < tokens.count; r += STRIP) {
            const int64_t count = tokens.count - r < STRIP ? tokens.count - r : STRIP;
            const float *panels = tokens.panels + r / PANEL * size;
            with_count<2>((rows + PANEL - 1) / PANEL, [&](auto a) {
                with_count<2>((count + PANEL - 1) / PANEL, [&](auto b) {
                    constexpr int A = decltype(a)::n, B = decltype(b)::n;
                    r ? tile_sums<A, B, false>(own, w.stride, rows, k, panels, size, sums)
                      : tile_sums<A, B, true>(own, w.stride, rows, k, panels, size, sums);
                });
            });
            for (int64_t i = 0; i < rows; i += PANEL)
                for (int64_t j = 0; j < count; j += PANEL) {
                    F square[L];
#pragma GCC unroll 16
                    for (int row = 0; row < L; row++) square[row] = load(sums + (i + row) * STRIP + j);
                    transpose(square);
                    for (int64_t token = 0; token < PANEL && j + token < count; token++) store(to + (r + j + token) * ldo + i, square[token]);
                }
        }
    }
}
#endif

/* Add bias[n] + b[n] . low[r]. */
template <class T>
void add_rest(const kt_weight &w, int64_t first, int64_t last, int64_t rank, const Tokens<T> &tokens, float *out, int64_t ldo) {
    if (w.bias)
        for (int64_t r = 0; r < tokens.count; r++)
            for (int64_t n = first; n < last; n++) out[r * ldo + n - first] += w.bias[n];
    add_low(w.b, first, last, rank, tokens.low, tokens.count, out, ldo);
}

/* out[r * ldo + n - first] = weight row n . x[r] + bias[n] + b[n] . low[r], for the rows [first, last) and some tokens. With b, first stands at
 * the start of a panel of it, and with b or packed tokens, out has room for the whole of the last panel. */
template <class T>
void product(const kt_weight &w, int64_t first, int64_t last, int64_t k, int64_t rank, const Tokens<T> &tokens, float *out, int64_t ldo) {
    if (!tokens.panels) multiply_blocks<T>(w, first, last, k, tokens, out, ldo);
#ifdef KT_TILES
    if constexpr (tiled<T>) {
        if (tokens.panels) multiply_tiles(w, first, last, k, tokens, out, ldo);
    }
#endif
    add_rest(w, first, last, rank, tokens, out, ldo);
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
