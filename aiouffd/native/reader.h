/* Reads the messages of many userfaultfds, and resolves the faults that take one COPY of bytes that are in memory, and
 * first writes to pages of a snapshot. */

#ifndef AIOUFFD_READER_H
#define AIOUFFD_READER_H

#include "common.h"

enum {
    WATCHED = 32, /* positions of streams that Python watches */
    RECENT = 16,  /* faults in no stream, of which one may be the first of a stream */
    READY = 32,   /* descriptors of one epoll_wait */
    LOGGED = 1024, /* pages of memory with a limit that come in one run */
};

/* What a descriptor shows: where the bytes of its mapping are. */
enum shown { NOTHING, MEMORY, FILE_PAGES, MAPPED, ONE_COPY };

/* What `aiouffd.engine.one_copy` has noted of a page that is in the file which all map. */
enum { IN_FILE = 1 };

/* Knows where a fault may belong to a stream. With readahead, only faults that belong to none are plain. */
struct strangers {
    uint64_t near;            /* bytes: a fault so close to a recent one may belong to it */
    uint64_t last, step;      /* addresses: the last fault, and its distance from the one before */
    uint64_t recent[RECENT];  /* addresses of faults */
    uint32_t turn, watched;
    uint64_t low[WATCHED], high[WATCHED]; /* addresses where a known stream is expected */
};

/* What only some descriptors need. */
struct more {
    struct strangers strangers; /* with readahead: `near` is not 0 */
    uint64_t mapped;            /* FILE_PAGES: where in a mapping of the file lies what is shown at `start`; MAPPED and
                                 * ONE_COPY: what offset of the source that is */
    int64_t mtime_ns;           /* FILE_PAGES: when the file was written last; later writes are the engine's to report */
    uint64_t *room;             /* how many pages may come; NULL: there is no limit, and nobody asks which have come */
    uint8_t *used;              /* MAPPED: a byte for each 64 KiB of the source, 1 where any was copied; NULL: unwanted */
};

/* One descriptor: one cache line, since a thousand descriptors take turns. */
struct line {
    int64_t identity; /* below 0: nobody's */
    uint64_t start, end;
    uint64_t source; /* MEMORY, MAPPED: the address of what is shown at `start`; FILE_PAGES: its offset in the file;
                      * ONE_COPY: the address of the note of the page at `start` */
    uint32_t page, mode;
    int32_t shown, file;
    struct more *more; /* NULL: memory without readahead */
    uint64_t *words;   /* where to count: 64-bit words that other processes may map */
};
_Static_assert(sizeof(struct line) == 64, "a line of cache");

/* What is counted: the place of each word. */
struct words {
    uint64_t faults, pages_fault, bytes_fetched, copies, eexist, wakes, latency, write_faults, continues, readahead;
};

/* Of a page, as `aiouffd.engine.kept` has them. */
enum page_state { PAGE_LOOSE, PAGE_PROTECTED, PAGE_DUE, PAGE_KEPT, PAGE_EMPTIED, PAGE_ABSENT };

/* What becomes of a first write to a protected page. */
enum keeps { ALL_ASKED, NONE_DUE, DUE_KEPT };

/* The pages of memory of which snapshots are taken. Its owner, Python, reads and changes all of it between two runs. */
struct keeper {
    uint64_t start, count; /* of addresses; how many pages lie there */
    uint64_t first;        /* the number of the first of them */
    uint64_t at;           /* where in `memory` page 0 is */
    uint8_t *states;       /* of each page: enum page_state */
    uint32_t *slots;       /* of each page that is kept: which slot has its bytes */
    uint32_t *free;        /* the slots that are free */
    uint8_t *area;         /* the slots, a page each */
    uint64_t *words;       /* where to count */
    uint64_t left, kept;   /* how many slots are free; how many pages were kept */
    uint32_t page;         /* bytes */
    int32_t memory, keeps; /* what the pages are read from; enum keeps */
};

struct reader {
    int32_t epoll, only; /* only: the one descriptor that there is, or -1: epoll is asked */
    int32_t flags;       /* of preadv2; 0: readv */
    uint32_t limit;      /* bytes of one read: of the landing, or of a turn */
    uint64_t spin_ns;
    uint8_t *landing;  /* where messages are read to */
    int64_t *identity; /* where their reader is noted, before they are read */
    struct words words;
    uint64_t *log; /* of memory with a limit: how many pages have come, and of each the descriptor and the address */
};

#endif
