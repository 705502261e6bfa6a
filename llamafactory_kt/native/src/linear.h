/* Linear layers of the same input, each with LoRA, in one parallel region. */
#pragma once
#include "packed.h"

namespace kt {
namespace {
namespace kernels_ {

template <class T>
struct Linears {
    const kt_linears &l;
    int64_t tokens, cols, between, between_wide, rank = 0, blocks = 0; /* of all layers: ranks, and panels of rows */
    const void *x;
    int32_t x_dtype;
    static constexpr bool twice = pairs<T> || coded<T>; /* LoRA needs x once more */
    X<T> *xs;   /* [tokens, cols], as weights multiply it */
    float *fs;  /* the same in float32, for LoRA */
    float *ts;  /* A x of each layer, [tokens, its rank] */
    float *panels; /* xs for tiles, or null */
    int64_t groups = 0; /* of a row of x, of all layers with offsets */
    float *gs;  /* their sums of each layer, [tokens, its groups] */
    Unpacked *unpacked; /* rows of a weight, of each thread */
    int64_t memory_of_thread;

    Linears(const kt_linears &linears, int64_t tokens, int threads, Scratch &scratch) : l(linears), tokens(tokens), cols(linears.parts[0]->cols) {
        for (int64_t n = 0; n < l.count; n++) rank += l.parts[n]->rank, blocks += (l.parts[n]->rows + PANEL - 1) / PANEL, groups += groups_in(*l.parts[n]);
        between = apart<X<T>>(arranged<T>(cols)), between_wide = apart<float>(cols);
        xs = scratch.take<X<T>>(tokens * between);
        fs = rank && twice ? scratch.take<float>(tokens * between_wide) : reinterpret_cast<float *>(xs);
        ts = scratch.take<float>(tokens * rank), gs = scratch.take<float>(tokens * groups);
        panels = many<T>(tokens) ? scratch.take<float>(panels_of<T>(tokens) * panel_size<X<T>>(arranged<T>(cols))) : nullptr;
        memory_of_thread = unpacked_size<T>(cols, tokens), unpacked = scratch.take<Unpacked>(threads * memory_of_thread);
    }

    int64_t groups_in(const kt_linear &layer) const { return layer.weight.offsets ? groups_of(*layer.packing, cols) : 0; }

    template <class S>
    void prepare(const S *given, const Team &team) {
        const Range mine(tokens, 1, team);
        for (int64_t t = mine.first; t < mine.last; t++) {
            arrange<T>(given + t * cols, xs + t * between, 0, cols, cols);
            if (rank && twice) convert(given + t * cols, fs + t * between_wide, cols);
            float *to = gs;
            for (int64_t n = 0, own; n < l.count; to += tokens * own, n++)
                if ((own = groups_in(*l.parts[n]))) sum_groups<T>(xs + t * between, cols, *l.parts[n]->packing, to + t * own);
        }
    }

    /* One token: each thread some of the A's rows; more: some of the tokens, in steps that are the same for any number of threads, because a
     * product sums a lone token in another order than several. */
    void low(const Team &team) {
        constexpr int64_t STEP = 8 * SIDE;
        const Range rows(rank, 1, team), some(tokens, STEP, team);
        int64_t before = 0;
        float *to = ts;
        for (int64_t n = 0; n < l.count; before += l.parts[n]->rank, to += tokens * l.parts[n]->rank, n++) {
            const int64_t own = l.parts[n]->rank;
            if (!own) continue;
            const kt_weight a = {l.parts[n]->weight.a, cols, nullptr, nullptr, nullptr};
            if (tokens == 1) {
                const int64_t first = rows.first > before ? rows.first - before : 0, last = rows.last - before < own ? rows.last - before : own;
                if (first < last) product<float>(a, first, last, cols, 0, {&fs, nullptr, 1}, to + first, own);
                continue;
            }
            for (int64_t t = some.first; t < some.last; t += STEP) {
                const float *of[STEP];
                const int64_t count = some.last - t < STEP ? some.last - t : STEP;
                for (int64_t r = 0; r < count; r++) of[r] = fs + (t + r) * between_wide;
                product<float>(a, 0, own, cols, 0, {of, nullptr, count}, to + t * own, own);
            }
        }
    }

