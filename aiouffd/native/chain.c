#include "chain.h"
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EARLIER = 8, TURN_MS = 300 };

/* earlier[0] was installed before us, the others while we had the signal. Entries stay when the signal is given back:
 * a handler that is above ours then may still call ours. */
static struct sigaction earlier[EARLIER];
static _Atomic int32_t newest = -1;
static handler *own;

THREAD_LOCAL struct {
    uint64_t address; /* that was passed on last, */
    int32_t to;       /* to this one of `earlier` */
    /* The call that is passing it on now, on this thread's stack. If the word there is not `ticket` any more, the call
     * was left by longjmp. */
    volatile const uint64_t *frame;
    uint64_t ticket;
} passed;

static int same(const struct sigaction *one, const struct sigaction *other)
{
    return one->sa_sigaction == other->sa_sigaction; /* of a union with sa_handler */
}

static int is_function(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN);
}

int install(handler *ours)
{
    struct sigaction now, mine;
    memset(&mine, 0, sizeof mine);
    sigemptyset(&mine.sa_mask); /* a thread that waits for a page gets its other signals */
    mine.sa_sigaction = own = ours;
    /* NODEFER: a handler below may raise it anew, and a fault that comes while SIGBUS is blocked kills the process.
     * ONSTACK: a thread with a small stack has set an alternate one. */
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGBUS, NULL, &now);
    if (same(&now, &mine))
        return 0;
    int32_t at = atomic_load(&newest);
    while (at >= 0 && !same(&earlier[at], &now))
        at--;
    if (at < 0)
        at = atomic_load(&newest) + 1;
    if (at >= EARLIER)
        return -1;
    earlier[at] = now;
    atomic_store(&newest, at);
    sigaction(SIGBUS, &mine, NULL);
    return 1;
}

void uninstall(void)
{
    struct sigaction now;
    if (atomic_load(&newest) < 0)
        return;
    sigaction(SIGBUS, NULL, &now);
    if (now.sa_sigaction == own)
        sigaction(SIGBUS, &earlier[atomic_load(&newest)], NULL);
}

/* The address of the handler below ours; 0: SIG_DFL, 1: SIG_IGN. */
EXPORT uint64_t aiouffd_below(void)
{
    int32_t at = atomic_load(&newest);
    return at < 0 ? 0 : (uint64_t)(uintptr_t)earlier[at].sa_sigaction;
}

/* The address of the handler on top. */
EXPORT uint64_t aiouffd_handler(void)
{
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    return (uint64_t)(uintptr_t)now.sa_sigaction;
}

static __attribute__((noreturn)) void die(void)
{
    struct sigaction plain;
    sigset_t only;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &plain, NULL);
    sigemptyset(&only);
    sigaddset(&only, SIGBUS);
    sigprocmask(SIG_UNBLOCK, &only, NULL);
    syscall(SYS_tgkill, getpid(), thread_id(), SIGBUS);
    syscall(SYS_exit_group, 128 + SIGBUS); /* its own signals do not kill the first process of a container */
    __builtin_unreachable();
}

/* Several threads may wait for one page that cannot be had. Most handlers write a report and end the process, and two
 * that do so at once spoil the report. So each thread gets a turn, which most likely ends the others. A turn is
 * bounded, since a thread that leaves by longjmp does not say that its turn is over. */
static _Atomic int32_t turn_of;
static _Atomic uint64_t turn_ends;

void wait_for_turn(void)
{
    _Atomic uint32_t nobody = 0;
    int me = thread_id();
    uint64_t ends;
    while ((ends = atomic_load(&turn_ends)) > now_ns() && atomic_load(&turn_of) != me)
        futex_wait(&nobody, 0, 5);
    if (atomic_compare_exchange_strong(&turn_ends, &ends, now_ns() + UINT64_C(1000000) * TURN_MS))
        atomic_store(&turn_of, me);
    else if (atomic_load(&turn_of) != me)
        wait_for_turn(); /* another thread was faster */
}

/* Call a handler as the kernel would: with its mask. SIGBUS itself stays unblocked, since a fault that comes while it
 * is blocked kills the process. */
static void call(const struct sigaction *action, int number, siginfo_t *info, void *context)
{
    sigset_t mask = action->sa_mask, before;
    sigdelset(&mask, SIGBUS);
    sigprocmask(SIG_BLOCK, &mask, &before);
    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(number, info, context);
    else
        action->sa_handler(number);
    sigprocmask(SIG_SETMASK, &before, NULL);
}

/* A handler below may hand the signal back: by calling ours, by raising it anew (as faulthandler does after its
 * traceback), or by returning, so that the access is repeated. Then the next older one gets it. For a fault that is not
 * ours the oldest handler gets it again and again, if it returns: it would without us. */
void pass_on(int number, siginfo_t *info, void *context, int ours)
{
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    int sent = info->si_code <= 0; /* by kill(2) or raise(3): there is no address */
    volatile uint64_t frame = 0;
    int nested = passed.frame != NULL && &frame < passed.frame && *passed.frame == passed.ticket;
    int jumped = passed.frame != NULL && !nested;
    int32_t to = atomic_load(&newest);
    if (nested && (sent || address == passed.address))
        to = passed.to - 1;
    else if (!nested && !jumped && !sent && address == passed.address && (ours || passed.to > 0))
        to = passed.to - 1; /* that one has returned, and the page is still missing */
    if (to < 0)
        die();
    struct sigaction action = earlier[to];
    if (!is_function(&action)) {
        if (sent && action.sa_handler == SIG_IGN)
            return;
        die(); /* a fault cannot be ignored */
    }
    if (action.sa_flags & (int)SA_RESETHAND) {
        earlier[to].sa_handler = SIG_DFL;
        earlier[to].sa_flags = 0;
    }
    if (ours && !nested)
        wait_for_turn();
    volatile const uint64_t *outer = nested ? passed.frame : NULL;
    uint64_t outer_ticket = passed.ticket;
    if (!sent)
        passed.address = address;
    passed.to = to;
    frame = passed.ticket = now_ns() | 1;
    passed.frame = &frame;
    call(&action, number, info, context);
    if (ours && !nested)
        atomic_store(&turn_ends, 0);
    passed.frame = outer;
    passed.ticket = outer_ticket;
    frame = 0;
}
