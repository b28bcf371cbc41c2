#include "table.h"
#include "gil.h"
#include "uffd.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUSY_MS = 5000 };
#define AROUND (UINT64_C(16) << 10) /* what a fault in no stream brings */

struct region regions[REGIONS];
_Atomic uint32_t used;
struct bucket buckets[BUCKETS];
_Atomic uint32_t waiting, epoch;
_Atomic int32_t pagemap = -1;
pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;

void forget_parent(void)
{
    for (int i = 0; i < REGIONS; i++) {
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
}

uint64_t neighborhood(const struct region *r)
{
    uint64_t around = AROUND < r->is.readahead ? AROUND : r->is.readahead;
    return around > r->is.page ? around : r->is.page;
}

static void prepare(struct region *r, const struct options *options)
{
    r->is = *options;
    if (r->is.readahead > LARGEST)
        r->is.readahead = LARGEST > r->is.page ? LARGEST : r->is.page;
    r->is.readahead &= -r->is.page;
    r->count = 0;
    atomic_store(&r->start, 0);
    atomic_store(&r->end, 0);
    atomic_store(&r->loop, 0);
    atomic_store(&r->strangers, 0);
    atomic_store(&r->refusals, 0);
    atomic_store(&r->around, neighborhood(r));
    atomic_store(&r->warning_ms, options->warning_ms);
    atomic_store(&r->limit_ms, options->limit_ms);
    memset(r->streams, 0, sizeof r->streams);
    memset(r->counters, 0, sizeof r->counters);
}

int take_record(const struct options *options)
{
    if (atomic_load(&pagemap) < 0)
        atomic_store(&pagemap, open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    if (atomic_load(&pagemap) < 0)
        return -errno;
    for (uint32_t i = 0; i < REGIONS; i++) {
        if (atomic_load(&regions[i].state) != FREE || atomic_load(&regions[i].inside) != 0)
            continue;
        prepare(&regions[i], options);
        atomic_store(&regions[i].state, CHANGING);
        if (atomic_load(&used) <= i)
            atomic_store(&used, i + 1);
        return (int)i;
    }
    return -ENOSPC;
}

void free_record(int slot)
{
    struct region *r = &regions[slot];
    free(r->extents);
    r->extents = NULL;
    r->count = 0;
    atomic_fetch_add(&epoch, 1);
    atomic_store(&r->state, FREE);
    futex_wake(&r->state);
}

int has_records(void)
{
    for (uint32_t i = 0; i < REGIONS; i++)
        if (atomic_load(&regions[i].state) != FREE)
            return 1;
    return 0;
}

void leave(struct region *r)
{
    if (atomic_fetch_sub(&r->inside, 1) == 1 && atomic_load(&r->state) != LIVE)
        futex_wake(&r->inside);
}

/* --- What Python calls: each function from any thread, but for one region from one thread at a time --- */

/* Say which thread runs the loop of a region. */
EXPORT void aiouffd_loop(int slot, int thread)
{
    atomic_store(&regions[slot].loop, thread);
}

/* From now on the loop is asked what to do about a write to a page that is there: to a closed region. */
EXPORT void aiouffd_tell_writes(int slot)
{
    regions[slot].is.asks_to_write = 1;
}

/* Keep handlers out of a region: new ones wait. 0, or -ETIMEDOUT if one that was inside did not leave. */
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

/* Let handlers in again. */
EXPORT void aiouffd_open(int slot)
{
    atomic_store(&regions[slot].state, LIVE);
    futex_wake(&regions[slot].state);
}

/* Say what a closed region shows. 0, or -ENOMEM: then the loop is asked for everything. */
EXPORT int aiouffd_show(int slot, uint64_t start, uint64_t end, const struct extent *extents, uint64_t number)
{
    struct region *r = &regions[slot];
    atomic_store(&r->refusals, 0); /* what lies there now may be had */
    free(r->extents);
    r->extents = number ? malloc(number * sizeof *extents) : NULL;
    r->count = r->extents != NULL ? number : 0;
    if (r->count)
        memcpy(r->extents, extents, number * sizeof *extents);
    atomic_store(&r->start, start);
    atomic_store(&r->end, end);
    return r->count == number ? 0 : -ENOMEM;
}

/* A page cannot be had: a thread that asks for it is not to wait. It may be had again after the next `aiouffd_show`. */
EXPORT void aiouffd_refuse(int slot, uint64_t page)
{
    struct region *r = &regions[slot];
    uint32_t number = atomic_load(&r->refusals); /* only the loop writes it */
    if (number < REFUSED)
        atomic_store(&r->refused[number], page);
    if (number <= REFUSED)
        atomic_store(&r->refusals, number + 1);
}

/* Wake the threads that wait for pages of a range, after the pages were placed. */
EXPORT void aiouffd_wake(uint64_t start, uint64_t length)
{
    if (atomic_load(&waiting) == 0)
        return;
    uint64_t first = start / page_size, number = (length + page_size - 1) / page_size;
    for (uint64_t i = 0; i < (number < BUCKETS ? number : BUCKETS); i++) {
        struct bucket *bucket = &buckets[(first + i) % BUCKETS];
        atomic_fetch_add(&bucket->generation, 1);
        if (atomic_load(&bucket->waiters) != 0)
            futex_wake(&bucket->generation);
    }
}

void wake_everybody(void)
{
    aiouffd_wake(0, BUCKETS * page_size);
}

/* COPY for the loop. Called with the GIL held, for short runs only: to release the GIL and take it back, while many
 * threads want it, takes longer than the copy. Returns bytes done, or a negated errno. */
EXPORT int64_t aiouffd_copy(int uffd, uint64_t dst, uint64_t src, uint64_t length, uint64_t mode)
{
    struct copy_argument copy = {dst, src, length, mode, 0};
    if (ioctl(uffd, IOC_COPY, &copy) == 0)
        return (int64_t)length;
    return errno == EAGAIN && copy.done != 0 ? copy.done : -errno;
}

EXPORT void aiouffd_counters(int slot, uint64_t *values)
{
    for (int i = 0; i < COUNTERS; i++)
        values[i] = GET(regions[slot].counters[i]);
}
