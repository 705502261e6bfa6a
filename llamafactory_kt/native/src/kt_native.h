/* The C interface of the native kernels.
 *
 * Weights are read where they lie: row-major [out, in], in the checkpoint's dtype, with a stride between rows. Sums are float32. All
 * pointers must stay valid during a call; nothing is kept.
 */
#pragma once
#include <pthread.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum kt_dtype {
    KT_F32 = 0, KT_BF16 = 1, KT_F16 = 2, KT_BOOL = 3, KT_I64 = 4, KT_C64 = 5, /* these three: of steps alone */
    KT_INT4 = 6, KT_INT8 = 7, KT_E4M3 = 8,                                    /* these three: of weights alone, with scales */
};
enum kt_activation { KT_SILU = 0, KT_GELU = 1, KT_GELU_TANH = 2, KT_RELU = 3, KT_RELU2 = 4 };

/* How codes stand for weights: value of a code times the scale of its group, and an offset of the group where kt_weight has some. */
typedef struct {
    int64_t group;         /* values of a row that share a scale: a power of two from 32 on (KT_E4M3: 64), or all (cols or more) */
    int64_t rows_of_scale; /* rows that share their scales */
    int32_t scale_dtype;   /* KT_F32 or KT_BF16 */
    float table[16];       /* KT_INT4: the value of each code, exact in bf16. The lower half of a byte comes first. */
} kt_packing;

/* A weight with its LoRA and bias: y = W x + B (A x) + bias. */
typedef struct {
    const void *weight;  /* [rows, cols], or codes */
    int64_t stride;      /* values between two rows */
    const float *a;      /* [rank, cols], or null */
    const float *b;      /* [rows / 16, rank, 16], zeros behind the last row, the scaling in it; or null */
    const float *bias;   /* [rows], or null */
    const void *scales;  /* of codes: [rows / rows_of_scale, cols / group] */
    int64_t scale_stride; /* values between two rows of them */
    const float *offsets; /* of codes: [rows / 16, cols / group, 16], added to each weight of a group; or null */
} kt_weight;

/* y = down(activation(gate x) * up x) of each expert; without a gate (gate null) y = down(activation(up x)). */
typedef struct {
    int64_t experts, hidden, intermediate, rank;
    int32_t dtype, activation, limit_activated;
    float alpha, limit, up_offset;
    const kt_packing *packing;  /* of all codes, or null */
    const kt_weight *gate, *up; /* [experts] each: rows = intermediate, cols = hidden */
    const kt_weight *down;      /* [experts]: rows = hidden, cols = intermediate. All have offsets, or none */
} kt_experts;

typedef struct {
    int64_t rows, cols, rank;
    int32_t dtype;
    const kt_packing *packing; /* of codes, or null */
    kt_weight weight;
} kt_linear;

/* Layers of one input: of the same cols and dtype. */
enum { KT_MOST_LINEARS = 8 };
typedef struct {
    int64_t count;
    const kt_linear *parts[KT_MOST_LINEARS];
    void *outs[KT_MOST_LINEARS]; /* each [tokens, rows] */
} kt_linears;

/* Symmetric codes of a float weight, with a bf16 scale for each 32 values of a row. */
typedef struct {
    int64_t rows, cols; /* cols: even for four bits */
    const void *weight; /* [rows, cols] */
    int64_t stride;     /* values between two rows */
    int32_t dtype, bits; /* 4 or 8 */
    uint8_t *codes;     /* [rows, cols * bits / 8], contiguous; of four bits: code + 8, the first of two in the lower half of a byte */
    void *scales;       /* bf16 [rows, cols / 32, rounded up], contiguous */
} kt_quantization;

/* For each head's own input: y[h] = W[h] x[h] + B[h] (A x[h]), or transposed, y[h] = W[h]^T x[h] + A^T (B[h]^T x[h]). */
typedef struct {
    int64_t heads, rows, cols, rank;
    int32_t dtype, transposed;
    const void *weight;          /* [heads, rows, cols] */
    int64_t head_stride, stride; /* values between two heads, two rows */
    const float *a;              /* [rank, cols], or null */
    const float *b;              /* the scaling in it: [heads, rows / 16, rank, 16] with zeros behind a head's last row; transposed: [heads, rows, rank] */
} kt_heads;

