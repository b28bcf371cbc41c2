/* The handler of SIGBUS: page faults resolved in the thread that took them.
 *
 * A userfaultfd with UFFD_FEATURE_SIGBUS sends no message: a thread that touches a missing page gets SIGBUS. The handler
 * places what is in memory at a fixed address (plain.c); the thread then repeats its access. For anything else it asks
 * the event loop (ask.c).
 *
 * What a handler of a synchronous signal may do. It runs between two instructions of the thread that touched, like a
 * call that the interrupted code does not know of. So it must not need a lock that this code may hold, nor disturb what
 * the code uses: no malloc, no stdio, no Python code; errno is put back; no other signal is blocked meanwhile (sa_mask
 * is empty). PyEval_SaveThread and PyEval_RestoreThread are the only calls into Python, and only if this thread holds
 * the GIL. Python never touches a region under the GIL's own locks.
 */

#include "ask.h"
#include "chain.h"
#include "gil.h"
#include "plain.h"
#include <errno.h>

enum { REPEATS = 1000 }; /* a page that is present faults again and again: something else is wrong with it */

THREAD_LOCAL struct {
    uint64_t missed;       /* the address that was in no region, */
    uint32_t missed_epoch; /* at that time */
    uint32_t repeats;      /* how often `repeated` was present and faulted all the same */
    uint64_t repeated;
} mine;

static int holds(const struct region *r, uint64_t address)
{
    return address >= atomic_load(&r->start) && address < atomic_load(&r->end);
}

/* The caller is counted `inside`, and no longer when this returns: 1, to touch again, or 0. */
static int serve_in(struct region *r, uint64_t address, void *context, uint64_t began)
{
    uint64_t page = address & -r->is.page;
    enum outcome how = place(r, page);
    if (how == ASKED)
        return ask(r, page, address, context);
    uint64_t spent = now_ns() - began;
    int bits = spent ? 64 - __builtin_clzll(spent) : 0;
    count(r, FAULTS, 1);
    count(r, LATENCY + (bits < LATENCIES ? bits : LATENCIES - 1), 1);
    leave(r);
    mine.repeats = how == PRESENT && mine.repeated == address ? mine.repeats + 1 : 0;
    mine.repeated = address;
    if (mine.repeats < REPEATS)
        return 1;
    complain(address, ", and the kernel says that it is present. Is it write-protected by another userfaultfd?\n");
    return 0;
}

/* 1: touch again; 0: pass the signal on; *ours is then whether it is for one of our pages. */
static int serve(uint64_t address, void *context, int *ours)
{
    uint64_t began = now_ns();
    struct region *changing = NULL;
    uint32_t freed = atomic_load(&epoch);
    for (uint32_t i = 0, end = atomic_load(&used); i < end; i++) {
        struct region *r = &regions[i];
        uint32_t state = atomic_load(&r->state);
        if (state == CHANGING)
            changing = r;
        if (state != LIVE || !holds(r, address))
            continue;
        atomic_fetch_add(&r->inside, 1);
        if (atomic_load(&r->state) != LIVE || !holds(r, address)) {
            leave(r);
            return 1; /* it has just changed: the next touch finds it as it is then */
        }
        *ours = 1;
        return serve_in(r, address, context, began);
    }
    if (changing != NULL) { /* its new range may contain the address */
        void *state = release_gil();
        int going = wait_for(changing, &changing->state, CHANGING, address);
        take_gil(state);
        *ours = !going;
        return going;
    }
    /* In no region; or in one that has left since the fault. The next touch tells. */
    if (mine.missed == address && mine.missed_epoch == freed)
        return 0;
    mine.missed = address;
    mine.missed_epoch = freed;
    return 1;
}

static int within(uint64_t address)
{
    for (uint32_t i = 0, end = atomic_load(&used); i < end; i++)
        if (atomic_load(&regions[i].state) != FREE && holds(&regions[i], address))
            return 1;
    return 0;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    /* A missing page is BUS_ADRERR. A poisoned one may be BUS_MCEERR_AR, as is one whose memory is broken. */
    if (info->si_code != BUS_ADRERR || !serve(address, context, &ours))
        pass_on(number, info, context, ours || (info->si_code == BUS_MCEERR_AR && within(address)));
    errno = saved;
}

/* Enter a region into the table, closed, and take SIGBUS: *displaced is what `install` returns. Returns a slot, or a
 * negated errno: ENOSPC, too many regions; EBUSY, too many others have taken SIGBUS; or why pagemap cannot be read. */
EXPORT int aiouffd_add(const struct options *options, int *displaced)
{
    static int at_fork;
    pthread_mutex_lock(&table);
    if (!at_fork) /* a forked child has no region to serve */
        at_fork = pthread_atfork(NULL, NULL, uninstall) == 0;
    int slot = take_record(options);
    if (slot >= 0 && (*displaced = install(on_sigbus)) < 0) {
        free_record(slot);
        slot = -EBUSY;
    }
    pthread_mutex_unlock(&table);
    return slot;
}

/* Take a closed region out of the table. Its waiters touch again.
 *
 * The last one gives SIGBUS back, if `for_good`: a touch of a missing page is SIGBUS from now on as well. Where missing
 * pages are zeros from now on, a thread may be on its way into our handler just now, and must find it. So the handler
 * stays, and passes everything on, until the next time. */
EXPORT void aiouffd_remove(int slot, int for_good)
{
    pthread_mutex_lock(&table);
    if (free_record(slot) == 0 && for_good)
        uninstall();
    pthread_mutex_unlock(&table);
    wake_everybody();
}

/* The loop runs. 0: SIGBUS is ours; 1: it is again, another handler had been installed; -1: it is not. */
EXPORT int aiouffd_beat(int slot)
{
    atomic_fetch_add(&regions[slot].heartbeat, 1);
    pthread_mutex_lock(&table);
    int displaced = install(on_sigbus);
    pthread_mutex_unlock(&table);
    return displaced;
}
