/* A message, the `struct uffd_msg` that the kernel would have sent, goes into a pipe that the loop reads as it would
 * read a userfaultfd. The thread waits on a futex with the GIL released.
 *
 * No wake-up is lost. A waiter reads its bucket's generation before it writes its message, and sleeps only while that
 * has not changed. The loop moves the generation on after it has placed the page, and it does so for each message that
 * it has read. Many pages share a bucket: a thread that is woken for another's page touches again, and asks again, as
 * with UFFDIO_WAKE.
 */

#include "ask.h"
#include "chain.h"
#include "gil.h"
#include "uffd.h"
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SLICE_MS = 100 }; /* how often a waiter looks whether the loop is alive */

void complain(uint64_t address, const char *why)
{
    struct text text = {.length = 0};
    add(&text, "aiouffd: thread ");
    add_number(&text, (uint64_t)thread_id(), 10);
    add(&text, " has touched the missing page at ");
    add_number(&text, address, 16);
    add(&text, why);
    say(&text);
}

static void warn(struct region *r, uint64_t address, uint64_t stalled, uint32_t limit_ms)
{
    struct text text = {.length = 0};
    add(&text, "aiouffd: thread ");
    add_number(&text, (uint64_t)thread_id(), 10);
    add(&text, " has been waiting for the page at ");
    add_number(&text, address, 16);
    add(&text, " for ");
    add_seconds(&text, stalled);
    add(&text, ", and the event loop that should bring it (thread ");
    add_number(&text, (uint64_t)(uint32_t)atomic_load(&r->loop), 10);
    add(&text, ") does not run: something blocks it, or native code keeps the GIL while its threads touch missing"
               " pages. Prefetch these pages first, or leave out engine=InThread().");
    if (limit_ms != 0) {
        add(&text, " The process is ended in ");
        add_number(&text, (limit_ms > stalled ? limit_ms - stalled + 999 : 999) / 1000, 10);
        add(&text, " s.");
    }
    add(&text, "\n");
    say(&text);
}

int wait_for(struct region *r, _Atomic uint32_t *word, uint32_t value, uint64_t address)
{
    uint32_t beat = atomic_load(&r->heartbeat);
    const uint32_t warning_ms = atomic_load(&r->warning_ms), limit_ms = atomic_load(&r->limit_ms);
    uint64_t last = now_ns(), stalled = 0;
    int warned = 0;
    for (;;) {
        if (atomic_load(word) != value)
            return 1;
        futex_wait(word, value, SLICE_MS);
        uint64_t now = now_ns(), slice = (now - last) / 1000000;
        if (slice == 0)
            continue; /* interrupted by another signal */
        last += slice * 1000000;
        if (atomic_load(&r->heartbeat) != beat || atomic_load(&finalizing) != 0) {
            beat = atomic_load(&r->heartbeat);
            stalled = 0;
            continue;
        }
        stalled += slice < 2 * SLICE_MS ? slice : 2 * SLICE_MS; /* longer: the whole process was stopped */
        if (!warned && warning_ms != 0 && stalled >= warning_ms) {
            warned = 1;
            warn(r, address, stalled, limit_ms);
        }
        if (limit_ms != 0 && stalled >= limit_ms)
            return 0;
    }
}

