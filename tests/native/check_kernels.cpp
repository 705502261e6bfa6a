/* Checks the native kernels against plain loops of doubles.
 *
 *     check_kernels [instruction set]
 *
 * Every array is exactly as long as the interface says. Behind it lies a page that cannot be read, so that a load which goes too far ends the
 * program; with a sanitizer it lies in the sanitizer's heap. Arrays that kernels only read are in read-only pages, as mapped files are. A team of
 * pthreads stands in for libgomp's, which the thread sanitizer does not know. C headers only, as the kernels themselves.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kt_native.h"

namespace {

/* ---- arrays ---- */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool GUARDED = false;
#elif defined(__has_feature)
constexpr bool GUARDED = !__has_feature(address_sanitizer) && !__has_feature(thread_sanitizer);
#else
constexpr bool GUARDED = true;
#endif

struct Block {
    char *pages;
    size_t length, unreadable;
} blocks[8192];
int count;

char *allocate(int64_t bytes) {
    if (count == int(sizeof blocks / sizeof *blocks)) abort();
    Block &block = blocks[count++];
    if (!GUARDED) {
        void *found = nullptr;
        if (posix_memalign(&found, 64, size_t(bytes))) abort();
        block = {static_cast<char *>(found), 0, 0};
        return block.pages;
    }
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    block.length = (size_t(bytes) + page - 1) / page * page, block.unreadable = page;
    void *found = mmap(nullptr, block.length + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) abort();
    block.pages = static_cast<char *>(found);
    mprotect(block.pages + block.length, page, PROT_NONE);
    return block.pages + block.length - bytes;
}

/* Nothing that has been allocated may be written from now on. */
void seal() {
    for (int i = 0; GUARDED && i < count; i++)
        if (blocks[i].length) mprotect(blocks[i].pages, blocks[i].length, PROT_READ);
}

void free_down_to(int kept) {
    for (; count > kept; count--) {
        Block &block = blocks[count - 1];
        GUARDED ? (void)munmap(block.pages, block.length + block.unreadable) : free(block.pages);
    }
}

uint64_t state;
uint64_t random_bits() { /* xorshift64* (Vigna 2016) */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1D;
}
int64_t below(int64_t n) { return int64_t((random_bits() >> 20) % uint64_t(n)); }

