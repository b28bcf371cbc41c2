/* Page faults resolved in the thread that took them.
 *
 * A userfaultfd with UFFD_FEATURE_SIGBUS sends no message: whoever touches a missing page gets SIGBUS, and this file
 * has its handler. What is at hand at a fixed address is placed right there, by one COPY or ZEROPAGE; the thread then
 * repeats its access. Anything else is written as a `struct uffd_msg` into a pipe, which the event loop reads as it
 * would read a userfaultfd, while the thread waits on a futex with the GIL free.
 *
 * What a handler of a synchronous signal may do. It runs between two instructions of the thread that touched, like a
 * call that the code did not know of, so it must not need a lock that this code may hold, nor disturb what it uses: no
 * malloc, no stdio, no Python code; errno is put back; no other signal is blocked meanwhile (sa_mask is empty).
 * PyEval_SaveThread and PyEval_RestoreThread are the only calls into Python, and only if this thread holds the GIL: they
 * leave exceptions and frames alone. Memory that Python code touches is never touched under the GIL's own locks.
 *
 * Who excludes whom. A record of the table is LIVE, CHANGING or FREE. A handler counts itself in (`inside`), looks at
 * the state again, and counts itself out before it waits for anything. Whoever changes a record marks it CHANGING
 * first and then waits until nobody is inside: each handler has seen the mark, or is waited for (both sides are
 * sequentially consistent). Records are static memory, so that a handler that comes late reads no freed memory; what
 * it finds there by then it checks under its own count.
 *
 * No lost wake-up. A waiter reads its bucket's generation *before* it writes its message, and sleeps only as long as
 * that has not changed; the loop moves the generation on *after* it has placed the page, and it does so for each
 * message that it has read. Buckets are shared by many pages: a thread that is woken for another's page touches again,
 * and asks again, as with UFFDIO_WAKE.
 */

#include "faults.h"
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* --- Placing what is at hand --- */

static void count(struct region *r, int which, uint64_t much)
{
    atomic_fetch_add_explicit(&r->counters[which], much, memory_order_relaxed);
}

/* Bytes done, or a negated errno when nothing was. The kernel writes `done` only sometimes, so it is 0 before. */
static int64_t resolve(struct region *r, unsigned long request, void *argument, const int64_t *done, uint64_t length)
{
    if (ioctl(r->is.uffd, request, argument) == 0)
        return (int64_t)length;
    return errno == EAGAIN && *done > 0 ? *done : -errno;
}

static int64_t fill(struct region *r, const struct extent *e, uint64_t start, uint64_t length)
{
    if (e->kind == ZEROS) {
        struct range_argument zero = {start, length, MODE_DONTWAKE, 0};
        count(r, ZEROPAGES, 1);
        return resolve(r, IOC_ZEROPAGE, &zero, &zero.done, length);
    }
    struct copy_argument copy = {start, e->source + start - e->start, length, MODE_DONTWAKE | r->is.mode, 0};
    count(r, COPIES, 1);
    return resolve(r, IOC_COPY, &copy, &copy.done, length);
}

/* Whether reading the file's mapping there would neither wait for the disk nor hit the end of a file that was cut. */
static int resident(const struct extent *e, uint64_t start, uint64_t length)
{
    unsigned char in_memory[LARGEST / PAGE + 1];
    struct stat file;
    uint64_t from = start - e->start, pages = (length + PAGE - 1) / PAGE;
    if (length > LARGEST || fstat(e->fd, &file) || (uint64_t)file.st_size < e->offset + from + length)
        return 0;
    if (syscall(SYS_mincore, e->source + from, length, in_memory))
        return 0;
    for (uint64_t i = 0; i < pages; i++)
        if (!(in_memory[i] & 1))
            return 0;
    return 1;
}

static const struct extent *find(const struct region *r, uint64_t page)
{
    uint64_t low = 0, high = r->count;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        const struct extent *e = &r->extents[middle];
        if (page < e->start)
            high = middle;
        else if (page >= e->end)
            low = middle + 1;
        else
            return e->kind == ASK || page + r->is.page > e->end ? NULL : e;
    }
    return NULL;
}

