#include "team.h"

#include "kt_native.h"

namespace kt {
namespace {

void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
void (*wait)(void);
int (*thread_number)(void), (*thread_count)(void);

struct Call {
    void (*body)(void *, const Team &);
    void *context;
};

void enter(void *data) {
    const Call *call = static_cast<Call *>(data);
    call->body(call->context, Team{thread_number(), thread_count(), wait});
}

}  // namespace

void in_team(int threads, void (*body)(void *, const Team &), void *context) {
    if (threads > 1 && parallel) {
        Call call{body, context};
        parallel(enter, &call, unsigned(threads), 0);
    } else {
        body(context, Team{0, 1, nullptr});
    }
}

}  // namespace kt

void kt_set_team(void (*parallel)(void (*)(void *), void *, unsigned, unsigned), void (*barrier)(void), int (*thread)(void),
                 int (*threads)(void)) {
    kt::wait = barrier, kt::thread_number = thread, kt::thread_count = threads;
    kt::parallel = parallel;
}
