/* Ends a process whose event loop waits for itself.
 *
 * If the loop that serves a region runs in the process that touches it, a thread that touches a missing page with the
 * GIL held stops that loop: for ever, and no Python code can say why. The same is true of a fault in the loop's own
 * thread, and of a write to a protected page. The watchdog looks a few times a second whether a message lies unread in
 * the userfaultfd while the loop makes no progress. It takes no message from the loop before the limit: a loop that is
 * only late loses nothing.
 */

#include "uffd.h"
#include "watchdog.h"
#include <unistd.h>

enum { LONGEST_PERIOD_MS = 250 };

static int unread(const struct watch *watch)
{
    struct pollfd one = {watch->uffd.fd, POLLIN, 0};
    return poll(&one, 1, 0) == 1 && one.revents & POLLIN;
}

static int progressed(struct watch *watch)
{
    int changed = 0;
    for (int i = 0; i < 2; i++) {
        uint64_t value = __atomic_load_n(watch->progress[i], __ATOMIC_RELAXED); /* another thread writes it */
        changed |= value != watch->known[i];
        watch->known[i] = value;
    }
    return changed;
}

static void add_where(struct text *text, const struct watch *watch, const char *state)
{
    add(text, " for ");
    add_seconds(text, watch->waited / 1000000);
    add(text, ", and the event loop that serves the region at ");
    add_number(text, watch->start, 16);
    add(text, " (thread ");
    add_number(text, (uint64_t)watch->loop, 10);
    add(text, ") ");
    add(text, state);
}

static const char *const advice = " The page was touched in that loop's own thread, or by a thread that holds the GIL."
                                  " Leave out engine=InProcess() (a pager process serves any touch), or"
                                  " `await monitor.prefetch(...)` first.";

static void warn(const struct watch *watch)
{
    struct text text = {.length = 0};
    add(&text, "aiouffd: a thread has been waiting for a page");
    add_where(&text, watch, "does not run.");
    add(&text, advice);
    if (watch->limit_ms != 0) {
        add(&text, " The process is ended in ");
        add_seconds(&text, watch->limit_ms - watch->waited / 1000000);
        add(&text, ".");
    }
    add(&text, "\n");
    say(&text);
}

/* The process ends, so its message may be taken: it tells the thread and the page. If there is none any more, the loop
 * has read it just now. */
static void end(const struct watch *watch)
{
    struct message message;
    if (read(watch->uffd.fd, &message, sizeof message) != sizeof message)
        return;
    struct text text = {.length = 0};
    if (message.event == EVENT_PAGEFAULT) {
        add(&text, "aiouffd: thread ");
        add_number(&text, message.thread, 10);
        add(&text, " has been waiting for the page at ");
        add_number(&text, message.address, 16);
        add(&text, message.flags & FAULT_WP ? ", to which it wants to write," : "");
    } else
        add(&text, "aiouffd: a thread that changes the layout of memory has been waiting");
    add_where(&text, watch, "has not run since.");
    add(&text, advice);
    add(&text, " The process is aborted.\n");
    end_process(&text, watch->loop);
}

static int look(struct watch *watch)
{
    if (!is_intact(&watch->uffd))
        return -1;
    if (progressed(watch) || !unread(watch)) {
        watch->waited = 0;
        watch->warned = 0;
        watch->seen = now_ns();
        return watch->period_ms;
    }
    add_waited(watch, 2 * (uint64_t)watch->period_ms);
    uint64_t waited_ms = watch->waited / 1000000;
    if (!watch->warned && watch->warning_ms != 0 && waited_ms >= watch->warning_ms) {
        watch->warned = 1;
        warn(watch);
    }
    if (watch->limit_ms != 0 && waited_ms >= watch->limit_ms)
        end(watch);
    return watch->period_ms;
}

/* Watch over the loop that serves [start, end) by `uffd`, in `thread`; both words at `progress` change while it runs.
 * Returns a number for `aiouffd_unwatch`, or a negated errno. */
EXPORT int aiouffd_watch_loop(int uffd, uint64_t start, int thread, const uint64_t *first,
                              const uint64_t *second, uint32_t warning_ms, uint32_t limit_ms)
{
    uint32_t patience = warning_ms != 0 && (limit_ms == 0 || warning_ms < limit_ms) ? warning_ms : limit_ms;
    struct watch filled = {
        .look = look,
        .ends = {{.fd = -1}, {.fd = -1}},
        .warning_ms = warning_ms,
        .limit_ms = limit_ms,
        .period_ms = patience < 4 * LONGEST_PERIOD_MS ? (int)(patience / 4) + 1 : LONGEST_PERIOD_MS,
        .seen = now_ns(),
        .progress = {first, second},
        .loop = thread,
        .start = start,
    };
    pthread_mutex_lock(&watches_lock);
    int number = add_watch(&filled, uffd);
    pthread_mutex_unlock(&watches_lock);
    return number;
}
