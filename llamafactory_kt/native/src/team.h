/* The threads that compute: libgomp's team of the calling thread, which PyTorch uses too. */
#pragma once

namespace kt {

struct Team {
    int thread, threads;
    void (*wait)(void);

    /* Wait until all threads of the team are here. */
    void barrier() const {
        if (threads > 1) wait();
    }
};

/* Call body(context, team) in each of `threads` threads at once, or of as many as there are. */
void in_team(int threads, void (*body)(void *, const Team &), void *context);

}  // namespace kt
