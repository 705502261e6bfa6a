/* Weights in mapped files, when a file is cut short: instead of ending the process, reading behind the new end finds zeros and is noticed.
 *
 * The system says SIGBUS to the thread that reads there. The handler puts pages of zeros in place of the rest of the mapping, which is all behind
 * the end, and the load is repeated. Any other SIGBUS goes to whoever handled it before. (Wayland's servers do the same with their clients'
 * files: wl_shm_buffer_begin_access.)
 */
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kt_native.h"

namespace {

struct Mapping {
    char *first, *last;
} mappings[4096];
struct sigaction before;
bool installed, returned;

bool holds(const Mapping &mapping, const char *address) {
    char *last = __atomic_load_n(&mapping.last, __ATOMIC_ACQUIRE);
    return last && address >= __atomic_load_n(&mapping.first, __ATOMIC_RELAXED) && address < last;
}

void on_bus_error(int, siginfo_t *info, void *) {
    char *address = static_cast<char *>(info->si_addr);
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    for (Mapping &mapping : mappings) {
        if (!holds(mapping, address)) continue;
        char *from = reinterpret_cast<char *>(uintptr_t(address) / page * page);
        char *to = reinterpret_cast<char *>((uintptr_t(mapping.last) + page - 1) / page * page);
        if (mmap(from, size_t(to - from), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
        return;
    }
    /* The load is repeated, and fails again. Once: the handler before may have given way to its own predecessor when a second thread comes. */
    if (!__atomic_exchange_n(&returned, true, __ATOMIC_ACQ_REL)) sigaction(SIGBUS, &before, nullptr);
}

}  // namespace

int kt_guard_mapped(const void *address, int64_t bytes) {
    if (!installed) {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        if (sigaction(SIGBUS, &action, &before)) return -1;
        installed = true;
    }
    for (Mapping &mapping : mappings) {
        if (mapping.last) continue;
        char *first = static_cast<char *>(const_cast<void *>(address));
        __atomic_store_n(&mapping.first, first, __ATOMIC_RELAXED);
        __atomic_store_n(&mapping.last, first + bytes, __ATOMIC_RELEASE);
        return 0;
    }
    return -1;
}

void kt_release_mapped(const void *address) {
    for (Mapping &mapping : mappings)
        if (mapping.last && mapping.first == address) return __atomic_store_n(&mapping.last, nullptr, __ATOMIC_RELEASE);
}