uint64_t neighbourhood(const struct region *r)
{
    uint64_t around = AROUND < r->is.readahead ? AROUND : r->is.readahead;
    return around > r->is.page ? around : r->is.page;
}

/* Choose what to bring along. A fault just behind, or a little behind, what another brought doubles its window; others
 * bring the aligned neighbourhood, which becomes smaller as long as none follows another. Several threads may do this
 * at once: what they overwrite is but a guess. */
static struct stream *choose(struct region *r, uint64_t page, uint64_t *low, uint64_t *high)
{
    uint64_t limit = r->is.readahead, around = GET(r->around);
    for (int i = 0; i < STREAMS; i++) {
        struct stream *s = &r->streams[i];
        uint64_t expected = GET(s->expected), window = GET(s->window);
        if (window == 0 || page - expected >= window)
            continue;
        window = window * 2 < limit ? window * 2 : limit;
        SET(s->window, window);
        SET(r->strangers, 0);
        SET(r->around, neighbourhood(r));
        *low = page;
        *high = page + window;
        return s;
    }
    if (atomic_fetch_add_explicit(&r->strangers, 1, memory_order_relaxed) >= STRANGERS) {
        SET(r->strangers, 0);
        around = around / 2 > r->is.page ? around / 2 : r->is.page;
        SET(r->around, around);
    }
    struct stream *s = &r->streams[atomic_fetch_add_explicit(&r->turn, 1, memory_order_relaxed) % STREAMS];
    *low = page / around * around;
    *high = *low + around;
    SET(s->window, around);
    return s;
}

enum outcome { PLACED, PRESENT, ASKED };

static enum outcome place(struct region *r, uint64_t page)
{
    const uint64_t size = r->is.page;
    if (r->is.shared) { /* another process may have brought it into the file; COPY says EEXIST then, and maps nothing */
        struct range_argument minor = {page, size, MODE_DONTWAKE | r->is.mode, 0};
        int64_t done = resolve(r, IOC_CONTINUE, &minor, &minor.done, size);
        if (done > 0) {
            count(r, CONTINUES, 1);
            count(r, PAGES_FAULT, 1);
            return PLACED;
        }
        if (done != -EFAULT)
            return done == -EEXIST ? PRESENT : ASKED;
    }
    const struct extent *e = find(r, page);
    if (e == NULL)
        return ASKED;
    uint64_t low = page, high = page + size;
    struct stream *stream = r->is.readahead > size ? choose(r, page, &low, &high) : NULL;
    low = low > e->start ? low : e->start;
    high = high < e->end ? high : e->start + (e->end - e->start) / size * size;
    if (e->kind == RESIDENT && !resident(e, low, high - low)) {
        low = page, high = page + size;
        if (!resident(e, page, size))
            return ASKED;
    }
    int64_t done = fill(r, e, low, high - low);
    uint64_t bytes = done > 0 ? (uint64_t)done : 0;
    if (low < page && low + bytes <= page) { /* there was something in front of it */
        low = page;
        done = fill(r, e, page, high - page);
        bytes += done > 0 ? (uint64_t)done : 0;
    }
    /* ENOENT: it spans two mappings (any mprotect or madvise splits one). EFAULT: its source is cut further on. */
    if (done < 0 && done != -EEXIST && high - page > size) {
        low = page, high = page + size;
        done = fill(r, e, page, size);
        bytes += done > 0 ? (uint64_t)done : 0;
    }
    if (stream != NULL)
        SET(stream->expected, done > 0 ? low + (uint64_t)done : high);
    if (bytes == 0) {
        if (done == -EEXIST)
            count(r, EEXISTS, 1);
        return done == -EEXIST ? PRESENT : ASKED; /* whatever it is, the engine knows what to do */
    }
    count(r, PAGES_FAULT, 1);
    count(r, PAGES_READAHEAD, bytes / size - 1);
    if (e->kind == ZEROS)
        count(r, PAGES_ZERO, bytes / size);
    else
        count(r, BYTES_FETCHED, bytes);
    return done > 0 ? PLACED : done == -EEXIST ? PRESENT : ASKED;
}