    void pack(const Team &team) {
        const Range mine(panels_of<T>(tokens), 1, team);
        const int64_t k = arranged<T>(cols);
        for (int64_t n = mine.first; n < mine.last; n++)
            pack_rows<X<T>>([&](int64_t r) { return xs + (n * PANEL + r) * between; }, tokens - n * PANEL, k, panels + n * panel_size<X<T>>(k), L);
    }

    template <class S>
    void rows(const kt_linear &layer, const float *low_of, const float *groups_from, S *to, int64_t first, int64_t last, Unpacked *memory) {
        alignas(64) float found[TILE * TILE];
        for (int64_t n = first; n < last; n += TILE) {
            const int64_t end = n + TILE < last ? n + TILE : last;
            const Rows<T> own(layer.weight, layer.packing, n, end, cols, layer.rank, tokens, memory);
            for (int64_t t = 0, count; t < tokens; t += count) {
                const X<T> *of[TILE];
                const float *low[TILE], *sums_of[TILE];
                count = tokens - t < tile_of<T>(cols) ? tokens - t : tile_of<T>(cols);
                for (int64_t r = 0; r < count; r++) of[r] = xs + (t + r) * between, low[r] = low_of + (t + r) * layer.rank, sums_of[r] = groups_from + (t + r) * groups_in(layer);
                const float *packed = panels ? panels + t / PANEL * panel_size<X<T>>(arranged<T>(cols)) : nullptr;
                own.multiply({of, low, count, packed, sums_of}, found, TILE);
                for (int64_t r = 0; r < count; r++) convert(found + r * TILE, to + (t + r) * layer.rows + n, end - n);
            }
        }
    }

    void compute(const Team &team) {
        with_dtype(x_dtype, [&](auto tag) { prepare(static_cast<const typename decltype(tag)::type *>(x), team); });
        team.barrier();
        if (rank || panels) {
            if (rank) low(team);
            if constexpr (tiled<T>) pack(team);
            team.barrier();
        }
        const Tiles tiles(panels);
        int64_t from = blocks * team.thread / team.threads, to = blocks * (team.thread + 1) / team.threads;
        const float *low_of = ts, *groups_from = gs;
        for (int64_t n = 0; n < l.count; n++) {
            const kt_linear &layer = *l.parts[n];
            const int64_t own = (layer.rows + PANEL - 1) / PANEL, first = (from > 0 ? from : 0) * PANEL, last = to < own ? to * PANEL : layer.rows;
            if (first < last)
                with_dtype(x_dtype, [&](auto tag) {
                    rows(layer, low_of, groups_from, static_cast<typename decltype(tag)::type *>(l.outs[n]), first, last, unpacked + team.thread * memory_of_thread);
                });
            from -= own, to -= own, low_of += tokens * layer.rank, groups_from += tokens * groups_in(layer);
        }
    }
};

inline bool in_shorts(const kt_linears &l) {
    for (int64_t n = 0; n < l.count; n++)
        if (!in_shorts(l.parts[n]->dtype, l.parts[n]->packing)) return false;
    return true;
}

int64_t linears_scratch(const kt_linears &l, int64_t tokens, int threads) {
    return with_weight(l.parts[0]->dtype, in_shorts(l), [&](auto tag) {
        Scratch scratch(nullptr);
        Linears<typename decltype(tag)::type> counted(l, tokens, threads, scratch);
        return scratch.used();
    });
}

void linears(const kt_linears &l, const void *x, int32_t x_dtype, int64_t tokens, void *memory, int threads) {
    with_weight(l.parts[0]->dtype, in_shorts(l), [&](auto tag) {
        using Call = Linears<typename decltype(tag)::type>;
        Scratch scratch(memory);
        Call call(l, tokens, threads, scratch);
        call.x = x, call.x_dtype = x_dtype;
        in_team(threads, [](void *context, const Team &team) { static_cast<Call *>(context)->compute(team); }, &call);
    });
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