int itemsize(int dtype) { return dtype == KT_F32 ? 4 : dtype == KT_BOOL ? 1 : 2; }
float float_of(uint32_t bits) {
    float found;
    memcpy(&found, &bits, 4);
    return found;
}
double value(const void *array, int dtype, int64_t i) {
    if (dtype == KT_F32) return static_cast<const float *>(array)[i];
    if (dtype == KT_BOOL) return static_cast<const uint8_t *>(array)[i];
    const uint16_t bits = static_cast<const uint16_t *>(array)[i];
    if (dtype == KT_BF16) return float_of(uint32_t(bits) << 16);
    const uint32_t sign = uint32_t(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
    return exponent ? float_of(sign | (exponent + 112) << 23 | fraction << 13) : (sign ? -1 : 1) * ldexp(fraction, -24);
}
double to_bf16(double v) { /* to nearest, ties to even, by way of float32 */
    const float narrow = float(v);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    return float_of((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

/* n values between -1 and 1, or above 0; of f16, a few are subnormal. */
void *drawn(int dtype, int64_t n, bool positive = false) {
    char *array = allocate(n * itemsize(dtype));
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = random_bits() >> 16;
        if (dtype == KT_F32) {
            const float found = float(int64_t(bits % (1 << 24)) - (1 << 23)) / (1 << 23);
            reinterpret_cast<float *>(array)[i] = positive ? fabsf(found) : found;
        } else if (dtype == KT_BOOL) {
            array[i] = char(bits & 1);
        } else {
            const uint32_t sign = positive ? 0 : uint32_t(bits & 1) << 15, few = uint32_t(bits >> 1) % 8;
            const bool subnormal = (bits >> 8) % 64 == 0;
            const uint32_t rest = dtype == KT_BF16 ? (119 + few) << 7 | (bits >> 20 & 127)
                                                   : (subnormal ? 0 : 7 + few) << 10 | (bits >> 20 & 1023);
            reinterpret_cast<uint16_t *>(array)[i] = uint16_t(sign | rest);
        }
    }
    return array;
}
const float *drawn_floats(int64_t n) { return static_cast<const float *>(drawn(KT_F32, n)); }
double *doubles(int64_t n) {
    double *found = reinterpret_cast<double *>(allocate(n * 8));
    memset(found, 0, size_t(n) * 8);
    return found;
}

/* ---- the team ---- */

thread_local int own_number, own_count = 1;
pthread_barrier_t all_here;
struct Member {
    void (*body)(void *);
    void *data;
    int number, count;
};
void *member(void *given) {
    const Member &self = *static_cast<Member *>(given);
    own_number = self.number, own_count = self.count;
    self.body(self.data);
    own_number = 0, own_count = 1;
    return nullptr;
}
void parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
    Member members[64];
    pthread_t handles[64];
    pthread_barrier_init(&all_here, nullptr, threads);
    for (int i = int(threads) - 1; i >= 0; i--) {
        members[i] = {body, data, i, int(threads)};
        if (i)
            pthread_create(&handles[i], nullptr, member, &members[i]);
        else
            member(&members[0]);
    }
    for (unsigned i = 1; i < threads; i++) pthread_join(handles[i], nullptr);
    pthread_barrier_destroy(&all_here);
}
void barrier() { pthread_barrier_wait(&all_here); }
int thread_number() { return own_number; }
int thread_count() { return own_count; }

/* ---- comparing ---- */

const char *instructions;
int failures, cases;
bool pairs() { return !strcmp(instructions, "avx512bf16") || !strcmp(instructions, "amx"); } /* multiplies bf16 weights by activations rounded to bf16 */
const char *const NAMES[] = {"f32", "bf16", "f16", "bool", "i64", "c64", "int4", "int8", "e4m3"};
constexpr int THREADS[] = {1, 2, 5}, MOST_THREADS = 5;

/* Compute with different numbers of threads: the answers are the same bits, and each row is near the wanted one. */
template <class Call>
void check(const char *name, int64_t rows, int64_t width, int dtype, const double *wanted, double rounding, int64_t scratch_bytes, Call call) {
    seal();
    const double bound = rounding + (dtype == KT_F32 ? 4e-6 : dtype == KT_BF16 ? 4e-3 : 1e-3);
    const int64_t bytes = rows * width * itemsize(dtype);
    char *first = nullptr;
    cases++;
    for (int threads : THREADS) {
        char *out = allocate(bytes), *scratch = allocate(scratch_bytes);
        memset(out, 0xff, size_t(bytes)), memset(scratch, 0xff, size_t(scratch_bytes)); /* NaN, so that nothing old is used */
        call(out, scratch, threads);
        if (first && memcmp(first, out, size_t(bytes))) {
            printf("%s %s: %d threads give other bits than one\n", instructions, name, threads);
            failures++;
        }
        first = first ? first : out;
    }
    double worst = 0;
    for (int64_t r = 0; r < rows; r++) {
        double error = 0, size = 0;
        for (int64_t i = 0; i < width; i++) {
            const double exact = wanted[r * width + i], difference = value(first, dtype, r * width + i) - exact;
            error += difference * difference, size += exact * exact;
        }
        const double relative = sqrt(error / (size + (dtype == KT_F16 ? 1e-9 : 1e-30))); /* of f16, the smallest are rounded more coarsely */
        worst = relative > worst || relative != relative ? relative : worst;
    }
    if (!(worst <= bound)) {
        printf("%s %s: differs by %.2g, allowed are %.2g\n", instructions, name, worst, bound);
        failures++;
    }
}

/* ---- one weight ---- */

bool coded(int dtype) { return dtype >= KT_INT4; }

/* Codes of all kinds: groups of some size or whole rows, scales in both dtypes and of one row or some, tables of integers and of E2M1. */
kt_packing *drawn_packing(int dtype, int64_t cols) {
    if (!coded(dtype)) return nullptr;
    kt_packing *p = reinterpret_cast<kt_packing *>(allocate(sizeof(kt_packing)));
    const int64_t groups[] = {32, 64, 128, 256, cols};
    p->group = groups[below(5)], p->rows_of_scale = below(2) ? 1 : 3, p->scale_dtype = below(2) ? KT_BF16 : KT_F32;
    if (dtype == KT_E4M3 && p->group < 64 && p->group < cols) p->group = 64;
    if (p->group == cols && p->group < 32) p->group = 32; /* more than a row has */
    const bool integers = below(2);
    const float e2m1[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    for (int i = 0; i < 16; i++) p->table[i] = integers ? float(i - 8) : i < 8 ? e2m1[i] : -e2m1[i - 8];
    return p;
}
int64_t scales_of(const kt_packing &p, int64_t cols) { return (cols + p.group - 1) / p.group; }

double weight_value(const kt_weight &w, int dtype, const kt_packing *p, int64_t n, int64_t i) {
    const int64_t at = n * w.stride + i;
    if (!coded(dtype)) return value(w.weight, dtype, at);
    const double scale = value(w.scales, p->scale_dtype, n / p->rows_of_scale * w.scale_stride + i / p->group);
    const uint8_t code = static_cast<const uint8_t *>(w.weight)[dtype == KT_INT4 ? at / 2 : at];
    if (dtype == KT_INT4) return scale * p->table[at % 2 ? code >> 4 : code & 15];
    if (dtype == KT_INT8) return scale * int8_t(code);
    const int exponent = code >> 3 & 15, fraction = code & 7;
    return scale * (code & 128 ? -1 : 1) * (exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9));
}

kt_weight drawn_weight(int dtype, int64_t rows, int64_t cols, int64_t rank, int64_t between, bool bias, const kt_packing *p = nullptr, bool offsets = false) {
    kt_weight w = {};
    w.stride = cols + (dtype == KT_INT4 ? between * 2 : between);
    const int64_t values = (rows - 1) * w.stride + cols; /* nothing lies behind the last row */
    if (coded(dtype)) {
        const int64_t bytes = dtype == KT_INT4 ? (values + 1) / 2 : values;
        uint8_t *codes = reinterpret_cast<uint8_t *>(allocate(bytes));
        for (int64_t i = 0; i < bytes; i++) {
            codes[i] = uint8_t(random_bits() >> 30);
            if (dtype == KT_E4M3 && (codes[i] & 127) == 127) codes[i]--; /* NaN */
        }
        const int64_t each = scales_of(*p, cols);
        w.weight = codes, w.scale_stride = each + between;
        const int64_t scales = (rows - 1) / p->rows_of_scale * w.scale_stride + each;
        void *drawn_scales = drawn(p->scale_dtype, scales, true); /* and then smaller, so that half numbers can hold the sums */
        for (int64_t i = 0; i < scales; i++)
            if (p->scale_dtype == KT_F32) static_cast<float *>(drawn_scales)[i] /= 64;
            else static_cast<uint16_t *>(drawn_scales)[i] = uint16_t(static_cast<uint16_t *>(drawn_scales)[i] - (6 << 7));
        w.scales = drawn_scales;
        if (offsets) {
            const int64_t n = (rows + 15) / 16 * 16 * each;
            float *drawn_offsets = static_cast<float *>(drawn(KT_F32, n));
            for (int64_t i = 0; i < n; i++) drawn_offsets[i] /= 16;
            w.offsets = drawn_offsets;
        }
    } else {
        w.weight = drawn(dtype, values);
    }
    if (rank) w.a = drawn_floats(rank * cols), w.b = drawn_floats((rows + 15) / 16 * 16 * rank);
    if (bias) w.bias = drawn_floats(rows);
    return w;
}

/* Integers are multiplied by numbers of 16 bits, with a scale for each token. */
bool in_shorts(int dtype) { return (dtype == KT_INT4 || dtype == KT_INT8) && !pairs(); }

/* out = W rounded + B (A x) + bias; rounded: x as W multiplies it. */
void plain_product(const kt_weight &w, int dtype, const kt_packing *p, int64_t rows, int64_t cols, int64_t rank, const double *x, double *out, int64_t tokens) {
    const bool unpacked = coded(dtype) && tokens >= 16; /* into the dtype that is multiplied */
    double low[256] = {}, rounded[1100];
    float most = 0;
    for (int64_t i = 0; i < cols; i++) most = fmaxf(most, fabsf(float(x[i])));
    const float scale = most / (127 * 256), inverse = scale > 0 ? 1 / scale : 0;
    for (int64_t i = 0; i < cols; i++)
        rounded[i] = in_shorts(dtype) ? nearbyintf(float(x[i]) * inverse) * double(scale) : (dtype == KT_BF16 || coded(dtype)) && pairs() ? to_bf16(x[i]) : x[i];
    for (int64_t j = 0; w.a && j < rank; j++)
        for (int64_t i = 0; i < cols; i++) low[j] += double(w.a[j * cols + i]) * x[i];
    for (int64_t n = 0; n < rows; n++) {
        double sum = w.bias ? w.bias[n] : 0;
        for (int64_t i = 0; i < cols; i++)
            {
                const double weight = weight_value(w, dtype, p, n, i);
                const double offset = w.offsets ? w.offsets[(n / 16 * scales_of(*p, cols) + i / p->group) * 16 + n % 16] : 0;
                sum += ((unpacked && pairs() ? to_bf16(weight) : weight) + offset) * rounded[i];
            }
        for (int64_t j = 0; w.b && j < rank; j++) sum += double(w.b[(n / 16 * rank + j) * 16 + n % 16]) * low[j];
        out[n] = sum;
    }
}

void check_linear(int64_t tokens, int64_t rows, int64_t cols, int64_t rank, int dtype, int x_dtype) {
    char name[200];
    snprintf(name, sizeof name, "linear: %d tokens, %d x %d, rank %d, %s weights, %s tokens", int(tokens), int(rows), int(cols), int(rank),
             NAMES[dtype], NAMES[x_dtype]);
    const kt_packing *packing = drawn_packing(dtype, cols);
    const kt_linear l = {rows, cols, rank, dtype, packing, drawn_weight(dtype, rows, cols, rank, tokens % 3, rows % 2, packing, below(2))};
    const void *x = drawn(x_dtype, tokens * cols);
    double *wanted = doubles(tokens * rows), *one = doubles(cols);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < cols; i++) one[i] = value(x, x_dtype, t * cols + i);
        plain_product(l.weight, dtype, packing, rows, cols, rank, one, wanted + t * rows, tokens);
    }
    kt_step step = {}; /* the same by way of a program */
    kt_linears alone = {1, {&l}, {}};
    step.op = KT_STEP_LINEAR, step.call = &alone, step.a = x, step.dtypes[1] = x_dtype, step.n = tokens;
    check(name, tokens, rows, x_dtype, wanted, 0, kt_run_scratch(&step, 1, MOST_THREADS), [&](void *out, void *scratch, int threads) {
        alone.outs[0] = out;
        if (threads == 2)
            kt_run(&step, 1, scratch, threads, nullptr);
        else
            kt_linear_forward(&l, x, x_dtype, tokens, out, scratch, threads);
    });
    free_down_to(0);
}