static uint64_t access_flags(void *context)
{
#if defined __x86_64__
    return ((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2 ? FAULT_WRITE : 0; /* bit 1 of the error code */
#else
    /* A list of records follows the registers; the syndrome's record has WnR in bit 6. */
    struct record {
        uint32_t magic, size;
        uint64_t syndrome;
    };
    const char *at = (const char *)((ucontext_t *)context)->uc_mcontext.__reserved;
    for (const struct record *r = (const void *)at; r->magic != 0 && r->size != 0; r = (const void *)at) {
        if (r->magic == 0x45535201)
            return r->syndrome >> 6 & 1 ? FAULT_WRITE : 0;
        at += r->size;
    }
    return 0;
#endif
}

/* The range of a page that is in categories of PAGEMAP_SCAN: 1, none: 0, or -1 (before Linux 6.7). */
static int scan_page(uint64_t page, uint64_t size, uint64_t categories, uint64_t inverted)
{
    struct {
        uint64_t start, end, categories;
    } found;
    struct scan_argument scan = {.size = sizeof scan, .start = page, .end = page + size, .vec_len = 1};
    scan.vec = (uint64_t)(uintptr_t)&found;
    scan.mask = scan.returned = categories;
    scan.inverted = inverted;
    return ioctl(atomic_load(&pagemap), IOC_PAGEMAP_SCAN, &scan);
}

static uint64_t entry_of(uint64_t page)
{
    uint64_t entry = 0; /* says nothing of huge pages */
    long got = syscall(SYS_pread64, atomic_load(&pagemap), &entry, sizeof entry, page / page_size * sizeof entry);
    return got == (long)sizeof entry ? entry : 0;
}

/* Whether a page is there and write-protected. */
static int protected(uint64_t page, uint64_t size)
{
    int number = scan_page(page, size, PAGE_IS_PRESENT | PAGE_IS_WRITTEN, PAGE_IS_WRITTEN);
    return number >= 0 ? number > 0 : (entry_of(page) >> 63) && (entry_of(page) >> 57 & 1);
}

/* Whether a page was poisoned (UFFDIO_POISON), since it could not be had. The signal does not tell: only kernels with
 * CONFIG_MEMORY_FAILURE send BUS_MCEERR_AR. In the page tables a poisoned page is an entry that is neither a page nor
 * none, and not the mark of a write-protected page. */
static int poisoned(uint64_t page, uint64_t size)
{
    int number = scan_page(page, size, PAGE_IS_SWAPPED | PAGE_IS_WRITTEN, 0);
    if (number >= 0)
        return number > 0;
    uint64_t entry = entry_of(page);
    return (entry >> 61) == 2 && !(entry >> 57 & 1); /* swapped, neither present nor of a file; not write-protected */
}

static int refused(const struct region *r, uint64_t page)
{
    uint32_t number = atomic_load(&r->refusals);
    if (number > REFUSED)
        return 1;
    for (uint32_t i = 0; i < number; i++)
        if (atomic_load(&r->refused[i]) == page)
            return 1;
    return 0;
}

/* Whether it is of no use to ask: who would bring the page is this very thread, or has ended, or has failed before. */
static int in_vain(struct region *r, uint64_t page, uint64_t address)
{
    int me = thread_id();
    if (me == atomic_load(&r->loop)) {
        complain(address, ", which it should bring itself: it runs the event loop of this region. A source or handler"
                          " must not touch its own region.\n");
        return 1;
    }
    if (poisoned(page, r->is.page))
        return 1;
    if (refused(r, page)) {
        complain(address, ", which cannot be had: `Monitor.check()` raises why. This kernel has no UFFDIO_POISON (Linux"
                          " 6.6), so the handler remembers it.\n");
        return 1;
    }
    if (atomic_load(&finalizing) == me) {
        complain(address, " while the interpreter ends: nobody serves it any more. Leave the Monitor before.\n");
        return 1;
    }
    return 0;
}

int ask(struct region *r, uint64_t page, uint64_t address, void *context)
{
    if (in_vain(r, page, address)) {
        leave(r);
        return 0;
    }
    const uint64_t size = r->is.page;
    struct bucket *bucket = &buckets[page / page_size % BUCKETS];
    struct message message = {.event = EVENT_PAGEFAULT, .address = address, .thread = (uint32_t)thread_id()};
    message.flags = access_flags(context);
    if (r->is.asks_to_write && message.flags && protected(page, size))
        message.flags |= FAULT_WP;
    int32_t ending = atomic_load(&finalizing);
    atomic_fetch_add(&waiting, 1);
    atomic_fetch_add(&bucket->waiters, 1);
    uint32_t generation = atomic_load(&bucket->generation);
    long written = syscall(SYS_write, r->is.pipe, &message, sizeof message); /* all of it, or nothing */
    leave(r);
    void *state = release_gil();
    int going = 1;
    if (written == (long)sizeof message || ending != 0)
        going = wait_for(r, &bucket->generation, generation, address);
    else
        futex_wait(&bucket->generation, generation, 1); /* EAGAIN: thousands of threads wait. Or EINTR. */
    atomic_fetch_sub(&bucket->waiters, 1);
    atomic_fetch_sub(&waiting, 1);
    /* All threads that wait for a page that cannot be had are woken at once. While the first of them writes its report,
     * faulthandler has put SIG_DFL in our place, which would kill the process when the others touch again. So they stay
     * here. (A page that was swapped out again looks the same: that costs a little time.) */
    if (going && (poisoned(page, size) || refused(r, page)))
        wait_for_turn();
    take_gil(state);
    return going;
}
