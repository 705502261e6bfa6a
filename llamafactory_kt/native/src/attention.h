/* Attention: the kernel for few queries, or the one for many. */
#pragma once
#include "attention_few.h"
#include "attention_many.h"

namespace kt {
namespace {
namespace kernels_ {

constexpr int64_t FEW_ROWS = LANES; /* of a key head; measured: a panel of lanes is not slower from here on */

/* Call f(call) with the kernel that suits, its memory taken from scratch. */
template <class T, class C, class Call>
inline void with_kernel_of(const kt_attention &a, int threads, Scratch &scratch, Call f) {
    if (a.heads / a.kv_heads * a.queries <= FEW_ROWS) {
        FewQueries<T, C> call(a, threads, scratch);
        f(call);
    } else {
        ManyQueries<T, C> call(a, threads, scratch);
        f(call);
    }
}

template <class Call>
inline void with_kernel(const kt_attention &a, int threads, Scratch &scratch, Call f) {
    with_dtype(a.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        a.coded ? with_kernel_of<T, code8>(a, threads, scratch, f) : with_kernel_of<T, T>(a, threads, scratch, f);
    });
}

template <class Call>
inline void run(Call &call, int threads) {
    in_team(threads, [](void *context, const Team &team) { static_cast<Call *>(context)->compute(team); }, &call);
}

int64_t attention_scratch(const kt_attention &a, int threads) {
    Scratch scratch(nullptr);
    with_kernel(a, at_most(threads), scratch, [](auto &) {});
    return scratch.used();
}

void attention(const kt_attention &a, void *memory, int threads) {
    threads = at_most(threads);
    Scratch scratch(memory);
    with_kernel(a, threads, scratch, [&](auto &call) {
        run(call, threads);
    });
}

}  // namespace kernels_
}  // namespace
}  // namespace kt