/* --- Asking the loop --- */

static void leave(struct region *r)
{
    if (atomic_fetch_sub(&r->inside, 1) == 1 && atomic_load(&r->state) != LIVE)
        futex_wake(&r->inside);
}

/* Wait until *word is no longer `value`; 0: the loop has not run for so long that it never will. */
static int wait_for(struct region *r, _Atomic uint32_t *word, uint32_t value, uint64_t address)
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
        stalled += slice < 2 * SLICE_MS ? slice : 2 * SLICE_MS; /* more: all of this process was stopped */
        if (!warned && warning_ms != 0 && stalled >= warning_ms) {
            struct text text = {.length = 0};
            warned = 1;
            add(&text, "aiouffd: thread ");
            add_number(&text, (uint64_t)thread_id(), 10);
            add(&text, " has been waiting for the page at ");
            add_number(&text, address, 16);
            add(&text, " for ");
            add_number(&text, stalled / 1000, 10);
            add(&text, ".");
            add_number(&text, stalled / 100 % 10, 10);
            add(&text, " s, and the event loop that should bring it (thread ");
            add_number(&text, (uint64_t)(uint32_t)atomic_load(&r->loop), 10);
            add(&text, ") does not run: something blocks it, or native code keeps the GIL while its threads touch"
                       " missing pages. Prefetch them first, or leave out engine=InThread().");
            if (limit_ms != 0) {
                add(&text, " The process is ended in ");
                add_number(&text, (limit_ms > stalled ? limit_ms - stalled + 999 : 999) / 1000, 10);
                add(&text, " s.");
            }
            add(&text, "\n");
            say(&text);
        }
        if (limit_ms != 0 && stalled >= limit_ms)
            return 0;
    }
}

