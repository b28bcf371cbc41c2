/* Ends a process that waits for pages of which nobody is left to bring any.
 *
 * When all processes that serve a region are killed at once, the application starts others. It needs the GIL for that:
 * if the very thread that holds the GIL waits for a page, nothing in Python runs any more. So the watchdog sleeps until
 * the last of those processes has ended, gives the application some time, says what has happened, and ends it.
 */

#include "uffd.h"
#include "watchdog.h"
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static int ended(int fd)
{
    struct pollfd one = {fd, POLLIN, 0};
    return poll(&one, 1, 0) == 1;
}

/* Whether a thread waits; its message. */
static int somebody_waits(const struct watch *watch, struct message *message)
{
    /* A thread whose fault was read by a process that has died is asleep, with nothing to be read. Woken, it faults
     * again. WAKE looks at no mapping, so that its range may be the whole address space. It ends at 2^39 to 2^56 bytes,
     * by machine and kernel: EINVAL beyond that. */
    int refused = -1;
    for (int bits = 56; bits >= 39 && refused; bits--) {
        struct wake_argument all = {1u << 16, (UINT64_C(1) << bits) - (1u << 17)};
        refused = ioctl(watch->uffd.fd, IOC_WAKE, &all);
    }
    struct pollfd one = {watch->uffd.fd, POLLIN, 0};
    return poll(&one, 1, 200) == 1 && is_intact(&watch->uffd) &&
           read(watch->uffd.fd, message, sizeof *message) == sizeof *message;
}

static void end(const struct message *message)
{
    struct text text = {0, {0}};
    add(&text, "aiouffd: the processes that served a region have all been killed, and no others could be started:"
               " Python does not run. ");
    if (message->event == EVENT_PAGEFAULT) {
        add(&text, "Thread ");
        add_number(&text, message->thread, 10);
        add(&text, " waits for the page at ");
        add_number(&text, message->address, 16);
    } else
        add(&text, "A thread that changes the layout of the region waits for them");
    add(&text, ", with the GIL held. Nobody would ever bring the page, so the process is aborted.\n");
    end_process(&text, message->event == EVENT_PAGEFAULT ? (int)message->thread : 0);
}

static int look(struct watch *watch)
{
    int known = is_intact(&watch->uffd), used = 0, alive = 0;
    for (int i = 0; i < ENDS; i++) {
        if (watch->ends[i].fd < 0)
            continue;
        used = 1;
        known &= is_intact(&watch->ends[i]);
        alive |= !ended(watch->ends[i].fd);
    }
    if (!known || !used) { /* it is not known either whether they have ended */
        watch->alone = 0;
        return -1;
    }
    if (alive) {
        watch->alone = 0;
        return (int)(watch->limit_ms / 4) + 1;
    }
    if (!watch->alone) {
        watch->alone = 1;
        watch->seen = now_ns();
        watch->waited = 0;
    }
    add_waited(watch, watch->limit_ms / 2);
    if (watch->waited < watch->limit_ms * UINT64_C(1000000))
        return (int)(watch->limit_ms / 4) + 1;
    struct message message;
    if (somebody_waits(watch, &message))
        end(&message);
    return 1000; /* nobody waits: Python may be busy, and start others later */
}

/* Duplicate both descriptors, or none: a process that is not known could go on serving. Returns 0, or an errno. */
static int replace(struct watch *watch, int first, int second)
{
    int fresh[ENDS] = {first, second}, failed = 0;
    for (int i = 0; i < ENDS; i++) {
        disown(&watch->ends[i]);
        if (!failed)
            failed = own(&watch->ends[i], fresh[i]);
    }
    for (int i = 0; failed && i < ENDS; i++)
        disown(&watch->ends[i]);
    watch->alone = 0;
    return failed;
}

/* Watch over `uffd` while neither `first` nor `second` is readable. All are duplicated. Returns a number for the other
 * calls, or a negated errno. */
EXPORT int aiouffd_watch(int uffd, int first, int second, uint32_t limit_ms)
{
    struct watch filled = {.look = look, .ends = {{.fd = -1}, {.fd = -1}}, .limit_ms = limit_ms};
    pthread_mutex_lock(&watches_lock);
    int failed = replace(&filled, first, second), number = failed ? -failed : add_watch(&filled, uffd);
    if (number < 0)
        replace(&filled, -1, -1);
    pthread_mutex_unlock(&watches_lock);
    return number;
}

/* Others serve now. -1 for both: they are not known, and nothing is watched until they are. Returns 0, or a negated
 * errno: then nothing is watched either. */
EXPORT int aiouffd_watch_ends(int number, int first, int second)
{
    int failed = 0;
    pthread_mutex_lock(&watches_lock);
    struct watch *watch = get_watch(number);
    if (watch != NULL) {
        failed = replace(watch, first, second);
        look_again();
    }
    pthread_mutex_unlock(&watches_lock);
    return -failed;
}

/* Python runs: its time begins anew. */
EXPORT void aiouffd_watch_alive(int number)
{
    pthread_mutex_lock(&watches_lock);
    struct watch *watch = get_watch(number);
    if (watch != NULL)
        watch->alone = 0;
    pthread_mutex_unlock(&watches_lock);
}
