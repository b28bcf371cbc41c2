#include "reader.h"
#include "uffd.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum outcome { IDLE, MESSAGES, DUE, FAILED }; /* of aiouffd_reader_run */
enum { VAIN = 3, MOST_SKIPPED = 64, USED_SHIFT = 16 };

/* A reader and what it must remember between two calls. Python writes the first part. */
struct state {
    struct reader is;
    struct line *lines;
    int32_t count;
    uint64_t last_ns;     /* when the last message came */
    uint32_t vain, skip;  /* looks in vain; faults behind which not to look */
    uint64_t turn;   /* that of the descriptor that was read last: see `take_turn` */
    uint64_t *turns; /* by descriptor: its next one */
    uint8_t *page; /* a page of a file, on its way */
    uint64_t page_length;
    struct keeper **keepers; /* by descriptor */
    int32_t keepable;        /* how many */
};

struct found {
    int32_t fd, length, error;
    uint32_t events;
};

static void bump(uint64_t *word, uint64_t much)
{
    /* One writer: a plain store that other processes see whole. */
    __atomic_store_n(word, *word + much, __ATOMIC_RELAXED);
}

/* --- A fault in no stream --- */

static int close_to(uint64_t page, uint64_t recent, uint64_t near)
{
    return page - recent <= near || recent - page <= near;
}

/* Whether a fault belongs to no stream that is known, and begins none with a recent one. It is noted then. */
static int is_stranger(struct strangers *s, uint64_t page)
{
    if (s->near == 0) /* no readahead */
        return 1;
    for (uint32_t i = 0; i < s->watched; i++)
        if (page - s->low[i] < s->high[i] - s->low[i])
            return 0;
    for (int i = 0; i < RECENT; i++)
        if (close_to(page, s->recent[i], s->near))
            return 0;
    uint64_t step = page - s->last;
    int strides = step == s->step;
    s->last = page;
    s->step = step;
    if (strides)
        return 0;
    s->recent[s->turn++ % RECENT] = page;
    return 1;
}

/* --- Placing a page --- */

static int resident(const struct line *line, uint64_t address)
{
    unsigned char in_memory[(2 << 20) / 4096];
    if (line->page > sizeof in_memory * page_size || mincore((void *)address, line->page, in_memory))
        return 0;
    for (uint64_t i = 0; i * page_size < line->page; i++)
        if (!(in_memory[i] & 1))
            return 0;
    return 1;
}

/* Whether a file is as it was when its source was made. Only local files come here: fstat asks no server. */
static int unchanged(const struct line *line, uint64_t end)
{
    struct stat file;
    return !fstat(line->file, &file) && (uint64_t)file.st_size >= end &&
           file.st_mtim.tv_sec * INT64_C(1000000000) + file.st_mtim.tv_nsec == line->more->mtime_ns;
}

/* Where the bytes of a page are; 0: not in memory. A page of a file is read: to map it would cost a fault more. */
static uint64_t locate(struct state *s, const struct line *line, uint64_t page)
{
    uint64_t at = line->source + page - line->start;
    if (line->shown == MEMORY)
        return at;
    if (line->shown == MAPPED)
        return resident(line, at) ? at : 0;
    if (s->page_length < line->page) {
        free(s->page);
        s->page = aligned_alloc(64, line->page);
        s->page_length = s->page != NULL ? line->page : 0;
    }
    if (s->page == NULL || !unchanged(line, at + line->page))
        return 0;
    struct iovec into = {s->page, line->page};
    ssize_t got = preadv2(line->file, &into, 1, (off_t)at, RWF_NOWAIT);
    if (got == (ssize_t)line->page)
        return (uint64_t)s->page;
    /* A file system that does not know RWF_NOWAIT, as tmpfs: mincore tells. */
    uint64_t mapped = line->more->mapped + page - line->start;
    return got < 0 && errno == EOPNOTSUPP && resident(line, mapped) ? mapped : 0;
}