static uint64_t access_flags(void *context)
{
#if defined __x86_64__
    return ((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2 ? FAULT_WRITE : 0; /* bit 1 of the error code */
#elif defined __aarch64__
    /* A list of records behind the registers; that of the syndrome has WnR in bit 6. */
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
#else
    (void)context;
    return 0;
#endif
}

static void complain(uint64_t address, const char *why)
{
    struct text text = {.length = 0};
    add(&text, "aiouffd: thread ");
    add_number(&text, (uint64_t)thread_id(), 10);
    add(&text, " has touched the missing page at ");
    add_number(&text, address, 16);
    add(&text, why);
    say(&text);
}

/* Whether a page was poisoned (UFFDIO_POISON), since it could not be had. The signal does not tell: BUS_MCEERR_AR comes
 * from kernels with CONFIG_MEMORY_FAILURE only. In the page tables it is an entry that is neither a page nor none, and
 * not the mark of a write-protected one. */
static int poisoned(uint64_t page, uint64_t size)
{
    struct {
        uint64_t start, end, categories;
    } found;
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
    } scan = {.size = 96, .start = page, .end = page + size, .vec = (uint64_t)(uintptr_t)&found, .vec_len = 1};
    scan.mask = scan.returned = PAGE_IS_SWAPPED | PAGE_IS_WRITTEN;
    int fd = atomic_load(&pagemap), number = ioctl(fd, IOC_PAGEMAP_SCAN, &scan);
    if (number >= 0)
        return number > 0;
    uint64_t entry = 0; /* before Linux 6.7; says nothing of huge pages */
    if (syscall(SYS_pread64, fd, &entry, sizeof entry, page / PAGE * sizeof entry) != (long)sizeof entry)
        return 0;
    return (entry >> 61) == 2 && !(entry >> 57 & 1); /* swapped, neither present nor of a file; not write-protected */
}

/* The caller is inside, and no longer when this returns: 1, to touch again, or 0 where that would be in vain. */
static int ask(struct region *r, uint64_t page, uint64_t address, void *context)
{
    int me = thread_id();
    if (me == atomic_load(&r->loop)) {
        leave(r);
        complain(address, ", which it should bring itself: it runs the event loop of this region. A source or handler"
                          " must not touch its own region.\n");
        return 0;
    }
    const uint64_t size = r->is.page;
    if (poisoned(page, size)) {
        leave(r);
        return 0;
    }
    int32_t ending = atomic_load(&finalizing);
    if (ending == me) {
        leave(r);
        complain(address, " while the interpreter ends: nobody serves it any more. Leave the Monitor before.\n");
        return 0;
    }
    struct bucket *bucket = &buckets[page / PAGE % BUCKETS];
    struct message message = {.event = EVENT_PAGEFAULT, .address = address, .thread = (uint32_t)me};
    message.flags = access_flags(context);
    atomic_fetch_add(&waiting, 1);
    atomic_fetch_add(&bucket->waiters, 1);
    uint32_t generation = atomic_load(&bucket->generation);
    long written = syscall(SYS_write, r->is.pipe, &message, sizeof message); /* whole, or not at all */
    leave(r);
    void *state = release_gil();
    int going = 1;
    if (written == (long)sizeof message || ending != 0)
        going = wait_for(r, &bucket->generation, generation, address);
    else
        futex_wait(&bucket->generation, generation, 1); /* EAGAIN: thousands of threads wait. EINTR. */
    atomic_fetch_sub(&bucket->waiters, 1);
    atomic_fetch_sub(&waiting, 1);
    /* All who wait for one page that cannot be had are woken at once. While the first of them writes its report,
     * faulthandler has put the default in our place, which would kill the others when they touch again, and the process
     * with them. So they stay here. (A page that was swapped out again looks the same: that costs a little time.) */
    if (going && poisoned(page, size))
        wait_for_turn();
    take_gil(state);
    return going;
}

/* --- The handler --- */

THREAD_LOCAL struct {
    uint64_t missed;       /* the address that was nobody's, */
    uint32_t missed_epoch; /* at that time */
    uint32_t repeats;      /* how often `repeated` was there and faulted all the same */
    uint64_t repeated;
} mine;

/* 1: touch again; 0: pass it on, and say in *ours whether it is a page of ours. */
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
        if (state != LIVE || address < atomic_load(&r->start) || address >= atomic_load(&r->end))
            continue;
        atomic_fetch_add(&r->inside, 1);
        state = atomic_load(&r->state);
        if (state != LIVE || address < atomic_load(&r->start) || address >= atomic_load(&r->end)) {
            leave(r);
            return 1; /* it has just changed: the next touch finds it as it is then */
        }
        *ours = 1;
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
        complain(address, ", and the kernel says that it is there. Is it write-protected by another userfaultfd?\n");
        return 0;
    }
    if (changing != NULL) { /* its address may be the one that is being changed */
        void *state = release_gil();
        int going = wait_for(changing, &changing->state, CHANGING, address);
        take_gil(state);
        *ours = !going;
        return going;
    }
    /* Nobody's: or it was somebody's when it faulted, who has left since. The next touch tells. */
    if (mine.missed == address && mine.missed_epoch == freed)
        return 0;
    mine.missed = address;
    mine.missed_epoch = freed;
    return 1;
}

static int within(uint64_t address)
{
    for (uint32_t i = 0, end = atomic_load(&used); i < end; i++)
        if (atomic_load(&regions[i].state) != FREE && address >= atomic_load(&regions[i].start)
            && address < atomic_load(&regions[i].end))
            return 1;
    return 0;
}

void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    /* BUS_ADRERR is how a missing page is told; a poisoned one may be BUS_MCEERR_AR, as one whose memory is broken. */
    if (info->si_code != BUS_ADRERR || !serve(address, context, &ours))
        pass_on(number, info, context, ours || (info->si_code == BUS_MCEERR_AR && within(address)));
    errno = saved;
}
