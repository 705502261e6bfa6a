/* Experts that a GPU's stream computes on the CPU, without Python: also in a CUDA graph, which makes the same calls again and again.
 *
 * CUDA calls functions of the host in threads of its own, maybe one for each GPU. Each would get a team of libgomp's, and teams that together have
 * more threads than there are CPUs sleep between any two steps. So one thread computes all calls, in the order in which they come: one team, one
 * scratch memory. The stream goes on meanwhile, until it needs the result. A thread that has had nothing to do for a while ends, and its team
 * with it.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kt_native.h"

namespace {

enum State { WAITING = 1, COMPUTED = 2, FINISHED = 3 };
constexpr int IDLE_SECONDS = 1;
constexpr size_t ALIGNMENT = 64;

int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t queued = PTHREAD_COND_INITIALIZER, computed = PTHREAD_COND_INITIALIZER;
kt_host_call *first, *last; /* of those that wait */
bool running;               /* there is a thread */
int64_t failed;

struct Memory {
    void *address = nullptr;
    size_t size = 0;

    ~Memory() { free(address); }

    /* Room for so many bytes, or null. */
    void *take(size_t bytes) {
        if (bytes > size) {
            free(address);
            size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            address = aligned_alloc(ALIGNMENT, size);
            if (!address) size = 0;
        }
        return address;
    }
};

/* Returns 0, the number of experts where an index is none of them, or -1 where memory is short. */
int64_t compute_rows(const kt_host_call &call, int64_t start, int64_t rows, size_t row, Memory &memory) {
    const char *x = static_cast<const char *>(call.x) + size_t(start) * row;
    char *out = static_cast<char *>(call.out) + size_t(start) * row;
    const int64_t from = start * call.top, bytes = kt_experts_scratch(call.experts, rows, call.top, call.threads);
    void *scratch = memory.take(size_t(bytes) + 1);
    const int wrong = !scratch || kt_experts_forward(call.experts, x, call.x_dtype, rows, call.index + from, call.scores + from, call.top, out, scratch, call.threads);
    if (wrong) memset(out, 0xff, size_t(rows) * row); /* NaN in each dtype: nobody takes it for a result */
    return !scratch ? -1 : wrong ? call.experts->experts : 0;
}

void compute(const kt_host_call &call, Memory &memory) {
    const size_t row = size_t(call.experts->hidden) * (call.x_dtype == KT_F32 ? 4 : 2);
    for (int64_t start = 0; start < call.tokens; start += call.chunk) {
        const int64_t rows = call.tokens - start < call.chunk ? call.tokens - start : call.chunk;
        if (const int64_t problem = compute_rows(call, start, rows, row, memory)) __atomic_store_n(&failed, problem, __ATOMIC_RELAXED);
    }
}

/* Wait for a call, with the mutex held. Returns whether one came in time. */
bool await_call() {
    timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += IDLE_SECONDS;
    while (!first)
        if (pthread_cond_timedwait(&queued, &mutex, &until) == ETIMEDOUT && !first) return false;
    return true;
}

void *work(void *) {
    Memory memory;
    pthread_mutex_lock(&mutex);
    while (await_call()) {
        kt_host_call *call = first;
        first = call->next;
        pthread_mutex_unlock(&mutex);
        compute(*call, memory);
        pthread_mutex_lock(&mutex);
        call->state = COMPUTED;
        pthread_cond_broadcast(&computed);
    }
    running = false;
    pthread_mutex_unlock(&mutex);
    return nullptr;
}

/* Start the thread, with the mutex held. */
bool start() {
    pthread_t thread;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    const bool started = create && !create(&thread, &attributes, work, nullptr);
    pthread_attr_destroy(&attributes);
    return started;
}

}  // namespace

void kt_set_thread(int (*own)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *)) { create = own; }

void kt_start_on_host(void *data) {
    kt_host_call *call = static_cast<kt_host_call *>(data);
    pthread_mutex_lock(&mutex);
    if (running || (running = start())) {
        call->state = WAITING, call->next = nullptr;
        (first ? last->next : first) = call;
        last = call;
        pthread_cond_signal(&queued);
    } else { /* no thread is to be had: compute in this one */
        Memory memory;
        compute(*call, memory);
        call->state = COMPUTED;
    }
    pthread_mutex_unlock(&mutex);
}

void kt_finish_on_host(void *data) {
    kt_host_call *call = static_cast<kt_host_call *>(data);
    pthread_mutex_lock(&mutex);
    while (call->state != COMPUTED) pthread_cond_wait(&computed, &mutex);
    __atomic_store_n(&call->state, FINISHED, __ATOMIC_RELEASE); /* it may be freed now */
    pthread_mutex_unlock(&mutex);
}

int64_t kt_failed_on_host(void) { return __atomic_exchange_n(&failed, 0, __ATOMIC_RELAXED); }
