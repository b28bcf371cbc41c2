/* A thread that drops private pages of this process for the one that serves them.
 *
 * No process may drop private pages of another (process_madvise(2) refuses MADV_DONTNEED). When this one does it on
 * demand, another thread may have unmapped them meanwhile, and a third may have other memory there, which madvise(2)
 * would empty. UFFDIO_MOVE of the region's own descriptor would not: from the moment when a range is unmapped or moved
 * until that is told, it is EAGAIN. It is told to the one that has asked, which reads nothing before it has the answer.
 * So pages are moved to a place of this thread's own, and freed there. That place is registered for this moment only:
 * MADV_DONTNEED of what is registered is an event, and waits until it is read.
 *
 * No thread can write to a page meanwhile that is dropped: pages are protected, and the one that asks lifts nothing.
 */

#include "dropper.h"
#include "uffd.h"
#include "watchdog.h"
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PLACE = 2 << 20, TRIES = 20, STACK = 128 << 10, LOOK_MS = 1000 };

struct move_argument {
    uint64_t dst, src, len, mode;
    int64_t done;
};
struct register_argument {
    uint64_t start, len, mode, ioctls;
};
#define IOC_REGISTER _IOWR(0xAA, 0x00, struct register_argument)
#define IOC_UNREGISTER _IOR(0xAA, 0x01, struct wake_argument)
#define IOC_MOVE _IOWR(0xAA, 0x05, struct move_argument)
enum { MODE_MISSING = 1, MOVE_DONTWAKE = 1, MOVE_SRC_HOLES = 2, LOCK_ONFAULT = 1 };

static struct dropper {
    struct dropper *next;
    int used; /* 0: it is a parent's */
    struct owned uffd;
    struct asked *asked;
    char *mapped; /* the place, between two pages that nobody may touch: no other mapping becomes one with it */
    pthread_t thread;
} *droppers;
static pthread_mutex_t droppers_lock = PTHREAD_MUTEX_INITIALIZER;

/* Another process has the same words. */
static void wait_for(_Atomic uint32_t *word, uint32_t value, unsigned milliseconds)
{
    struct timespec limit = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0);
}

static void wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static void ring(struct asked *asked)
{
    atomic_fetch_add(&asked->bell, 1);
    wake(&asked->bell);
}

/* MADV_DONTNEED_LOCKED is of Linux 5.18: the process may have locked all of its memory. */
static int empty(uint64_t place)
{
    return madvise((void *)place, PLACE, MADV_DONTNEED) && madvise((void *)place, PLACE, 24) ? -errno : 0;
}

/* Move what is there of pages to the place, which is registered. 0, or a negated errno: some stay. */
static int move_away(int uffd, uint64_t place, uint64_t start, uint64_t size)
{
    int failed = 0, tries = 0;
    uint64_t step = size;
    for (uint64_t done = 0; done < size;) {
        uint64_t length = step < size - done ? step : size - done;
        struct move_argument move = {place + done, start + done, length, MOVE_DONTWAKE | MOVE_SRC_HOLES, 0};
        int refused = ioctl(uffd, IOC_MOVE, &move) ? errno : 0;
        if (move.done > 0) {
            done += (uint64_t)move.done;
            step *= step < size ? 2 : 1;
        } else if (refused == EINVAL && length > page_size) /* more than one VMA; maybe a page of it is locked */
            step = (length / page_size + 1) / 2 * page_size;
        else if (refused == EBUSY || refused == EINVAL || refused == EFAULT) {
            if (refused != EFAULT) /* the page stays: it is pinned, or may not be written to; else it is poisoned */
                failed = -refused;
            done += page_size;
        } else if (refused == EAGAIN && tries++ < TRIES)
            sched_yield();
        else if (refused)
            return -refused;
    }
    return failed;
}

static int drop(struct dropper *dropper, uint64_t start, uint64_t end)
{
    uint64_t place = (uint64_t)dropper->mapped + page_size;
    int failed = 0;
    if (!is_intact(&dropper->uffd))
        return -EBADF;
    for (uint64_t at = start; at < end; at += PLACE) {
        struct register_argument whole = {place, PLACE, MODE_MISSING, 0};
        struct wake_argument same = {place, PLACE};
        if (ioctl(dropper->uffd.fd, IOC_REGISTER, &whole))
            return -errno;
        int outcome = move_away(dropper->uffd.fd, place, at, end - at < PLACE ? end - at : PLACE);
        if (ioctl(dropper->uffd.fd, IOC_UNREGISTER, &same)) { /* madvise would wait for one that waits for this */
            outcome = -errno;
            atomic_store(&dropper->asked->closed, 1);
            return outcome;
        }
        int stays = empty(place);
        if (stays)
            return stays;
        if (outcome)
            failed = outcome;
        if (outcome && outcome != -EBUSY && outcome != -EINVAL)
            break;
    }
    return failed;
}