/* Several layers of one input. */
void check_linears(int64_t tokens, int dtype, int x_dtype) {
    char name[200];
    snprintf(name, sizeof name, "linears: %d tokens, %s weights, %s tokens", int(tokens), NAMES[dtype], NAMES[x_dtype]);
    const int64_t COLS = coded(dtype) ? 76 : 75;
    constexpr int64_t ROWS[] = {7, 33, 5}, RANKS[] = {3, 0, 9};
    kt_linear layers[3];
    kt_linears l = {3, {}, {}};
    for (int n = 0; n < 3; n++) {
        const kt_packing *packing = drawn_packing(dtype, COLS);
        layers[n] = {ROWS[n], COLS, RANKS[n], dtype, packing, drawn_weight(dtype, ROWS[n], COLS, RANKS[n], n, n == 1, packing, n != 1)};
        l.parts[n] = &layers[n];
    }
    const void *x = drawn(x_dtype, tokens * COLS);
    double *wanted = doubles(tokens * 45), *one = doubles(COLS), *to = wanted;
    for (int n = 0; n < 3; n++)
        for (int64_t t = 0; t < tokens; t++, to += ROWS[n]) {
            for (int64_t i = 0; i < COLS; i++) one[i] = value(x, x_dtype, t * COLS + i);
            plain_product(layers[n].weight, dtype, layers[n].packing, ROWS[n], COLS, RANKS[n], one, to, tokens);
        }
    kt_step step = {};
    step.op = KT_STEP_LINEAR, step.call = &l, step.a = x, step.dtypes[1] = x_dtype, step.n = tokens;
    check(name, 1, tokens * 45, x_dtype, wanted, 0, kt_run_scratch(&step, 1, MOST_THREADS), [&](char *out, void *scratch, int threads) {
        for (int n = 0; n < 3; out += tokens * ROWS[n] * itemsize(x_dtype), n++) l.outs[n] = out;
        kt_run(&step, 1, scratch, threads, nullptr);
    });
    free_down_to(0);
}

/* Each head's input with its part of a weight, which lies between other rows. */
void check_heads(int64_t tokens, int64_t heads, int64_t rows, int64_t cols, int64_t rank, int transposed, int dtype, int x_dtype) {
    char name[200];
    snprintf(name, sizeof name, "heads: %d tokens, %d of %d x %d, transposed: %d, rank %d, %s weights, %s tokens", int(tokens), int(heads), int(rows),
             int(cols), transposed, int(rank), NAMES[dtype], NAMES[x_dtype]);
    const int64_t stride = cols + tokens % 3, head_stride = (rows + 2) * stride, padded = transposed ? rows : (rows + 15) / 16 * 16;
    kt_heads h = {heads, rows, cols, rank, dtype, transposed, nullptr, head_stride, stride, nullptr, nullptr};
    h.weight = drawn(dtype, (heads - 1) * head_stride + (rows - 1) * stride + cols);
    if (rank) h.a = drawn_floats(rank * cols), h.b = drawn_floats(heads * padded * rank);
    const int64_t in = transposed ? rows : cols, out_size = transposed ? cols : rows;
    const void *x = drawn(x_dtype, tokens * heads * in);
    double *wanted = doubles(tokens * heads * out_size), *one = doubles(in);
    for (int64_t t = 0; t < tokens * heads; t++) {
        const int64_t head = t % heads;
        for (int64_t i = 0; i < in; i++) one[i] = value(x, x_dtype, t * in + i);
        double *to = wanted + t * out_size, low[64] = {};
        if (!transposed) {
            const void *own = static_cast<const char *>(h.weight) + head * head_stride * itemsize(dtype);
            plain_product({own, stride, h.a, h.b ? h.b + head * padded * rank : nullptr, nullptr, nullptr, 0}, dtype, nullptr, rows, cols, rank, one, to, 1);
            continue;
        }
        for (int64_t j = 0; j < rank; j++)
            for (int64_t r = 0; r < rows; r++) low[j] += double(h.b[(head * rows + r) * rank + j]) * one[r];
        for (int64_t c = 0; c < cols; c++) {
            to[c] = 0;
            for (int64_t r = 0; r < rows; r++) to[c] += value(h.weight, dtype, head * head_stride + r * stride + c) * one[r];
            for (int64_t j = 0; j < rank; j++) to[c] += double(h.a[j * cols + c]) * low[j];
        }
    }
    kt_step step = {};
    step.op = KT_STEP_HEADS, step.call = &h, step.a = x, step.dtypes[1] = x_dtype, step.n = tokens;
    const int64_t by_step = kt_run_scratch(&step, 1, MOST_THREADS), alone = kt_heads_scratch(&h, tokens, MOST_THREADS);
    check(name, tokens * heads, out_size, x_dtype, wanted, 0, by_step > alone ? by_step : alone, [&](void *out, void *scratch, int threads) {
        step.out = out;
        if (threads == 2)
            kt_run(&step, 1, scratch, threads, nullptr);
        else
            kt_heads_forward(&h, x, x_dtype, tokens, out, scratch, threads);
    });
    free_down_to(0);
}

