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
#include "crash_notes.h"
#include "plain.h"
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REPEATS = 1000 }; /* a page that is present faults again and again: something else is wrong with it */

THREAD_LOCAL struct {
    uint64_t missed;       /* the address that was in no region, */
    uint32_t missed_epoch; /* at that time */
    uint32_t repeats;      /* how often `repeated` was present and faulted all the same */
    uint64_t repeated;
    uint64_t explained; /* the address that `explained` spoke of last */
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
    if (how == ASKED || (how == PRESENT && r->is.asks_to_write)) /* it is protected, perhaps */
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

/* Say what is known about memory that a Monitor has left; once, though the handlers below may come back to it. */
static int explained(uint64_t address)
{
    if (address != mine.explained && !say_note(LEFT, address))
        return 0;
    mine.explained = address;
    return 1;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    /* A missing page is BUS_ADRERR. A poisoned one may be BUS_MCEERR_AR, as is one whose memory is broken. */
    if (info->si_code != BUS_ADRERR || !serve(address, context, &ours)) {
        if (info->si_code > 0 && !ours)
            ours = within(address) ? info->si_code == BUS_MCEERR_AR : explained(address);
        pass_on(number, info, context, ours);
    }
    errno = saved;
}

/* --- A forked child --- */

static struct sigaction segv_before;

/* The child touched memory that it does not have. With the handler from before in place, the access is repeated. */
static void on_sigsegv(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    (void)context;
    sigaction(SIGSEGV, &segv_before, NULL);
    if (info->si_code > 0)
        say_note(ABSENT, (uint64_t)(uintptr_t)info->si_addr);
    else /* by kill(2) or raise(3): nothing would raise it again */
        syscall(SYS_tgkill, getpid(), thread_id(), number);
    errno = saved;
}

static void in_child(void)
{
    forget_parent();
    uninstall();
    drop_notes(LEFT);
    struct sigaction now, fresh;
    memset(&fresh, 0, sizeof fresh);
    fresh.sa_sigaction = on_sigsegv;
    fresh.sa_flags = SA_SIGINFO | SA_ONSTACK;
    if (!has_notes(ABSENT) || sigaction(SIGSEGV, NULL, &now) || now.sa_sigaction == on_sigsegv)
        return;
    segv_before = now;
    sigaction(SIGSEGV, &fresh, NULL);
}

static void prepare_for_forks(void)
{
    static int prepared;
    if (!prepared)
        prepared = pthread_atfork(NULL, NULL, in_child) == 0;
}

/* --- What Python calls --- */

static int stays; /* the handler stays installed with nothing to serve: see `aiouffd_remove` */

static void give_back(void)
{
    if (!stays && !has_records() && !has_notes(LEFT))
        uninstall();
}

/* Enter a region into the table, closed, and take SIGBUS: *displaced is what `install` returns. Returns a slot, or a
 * negated errno: ENOSPC, too many regions; EBUSY, too many others have taken SIGBUS; or why pagemap cannot be read. */
EXPORT int aiouffd_add(const struct options *options, int *displaced)
{
    pthread_mutex_lock(&table);
    prepare_for_forks();
    int slot = take_record(options);
    if (slot >= 0 && (*displaced = install(on_sigbus)) < 0) {
        free_record(slot);
        slot = -EBUSY;
    }
    if (slot >= 0)
        stays = 0;
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
    free_record(slot);
    stays = !for_good;
    give_back();
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

/* Take note of a range, about which nothing is said yet. Returns a number for the other calls, or -1. */
EXPORT int aiouffd_note(uint64_t start, uint64_t end)
{
    pthread_mutex_lock(&table);
    prepare_for_forks();
    int number = take_note(start, end);
    pthread_mutex_unlock(&table);
    return number;
}

/* What is to be said about a range. LEFT takes SIGBUS, until the note is dropped. */
EXPORT void aiouffd_note_set(int number, int kind, const char *sentence)
{
    pthread_mutex_lock(&table);
    set_note(number, (enum note_kind)kind, sentence);
    if (kind == LEFT)
        install(on_sigbus); /* if too many others have taken it, nothing is said */
    pthread_mutex_unlock(&table);
}

EXPORT void aiouffd_note_move(int number, uint64_t start, uint64_t end)
{
    move_note(number, start, end);
}

EXPORT void aiouffd_note_drop(int number)
{
    pthread_mutex_lock(&table);
    drop_note(number);
    give_back();
    pthread_mutex_unlock(&table);
}
