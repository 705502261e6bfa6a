/* A layer's experts in one parallel region.
 *
 * The tokens of each expert form a group. The steps, with a barrier after each: activations into the dtype that weights multiply, A of gate and
 * up, gate and up with the activation between, A of down, down with the weighted sum. Without LoRA, two steps go. Gate and up are divided among
 * threads by what they cost; of down, each thread takes a part of the rows for all groups, so that it alone adds to its columns of the output,
 * in the order of the experts: the result does not depend on the number of threads.
 */
#pragma once
#include "activation.h"
#include "packed.h"

namespace kt {
namespace {
namespace kernels_ {

struct Group {
    int64_t expert, first, count; /* its rows in Experts::order */
    int64_t panel;                /* its first one in Experts::panels, or -1 */
};

template <class T>
struct Experts {
    const kt_experts &e;
    int64_t tokens, top, rank, rows;
    const void *x;
    int32_t x_dtype;
    const float *scores;
    void *out;

    static constexpr bool twice = pairs<T> || coded<T>; /* LoRA needs x and h once more */
    Group *groups;
    int64_t *starts, *order;       /* order: slot (token * top + k) of each row, expert by expert */
    int64_t hidden, inner_;        /* values between two rows of xs and hs; of the wide ones: */
    int64_t hidden_wide, inner_wide;
    X<T> *xs, *hs;                 /* x [tokens, H], h [rows, I], as weights multiply them */
    float *fs, *gs;                /* the same in float32, for LoRA; h also where its row is put as a whole */
    float *ts, *us;                /* A x of gate and up [rows, 2 rank], A h of down [rows, rank] */
    float *sums;                   /* [tokens, H] */
    int64_t x_groups = 0, h_groups = 0; /* groups of a row of x and h, of weights with offsets */
    float *xg, *hg;                /* the groups' sums */
    float *panels;                 /* x, and then h, of the groups that tiles multiply */
    Unpacked *unpacked;            /* rows of two weights, of each thread */
    int64_t memory_of_thread;
    int64_t count = 0, cost = 0, packed = 0; /* packed: panels */

    Experts(const kt_experts &experts, int64_t tokens, int64_t top, int threads, Scratch &scratch)
        : e(experts), tokens(tokens), top(top), rank(experts.rank), rows(tokens * top) {
        hidden = apart<X<T>>(arranged<T>(e.hidden)), inner_ = apart<X<T>>(arranged<T>(e.intermediate));
        hidden_wide = apart<float>(e.hidden), inner_wide = apart<float>(e.intermediate);
        const bool both = rank && twice, h_both = both || of_shorts<T>;
        groups = scratch.take<Group>(rows < e.experts ? rows : e.experts);
        starts = scratch.take<int64_t>(e.experts + 1), order = scratch.take<int64_t>(rows);
        xs = scratch.take<X<T>>(tokens * hidden), hs = scratch.take<X<T>>(rows * inner_);
        fs = both ? scratch.take<float>(tokens * hidden_wide) : reinterpret_cast<float *>(xs);
        gs = h_both ? scratch.take<float>(rows * inner_wide) : reinterpret_cast<float *>(hs);
        ts = scratch.take<float>(rows * 2 * rank), us = scratch.take<float>(rows * rank);
        sums = scratch.take<float>(tokens * e.hidden);
        if (e.packing && e.down->offsets) x_groups = groups_of(*e.packing, e.hidden), h_groups = groups_of(*e.packing, e.intermediate);
        xg = scratch.take<float>(tokens * x_groups), hg = scratch.take<float>(rows * h_groups);
        const int64_t full = many<T>(rows) ? rows / PANEL : 0, most = full + (full < e.experts ? full : e.experts); /* each group's last is not full */
        const int64_t wider = e.hidden > e.intermediate ? e.hidden : e.intermediate;
        panels = scratch.take<float>(most * panel_size<X<T>>(arranged<T>(wider)));
        memory_of_thread = 2 * unpacked_size<T>(wider, rows), unpacked = scratch.take<Unpacked>(threads * memory_of_thread);
    }

    /* Sort the rows by expert. Those of experts that are computed elsewhere are left out. */
    void group(const int64_t *index) {
        for (int64_t n = 0; n <= e.experts; n++) starts[n] = 0;
        for (int64_t r = 0; r < rows; r++)
            if (index[r] >= 0) starts[index[r] + 1]++;
        for (int64_t n = 0, first = 0; n < e.experts; n++) {
            const int64_t own = starts[n + 1];
            starts[n] = first;
            if (own) groups[count++] = Group{n, first, own, many<T>(own) ? packed : -1}, cost += weight(own) * steps();
            first += own, packed += panels_of<T>(own);
        }
        int64_t own = 0;
        for (int64_t r = 0; r < rows; r++)
            if (index[r] >= 0) order[starts[index[r]]++] = r, own++;
        rows = own;
    }