/* x / sqrt(mean(x^2) + eps) * (weight + offset), of each row. */
typedef struct {
    int64_t width;
    const void *weight; /* [width] */
    int32_t dtype;      /* of the weight */
    float eps, offset;
    int32_t round_first; /* to the dtype of x, before the weight is multiplied */
} kt_norm;

/* Causal attention of one query to thousands to the keys of a cache. Query i of n stands at position keys - n + i. */
typedef struct {
    int64_t batch, heads, kv_heads, queries, keys, key_dim, value_dim;
    int32_t dtype;                               /* of q and out, and of k and v */
    int32_t coded;                               /* or k and v are rows as KT_STEP_ENCODE makes them, and their strides are words of four bytes */
    float scale;                                 /* >= 0 */
    int64_t window;                              /* a query sees so many positions up to its own; 0: all */
    const void *q, *k, *v;                       /* [batch, heads, queries, key_dim], [batch, kv_heads, keys, key_dim or value_dim] */
    int64_t q_strides[3], k_strides[3], v_strides[3]; /* values between two of the batch, heads, rows */
    const float *sinks;                          /* [heads] logits that take part in each softmax, or null */
    const uint8_t *mask;                         /* [batch, keys], 0: nobody sees it; or null */
    void *out;                                   /* [batch, queries, heads, value_dim], contiguous */
} kt_attention;

/* One step of a program (kt_run). Element by element over sizes[4], with the strides of out, a and b in values: out = f(a, b), where b null
 * stands for the number beta. Row by row over sizes[0] contiguous rows of a with sizes[1] values: the last ones. */
enum kt_op {
    KT_STEP_COPY, KT_STEP_ADD /* a + alpha b */, KT_STEP_MUL, KT_STEP_DIV, KT_STEP_RSUB /* b - alpha a */, KT_STEP_SILU, KT_STEP_SIGMOID, KT_STEP_GELU, KT_STEP_GELU_TANH, KT_STEP_EXP,
    KT_STEP_CLAMP /* between alpha and beta */, KT_STEP_NEG, KT_STEP_SQUARE, KT_STEP_RSQRT, KT_STEP_SQRT, KT_STEP_NOT, KT_STEP_FILL_WHERE /* alpha where b, else a */,
    KT_STEP_SUM /* times alpha */, KT_STEP_SOFTMAX, KT_STEP_TOPK /* n, their indices int64 in b */, KT_STEP_GATHER /* n, at the indices b */, KT_STEP_SCATTER /* alpha, at n indices b of each row of out */,
    KT_STEP_FILL /* out = alpha */, KT_STEP_COMPLEX_MUL, KT_STEP_MEMCPY /* n bytes */, KT_STEP_LINEAR, KT_STEP_EXPERTS, KT_STEP_ATTENTION, KT_STEP_NORM, KT_STEP_HEADS, /* of n tokens; sizes[0]: experts of a token */
    KT_STEP_ENCODE /* a cache's rows of eight bits: sizes[3] codes of a value each, zeros up to a whole word of four, and a float: what they are multiplied with; strides[0] are words, and a's rows contiguous */
};

typedef struct {
    int32_t op, dtypes[3]; /* of out, a, b */
    int64_t sizes[4], strides[3][4];
    void *out;
    const void *a;
    void *b;
    const void *c; /* scores of KT_STEP_EXPERTS */
    double alpha, beta;
    int64_t n;
    const void *call; /* kt_linears, kt_experts, kt_attention, kt_norm or kt_heads */
} kt_step;

/* The fingerprint of the sources that this library was made from (build.py). */
const char *kt_sources(void);

/* The instruction sets that this CPU has kernels for, fastest first, as a list of names with commas; empty if none. */
const char *kt_instruction_sets(void);

/* Take one of them from now on; null: the fastest. Returns 0, or -1 if the CPU does not have it. */
int kt_use(const char *name);

/* The one in use. */
const char *kt_in_use(void);