/* Take note that a page of memory with a limit, or of which somebody asks what has come, has come. */
static void note(struct state *s, const struct line *line, int fd, uint64_t page)
{
    uint64_t *log = s->is.log;
    --*line->more->room;
    log[1 + 2 * *log] = (uint64_t)fd;
    log[2 + 2 * (*log)++] = page;
}

/* Wake the threads of a page that is there. EEXIST wakes nobody. */
static int wake(const struct words *at, uint64_t *words, const struct line *line, int fd, uint64_t page)
{
    struct wake_argument wake = {page, line->page};
    bump(words + at->eexist, 1);
    bump(words + at->wakes, 1);
    return ioctl(fd, IOC_WAKE, &wake) == 0;
}

/* CONTINUE; returns the bytes that are mapped now, or a negated errno. */
static int64_t map(const struct line *line, int fd, uint64_t start, uint64_t end)
{
    struct range_argument minor = {start, end - start, line->mode, 0};
    if (ioctl(fd, IOC_CONTINUE, &minor) == 0)
        return (int64_t)minor.len;
    return errno == EAGAIN && minor.done > 0 ? minor.done : -errno;
}

/* Map a page from the file that all map, if it is there; 1: its threads are awake, 0: the engine must decide.
 *
 * With readahead, its neighbours are mapped as well, as far as they are there: that takes no memory. They are those of
 * `OneCopy.around`. */
static int map_from_file(struct state *s, const struct line *line, int fd, uint64_t page)
{
    const struct words *at = &s->is.words;
    const uint8_t *notes = (const uint8_t *)line->source;
    uint64_t *words = line->words, size = line->page, first = page, end = page + size;
    int is_logged = line->more != NULL && line->more->room != NULL;
    if (notes[(page - line->start) / size] != IN_FILE || (is_logged && *s->is.log == LOGGED))
        return 0;
    if (line->more != NULL && !is_logged && line->more->strangers.near > size) {
        uint64_t in_block = (line->more->mapped + page - line->start) % line->more->strangers.near;
        uint64_t low = page - line->start > in_block ? page - in_block : line->start;
        uint64_t high = page - in_block + line->more->strangers.near;
        while (first > low && notes[(first - line->start) / size - 1] == IN_FILE)
            first -= size;
        while (end < high && end < line->end && notes[(end - line->start) / size] == IN_FILE)
            end += size;
    }
    /* Counted first, as in `place`. */
    bump(words + at->pages_fault, 1);
    bump(words + at->continues, 1);
    int64_t done = map(line, fd, first, end), before = 0;
    if (first < page && done <= (int64_t)(page - first)) { /* one in front is mapped already, or in another mapping */
        before = done > 0 ? done : 0;
        done = map(line, fd, page, end);
    }
    if (done == -ENOENT && end - page > size) /* one behind is in another mapping */
        done = map(line, fd, page, page + size);
    if (done > 0) {
        bump(words + at->readahead, (uint64_t)(before + done) / size - 1);
        if (is_logged)
            note(s, line, fd, page);
        return 1;
    }
    bump(words + at->readahead, (uint64_t)before / size);
    bump(words + at->pages_fault, (uint64_t)-1);
    bump(words + at->continues, (uint64_t)-1);
    return done == -EEXIST && wake(at, words, line, fd, page);
}

/* COPY a page; 1: it is there and its threads are awake, 0: the engine must decide. */
static int place(struct state *s, const struct line *line, int fd, uint64_t page)
{
    if (line->shown == ONE_COPY)
        return map_from_file(s, line, fd, page);
    const struct words *at = &s->is.words;
    uint64_t *words = line->words, *room = line->more != NULL ? line->more->room : NULL;
    if (room != NULL && (*room == 0 || *s->is.log == LOGGED))
        return 0;
    struct copy_argument copy = {page, locate(s, line, page), line->page, line->mode, 0};
    if (copy.src == 0)
        return 0;
    /* Counted first: whoever gets the page may kill this process, and a worker that resolved a fault is no failure. */
    bump(words + at->pages_fault, 1);
    if (ioctl(fd, IOC_COPY, &copy) == 0) {
        bump(words + at->copies, 1);
        bump(words + at->bytes_fetched, line->page);
        if (line->more != NULL && line->more->used != NULL)
            line->more->used[(line->more->mapped + page - line->start) >> USED_SHIFT] = 1;
        if (room != NULL)
            note(s, line, fd, page);
        return 1;
    }
    bump(words + at->pages_fault, (uint64_t)-1);
    return errno == EEXIST && wake(at, words, line, fd, page);
}

