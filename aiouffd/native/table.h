/* The table of regions that are served in the faulting thread, and the threads that wait for the event loop.
 *
 * Python writes it through table.c; handlers of SIGBUS read it. A record is LIVE, CHANGING or FREE. A handler counts
 * itself in (`inside`), looks at the state again, and counts itself out before it waits for anything. A writer first
 * marks the record CHANGING and then waits until nobody is inside: each handler has either seen the mark or is waited
 * for (both sides are sequentially consistent). Records are static memory, so that a handler that comes late reads no
 * freed memory; what it finds there it checks under its own count.
 */

#ifndef AIOUFFD_TABLE_H
#define AIOUFFD_TABLE_H

#include "common.h"
#include <pthread.h>

enum {
    REGIONS = 256,
    BUCKETS = 1024, /* a power of two */
    STREAMS = 8,
    LATENCIES = 48,
    REFUSED = 64,
};
#define LARGEST (UINT64_C(2) << 20) /* the most that one fault brings: 0.4 ms */

enum state { FREE, LIVE, CHANGING };
enum kind { ASK, COPY, ZEROS, RESIDENT }; /* RESIDENT: as COPY, for those pages of a file that are in memory */
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
    SEQUENTIAL,
    LATENCY,
    COUNTERS = LATENCY + LATENCIES
};

struct extent {
    uint64_t start, end; /* addresses, sorted and disjoint; the loop is asked for what is in no extent */
    uint64_t source;     /* where the bytes shown at `start` are in memory */
    uint64_t offset;     /* where they are in the file behind that memory */
    int32_t kind, fd;
    int64_t mtime_ns; /* of the file when it was opened */
};

struct stream { /* one sequence of touches */
    _Atomic uint64_t expected, window;
};

struct options {
    int32_t uffd, pipe, shared; /* shared: registered with MINOR, so that the file may have the page already */
    int32_t asks_to_write;      /* the loop lifts the protection of a page that is written to */
    uint32_t mode;              /* of COPY and CONTINUE: 2 for write-protected pages */
    uint64_t page, readahead;
    uint32_t warning_ms, limit_ms; /* 0: none */
};

struct region {
    _Atomic uint32_t state;  /* a futex, for those who met CHANGING */
    _Atomic uint32_t inside; /* a futex, for who changes the record */
    _Atomic uint64_t start, end;
    _Atomic uint32_t warning_ms, limit_ms; /* copies, for waiters, who are not inside */
    struct options is;
    struct extent *extents;
    uint64_t count;
    _Atomic uint32_t heartbeat; /* of the loop */
    _Atomic int32_t loop;       /* its thread */
    struct stream streams[STREAMS];
    _Atomic uint32_t turn, strangers;
    _Atomic uint64_t around;
    _Atomic uint64_t counters[COUNTERS];
    /* Pages that cannot be had, where the kernel has no UFFDIO_POISON (before Linux 6.6). With more, all are refused. */
    _Atomic uint64_t refused[REFUSED];
    _Atomic uint32_t refusals;
};

struct bucket { /* threads that wait for pages with the same hash */
    _Atomic uint32_t generation, waiters;
};

extern struct region regions[REGIONS];
extern _Atomic uint32_t used; /* records from here on were never in use */
extern struct bucket buckets[BUCKETS];
extern _Atomic uint32_t waiting; /* the sum of all waiters */
extern _Atomic uint32_t epoch;   /* counts freed records */
extern _Atomic int32_t pagemap;  /* /proc/self/pagemap; -1: not open */

/* Held while the table's records are taken or freed, and while SIGBUS is taken or given back. */
extern pthread_mutex_t table;

int take_record(const struct options *options); /* with `table` held; a slot, or a negated errno */
void free_record(int slot);                     /* with `table` held */
int has_records(void);                          /* with `table` held; whether any is in use */
void forget_parent(void);                       /* in a forked child, which has neither its regions nor its threads */
void wake_everybody(void);
void leave(struct region *r); /* count a handler out */

uint64_t neighborhood(const struct region *r); /* bytes that a fault in no stream brings, at first */

#define GET(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define SET(field, value) atomic_store_explicit(&(field), (value), memory_order_relaxed)

#endif
