/* Ends a process that waits for pages of which nobody is left to bring any.
 *
 * When all processes that serve a region are killed at once, the application starts others. It needs the GIL for that:
 * if the very thread that holds the GIL waits for a page just then, nothing in Python runs any more. A thread of our
 * own, which needs no GIL, looks on: it sleeps until the last of those processes has ended, gives the application
 * some time, and then says what has happened and calls abort(3). faulthandler, where it is enabled, writes the
 * traceback of each thread.
 */

#include "native.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { WATCHES = 256, ENDS = 2 };

static struct watch {
    int used;
    int uffd;
    int ends[ENDS]; /* readable, or hung up, when one that serves has ended; -1: not used */
    uint32_t limit_ms;
    int alone;       /* all have ended */
    uint64_t seen;   /* when that was looked at last */
    uint64_t waited; /* ns that this thread has seen pass since all have ended, or the application has shown life */
} watches[WATCHES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int bell = -1; /* something has changed */
static int running;   /* the thread */

static int ended(int fd)
{
    struct pollfd one = {fd, POLLIN, 0};
    return poll(&one, 1, 0) == 1;
}

/* Wait for `milliseconds` at most for a message of somebody who waits. */
static int somebody_waits(const struct watch *watch, struct uffd_msg *message)
{
    /* Whoever's fault was read by one that has died is asleep with nothing to be read: woken, he faults again. WAKE
     * looks at no mapping, so that this may be all of the address space. */
    struct uffdio_range all = {1u << 16, (1ull << 47) - (1u << 17)};
    ioctl(watch->uffd, UFFDIO_WAKE, &all);
    struct pollfd one = {watch->uffd, POLLIN, 0};
    return poll(&one, 1, 200) == 1 && read(watch->uffd, message, sizeof *message) == sizeof *message;
}

static void end(const struct uffd_msg *message)
{
    struct text text = {0, {0}};
    add(&text, "aiouffd: the processes that served a region have all been killed, and no others could be started:"
               " Python does not run. ");
    if (message->event == UFFD_EVENT_PAGEFAULT) {
        add(&text, "Thread ");
        add_number(&text, message->arg.pagefault.feat.ptid, 10);
        add(&text, " waits for the page at ");
        add_number(&text, message->arg.pagefault.address, 16);
    } else
        add(&text, "A thread that changes the layout of the region waits for them");
    add(&text, ", with the GIL held. Aborting, as nobody would ever bring it.\n");
    say(&text);
    abort();
}

/* Look at a watch, with the lock held; return for how many milliseconds nothing need be done, -1: until it is told. */
static int look(struct watch *watch)
{
    int known = 0;
    for (int i = 0; i < ENDS; i++) {
        known |= watch->ends[i] >= 0;
        if (watch->ends[i] >= 0 && !ended(watch->ends[i])) {
            watch->alone = 0;
            return -1;
        }
    }
    if (!known) /* who serves could not be told: whether they have ended cannot, either */
        return -1;
    /* A process that was stopped (SIGSTOP, a debugger, a frozen cgroup) could not have others started meanwhile: that
     * time does not count. */
    uint64_t now = now_ns(), limit = watch->limit_ms * UINT64_C(1000000), passed = now - watch->seen;
    if (!watch->alone)
        passed = watch->waited = 0;
    watch->alone = 1;
    watch->seen = now;
    watch->waited += passed < limit / 2 ? passed : limit / 2;
    if (watch->waited < limit)
        return (int)(watch->limit_ms / 4) + 1;
    struct uffd_msg message;
    if (somebody_waits(watch, &message))
        end(&message);
    return 1000; /* nobody waits: Python may be busy, and start others when it comes to that */
}

static void *run(void *argument)
{
    (void)argument;
    static struct pollfd set[WATCHES * ENDS + 1];
    for (;;) {
        nfds_t count = 1;
        int timeout = -1;
        pthread_mutex_lock(&lock);
        set[0] = (struct pollfd){bell, POLLIN, 0};
        for (struct watch *watch = watches; watch < watches + WATCHES; watch++) {
            if (!watch->used)
                continue;
            int pause = look(watch), left = 0, known = 0;
            for (int i = 0; pause < 0 && i < ENDS; i++) {
                known |= watch->ends[i] >= 0;
                if (watch->ends[i] >= 0 && !ended(watch->ends[i])) {
                    set[count++] = (struct pollfd){watch->ends[i], POLLIN, 0};
                    left = 1;
                }
            }
            if (known && !left) /* the last has ended in between */
                pause = 0;
            if (pause >= 0 && (timeout < 0 || pause < timeout))
                timeout = pause;
        }
        pthread_mutex_unlock(&lock);
        /* Without the lock: a descriptor that is closed meanwhile was announced by the bell. */
        poll(set, count, timeout);
        uint64_t rung;
        while (read(bell, &rung, sizeof rung) < 0 && errno == EINTR)
            ;
    }
    return NULL;
}

static void ring(void)
{
    uint64_t one = 1;
    ssize_t written = write(bell, &one, sizeof one);
    (void)written; /* it rings already */
}

/* A forked child has no such thread, and what was watched is its parent's. The lock may have been held: by the thread,
 * or for it. The duplicates stay open: they are few, and which of them were is not certain. */
static void in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    memset(watches, 0, sizeof watches);
    running = 0;
}