/* --- Keeping a page --- */

/* Let a first write to a protected page go on, once the bytes of the page are kept if a snapshot is to have them; 1: it
 * goes on, 0: the engine must decide.
 *
 * Nothing is changed where the kernel does not lift the protection: the layout is changing then, and what was read may
 * have been moved there just now. */
static int keep(struct keeper *k, const struct words *at, int fd, uint64_t page)
{
    uint64_t index = (page - k->start) / k->page; /* of an address below them: very large */
    if (index >= k->count || k->keeps == ALL_ASKED)
        return 0;
    index += k->first;
    uint32_t slot = 0;
    uint8_t before = k->states[index];
    if (before == PAGE_DUE) {
        if (k->keeps != DUE_KEPT || k->left == 0)
            return 0;
        slot = k->free[k->left - 1];
        if (pread(k->memory, k->area + (uint64_t)slot * k->page, k->page, (off_t)(k->at + index * k->page)) !=
            (ssize_t)k->page)
            return 0;
    } else if (before != PAGE_PROTECTED) {
        return 0;
    }
    struct writeprotect_argument lift = {page, k->page, 0};
    /* Counted first, as in `place`. */
    bump(k->words + at->write_faults, 1);
    if (ioctl(fd, IOC_WRITEPROTECT, &lift)) {
        bump(k->words + at->write_faults, (uint64_t)-1);
        return 0;
    }
    if (before == PAGE_DUE) {
        k->left--;
        k->kept++;
        k->slots[index] = slot;
        if (k->left != 0) /* the next slot is memory then, while the writer wakes up: it may take 2 us and more */
            k->area[(uint64_t)k->free[k->left - 1] * k->page] = 0;
    }
    k->states[index] = before == PAGE_DUE ? PAGE_KEPT : PAGE_LOOSE;
    return 1;
}

/* --- The messages of one read --- */

static int all_faults(const struct message *messages, int count)
{
    for (int i = 0; i < count; i++)
        if (messages[i].event != EVENT_PAGEFAULT)
            return 0;
    return 1;
}

/* Whether an earlier message of the batch was about the same page: its COPY has woken this thread as well. */
static int seen(const uint64_t *pages, int count, uint64_t page)
{
    for (int i = 0; i < count; i++)
        if (pages[i] == page)
            return 1;
    return 0;
}

/* Serve what is plain, and move the other messages to the front. Returns the bytes of these.
 *
 * With one layout event in the batch nothing is plain: the kernel hands out faults before older events, and a COPY
 * for such a fault would bring removed bytes back. */
static int32_t serve(struct state *s, const struct line *line, int fd, int32_t length)
{
    struct message *messages = (struct message *)s->is.landing;
    struct keeper *keeper = fd < s->keepable ? s->keepers[fd] : NULL;
    int count = length / (int)sizeof *messages, left = 0, served = 0, placed = 0, plain = line->shown != NOTHING;
    uint64_t pages[64], began = now_ns(), mask = -(uint64_t)(plain ? line->page : keeper != NULL ? keeper->page : 1);
    if ((!plain && keeper == NULL) || count > 64 || !all_faults(messages, count))
        return length;
    for (int i = 0; i < count; i++) {
        uint64_t page = messages[i].address & mask, flags = messages[i].flags & ~(uint64_t)FAULT_WRITE;
        if (line->shown == ONE_COPY) /* of a page that another has put in the file */
            flags &= ~(uint64_t)FAULT_MINOR;
        if (seen(pages, served, page))
            continue;
        if (flags == FAULT_WP && keeper != NULL && keep(keeper, &s->is.words, fd, page)) {
            pages[served++] = page;
        } else if (flags == 0 && plain && page >= line->start && page + line->page <= line->end &&
                   (line->more == NULL || is_stranger(&line->more->strangers, page)) && place(s, line, fd, page)) {
            pages[served++] = page;
            placed++;
        } else {
            messages[left++] = messages[i];
        }
    }
    bump((plain ? line->words : keeper->words) + s->is.words.faults, (uint64_t)(count - left));
    if (placed) {
        uint64_t spent = now_ns() - began;
        bump(line->words + s->is.words.latency + (64 - (spent ? __builtin_clzll(spent) : 64)), (uint64_t)placed);
    }
    return left * (int32_t)sizeof *messages;
}

