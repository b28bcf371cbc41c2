#include "plain.h"
#include "uffd.h"
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STRANGERS = 4, SMALLEST_PAGE = 4096 };

void count(struct region *r, int which, uint64_t much)
{
    atomic_fetch_add_explicit(&r->counters[which], much, memory_order_relaxed);
}

/* Returns bytes done, or a negated errno if none were. The kernel writes `done` only sometimes, so it starts as 0. */
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

/* Whether reading the file's mapping there neither waits for the disk nor hits the end of a file that was cut. */
static int resident(const struct extent *e, uint64_t start, uint64_t length)
{
    unsigned char in_memory[LARGEST / SMALLEST_PAGE + 1]; /* the kernel writes a byte for each page */
    struct stat file;
    uint64_t from = start - e->start, pages = (length + page_size - 1) / page_size;
    if (length > LARGEST || fstat(e->fd, &file) || (uint64_t)file.st_size < e->offset + from + length)
        return 0;
    if (file.st_mtim.tv_sec * INT64_C(1000000000) + file.st_mtim.tv_nsec != e->mtime_ns)
        return 0; /* it was written: the loop says so */
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

/* Choose what to bring along. A fault just behind, or a little behind, what an earlier fault brought doubles that
 * stream's window. Other faults bring the aligned neighborhood, which shrinks while none of them follows another.
 * Several threads may do this at once: what they overwrite is only a guess. */
static struct stream *choose(struct region *r, uint64_t page, uint64_t *low, uint64_t *high, uint64_t *follows)
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
        SET(r->around, neighborhood(r));
        *low = page;
        *high = page + window;
        *follows = 1;
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

/* Map a page that the file has already: another process may have brought it. COPY says EEXIST then, and maps nothing. */
static int mapped_from_file(struct region *r, uint64_t page, enum outcome *how)
{
    uint32_t mode = r->is.mode | (r->is.asks_to_write ? MODE_WP : 0); /* it may be protected, and is mapped nowhere */
    struct range_argument minor = {page, r->is.page, MODE_DONTWAKE | mode, 0};
    int64_t done = resolve(r, IOC_CONTINUE, &minor, &minor.done, r->is.page);
    if (done == -EFAULT) /* the file does not have it */
        return 0;
    *how = done > 0 ? PLACED : done == -EEXIST ? PRESENT : ASKED;
    if (done > 0) {
        count(r, CONTINUES, 1);
        count(r, PAGES_FAULT, 1);
    }
    return 1;
}

/* Fill [low, high) around a page, or less. Returns the bytes placed; *last is what the last ioctl returned, *from
 * where it began. */
static uint64_t fill_around(struct region *r, const struct extent *e, uint64_t page, uint64_t low, uint64_t high,
                            int64_t *last, uint64_t *from)
{
    const uint64_t size = r->is.page;
    int64_t done = fill(r, e, low, high - low);
    uint64_t bytes = done > 0 ? (uint64_t)done : 0;
    if (low < page && low + bytes <= page) { /* a page in front was present */
        low = page;
        done = fill(r, e, page, high - page);
        bytes += done > 0 ? (uint64_t)done : 0;
    }
    /* ENOENT: the range spans two mappings (any mprotect or madvise splits one). EFAULT: the source's file was cut. */
    if (done < 0 && done != -EEXIST && high - page > size) {
        low = page;
        done = fill(r, e, page, size);
        bytes += done > 0 ? (uint64_t)done : 0;
    }
    *last = done;
    *from = low;
    return bytes;
}

enum outcome place(struct region *r, uint64_t page)
{
    const uint64_t size = r->is.page;
    enum outcome how;
    if (r->is.shared && mapped_from_file(r, page, &how))
        return how;
    const struct extent *e = find(r, page);
    if (e == NULL)
        return ASKED;
    uint64_t low = page, high = page + size, from, follows = 0;
    struct stream *stream = r->is.readahead > size ? choose(r, page, &low, &high, &follows) : NULL;
    low = low > e->start ? low : e->start;
    high = high < e->end ? high : e->start + (e->end - e->start) / size * size;
    if (e->kind == RESIDENT && !resident(e, low, high - low)) {
        low = page, high = page + size;
        if (!resident(e, page, size))
            return ASKED;
    }
    int64_t last;
    uint64_t bytes = fill_around(r, e, page, low, high, &last, &from);
    if (stream != NULL)
        SET(stream->expected, last > 0 ? from + (uint64_t)last : high);
    how = last > 0 ? PLACED : last == -EEXIST ? PRESENT : ASKED;
    if (bytes == 0) {
        if (how == PRESENT)
            count(r, EEXISTS, 1);
        return how;
    }
    count(r, PAGES_FAULT, 1);
    if (follows)
        count(r, SEQUENTIAL, 1);
    count(r, PAGES_READAHEAD, bytes / size - 1);
    if (e->kind == ZEROS)
        count(r, PAGES_ZERO, bytes / size);
    else
        count(r, BYTES_FETCHED, bytes);
    return how;
}