/* libgomp's own functions: GOMP_parallel, GOMP_barrier, omp_get_thread_num and omp_get_num_threads. Without them, one thread computes. */
void kt_set_team(void (*parallel)(void (*)(void *), void *, unsigned, unsigned), void (*barrier)(void), int (*thread)(void),
                 int (*threads)(void));

/* Bytes of scratch memory, 64-byte aligned, that a call needs. */
int64_t kt_experts_scratch(const kt_experts *experts, int64_t tokens, int64_t top, int threads);
int64_t kt_linear_scratch(const kt_linear *linear, int64_t tokens, int threads);
int64_t kt_heads_scratch(const kt_heads *heads, int64_t tokens, int threads);
int64_t kt_attention_scratch(const kt_attention *attention, int threads); /* not less for more keys or threads */

/* out[t] = sum over k of scores[t, k] * expert[index[t, k]](x[t]), for x and out [tokens, hidden] of x_dtype, index [tokens, top],
 * scores [tokens, top]. An index ~e leaves expert e out: somebody else computes it. Returns 0, or -1 for an index that is no expert. */
int kt_experts_forward(const kt_experts *experts, const void *x, int32_t x_dtype, int64_t tokens, const int64_t *index,
                       const float *scores, int64_t top, void *out, void *scratch, int threads);

/* A call of kt_experts_forward that a GPU's stream makes, maybe again and again. It and all that it points to stay in place until the stream has
 * finished it for good. */
typedef struct kt_host_call {
    const kt_experts *experts;
    const void *x;
    const int64_t *index;
    const float *scores;
    void *out;
    int64_t tokens, top, chunk; /* at most so many tokens at a time, which bounds the scratch memory */
    int32_t x_dtype, threads;
    int32_t state;              /* 0 before it is started, 3 when it is finished */
    struct kt_host_call *next;  /* of the library's own */
} kt_host_call;

/* What a stream calls (cudaHostFn_t), with a kt_host_call: hand it to the thread that computes; and wait until it is computed. Neither calls
 * CUDA, or Python. Where an index is no expert, the results of the call are NaN. */
void kt_start_on_host(void *call);
void kt_finish_on_host(void *call);

/* Whether such a call has failed since this was asked last: 0, the number of experts of the layer where an index is none of them, or -1
 * where memory was short. */
int64_t kt_failed_on_host(void);

/* pthread_create, which is another symbol in new C libraries than in old ones. Without it, the thread of the stream computes. */
void kt_set_thread(int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *));

/* out[t] = W x[t] + B (A x[t]) + bias, for x [tokens, cols] and out [tokens, rows] of x_dtype. */
void kt_linear_forward(const kt_linear *linear, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *scratch,
                       int threads);

/* For x [tokens, heads, cols] and out [tokens, heads, rows] of x_dtype; transposed, the other way round. */
void kt_heads_forward(const kt_heads *heads, const void *x, int32_t x_dtype, int64_t tokens, void *out, void *scratch, int threads);

/* For x and out [rows, width] of x_dtype. */
void kt_norm_forward(const kt_norm *norm, const void *x, int32_t x_dtype, int64_t rows, void *out, int threads);

/* Each query's softmax(scale q k) v; zeros for one that sees no key. Where the CPU multiplies pairs of bf16, the softmax's weights are rounded
 * to bf16 first. */
void kt_attention_forward(const kt_attention *attention, void *scratch, int threads);

/* Returns 0, or -1 if a weight is not finite. */
int kt_quantize(const kt_quantization *quantization, int threads);

/* Bytes of scratch memory that a program needs; calls of attention need more when their keys grow. */
int64_t kt_run_scratch(const kt_step *steps, int64_t count, int threads);

/* Compute the steps in order; seconds, if not null, gets what each kt_op takes added. Returns 0, or -1 for an index that is no expert; the
 * steps before it are done. */
int kt_run(const kt_step *steps, int64_t count, void *scratch, int threads, double *seconds);

/* Between these calls, which one thread at a time makes, a mapping of a file that is cut short reads as zeros behind the new end, instead of
 * ending the process. Returns 0, or -1 where there are too many. */
int kt_guard_mapped(const void *address, int64_t bytes);
void kt_release_mapped(const void *address);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
