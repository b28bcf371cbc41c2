#include "watchdog.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { WATCHES = 256 };

pthread_mutex_t watches_lock = PTHREAD_MUTEX_INITIALIZER;
static struct watch watches[WATCHES];
static int bell = -1; /* an eventfd: something has changed */
static int running;   /* the thread */

static void *run(void *argument)
{
    (void)argument;
    static struct pollfd set[WATCHES * ENDS + 1];
    for (;;) {
        nfds_t count = 1;
        int timeout = -1;
        pthread_mutex_lock(&watches_lock);
        set[0] = (struct pollfd){bell, POLLIN, 0};
        for (struct watch *watch = watches; watch < watches + WATCHES; watch++) {
            int pause = watch->used ? watch->look(watch, set, &count) : -1;
            if (pause >= 0 && (timeout < 0 || pause < timeout))
                timeout = pause;
        }
        pthread_mutex_unlock(&watches_lock);
        /* Without the lock: if a descriptor is closed meanwhile, the bell has rung for that. */
        poll(set, count, timeout);
        uint64_t rung;
        while (read(bell, &rung, sizeof rung) < 0 && errno == EINTR)
            ;
    }
    return NULL;
}

void look_again(void)
{
    uint64_t one = 1;
    ssize_t written = write(bell, &one, sizeof one);
    (void)written; /* EAGAIN: it rings already */
}

/* A forked child does not have the thread, and what is watched is its parent's. The lock may have been held. The
 * duplicates stay open: they are few, and which of them were complete is not certain. */
static void in_child(void)
{
    pthread_mutex_init(&watches_lock, NULL);
    memset(watches, 0, sizeof watches);
    running = 0;
}

/* Returns 0, or an errno. */
static int start(void)
{
    static int at_fork;
    if (running)
        return 0;
    if (!at_fork && pthread_atfork(NULL, NULL, in_child))
        return ENOMEM;
    at_fork = 1;
    bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (bell < 0)
        return errno;
    sigset_t all, before;
    sigfillset(&all); /* the application's signals are not for this thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int failed = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        close(bell);
        return failed;
    }
    pthread_detach(thread);
    running = 1;
    return 0;
}

int add_watch(const struct watch *filled)
{
    int failed = start();
    if (failed)
        return -failed;
    for (int i = 0; i < WATCHES; i++)
        if (!watches[i].used) {
            int own = fcntl(filled->uffd, F_DUPFD_CLOEXEC, 3);
            if (own < 0)
                return -errno;
            watches[i] = *filled;
            watches[i].uffd = own;
            watches[i].used = 1;
            look_again();
            return i;
        }
    return -ENOSPC;
}

struct watch *get_watch(int number)
{
    return watches[number].used ? &watches[number] : NULL;
}

void add_waited(struct watch *watch, uint64_t most_ms)
{
    uint64_t now = now_ns(), passed = now - watch->seen, most = most_ms * UINT64_C(1000000);
    watch->seen = now;
    watch->waited += passed < most ? passed : most;
}

void end_process(const struct text *text)
{
    sigset_t aborts;

    say(text);
    /* Since glibc 2.41 abort() leaves a blocked SIGABRT blocked: its handler, which prints the tracebacks, would not run. */
    sigemptyset(&aborts);
    sigaddset(&aborts, SIGABRT);
    pthread_sigmask(SIG_UNBLOCK, &aborts, NULL);
    abort();
}

EXPORT void aiouffd_unwatch(int number)
{
    pthread_mutex_lock(&watches_lock);
    struct watch *watch = get_watch(number);
    if (watch != NULL) {
        for (int i = 0; i < ENDS; i++)
            if (watch->ends[i] >= 0)
                close(watch->ends[i]);
        close(watch->uffd);
        watch->used = 0;
        look_again();
    }
    pthread_mutex_unlock(&watches_lock);
}
