/* The table of regions, as Python keeps it: not for handlers. Each of these calls may be made by any thread; those that
 * are about one region, by one thread at a time.
 */

#include "faults.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct region regions[REGIONS];
_Atomic uint32_t used;
struct bucket buckets[BUCKETS];
_Atomic uint32_t waiting, epoch;
_Atomic int32_t pagemap = -1;

static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;

static void in_child(void)
{
    for (int i = 0; i < REGIONS; i++) { /* the parent's regions are not here, and none of its other threads */
        atomic_store(&regions[i].state, FREE);
        atomic_store(&regions[i].inside, 0);
    }
    for (int i = 0; i < BUCKETS; i++)
        atomic_store(&buckets[i].waiters, 0);
    atomic_store(&waiting, 0);
    atomic_store(&finalizing, 0);
    pthread_mutex_init(&table, NULL);
    int32_t fd = atomic_exchange(&pagemap, -1); /* it shows the parent's memory */
    if (fd >= 0)
        close(fd);
    uninstall();
}

/* Enter a region into the table, closed, and take the signal: *displaced is what `install` says. A slot, or a negated
 * errno: ENOSPC, too many regions; EBUSY, too many others have taken the signal; or why pagemap cannot be read. */
EXPORT int aiouffd_add(const struct options *options, int *displaced)
{
    static int forks_are_told;
    int slot = -ENOSPC;
    pthread_mutex_lock(&table);
    if (!forks_are_told)
        forks_are_told = pthread_atfork(NULL, NULL, in_child) == 0;
    if (atomic_load(&pagemap) < 0)
        atomic_store(&pagemap, open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    if (atomic_load(&pagemap) < 0)
        slot = -errno;
    for (uint32_t i = 0; i < REGIONS && slot == -ENOSPC; i++)
        if (atomic_load(&regions[i].state) == FREE && atomic_load(&regions[i].inside) == 0)
            slot = (int)i;
    if (slot >= 0) {
        struct region *r = &regions[slot];
        r->is = *options;
        if (r->is.readahead > LARGEST)
            r->is.readahead = LARGEST > r->is.page ? LARGEST : r->is.page;
        r->is.readahead &= -r->is.page;
        r->count = 0;
        atomic_store(&r->start, 0);
        atomic_store(&r->end, 0);
        atomic_store(&r->loop, 0);
        atomic_store(&r->strangers, 0);
        atomic_store(&r->around, neighbourhood(r));
        atomic_store(&r->warning_ms, options->warning_ms);
        atomic_store(&r->limit_ms, options->limit_ms);
        memset(r->streams, 0, sizeof r->streams);
        memset(r->counters, 0, sizeof r->counters);
        *displaced = install(on_sigbus);
        atomic_store(&r->state, *displaced < 0 ? FREE : CHANGING);
        if (atomic_load(&used) <= (uint32_t)slot)
            atomic_store(&used, (uint32_t)slot + 1);
        if (*displaced < 0)
            slot = -EBUSY;
    }
    pthread_mutex_unlock(&table);
    return slot;
}

/* Say which thread runs the loop of a region. */
EXPORT void aiouffd_loop(int slot, int thread)
{
    atomic_store(&regions[slot].loop, thread);
}

/* Keep handlers out of a region: those that come wait. 0, or -ETIMEDOUT where one did not leave. */
EXPORT int aiouffd_close(int slot)
{
    struct region *r = &regions[slot];
    uint64_t limit = now_ns() + UINT64_C(1000000) * BUSY_MS;
    atomic_store(&r->state, CHANGING);
    for (uint32_t inside; (inside = atomic_load(&r->inside)) != 0;) {
        if (now_ns() > limit)
            return -ETIMEDOUT;
        futex_wait(&r->inside, inside, 10);
    }
    return 0;
}

/* Let them in again. */
EXPORT void aiouffd_open(int slot)
{
    atomic_store(&regions[slot].state, LIVE);
    futex_wake(&regions[slot].state);
}

/* Say what a region shows, while it is closed. 0, or -ENOMEM: then all is asked of the loop. */
EXPORT int aiouffd_show(int slot, uint64_t start, uint64_t end, const struct extent *extents, uint64_t number)
{
    struct region *r = &regions[slot];
    free(r->extents);
    r->extents = number ? malloc(number * sizeof *extents) : NULL;
    r->count = r->extents != NULL ? number : 0;
    if (r->count)
        memcpy(r->extents, extents, number * sizeof *extents);
    atomic_store(&r->start, start);
    atomic_store(&r->end, end);
    return r->count == number ? 0 : -ENOMEM;
}

/* Let the waiters of a range go: to be called after its pages were placed. */
EXPORT void aiouffd_wake(uint64_t start, uint64_t length)
{
    if (atomic_load(&waiting) == 0)
        return;
    uint64_t first = start / PAGE, number = (length + PAGE - 1) / PAGE;
    for (uint64_t i = 0; i < (number < BUCKETS ? number : BUCKETS); i++) {
        struct bucket *bucket = &buckets[(first + i) % BUCKETS];
        atomic_fetch_add(&bucket->generation, 1);
        if (atomic_load(&bucket->waiters) != 0)
            futex_wake(&bucket->generation);
    }
}

/* COPY from the loop. To be called with the GIL held, and for short runs only: to give it away and to get it back, while
 * many threads want it, takes longer than that. Bytes done, or a negated errno. */
EXPORT int64_t aiouffd_copy(int uffd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode)
{
    struct copy_argument copy = {dst, src, length, mode, 0};
    if (ioctl(uffd, IOC_COPY, &copy) == 0)
        return (int64_t)length;
    return errno == EAGAIN && copy.done != 0 ? copy.done : -errno;
}

/* Take a closed region out of the table. Waiters touch again.
 *
 * The last one gives the signal back, if `for_good`: a touch of what is missing is SIGBUS from now on, as well. Where it
 * is zeros, a thread may be on its way into our handler just now, which must find it: so it stays, and passes on all
 * that comes, until the next time. */
EXPORT void aiouffd_remove(int slot, int for_good)
{
    struct region *r = &regions[slot];
    pthread_mutex_lock(&table);
    free(r->extents);
    r->extents = NULL;
    r->count = 0;
    atomic_fetch_add(&epoch, 1);
    atomic_store(&r->state, FREE);
    futex_wake(&r->state);
    int live = 0;
    for (uint32_t i = 0; i < REGIONS; i++)
        live |= atomic_load(&regions[i].state) != FREE;
    if (!live && for_good)
        uninstall();
    pthread_mutex_unlock(&table);
    aiouffd_wake(0, (uint64_t)BUCKETS * PAGE);
}

/* The loop lives. 0: the signal is ours; 1: it is again, another had taken it; -1: it is not. */
EXPORT int aiouffd_beat(int slot)
{
    atomic_fetch_add(&regions[slot].heartbeat, 1);
    pthread_mutex_lock(&table);
    int displaced = install(on_sigbus);
    pthread_mutex_unlock(&table);
    return displaced;
}

EXPORT void aiouffd_counters(int slot, uint64_t *values)
{
    for (int i = 0; i < COUNTERS; i++)
        values[i] = GET(regions[slot].counters[i]);
}