/* --- Looking for messages --- */

static uint64_t turn_of(const struct state *s, int fd)
{
    return fd < s->count ? s->turns[fd] : 0;
}

/* Take out of some descriptors that which has its turn now: it has got fewer messages than the others. While it had
 * none, it has saved nothing up. */
static struct epoll_event take_turn(struct state *s, struct epoll_event *ready, int count)
{
    struct epoll_event *first = ready;
    for (struct epoll_event *each = ready + 1; each < ready + count; each++)
        if (turn_of(s, each->data.fd) < turn_of(s, first->data.fd))
            first = each;
    struct epoll_event taken = *first;
    *first = ready[count - 1];
    if (turn_of(s, taken.data.fd) > s->turn)
        s->turn = turn_of(s, taken.data.fd);
    return taken;
}

/* Read once from `only`, or else (-1) from the descriptor whose turn it is. 1: something came, 0: nothing; -1: `found` is
 * for the engine. */
static int look(struct state *s, int only, struct found *found)
{
    struct epoll_event ready[READY] = {{.data.fd = only}};
    int count = only >= 0 ? 1 : epoll_wait(s->is.epoll, ready, READY, 0);
    for (; count > 0; count--) {
        struct epoll_event taken = take_turn(s, ready, count);
        uint32_t events = taken.events;
        int fd = taken.data.fd;
        if (fd >= s->count || s->lines[fd].identity < 0)
            continue; /* dropped just now */
        struct iovec into = {s->is.landing, s->is.limit};
        *s->is.identity = s->lines[fd].identity;
        ssize_t length = s->is.flags ? preadv2(fd, &into, 1, -1, s->is.flags) : readv(fd, &into, 1);
        int error = length < 0 ? errno : 0;
        if (length > 0)
            s->turns[fd] = s->turn + (uint64_t)length / sizeof(struct message);
        int32_t left = length > 0 ? serve(s, &s->lines[fd], fd, (int32_t)length) : 0;
        if (left || (error && error != EAGAIN) || events & EPOLLERR) {
            *found = (struct found){fd, left, error == EAGAIN ? 0 : error, events};
            return -1;
        }
        if (length > 0)
            return 1;
    }
    return 0;
}

/* For how long to look again after a message: only while messages keep coming. */
static uint64_t patience(struct state *s, uint64_t now)
{
    uint64_t gap = now - s->last_ns;
    s->last_ns = now;
    if (gap > 2 * s->is.spin_ns) /* a look after the last one would have been in vain */
        return 0;
    if (s->skip) {
        s->skip--;
        return 0;
    }
    return s->is.spin_ns;
}

/* --- What Python calls --- */

EXPORT struct state *aiouffd_reader_new(const struct reader *is)
{
    struct state *s = calloc(1, sizeof *s);
    if (s != NULL)
        s->is = *is;
    return s;
}

EXPORT void aiouffd_reader_set(struct state *s, const struct reader *is)
{
    s->is = *is;
}

EXPORT void aiouffd_reader_free(struct state *s)
{
    for (int i = 0; i < s->count; i++)
        free(s->lines[i].more);
    free(s->lines);
    free(s->turns);
    free(s->keepers);
    free(s->page);
    free(s);
}