void check_norm(int64_t rows, int64_t width, int dtype, int x_dtype, int round_first) {
    char name[200];
    snprintf(name, sizeof name, "norm: %d rows of %d, %s weight, %s, rounded first: %d", int(rows), int(width), NAMES[dtype], NAMES[x_dtype],
             round_first);
    const kt_norm norm = {width, drawn(dtype, width), dtype, 1e-5f, round_first ? 0.f : 1.f, round_first};
    const void *x = drawn(x_dtype, rows * width);
    double *wanted = doubles(rows * width);
    for (int64_t r = 0; r < rows; r++) {
        double square = 0;
        for (int64_t i = 0; i < width; i++) square += value(x, x_dtype, r * width + i) * value(x, x_dtype, r * width + i);
        for (int64_t i = 0; i < width; i++)
            wanted[r * width + i] = value(x, x_dtype, r * width + i) / sqrt(square / width + norm.eps) * (value(norm.weight, dtype, i) + norm.offset);
    }
    const double rounding = round_first && x_dtype == KT_BF16 ? 4e-3 : 0; /* twice, and few values */
    check(name, rows, width, x_dtype, wanted, rounding, 0, [&](void *out, void *, int threads) {
        kt_step step = {};
        step.op = KT_STEP_NORM, step.call = &norm, step.a = x, step.dtypes[1] = x_dtype, step.n = rows, step.out = out;
        if (threads == 2)
            kt_run(&step, 1, nullptr, threads, nullptr);
        else
            kt_norm_forward(&norm, x, x_dtype, rows, out, threads);
    });
    free_down_to(0);
}

/* ---- experts ---- */

double activated(double x, const kt_experts &e) {
    switch (e.activation) {
        case KT_GELU: return x / 2 * (1 + erf(x / sqrt(2.)));
        case KT_GELU_TANH: return x / 2 * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
        case KT_RELU: return x > 0 ? x : 0;
        case KT_RELU2: return x > 0 ? x * x : 0;
        default: return x / (1 + exp(-e.alpha * x));
    }
}

void check_experts(int64_t tokens, int64_t top, int64_t experts, int64_t hidden, int64_t inner, int64_t rank, int dtype, int x_dtype,
                   int formula) {
    char name[200];
    snprintf(name, sizeof name, "experts: %d tokens, %d of %d, %d x %d, rank %d, %s weights, %s tokens, formula %d", int(tokens), int(top),
             int(experts), int(hidden), int(inner), int(rank), NAMES[dtype], NAMES[x_dtype], formula);
    kt_experts e = {};
    e.experts = experts, e.hidden = hidden, e.intermediate = inner, e.rank = rank, e.dtype = dtype, e.alpha = 1, e.limit = INFINITY;
    e.packing = drawn_packing(dtype, hidden > inner ? hidden : inner);
    e.activation = formula % 5;
    const bool gated = formula < 7, biased = formula == 5 || formula == 8; /* 5, 6: limits, as gpt-oss and Step have them; 7, 8: no gate */
    if (formula == 5) e.alpha = 1.702f, e.limit = 0.7f, e.up_offset = 1, e.activation = KT_SILU;
    if (formula == 6) e.limit = 0.5f, e.limit_activated = 1, e.activation = KT_SILU;
    if (formula == 7) e.activation = KT_RELU2;
    kt_weight *all = reinterpret_cast<kt_weight *>(allocate(experts * 3 * int64_t(sizeof(kt_weight))));
    const bool offsets = below(2);
    for (int64_t n = 0; n < 3 * experts; n++) { /* a third of the weights have no LoRA */
        const bool down = n >= 2 * experts;
        all[n] = drawn_weight(dtype, down ? hidden : inner, down ? inner : hidden, n % 3 == 2 ? 0 : rank, n % 2, biased, e.packing, offsets);
    }
    e.gate = gated ? all : nullptr, e.up = all + experts, e.down = all + 2 * experts;
    const void *x = drawn(x_dtype, tokens * hidden);
    int64_t *index = reinterpret_cast<int64_t *>(allocate(tokens * top * 8));
    const float *scores = drawn_floats(tokens * top);
    double *wanted = doubles(tokens * hidden), *one = doubles(hidden), *gate = doubles(inner), *up = doubles(inner), *out = doubles(hidden);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < hidden; i++) one[i] = value(x, x_dtype, t * hidden + i);
        const int64_t start = below(experts);
        for (int64_t k = 0; k < top; k++) {
            const int64_t n = index[t * top + k] = (start + k * (1 + k)) % experts; /* also twice the same */
            if ((t * top + k) % 7 == 6) {
                index[t * top + k] = ~n; /* computed elsewhere */
                continue;
            }
            plain_product(e.up[n], dtype, e.packing, inner, hidden, rank, one, up, tokens);
            if (gated) plain_product(e.gate[n], dtype, e.packing, inner, hidden, rank, one, gate, tokens);
            for (int64_t i = 0; i < inner; i++) {
                double g = gate[i], u = up[i];
                if (gated && !e.limit_activated) g = fmin(g, e.limit);
                g = activated(gated ? g : u, e);
                if (gated && e.limit_activated) g = fmin(g, e.limit);
                up[i] = gated ? g * (fmax(fmin(u, e.limit), -e.limit) + e.up_offset) : g;
            }
            plain_product(e.down[n], dtype, e.packing, hidden, inner, rank, up, out, tokens);
            for (int64_t i = 0; i < hidden; i++) wanted[t * hidden + i] += double(scores[t * top + k]) * out[i];
        }
    }
    /* A sum that lies near the middle of two bf16 numbers may be rounded to the other one. */
    const double rounding = in_shorts(dtype) ? 5e-5 : !pairs() || !(dtype == KT_BF16 || coded(dtype)) ? 2e-6 : coded(dtype) && tokens * top >= 16 ? 1e-2 : 3e-3;
    kt_step step = {};
    step.op = KT_STEP_EXPERTS, step.call = &e, step.a = x, step.dtypes[1] = x_dtype, step.n = tokens, step.sizes[0] = top;
    step.b = index, step.c = scores;
    check(name, tokens, hidden, x_dtype, wanted, rounding, kt_run_scratch(&step, 1, MOST_THREADS), [&](void *to, void *scratch, int threads) {
        step.out = to;
        if (threads == 2 ? kt_run(&step, 1, scratch, threads, nullptr) : kt_experts_forward(&e, x, x_dtype, tokens, index, scores, top, to, scratch, threads)) failures++, printf("%s: refused\n", name);
    });
    free_down_to(0);
}

