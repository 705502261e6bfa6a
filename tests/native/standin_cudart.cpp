/* A stand-in for CUDA's runtime: each stream calls functions of the host in a thread of its own, in order, and knows nothing of Python. It captures
 * one graph at a time. */
#include <pthread.h>
#include <string.h>

extern "C" {

typedef void (*Function)(void *);
struct Item {
    Function function;
    void *data, *target;
    unsigned long bytes; /* of a copy, where there is no function */
};
enum { MOST = 1 << 14 };
struct Stream {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    Item items[MOST], graph[MOST];
    long added, done, captured;
    int capturing;
};

static void *work(void *data) {
    Stream *s = static_cast<Stream *>(data);
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (s->done == s->added) pthread_cond_wait(&s->changed, &s->mutex);
        Item item = s->items[s->done % MOST];
        pthread_mutex_unlock(&s->mutex);
        if (item.function) item.function(item.data);
        else memcpy(item.target, item.data, item.bytes);
        pthread_mutex_lock(&s->mutex);
        s->done++;
        pthread_cond_broadcast(&s->changed);
    }
}

static int add(Stream *s, Item item) {
    pthread_mutex_lock(&s->mutex);
    const bool full = s->capturing ? s->captured == MOST : s->added - s->done == MOST;
    if (!full) {
        if (s->capturing) s->graph[s->captured++] = item;
        else s->items[s->added++ % MOST] = item;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->mutex);
    return full ? 700 : 0;
}

void *standin_stream(void) {
    Stream *s = new Stream();
    pthread_mutex_init(&s->mutex, nullptr), pthread_cond_init(&s->changed, nullptr);
    pthread_t thread;
    pthread_create(&thread, nullptr, work, s), pthread_detach(thread);
    return s;
}

int cudaLaunchHostFunc(void *stream, Function function, void *data) {
    return stream ? add(static_cast<Stream *>(stream), Item{function, data, nullptr, 0}) : 400; /* cudaErrorInvalidResourceHandle */
}

int cudaThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0; }

int standin_copy(void *stream, void *target, void *source, unsigned long bytes) {
    return add(static_cast<Stream *>(stream), Item{nullptr, source, target, bytes});
}

/* 1: begin a graph, which holds all that comes from now on; 0: end it. */
void standin_capture(void *stream, int on) {
    Stream *s = static_cast<Stream *>(stream);
    pthread_mutex_lock(&s->mutex);
    if (on) s->captured = 0;
    s->capturing = on;
    pthread_mutex_unlock(&s->mutex);
}

void standin_replay(void *stream) {
    Stream *s = static_cast<Stream *>(stream);
    for (long i = 0; i < s->captured; i++) add(s, s->graph[i]);
}

void standin_synchronize(void *stream) {
    Stream *s = static_cast<Stream *>(stream);
    pthread_mutex_lock(&s->mutex);
    const long until = s->added;
    while (s->done < until) pthread_cond_wait(&s->changed, &s->mutex);
    pthread_mutex_unlock(&s->mutex);
}
}