static void *run(void *argument)
{
    struct dropper *dropper = argument;
    struct asked *asked = dropper->asked;
    for (;;) {
        uint32_t bell = atomic_load(&asked->bell), expected = ASKED;
        int closed = (int)atomic_load(&asked->closed);
        if (atomic_compare_exchange_strong(&asked->state, &expected, TAKEN)) {
            uint32_t count = atomic_load(&asked->count);
            for (uint32_t i = 0; i < count && i < ASKED_MOST; i++) {
                closed = (int)atomic_load(&asked->closed);
                asked->results[i] = closed ? -ECANCELED : drop(dropper, asked->ranges[i].start, asked->ranges[i].end);
            }
            atomic_store(&asked->state, ANSWERED);
            wake(&asked->state);
        } else if (closed)
            return NULL;
        else
            wait_for(&asked->bell, bell, LOOK_MS);
    }
}

/* A forked child has neither the thread nor the memory. */
static void in_child(void)
{
    pthread_mutex_init(&droppers_lock, NULL);
    for (struct dropper *each = droppers; each != NULL; each = each->next) {
        disown(&each->uffd);
        each->used = 0;
    }
    droppers = NULL;
}

static int start(struct dropper *dropper)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all); /* the application's signals are not for this thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    int failed = pthread_create(&dropper->thread, &attributes, run, dropper);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

static int prepare(struct dropper *dropper, int uffd, int words, int locked)
{
    uint64_t length = PLACE + 2 * page_size;
    void *asked = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, words, 0);
    if (asked == MAP_FAILED)
        return errno;
    dropper->asked = asked;
    void *mapped = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        return errno;
    dropper->mapped = mapped;
    char *place = dropper->mapped + page_size;
    if (mprotect(place, PLACE, PROT_READ | PROT_WRITE) || madvise(place, PLACE, MADV_DONTFORK))
        return errno;
    madvise(place, PLACE, MADV_NOHUGEPAGE);
    /* UFFDIO_MOVE takes two VMAs that are both locked, or both not. mlockall(2) may have locked and filled this one. */
    if (locked ? syscall(SYS_mlock2, place, PLACE, LOCK_ONFAULT) : munlock(place, PLACE))
        return errno;
    empty((uint64_t)place);
    return own(&dropper->uffd, uffd);
}

static void release(struct dropper *dropper)
{
    struct dropper **at = &droppers;
    while (*at != dropper)
        at = &(*at)->next;
    disown(&dropper->uffd); /* first: `in_child` closes what is in the list */
    *at = dropper->next;
    if (dropper->mapped != NULL)
        munmap(dropper->mapped, PLACE + 2 * page_size);
    if (dropper->asked != NULL)
        munmap(dropper->asked, page_size);
    free(dropper);
}

/* Have a thread drop pages of the memory that a userfaultfd is about, when it is asked by words in a file. Both are
 * duplicated or mapped. `locked`: whether the memory is. Returns 0, or an errno. */
EXPORT int aiouffd_dropper(int uffd, int words, int locked, struct dropper **made)
{
    static int at_fork;
    int failed = ENOMEM;
    struct dropper *dropper = malloc(sizeof *dropper);
    pthread_mutex_lock(&droppers_lock);
    if (!at_fork && pthread_atfork(NULL, NULL, in_child) == 0)
        at_fork = 1;
    if (at_fork && dropper != NULL) {
        *dropper = (struct dropper){.next = droppers, .used = 1, .uffd = {.fd = -1}};
        droppers = dropper;
        failed = prepare(dropper, uffd, words, locked);
        if (!failed)
            failed = start(dropper);
        if (failed)
            release(dropper);
    } else
        free(dropper);
    pthread_mutex_unlock(&droppers_lock);
    *made = failed ? NULL : dropper;
    return failed;
}

/* Drop nothing more, and wait until what is being dropped just now is. */
EXPORT void aiouffd_dropper_end(struct dropper *dropper)
{
    if (!dropper->used)
        return;
    atomic_store(&dropper->asked->closed, 1);
    ring(dropper->asked);
    pthread_join(dropper->thread, NULL);
    pthread_mutex_lock(&droppers_lock);
    release(dropper);
    pthread_mutex_unlock(&droppers_lock);
}

/* The process that serves */

/* Ask for ranges, which are in `asked` already. Nothing is being asked. */
EXPORT void aiouffd_ask(struct asked *asked, uint32_t count)
{
    uint32_t expected = ASKED;
    atomic_store(&asked->count, count);
    atomic_store(&asked->state, ASKED);
    if (!atomic_load(&asked->closed))
        ring(asked);
    else if (atomic_compare_exchange_strong(&asked->state, &expected, TAKEN)) {
        for (uint32_t i = 0; i < count; i++)
            asked->results[i] = -ECANCELED;
        atomic_store(&asked->state, ANSWERED);
    }
}

/* Wait for the answer; 0: it has not come in so many milliseconds. */
EXPORT int aiouffd_answered(struct asked *asked, uint32_t milliseconds)
{
    uint64_t until = now_ns() + milliseconds * UINT64_C(1000000);
    for (;;) {
        uint32_t state = atomic_load(&asked->state);
        uint64_t now = now_ns();
        if (state != ASKED && state != TAKEN)
            return 1;
        if (now >= until)
            return 0;
        wait_for(&asked->state, state, (unsigned)((until - now) / 1000000) + 1);
    }
}

/* Take back what a predecessor has asked for; 0: it is being done. */
EXPORT int aiouffd_take_back(struct asked *asked)
{
    uint32_t expected = ASKED;
    atomic_compare_exchange_strong(&asked->state, &expected, IDLE);
    return atomic_load(&asked->state) != TAKEN;
}