/* A code that is NaN gives NaN, with few tokens and with many, and no other row. */
void check_nan() {
    for (int64_t tokens = 1; tokens < 40; tokens += 32) {
        kt_packing packing = {128, 1, KT_F32, {}};
        kt_linear l = {2, 128, 0, KT_E4M3, &packing, drawn_weight(KT_E4M3, 2, 128, 0, 0, false, &packing)};
        const_cast<uint8_t *>(static_cast<const uint8_t *>(l.weight.weight))[77] = tokens == 1 ? 0x7f : 0xff;
        const void *x = drawn(KT_F32, tokens * 128);
        float *out = reinterpret_cast<float *>(allocate(tokens * 2 * 4));
        kt_linear_forward(&l, x, KT_F32, tokens, out, allocate(kt_linear_scratch(&l, tokens, 1)), 1);
        cases++;
        for (int64_t t = 0; t < tokens; t++)
            if (out[2 * t] == out[2 * t] || out[2 * t + 1] != out[2 * t + 1]) failures++, printf("%s: NaN of e4m3, %d tokens: %g, %g\n", instructions, int(tokens), out[2 * t], out[2 * t + 1]);
        free_down_to(0);
    }
}

/* What is not finite in one token makes all its results so, and no other token's. */
void check_infinite_tokens(int dtype) {
    const float wrong[] = {NAN, INFINITY, -INFINITY};
    for (int n = 0; n < 6; n++) {
        const int64_t tokens = n % 2 ? 20 : 3, cols = 70 + n * 30, rows = 5;
        const kt_packing *packing = drawn_packing(dtype, cols);
        const kt_linear l = {rows, cols, 0, dtype, packing, drawn_weight(dtype, rows, cols, 0, 0, false, packing)};
        float *x = static_cast<float *>(drawn(KT_F32, tokens * cols)), *out = reinterpret_cast<float *>(allocate(tokens * rows * 4));
        x[cols + below(cols)] = wrong[n / 2];
        kt_linear_forward(&l, x, KT_F32, tokens, out, allocate(kt_linear_scratch(&l, tokens, 1)), 1);
        cases++;
        for (int64_t i = 0; i < tokens * rows; i++)
            if (isfinite(out[i]) == (i / rows == 1)) failures++, printf("%s: a token with %g, %s weights: token %d has %g\n", instructions, wrong[n / 2], NAMES[dtype], int(i / rows), out[i]);
        free_down_to(0);
    }
}

void check_refusal() {
    kt_experts e = {};
    e.experts = 3;
    const int64_t indices[] = {-4, 3};
    for (const int64_t &index : indices)
        if (kt_experts_forward(&e, nullptr, KT_F32, 1, &index, nullptr, 1, nullptr, nullptr, 1) != -1)
            failures++, printf("%s experts: expert %d of 3 is not refused\n", instructions, int(index));
}

/* ---- attention ---- */

struct Sizes {
    int64_t batch, heads, kv_heads, queries, keys, key_dim, value_dim, window;
    bool sinks, mask;
};

/* Rows of codes as KT_STEP_ENCODE makes them; `array`, `heads` times `held` rows apart by `between`, becomes what they stand for. */
void *encoded(int dtype, int64_t heads, int64_t held, int64_t between, int64_t width, const void *array, double *values) {
    const int64_t words = (width + 3) / 4 + 1;
    int32_t *rows = reinterpret_cast<int32_t *>(allocate(((heads - 1) * between + held) * words * 4));
    kt_step step = {KT_STEP_ENCODE, {0, dtype, 0}, {1, heads, held, width}, {{0, between * words, words, 1}, {0, between * width, width, 1}, {}}, rows, array, nullptr, nullptr, 0, 0, 0, nullptr};
    kt_run(&step, 1, nullptr, 3, nullptr);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < held; r++) {
            const int32_t *row = rows + (h * between + r) * words;
            float scale;
            memcpy(&scale, row + words - 1, 4);
            for (int64_t d = 0; d < width; d++) {
                const int64_t at = (h * between + r) * width + d;
                values[at] = double(reinterpret_cast<const int8_t *>(row)[d]) * scale;
                if (!(fabs(values[at] - value(array, dtype, at)) <= 0.501 * scale)) failures++, printf("%s: a code is wrong\n", instructions);
            }
        }
    return rows;
}

