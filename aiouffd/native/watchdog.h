/* A thread that looks after others, and ends the process when nobody will ever bring a page that is waited for.
 *
 * It is a native thread, so that it needs neither the GIL nor malloc. What a watch looks at is in watch_servers.c and
 * watch_loop.c.
 */

#ifndef AIOUFFD_WATCHDOG_H
#define AIOUFFD_WATCHDOG_H

#include "common.h"
#include <poll.h>
#include <pthread.h>
#include <sys/stat.h>

enum { ENDS = 2 };

/* A descriptor of this thread's own. A program may close all that it has, as daemons do; the number is another file's
 * then, which must be neither read nor closed. Each pidfd has its own inode since Linux 6.9, each userfaultfd since
 * 5.12 (before, all files of such a kind look the same). */
struct owned {
    int fd; /* -1: none */
    dev_t device;
    ino_t inode;
};

int own(struct owned *owned, int fd); /* duplicates it, -1: none. Returns 0, or an errno. */
int is_intact(const struct owned *owned);
void disown(struct owned *owned); /* closes it */

struct watch {
    int used;
    /* Look, with `watches_lock` held. Returns the milliseconds until the next look, -1: when something has changed. */
    int (*look)(struct watch *watch);
    struct owned uffd; /* a duplicate: the region may be given up, and its descriptor closed, before the watch is */
    uint32_t warning_ms, limit_ms;
    uint64_t seen;   /* when it was looked at last */
    uint64_t waited; /* ns that this thread has seen pass without progress */
    /* watch_servers.c */
    struct owned ends[ENDS]; /* readable, or hung up, when a process that serves has ended */
    int alone;               /* all of them have ended */
    /* watch_loop.c */
    const uint64_t *progress[2]; /* words that change while the loop runs */
    uint64_t known[2];           /* their values at the last look */
    uint64_t start;              /* of the region */
    int loop, warned, period_ms; /* the loop's thread; whether the warning was written */
};

extern pthread_mutex_t watches_lock;

/* Take a free record, a copy of `filled`, with a duplicate of the region's descriptor. Starts the thread if needed.
 * Returns its number, or a negated errno. With `watches_lock` held. */
int add_watch(const struct watch *filled, int uffd);
struct watch *get_watch(int number); /* NULL, if it is not used. With `watches_lock` held. */
void look_again(void);               /* something has changed. With `watches_lock` held. */

/* Add the time since the last look to `waited`, `most_ms` of it at most: a process that was stopped (SIGSTOP, a debugger,
 * a frozen cgroup) could make no progress meanwhile. */
void add_waited(struct watch *watch, uint64_t most_ms);

/* Say it, and end the process by SIGABRT in a thread: faulthandler, where it is enabled, writes its traceback, or that of
 * each thread. 0: it is not known which. */
__attribute__((noreturn)) void end_process(const struct text *text, int thread);

#endif
