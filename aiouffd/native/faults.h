/* The table of regions that are served in the faulting thread: what table.c keeps and faults.c looks at. */

#ifndef AIOUFFD_FAULTS_H
#define AIOUFFD_FAULTS_H

#include "native.h"
#include <sys/ioctl.h>

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

/* table.c */
extern struct region regions[REGIONS];
extern _Atomic uint32_t used; /* records behind it were never in use */
extern struct bucket buckets[BUCKETS];
extern _Atomic uint32_t waiting; /* the sum of their waiters */
extern _Atomic uint32_t epoch;   /* moves on when a record is freed */
extern _Atomic int32_t pagemap;  /* /proc/self/pagemap; -1: not open */

/* faults.c */
void on_sigbus(int number, siginfo_t *info, void *context);
uint64_t neighbourhood(const struct region *r); /* bytes that a fault of no stream brings, at first */

#define GET(field) atomic_load_explicit(&(field), memory_order_relaxed)
#define SET(field, value) atomic_store_explicit(&(field), (value), memory_order_relaxed)

#endif