void check_attention(const Sizes &s, int dtype, bool coded) {
    char name[200];
    snprintf(name, sizeof name, "attention%s: batch %d, %d heads of %d, %d queries, %d keys, %d and %d wide, window %d%s%s, %s", coded ? " to codes" : "", int(s.batch),
             int(s.heads), int(s.kv_heads), int(s.queries), int(s.keys), int(s.key_dim), int(s.value_dim), int(s.window),
             s.sinks ? ", sinks" : "", s.mask ? ", mask" : "", NAMES[dtype]);
    kt_attention a = {};
    a.batch = s.batch, a.heads = s.heads, a.kv_heads = s.kv_heads, a.queries = s.queries, a.keys = s.keys;
    a.key_dim = s.key_dim, a.value_dim = s.value_dim, a.window = s.window, a.dtype = dtype, a.scale = float(1 / sqrt(double(s.key_dim)));
    const int64_t room = s.keys + 3; /* rows of a head in the cache */
    const int64_t q_strides[] = {s.queries * s.heads * s.key_dim, s.key_dim, s.heads * s.key_dim};
    const int64_t k_strides[] = {s.kv_heads * room * s.key_dim, room * s.key_dim, s.key_dim};
    const int64_t v_strides[] = {s.kv_heads * room * s.value_dim, room * s.value_dim, s.value_dim};
    memcpy(a.q_strides, q_strides, sizeof q_strides), memcpy(a.k_strides, k_strides, sizeof k_strides);
    memcpy(a.v_strides, v_strides, sizeof v_strides);
    a.q = drawn(dtype, s.batch * s.queries * s.heads * s.key_dim);
    a.k = drawn(dtype, s.batch * s.kv_heads * room * s.key_dim - 3 * s.key_dim); /* nothing lies behind the last key */
    a.v = drawn(dtype, s.batch * s.kv_heads * room * s.value_dim - 3 * s.value_dim);
    if (s.sinks) a.sinks = drawn_floats(s.heads);
    if (s.mask) {
        uint8_t *mask = reinterpret_cast<uint8_t *>(allocate(s.batch * s.keys));
        for (int64_t i = 0; i < s.batch * s.keys; i++) mask[i] = i % s.keys >= s.keys - s.queries || below(3) > 0;
        a.mask = mask;
    }
    const int64_t key_heads = s.batch * s.kv_heads, all_rows = key_heads * room - 3;
    double *keys = doubles(all_rows * s.key_dim), *values = doubles(all_rows * s.value_dim);
    for (int64_t i = 0; i < all_rows * s.key_dim; i++) keys[i] = value(a.k, dtype, i);
    for (int64_t i = 0; i < all_rows * s.value_dim; i++) values[i] = value(a.v, dtype, i);
    if (coded) {
        a.coded = 1;
        a.k = encoded(dtype, key_heads, s.keys, room, s.key_dim, a.k, keys), a.v = encoded(dtype, key_heads, s.keys, room, s.value_dim, a.v, values);
        for (int i = 0; i < 3; i++) a.k_strides[i] = k_strides[i] / s.key_dim * ((s.key_dim + 3) / 4 + 1), a.v_strides[i] = v_strides[i] / s.value_dim * ((s.value_dim + 3) / 4 + 1);
    }
    const int64_t rows = s.batch * s.queries * s.heads;
    double *wanted = doubles(rows * s.value_dim), *score = doubles(s.keys);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t head = r % s.heads, query = r / s.heads % s.queries, batch = r / s.heads / s.queries, kv = head / (s.heads / s.kv_heads);
        const int64_t last = s.keys - s.queries + query, first = s.window && last + 1 > s.window ? last + 1 - s.window : 0;
        double most = s.sinks ? a.sinks[head] : -INFINITY, total = 0;
        for (int64_t i = first; i <= last; i++) {
            score[i] = s.mask && !a.mask[batch * s.keys + i] ? -INFINITY : 0;
            for (int64_t d = 0; d < s.key_dim; d++)
                score[i] += a.scale * value(a.q, dtype, batch * q_strides[0] + head * q_strides[1] + query * q_strides[2] + d) *
                            keys[batch * k_strides[0] + kv * k_strides[1] + i * k_strides[2] + d];
            most = fmax(most, score[i]);
        }
        if (s.sinks) total = exp(a.sinks[head] - most);
        for (int64_t i = first; i <= last; i++) total += score[i] = exp(score[i] - most);
        for (int64_t i = first; i <= last; i++)
            for (int64_t d = 0; d < s.value_dim; d++)
                wanted[r * s.value_dim + d] +=
                    score[i] / total * values[batch * v_strides[0] + kv * v_strides[1] + i * v_strides[2] + d];
    }
    kt_step step = {};
    step.op = KT_STEP_ATTENTION, step.call = &a;
    const double rounding = pairs() && dtype == KT_BF16 ? 6e-3 : coded ? (dtype == KT_BF16 ? 4e-3 : dtype == KT_F16 ? 1e-3 : 4e-4) : 2e-6; /* the softmax's weights are rounded, too: few keys, no averaging */
    check(name, rows, s.value_dim, dtype, wanted, rounding, kt_run_scratch(&step, 1, MOST_THREADS), [&](void *out, void *scratch, int threads) {
        a.out = out;
        if (threads == 2)
            kt_run(&step, 1, scratch, threads, nullptr);
        else
            kt_attention_forward(&a, scratch, threads);
    });
    free_down_to(0);
}

/* ---- the steps between them ---- */

double computed(const kt_step &s, double a, double b) {
    kt_experts plain = {};
    plain.alpha = 1;
    switch (s.op) {
        case KT_STEP_ADD: return a + s.alpha * b;
        case KT_STEP_MUL: return a * b;
        case KT_STEP_DIV: return a / b;
        case KT_STEP_RSUB: return b - s.alpha * a;
        case KT_STEP_SIGMOID: return 1 / (1 + exp(-a));
        case KT_STEP_EXP: return exp(a);
        case KT_STEP_CLAMP: return fmin(fmax(a, s.alpha), s.beta);
        case KT_STEP_NEG: return -a;
        case KT_STEP_SQUARE: return a * a;
        case KT_STEP_RSQRT: return 1 / sqrt(a);
        case KT_STEP_SQRT: return sqrt(a);
        case KT_STEP_NOT: return a == 0;
        case KT_STEP_FILL_WHERE: return b != 0 ? s.alpha : a;
        case KT_STEP_GELU: plain.activation = KT_GELU; return activated(a, plain);
        case KT_STEP_GELU_TANH: plain.activation = KT_GELU_TANH; return activated(a, plain);
        case KT_STEP_SILU: return activated(a, plain);
        default: return a;
    }
}

/* out [2, 3, 2, width]; a with its first two dimensions exchanged and `apart` values between two; b as wide, or one value for each row, or the
 * number beta. */