/* With the lock held; 0, or an errno. */
static int start(void)
{
    if (running)
        return 0;
    static int told;
    if (!told && pthread_atfork(NULL, NULL, in_child))
        return ENOMEM;
    told = 1;
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell < 0)
        return errno;
    sigset_t all, before;
    sigfillset(&all); /* the application's signals are not for this thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int failed = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        close(bell);
        return failed;
    }
    pthread_detach(thread);
    running = 1;
    return 0;
}

/* All of them or none: whoever is not known could serve on. Returns 0, or an errno. */
static int replace(struct watch *watch, int first, int second)
{
    int fresh[ENDS] = {first, second}, failed = 0;
    for (int i = 0; i < ENDS; i++) {
        if (watch->ends[i] >= 0)
            close(watch->ends[i]);
        watch->ends[i] = fresh[i] < 0 || failed ? -1 : fcntl(fresh[i], F_DUPFD_CLOEXEC, 3);
        if (fresh[i] >= 0 && watch->ends[i] < 0 && !failed)
            failed = errno;
    }
    for (int i = 0; failed && i < ENDS; i++)
        if (watch->ends[i] >= 0) {
            close(watch->ends[i]);
            watch->ends[i] = -1;
        }
    watch->alone = 0;
    return failed;
}

/* Watch over `uffd`, as long as `first` or `second` is not readable. All are duplicated: the region may be settled, and
 * its descriptor closed, before `aiouffd_unwatch`. Returns a number for the other calls, or a negated errno. */
EXPORT int aiouffd_watch(int uffd, int first, int second, uint32_t limit_ms)
{
    int result = -ENOSPC;
    pthread_mutex_lock(&lock);
    int failed = start();
    for (int i = 0; !failed && i < WATCHES; i++)
        if (!watches[i].used) {
            int own = fcntl(uffd, F_DUPFD_CLOEXEC, 3);
            watches[i] = (struct watch){.used = 1, .uffd = own, .ends = {-1, -1}, .limit_ms = limit_ms};
            failed = own < 0 ? errno : replace(&watches[i], first, second);
            watches[i].used = !failed;
            if (failed && own >= 0)
                close(own);
            ring();
            result = i;
            break;
        }
    pthread_mutex_unlock(&lock);
    return failed ? -failed : result;
}

/* Others serve now; none that are known (-1): nothing is watched, until there are. Returns 0, or a negated errno:
 * nothing is watched then, either. */
EXPORT int aiouffd_watch_ends(int number, int first, int second)
{
    int failed = 0;
    pthread_mutex_lock(&lock);
    if (watches[number].used) {
        failed = replace(&watches[number], first, second);
        ring();
    }
    pthread_mutex_unlock(&lock);
    return -failed;
}

/* Python runs: its time begins anew. */
EXPORT void aiouffd_watch_alive(int number)
{
    pthread_mutex_lock(&lock);
    if (watches[number].used)
        watches[number].alone = 0;
    pthread_mutex_unlock(&lock);
}

EXPORT void aiouffd_unwatch(int number)
{
    pthread_mutex_lock(&lock);
    if (watches[number].used) {
        replace(&watches[number], -1, -1);
        close(watches[number].uffd);
        watches[number].used = 0;
        ring();
    }
    pthread_mutex_unlock(&lock);
}
