/* Who has SIGBUS besides us: those from before are kept and passed what is not ours, those that take it while we have
 * it are put below us.
 */

#include "native.h"
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EARLIER = 8 };

/* earlier[0] was there before us. Those behind took the signal while we had it. Entries are kept when the signal is
 * given back: whoever is above us then may still call us. */
static struct sigaction earlier[EARLIER];
static _Atomic int32_t newest = -1;
static handler *own;

THREAD_LOCAL struct {
    uint64_t address;  /* that was passed on last, */
    int32_t to;        /* to this one of `earlier` */
    const char *frame; /* of the call that is passing it on just now */
} passed;

static int same(const struct sigaction *one, const struct sigaction *other)
{
    return one->sa_sigaction == other->sa_sigaction; /* of a union with sa_handler */
}

static int is_function(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN);
}

/* With a lock of the caller's held, as `uninstall`. */
int install(handler *ours)
{
    struct sigaction now, mine;
    memset(&mine, 0, sizeof mine);
    sigemptyset(&mine.sa_mask); /* a thread that waits for a page gets its other signals */
    mine.sa_sigaction = own = ours;
    /* NODEFER: an earlier handler may raise it anew, and a fault that comes while it is blocked kills the process.
     * ONSTACK: whoever runs on a small stack has made an alternate one. */
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

/* The handler that is below ours, as a number. */
EXPORT uint64_t aiouffd_below(void)
{
    int32_t at = atomic_load(&newest);
    return at < 0 ? 0 : (uint64_t)(uintptr_t)earlier[at].sa_sigaction;
}

/* The handler of SIGBUS, as a number. */
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
    syscall(SYS_exit_group, 128 + SIGBUS); /* the first process of a container is not killed by its own signals */
    __builtin_unreachable();
}

/* Each of the earlier handlers may hand it back: by calling us, by raising it anew (as faulthandler does when it has
 * written its traceback), or by returning, so that the access is repeated. The next older one gets it then. For a fault
 * that is not ours the oldest gets it again and again, if it returns: it would without us. */
void pass_on(int number, siginfo_t *info, void *context, int ours)
{
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    int sent = info->si_code <= 0; /* by kill(2) or raise(3): it has no address */
    const char *frame = __builtin_frame_address(0);
    int nested = passed.frame != NULL && frame < passed.frame; /* deeper in the stack; else that one was left by longjmp */
    int32_t to = atomic_load(&newest);
    if (nested ? sent || address == passed.address : !sent && address == passed.address && (ours || passed.to > 0))
        to = passed.to - 1;
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
    sigset_t before;
    sigdelset(&action.sa_mask, SIGBUS);
    sigprocmask(SIG_BLOCK, &action.sa_mask, &before);
    const char *outer = passed.frame;
    if (!sent)
        passed.address = address;
    passed.to = to;
    passed.frame = frame;
    if (action.sa_flags & SA_SIGINFO)
        action.sa_sigaction(number, info, context);
    else
        action.sa_handler(number);
    passed.frame = outer;
    sigprocmask(SIG_SETMASK, &before, NULL);
}