void check_elementwise(int op, int out_dtype, int a_dtype, int b_dtype, int64_t width, int64_t apart, int second) {
    char name[200];
    snprintf(name, sizeof name, "step %d: %d wide, %s from %s and %s, %d apart, second operand %d", op, int(width), NAMES[out_dtype],
             NAMES[a_dtype], NAMES[b_dtype], int(apart), second);
    const int64_t row = (width - 1) * apart + 1, rows = 12;
    kt_step s = {op, {out_dtype, a_dtype, b_dtype}, {2, 3, 2, width}, {}, nullptr, nullptr, nullptr, nullptr, -0.3, 0.7, 0, nullptr};
    const int64_t strides[3][4] = {{6 * width, 2 * width, width, 1}, {2 * row, 4 * row, row, apart}, {0, 2, 1, 0}};
    memcpy(s.strides, strides, sizeof strides);
    if (second == 1) s.strides[2][1] = 0, s.strides[2][2] = width, s.strides[2][3] = 1;
    s.a = drawn(a_dtype, rows * row, op == KT_STEP_SQRT || op == KT_STEP_RSQRT);
    if (second != 2) s.b = drawn(b_dtype, second == 1 ? 2 * width : 6, true);
    double *wanted = doubles(rows * width);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < width; n++) {
            const int64_t at[] = {r / 6, r / 2 % 3, r % 2, n};
            int64_t places[3] = {};
            for (int d = 0; d < 4; d++)
                for (int which = 0; which < 3; which++) places[which] += at[d] * s.strides[which][d];
            wanted[places[0]] = computed(s, value(s.a, a_dtype, places[1]), s.b ? value(s.b, b_dtype, places[2]) : s.beta);
        }
    check(name, rows, width, out_dtype, wanted, 0, kt_run_scratch(&s, 1, MOST_THREADS), [&](void *out, void *scratch, int threads) {
        s.out = out;
        kt_run(&s, 1, scratch, threads, nullptr);
    });
    free_down_to(0);
}

void check_rows(int op, int out_dtype, int a_dtype, int64_t rows, int64_t width, int64_t chosen) {
    char name[200];
    snprintf(name, sizeof name, "step %d: %d of %d rows of %d, %s from %s", op, int(chosen), int(rows), int(width), NAMES[out_dtype],
             NAMES[a_dtype]);
    kt_step s = {op, {out_dtype, a_dtype, KT_I64}, {rows, width, 1, 1}, {}, nullptr, nullptr, nullptr, nullptr, 0.25, 0, chosen, nullptr};
    s.a = drawn(a_dtype, rows * width);
    const int64_t found = op == KT_STEP_SUM ? 1 : op == KT_STEP_SOFTMAX ? width : chosen;
    int64_t *index = reinterpret_cast<int64_t *>(allocate(rows * chosen * 8));
    double *wanted = doubles(rows * found);
    for (int64_t r = 0; r < rows; r++) {
        double total = 0;
        for (int64_t i = 0; i < width; i++) {
            const double v = value(s.a, a_dtype, r * width + i);
            total += op == KT_STEP_SOFTMAX ? exp(v) : v;
        }
        for (int64_t i = 0; i < found; i++) {
            int64_t place = i;
            if (op == KT_STEP_GATHER) place = below(width);
            if (op == KT_STEP_TOPK) { /* the largest of those not chosen yet; of equal ones the first */
                place = -1;
                for (int64_t n = 0; n < width; n++) {
                    bool taken = false;
                    for (int64_t j = 0; j < i; j++) taken |= index[r * chosen + j] == n;
                    if (!taken && (place < 0 || value(s.a, a_dtype, r * width + n) > value(s.a, a_dtype, r * width + place))) place = n;
                }
            }
            if (op == KT_STEP_GATHER || op == KT_STEP_TOPK) index[r * chosen + i] = place;
            const double v = value(s.a, a_dtype, r * width + place);
            wanted[r * found + i] = op == KT_STEP_SUM ? 0.25 * total : op == KT_STEP_SOFTMAX ? exp(v) / total : v;
        }
    }
    /* sums may cancel: their error is small beside all of them */
    check(name, op == KT_STEP_SUM ? 1 : rows, op == KT_STEP_SUM ? rows : found, out_dtype, wanted, 0, kt_run_scratch(&s, 1, MOST_THREADS),
          [&](void *out, void *scratch, int threads) {
              int64_t *own = op == KT_STEP_TOPK ? reinterpret_cast<int64_t *>(allocate(rows * chosen * 8)) : index;
              s.out = out, s.b = own;
              kt_run(&s, 1, scratch, threads, nullptr);
              if (memcmp(own, index, size_t(rows * chosen) * 8)) failures++, printf("%s %s: other indices\n", instructions, name);
          });
    free_down_to(0);
}

void check_steps() {
    const int64_t widths[] = {1, 5, 16, 300};
    for (int op = KT_STEP_COPY; op <= KT_STEP_FILL_WHERE; op++)
        for (int n = 0; n < 12; n++) {
            const int out = op == KT_STEP_NOT ? int(KT_BOOL) : n % 3, a = op == KT_STEP_NOT ? int(KT_BOOL) : n / 3 % 3;
            check_elementwise(op, out, a, op == KT_STEP_FILL_WHERE ? int(KT_BOOL) : (n + 1) % 3, widths[n % 4], 1 + n / 2 % 2,
                              op == KT_STEP_FILL_WHERE ? n % 2 : n % 3);
        }
    for (int op = KT_STEP_SUM; op <= KT_STEP_GATHER; op++)
        for (int n = 0; n < 9; n++) {
            const int64_t sizes[][3] = {{1, 1, 1}, {3, 17, 4}, {2, 130, 8}, {5, 64, 64}};
            const int64_t *s = sizes[n % 4];
            check_rows(op, n % 3, n / 3, s[0], s[1], s[2]);
        }
    for (int dtype = 0; dtype < 3; dtype++) { /* the first values of each row of 7 become 0.5, the others -0.25 */
        kt_step steps[2] = {{KT_STEP_FILL, {dtype, 0, 0}, {1, 1, 1, 21}, {{0, 0, 0, 1}, {}, {}}, nullptr, nullptr, nullptr, nullptr, -0.25, 0, 0, nullptr},
                            {KT_STEP_SCATTER, {dtype, dtype, KT_I64}, {3, 7, 1, 1}, {}, nullptr, nullptr, nullptr, nullptr, 0.5, 0, 2, nullptr}};
        int64_t *index = reinterpret_cast<int64_t *>(allocate(6 * 8));
        double *wanted = doubles(21);
        for (int n = 0; n < 21; n++) wanted[n] = n % 7 < 2 ? 0.5 : -0.25;
        for (int n = 0; n < 6; n++) index[n] = n % 2;
        steps[1].b = index;
        check("steps: fill and scatter", 3, 7, dtype, wanted, 0, kt_run_scratch(steps, 2, MOST_THREADS), [&](void *out, void *scratch, int threads) {
            steps[0].out = steps[1].out = out;
            kt_run(steps, 2, scratch, threads, nullptr);
        });
        free_down_to(0);
    }
    const char *text = "copied as it is";
    char *copy = allocate(16);
    kt_step s = {};
    s.op = KT_STEP_MEMCPY, s.a = text, s.out = copy, s.n = 16;
    if (kt_run(&s, 1, nullptr, 1, nullptr) || strcmp(copy, text)) failures++, printf("%s: step %d does not copy\n", instructions, s.op);
    free_down_to(0);
}