    /* gate's and up's rows are divided in panels, whose cost is reading them or, for many tokens, the products: of a tile's tokens, taken to be
     * that of two tokens in blocks. */
    int64_t steps() const { return (e.intermediate + PANEL - 1) / PANEL; }
    static int64_t weight(int64_t tokens) {
        const int64_t products = many<T>(tokens) ? 2 * panels_of<T>(tokens) : tokens;
        return products < 10 ? 10 : products;
    }
    int64_t token(int64_t row) const { return order[row] / top; }

    template <class S>
    void prepare(const S *given, const Team &team) {
        const int64_t h = e.hidden;
        const Range mine(tokens, 1, team), columns(h, L, team);
        for (int64_t t = mine.first; t < mine.last; t++) {
            arrange<T>(given + t * h, xs + t * hidden, 0, h, h);
            if (rank && twice) convert(given + t * h, fs + t * hidden_wide, h);
            if (x_groups) sum_groups<T>(xs + t * hidden, h, *e.packing, xg + t * x_groups);
        }
        for (int64_t t = 0; t < tokens; t++)
            memset(sums + t * h + columns.first, 0, size_t(columns.last - columns.first) * sizeof(float));
    }

    /* The halves A of LoRA: of gate and up, or of down. */
    void low(bool down, const Team &team) {
        const int64_t k = down ? e.intermediate : e.hidden, width = down ? rank : 2 * rank;
        int64_t number = 0;
        for (int64_t n = 0; n < count; n++) {
            const Group &g = groups[n];
            const kt_weight *halves[] = {down ? &e.down[g.expert] : e.gate ? &e.gate[g.expert] : nullptr, down ? nullptr : &e.up[g.expert]};
            for (int half = 0; half < 2; half++)
                for (int64_t r = 0; r < g.count; r += TILE) {
                    if (!halves[half] || !halves[half]->a || number++ % team.threads != team.thread) continue;
                    const kt_weight a = {halves[half]->a, k, nullptr, nullptr, nullptr};
                    const float *of[TILE];
                    const int64_t first = g.first + r, some = g.count - r < TILE ? g.count - r : TILE;
                    for (int64_t j = 0; j < some; j++) of[j] = down ? gs + (first + j) * inner_wide : fs + token(first + j) * hidden_wide;
                    product<float>(a, 0, rank, k, 0, {of, nullptr, some}, (down ? us : ts) + first * width + half * rank, width);
                }
        }
    }

    /* The panels of x, or of h. */
    void pack(bool down, const Team &team) {
        const int64_t k = arranged<T>(down ? e.intermediate : e.hidden);
        for (int64_t n = 0; n < count; n++) {
            const Group &g = groups[n];
            for (int64_t r = 0; g.panel >= 0 && r < g.count; r += PANEL) {
                const int64_t panel = g.panel + r / PANEL, first = g.first + r;
                if (panel % team.threads != team.thread) continue;
                pack_rows<X<T>>([&](int64_t j) { return down ? hs + (first + j) * inner_ : xs + token(first + j) * hidden; }, g.count - r, k,
                                panels + panel * panel_size<X<T>>(k), L);
            }
        }
    }

    /* Those of a group from its row r on. */
    const float *panels_from(const Group &g, int64_t r, int64_t k) const {
        return g.panel < 0 ? nullptr : panels + (g.panel + r / PANEL) * panel_size<X<T>>(arranged<T>(k));
    }

    void gate_up(const Team &team) {
        int64_t from = cost * team.thread / team.threads, to = cost * (team.thread + 1) / team.threads;
        Unpacked *memory = unpacked + team.thread * memory_of_thread;
        for (int64_t n = 0; n < count; n++) {
            const int64_t each = weight(groups[n].count), own = each * steps();
            if (from < own && to > 0) {
                const int64_t first = from > 0 ? (from + each - 1) / each * PANEL : 0;
                int64_t last = to < own ? (to + each - 1) / each * PANEL : e.intermediate;
                if (last > e.intermediate) last = e.intermediate;
                gate_up_rows(groups[n], first, last, memory);
            }
            from -= own, to -= own;
        }
    }