/* Describe a descriptor; `more` may be NULL, and is copied. 0, or -ENOMEM. */
EXPORT int aiouffd_reader_line(struct state *s, int fd, const struct line *line, const struct more *more)
{
    if (fd >= s->count) {
        int count = fd + 64;
        struct line *lines = aligned_alloc(64, (size_t)count * sizeof *lines);
        if (lines == NULL)
            return -ENOMEM;
        if (s->count)
            memcpy(lines, s->lines, (size_t)s->count * sizeof *lines);
        memset(lines + s->count, 0, (size_t)(count - s->count) * sizeof *lines);
        uint64_t *turns = realloc(s->turns, (size_t)count * sizeof *turns);
        if (turns == NULL) {
            free(lines);
            return -ENOMEM;
        }
        for (int i = s->count; i < count; i++) {
            lines[i].identity = -1;
            turns[i] = 0;
        }
        free(s->lines);
        s->lines = lines;
        s->turns = turns;
        s->count = count;
    }
    struct more *kept = s->lines[fd].more;
    if (more == NULL) {
        free(kept);
        kept = NULL;
    } else {
        if (kept == NULL)
            kept = malloc(sizeof *kept);
        if (kept == NULL)
            return -ENOMEM;
        *kept = *more;
    }
    s->lines[fd] = *line;
    s->lines[fd].more = kept;
    return 0;
}

/* Keep pages of a descriptor; NULL: none any more. The keeper stays the caller's. 0, or -ENOMEM. */
EXPORT int aiouffd_reader_keep(struct state *s, int fd, struct keeper *keeper)
{
    if (fd >= s->keepable) {
        if (keeper == NULL)
            return 0;
        struct keeper **keepers = realloc(s->keepers, (size_t)(fd + 64) * sizeof *keepers);
        if (keepers == NULL)
            return -ENOMEM;
        memset(keepers + s->keepable, 0, (size_t)(fd + 64 - s->keepable) * sizeof *keepers);
        s->keepers = keepers;
        s->keepable = fd + 64;
    }
    s->keepers[fd] = keeper;
    return 0;
}

/* Say where the streams of a descriptor are expected: pairs of addresses. */
EXPORT void aiouffd_reader_watch(struct state *s, int fd, const uint64_t *pairs, uint32_t count)
{
    if (s->lines[fd].more == NULL)
        return;
    struct strangers *strangers = &s->lines[fd].more->strangers;
    strangers->watched = count < WATCHED ? count : WATCHED;
    for (uint32_t i = 0; i < strangers->watched; i++) {
        strangers->low[i] = pairs[2 * i];
        strangers->high[i] = pairs[2 * i + 1];
    }
}

/* By descriptor that was described: a number that is another one whenever messages of it have been read. */
EXPORT const uint64_t *aiouffd_reader_turns(const struct state *s)
{
    return s->turns;
}

/* Read and serve until something is not plain, nothing has come for a while, or the loop is due for a turn.
 *
 * came: the engine has served something just now, so look again for a while. once: look once. fd: read nothing else; -1:
 * all. */
EXPORT int aiouffd_reader_run(struct state *s, uint64_t turn_ns, int came, int once, int fd, struct found *found)
{
    int only = fd >= 0 ? fd : s->is.only;
    uint64_t now = now_ns(), due = now + turn_ns, until = came ? now + patience(s, now) : now;
    int looking = came;
    for (;;) {
        int result = look(s, only, found);
        if (result < 0)
            return found->error ? FAILED : MESSAGES;
        now = now_ns();
        if (result > 0) {
            if (looking)
                s->vain = 0;
            until = now + patience(s, now);
            looking = 1;
        } else if (once) {
            return IDLE;
        } else if (now >= until) {
            if (looking && until > s->last_ns) {
                s->vain++;
                s->skip = s->vain < VAIN ? 0 : s->vain < 6 ? 1u << s->vain : MOST_SKIPPED;
            }
            return IDLE;
        }
        if (now >= due)
            return DUE;
    }
}