/* ---- everything ---- */

constexpr int64_t TOKENS[] = {1, 2, 5, 20}, WIDTHS[] = {1, 7, 16, 129};

void check_all() {
    for (int dtype = 0; dtype < 3; dtype++) {
        for (int x_dtype = 0; x_dtype < 3; x_dtype++) {
            const int64_t linears[][4] = {
                {1, 1, 1, 1}, {1, 7, 5, 0}, {1, 67, 128, 8}, {2, 33, 100, 3}, {3, 16, 31, 17}, {5, 50, 65, 16},
                {9, 40, 64, 4}, {17, 25, 33, 1}, {65, 96, 129, 256}, {200, 61, 70, 5}, {15, 40, 96, 3}, {16, 16, 32, 20}, {48, 112, 160, 8}, {0, 4, 4, 2},
            };
            for (auto &s : linears) check_linear(s[0], s[1], s[2], s[3], dtype, x_dtype);
            for (int64_t tokens : TOKENS) check_linears(tokens, dtype, x_dtype);
            const int64_t heads[][5] = {{1, 2, 8, 128, 0}, {1, 3, 17, 200, 5}, {2, 1, 5, 7, 1}, {18, 4, 20, 40, 3}, {67, 2, 65, 33, 9}};
            for (auto &s : heads)
                for (int transposed = 0; transposed < 2; transposed++) check_heads(s[0], s[1], s[2], s[3], s[4], transposed, dtype, x_dtype);
            for (int64_t width : WIDTHS) check_norm(3 + width % 5, width, dtype, x_dtype, width % 2);
            check_norm(70, 513, dtype, x_dtype, 0); /* in several threads */
            const int64_t layers[][6] = {
                {1, 1, 1, 5, 3, 1}, {1, 4, 8, 64, 32, 0}, {1, 8, 9, 72, 40, 8}, {2, 3, 5, 33, 17, 1}, {7, 2, 6, 100, 65, 3},
                {40, 4, 16, 96, 48, 16}, {20, 3, 7, 50, 70, 256}, {150, 2, 3, 40, 24, 5}, {60, 3, 11, 64, 96, 4}, {0, 2, 4, 8, 8, 2},
            };
            for (auto &s : layers) check_experts(s[0], s[1], s[2], s[3], s[4], s[5], dtype, x_dtype, KT_SILU);
        }
        for (int formula = 1; formula < 9; formula++) check_experts(6, 3, 5, 40, 37, 4, dtype, (dtype + formula) % 3, formula);
        const Sizes attentions[] = {
            {1, 8, 2, 1, 1, 64, 64, 0, false, false}, {1, 4, 4, 1, 257, 5, 3, 0, false, false}, {1, 32, 4, 1, 600, 128, 128, 0, false, false},
            {2, 8, 8, 3, 300, 96, 40, 0, true, true}, {1, 12, 3, 5, 777, 24, 7, 100, true, false}, {2, 16, 1, 1, 513, 72, 64, 0, false, true},
            {1, 4, 2, 4, 4, 16, 16, 0, false, false}, {3, 6, 2, 2, 40, 33, 17, 1, false, false},
        };
        for (auto &s : attentions)
            for (int coded = 0; coded < 2; coded++) check_attention(s, dtype, coded);
    }
    constexpr int CODES[] = {KT_INT4, KT_INT8, KT_E4M3};
    constexpr int64_t FEW_AND_MANY[] = {1, 2, 3, 4, 7, 15, 16, 33, 70}, EVEN[] = {2, 30, 64, 98, 128, 256, 300, 650};
    for (int dtype : CODES) {
        for (int x_dtype = 0; x_dtype < 3; x_dtype++) {
            for (int64_t tokens : FEW_AND_MANY)
                for (int64_t cols : EVEN) check_linear(tokens, 1 + (tokens * cols) % 71, cols, tokens % 3 * 4, dtype, x_dtype);
            for (int64_t tokens : TOKENS) check_linears(tokens, dtype, x_dtype);
            const int64_t layers[][6] = {{1, 4, 8, 256, 128, 0}, {1, 8, 9, 72, 40, 8}, {7, 2, 6, 100, 66, 3}, {150, 2, 3, 40, 140, 5}, {60, 3, 11, 64, 96, 4}, {0, 2, 4, 8, 8, 2}};
            for (auto &s : layers) check_experts(s[0], s[1], s[2], s[3], s[4], s[5], dtype, x_dtype, KT_SILU);
        }
        for (int formula = 1; formula < 9; formula++) check_experts(6, 3, 5, 40, 38, 4, dtype, (dtype + formula) % 3, formula);
        check_infinite_tokens(dtype);
    }
    check_steps();
    check_nan();
    check_refusal();
}

}  // namespace

int main(int argc, char **argv) {
    kt_set_team(parallel, barrier, thread_number, thread_count);
    char sets[200];
    snprintf(sets, sizeof sets, "%s", argc > 1 ? argv[1] : kt_instruction_sets());
    for (char *rest = sets; (instructions = strtok_r(rest, ",", &rest));) {
        state = 88172645463325252; /* the same numbers for each */
        if (kt_use(instructions)) {
            printf("This CPU does not have %s\n", instructions);
            return 2;
        }
        check_all();
    }
    printf("%d cases, %d failures\n", cases, failures);
    return failures || !cases;
}