    void gate_up_rows(const Group &g, int64_t first, int64_t last, Unpacked *memory) {
        alignas(64) float gate[TILE * TILE], up[TILE * TILE];
        for (int64_t n = first; n < last; n += TILE) {
            const int64_t end = n + TILE < last ? n + TILE : last;
            const kt_weight &up_weight = e.up[g.expert], &gate_weight = e.gate ? e.gate[g.expert] : up_weight;
            const Rows<T> up_rows(up_weight, e.packing, n, end, e.hidden, rank, g.count, memory);
            const Rows<T> gate_rows(gate_weight, e.packing, n, end, e.hidden, rank, e.gate ? g.count : 0, memory + memory_of_thread / 2);
            for (int64_t r = 0, some; r < g.count; r += some) {
                const X<T> *of[TILE];
                const float *gate_t[TILE], *up_t[TILE], *sums_of[TILE];
                some = g.count - r < tile_of<T>(e.hidden) ? g.count - r : tile_of<T>(e.hidden);
                for (int64_t j = 0; j < some; j++) {
                    const int64_t row = g.first + r + j;
                    of[j] = xs + token(row) * hidden, gate_t[j] = ts + row * 2 * rank, up_t[j] = gate_t[j] + rank;
                    sums_of[j] = xg + token(row) * x_groups;
                }
                const float *packed = panels_from(g, r, e.hidden);
                if (e.gate) gate_rows.multiply({of, gate_t, some, packed, sums_of}, gate, TILE);
                up_rows.multiply({of, up_t, some, packed, sums_of}, up, TILE);
                for (int64_t j = 0; j < some; j++) {
                    const int64_t row = g.first + r + j;
                    float *found = up + j * TILE;
                    for (int64_t i = 0; i < end - n; i += L) store(found + i, inner(load(gate + j * TILE + i), load(found + i), e));
                    if constexpr (!of_shorts<T>) arrange<T>(found, hs + row * inner_, n, end - n, e.intermediate);
                    if ((rank && twice) || of_shorts<T>) convert(found, gs + row * inner_wide + n, end - n);
                }
            }
        }
    }

    void down(const Team &team) {
        const int64_t h = e.hidden;
        const Range mine(h, PANEL, team);
        alignas(64) float found[TILE * TILE];
        for (int64_t m = 0; m < count; m++) {
            const Group &g = groups[m];
            for (int64_t n = mine.first; n < mine.last; n += TILE) {
                const int64_t end = n + TILE < mine.last ? n + TILE : mine.last;
                const Rows<T> rows(e.down[g.expert], e.packing, n, end, e.intermediate, rank, g.count, unpacked + team.thread * memory_of_thread);
                for (int64_t r = 0, some; r < g.count; r += some) {
                    const X<T> *of[TILE];
                    const float *t[TILE], *sums_of[TILE];
                    some = g.count - r < tile_of<T>(e.intermediate) ? g.count - r : tile_of<T>(e.intermediate);
                    const int64_t first = g.first + r;
                    for (int64_t j = 0; j < some; j++)
                        of[j] = hs + (first + j) * inner_, t[j] = us + (first + j) * rank, sums_of[j] = hg + (first + j) * h_groups;
                    rows.multiply({of, t, some, panels_from(g, r, e.intermediate), sums_of}, found, TILE);
                    for (int64_t j = 0; j < some; j++) {
                        float *to = sums + token(g.first + r + j) * h + n;
                        const float score = scores[order[g.first + r + j]];
                        for (int64_t i = 0; i < end - n; i++) to[i] += score * found[j * TILE + i];
                    }
                }
            }
        }
        with_dtype(x_dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            for (int64_t t = 0; t < tokens; t++)
                convert(sums + t * h + mine.first, static_cast<S *>(out) + t * h + mine.first, mine.last - mine.first);
        });
    }

    /* What the products with gate and up, or down, need beside their rows. */
    void between(bool products_of_down, const Team &team) {
        const bool late = products_of_down && of_shorts<T>; /* the scale of h is that of all its parts */
        if (!rank && !packed && !h_groups && !late) return;
        if (rank) low(products_of_down, team);
        for (int64_t r = team.thread; products_of_down && (h_groups || late) && r < rows; r += team.threads) {
            if constexpr (of_shorts<T>) arrange<T>(gs + r * inner_wide, hs + r * inner_, 0, e.intermediate, e.intermediate);
            if (h_groups) sum_groups<T>(hs + r * inner_, e.intermediate, *e.packing, hg + r * h_groups);
        }
        if constexpr (tiled<T>) pack(products_of_down, team);
        team.barrier();
    }

    void compute(const Team &team) {
        with_dtype(x_dtype, [&](auto tag) { prepare(static_cast<const typename decltype(tag)::type *>(x), team); });
        team.barrier();
        between(false, team);
        const Tiles tiles(packed);
        gate_up(team);
        team.barrier();
        between(true, team);
        down(team);
    }
};

int64_t experts_scratch(const kt_experts &e, int64_t tokens, int64_t top, int threads) {
    return with_weight(e.dtype, in_shorts(e.dtype, e.packing), [&](auto tag) {
        Scratch scratch(nullptr);
        Experts<typename decltype(tag)::type> counted(e, tokens, top, threads, scratch);
        return scratch.used();
    });
}

int experts(const kt_experts &e, const void *x, int32_t x_dtype, int64_t tokens, const int64_t *index, const float *scores, int64_t top,
            void *out, void *memory, int threads) {
    return with_weight(e.dtype, in_shorts(e.dtype, e.packing), [&](auto tag) {
        using Call = Experts<typename decltype(tag)::type>;
        Scratch scratch(memory);
        Call call(e, tokens, top, threads, scratch);
        call.x = x, call.x_dtype = x_dtype, call.scores = scores, call.out = out;
        call.group(index);
        in_team(threads, [](void *context, const Team &team) { static_cast<Call *>(context)->compute(team); }, &call);
        return 0;
    });
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
