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

#include "native.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum {
    REGIONS = 256,
    BUCKETS = 1024, /* a power of two */
    STREAMS = 8,
    LATENCIES = 48,
    PAGE = 4096,
    STRANGERS = 4,
    REPEATS = 1000,  /* the same page is said to be there, and faults again: something else is wrong with it */
    SLICE_MS = 100,  /* a waiter looks so often whether the loop is alive */
    BUSY_MS = 5000,
};
#define AROUND (UINT64_C(16) << 10) /* what a fault that follows no other brings */
#define LARGEST (UINT64_C(2) << 20) /* what one fault brings at most: 0.4 ms */

/* --- What the kernel takes (linux/userfaultfd.h; old headers lack CONTINUE) --- */

struct copy_argument {
    uint64_t dst, src, len, mode;
    int64_t done;
};
struct range_argument { /* of ZEROPAGE and CONTINUE */
    uint64_t start, len, mode;
    int64_t done;
};
struct message { /* struct uffd_msg of a page fault */
    uint8_t event, padding[7];
    uint64_t flags, address;
    uint32_t thread, unused;
};
_Static_assert(sizeof(struct message) == 32, "struct uffd_msg has 32 bytes");

#define IOC_COPY _IOWR(0xAA, 0x03, struct copy_argument)
#define IOC_ZEROPAGE _IOWR(0xAA, 0x04, struct range_argument)
#define IOC_CONTINUE _IOWR(0xAA, 0x07, struct range_argument)
#define IOC_PAGEMAP_SCAN _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 96)
enum { EVENT_PAGEFAULT = 0x12, FAULT_WRITE = 1, MODE_DONTWAKE = 1, PAGE_IS_WRITTEN = 2, PAGE_IS_SWAPPED = 16 };

/* --- The table --- */

enum state { FREE, LIVE, CHANGING };
enum kind { ASK, COPY, ZEROS, RESIDENT }; /* RESIDENT: as COPY, of those pages of a file that are in memory */
enum counter {
    FAULTS,
    PAGES_FAULT,
    PAGES_READAHEAD,
    PAGES_ZERO,
    BYTES_FETCHED,
    COPIES,
    ZEROPAGES,
    CONTINUES,
    EEXISTS,
    LATENCY,
    COUNTERS = LATENCY + LATENCIES
};

struct extent {
    uint64_t start, end; /* addresses, sorted and disjoint; what is in none is asked for */
    uint64_t source;     /* what `start` shows: the address of its bytes */
    uint64_t offset;     /* and where these are in the file behind them */
    int32_t kind, fd;
};

struct stream {
    _Atomic uint64_t expected, window;
};

struct options {
    int32_t uffd, pipe, shared; /* shared: registered with MINOR, so that the file may have the page already */
    uint32_t mode;              /* of COPY and CONTINUE: 2 for write-protected pages */
    uint64_t page, readahead;
    uint32_t warning_ms, limit_ms; /* 0: none */
};

struct region {
    _Atomic uint32_t state;  /* a futex: those wait who met CHANGING */
    _Atomic uint32_t inside; /* a futex: whoever changes waits */
    _Atomic uint64_t start, end;
    _Atomic uint32_t warning_ms, limit_ms; /* here as well, since waiters are not inside */
    struct options is;
    struct extent *extents;
    uint64_t count;
    _Atomic uint32_t heartbeat; /* of the loop */
    _Atomic int32_t loop;       /* its thread */
    struct stream streams[STREAMS];
    _Atomic uint32_t turn, strangers;
    _Atomic uint64_t around;
    _Atomic uint64_t counters[COUNTERS];
};

struct bucket {
    _Atomic uint32_t generation, waiters;
};

static struct region regions[REGIONS];
static _Atomic uint32_t used; /* records behind it were never in use */
static struct bucket buckets[BUCKETS];
static _Atomic uint32_t waiting; /* the sum of their waiters */
static _Atomic uint32_t epoch;   /* moves on when a record is freed */

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

#define GET(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define SET(field, value) atomic_store_explicit(&(field), (value), memory_order_relaxed)

static uint64_t neighbourhood(const struct region *r)
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
                       " missing pages. Prefetch them first, or leave out in_thread=True.");
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

static _Atomic int32_t pagemap = -1; /* of this process */

/* Whether a page was poisoned (UFFDIO_POISON), since it could not be had. The signal does not tell: BUS_MCEERR_AR comes
 * from kernels with CONFIG_MEMORY_FAILURE only. In the page tables it is an entry that is neither a page nor none, and
 * not the mark of a write-protected one. */
static int poisoned(const struct region *r, uint64_t page)
{
    struct {
        uint64_t start, end, categories;
    } found;
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
    } scan = {.size = 96, .start = page, .end = page + r->is.page, .vec = (uint64_t)(uintptr_t)&found, .vec_len = 1};
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
    if (poisoned(r, page)) {
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
    if (!going) { /* one traceback is enough: others wait for the end of the process */
        static _Atomic uint32_t given_up;
        if (atomic_exchange(&given_up, 1))
            futex_wait(&given_up, 1, BUSY_MS);
    }
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

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno, ours = 0;
    uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    /* BUS_ADRERR is how a missing page is told; a poisoned one may be BUS_MCEERR_AR, as one whose memory is broken. */
    if (info->si_code != BUS_ADRERR || !serve(address, context, &ours))
        pass_on(number, info, context, ours || (info->si_code == BUS_MCEERR_AR && within(address)));
    errno = saved;
}

/* --- What Python calls --- */

static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER; /* of these calls, not of handlers */

static void in_child(void)
{
    for (int i = 0; i < REGIONS; i++) { /* the parent's regions are not here, and none of its other threads */
        atomic_store(&regions[i].state, FREE);
        atomic_store(&regions[i].inside, 0);
    }
    for (int i = 0; i < BUCKETS; i++)
        atomic_store(&buckets[i].waiters, 0);
    atomic_store(&waiting, 0);
    pthread_mutex_init(&table, NULL);
    int32_t fd = atomic_exchange(&pagemap, -1); /* it shows the parent's memory */
    if (fd >= 0)
        close(fd);
    uninstall();
}

/* Enter a region into the table, closed, and take the signal: *displaced is what `install` says. A slot, or a negated
 * errno: ENOSPC, too many regions; EBUSY, too many others have taken the signal. */
EXPORT int aiouffd_add(const struct options *options, int *displaced)
{
    static int forks_are_told;
    int slot = -ENOSPC;
    pthread_mutex_lock(&table);
    if (!forks_are_told)
        forks_are_told = pthread_atfork(NULL, NULL, in_child) == 0;
    if (atomic_load(&pagemap) < 0)
        atomic_store(&pagemap, open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    for (uint32_t i = 0; i < REGIONS && slot < 0; i++)
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

/* Take a closed region out of the table; the last one gives the signal back. Waiters touch again. */
EXPORT void aiouffd_remove(int slot)
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
    if (!live)
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
