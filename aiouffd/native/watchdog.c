#include "watchdog.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { WATCHES = 256 };

/* A block of watches. Others follow when all are in use; none is freed or moved, so that a forked child may look at them
 * whatever was going on in its parent. */
struct block {
    struct watch watches[WATCHES];
    struct block *next;
};

pthread_mutex_t watches_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed; /* something is to be looked at; with `watches_lock` */
static struct block blocks;
static int running; /* the thread */

static void wait_for(int milliseconds)
{
    if (milliseconds < 0) {
        pthread_cond_wait(&changed, &watches_lock);
        return;
    }
    uint64_t until = now_ns() + (uint64_t)milliseconds * UINT64_C(1000000);
    struct timespec deadline = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
    pthread_cond_timedwait(&changed, &watches_lock, &deadline);
}

/* The record behind this one, in use or not; of NULL the first. NULL: there is none. */
static struct watch *next_watch(struct watch *watch, struct block **block)
{
    if (watch == NULL)
        *block = &blocks;
    else if (++watch < (*block)->watches + WATCHES)
        return watch;
    else
        *block = __atomic_load_n(&(*block)->next, __ATOMIC_ACQUIRE);
    return *block == NULL ? NULL : (*block)->watches;
}

static void *run(void *argument)
{
    (void)argument;
    pthread_mutex_lock(&watches_lock);
    for (;;) {
        struct block *block;
        int timeout = -1;
        for (struct watch *watch = NULL; (watch = next_watch(watch, &block)) != NULL;) {
            int pause = watch->used ? watch->look(watch) : -1;
            if (pause >= 0 && (timeout < 0 || pause < timeout))
                timeout = pause;
        }
        wait_for(timeout);
    }
    return NULL;
}

void look_again(void)
{
    pthread_cond_signal(&changed);
}

int own(struct owned *owned, int fd)
{
    struct stat found;
    owned->fd = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (owned->fd < 0)
        return fd < 0 ? 0 : errno;
    fstat(owned->fd, &found);
    owned->device = found.st_dev;
    owned->inode = found.st_ino;
    return 0;
}

int is_intact(const struct owned *owned)
{
    struct stat found;
    return owned->fd >= 0 && fstat(owned->fd, &found) == 0 && found.st_dev == owned->device &&
           found.st_ino == owned->inode;
}

void disown(struct owned *owned)
{
    int fd = is_intact(owned) ? owned->fd : -1;
    __atomic_store_n(&owned->fd, -1, __ATOMIC_SEQ_CST); /* first: `in_child` closes what is owned */
    if (fd >= 0)
        close(fd);
}

static void disown_all(struct watch *watch)
{
    for (int i = 0; i < ENDS; i++)
        disown(&watch->ends[i]);
    disown(&watch->uffd);
}

/* A forked child does not have the thread, and what is watched is its parent's, whose memory a userfaultfd that stays
 * open in the child would keep registered. The lock may have been held: what is in use has its duplicate. */
static void in_child(void)
{
    struct block *block;
    pthread_mutex_init(&watches_lock, NULL);
    for (struct watch *watch = NULL; (watch = next_watch(watch, &block)) != NULL;) {
        if (watch->used)
            disown_all(watch);
        memset(watch, 0, sizeof *watch);
    }
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
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &clock);
    pthread_condattr_destroy(&clock);
    sigset_t all, before;
    sigfillset(&all); /* the application's signals are not for this thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int failed = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return failed;
    pthread_detach(thread);
    running = 1;
    return 0;
}

int add_watch(const struct watch *filled, int uffd)
{
    int failed = start();
    if (failed)
        return -failed;
    struct block *block = &blocks;
    for (int number = 0;; number++) {
        int place = number % WATCHES;
        if (number > 0 && place == 0) {
            if (block->next == NULL) {
                struct block *fresh = calloc(1, sizeof *fresh);
                if (fresh == NULL)
                    return -ENOMEM;
                __atomic_store_n(&block->next, fresh, __ATOMIC_RELEASE);
            }
            block = block->next;
        }
        struct watch *watch = &block->watches[place];
        if (watch->used)
            continue;
        *watch = *filled;
        failed = own(&watch->uffd, uffd);
        if (failed)
            return -failed;
        __atomic_store_n(&watch->used, 1, __ATOMIC_RELEASE);
        look_again();
        return number;
    }
}

struct watch *get_watch(int number)
{
    struct block *block = &blocks;
    for (; number >= WATCHES && block != NULL; number -= WATCHES)
        block = block->next;
    return block != NULL && block->watches[number].used ? &block->watches[number] : NULL;
}

void add_waited(struct watch *watch, uint64_t most_ms)
{
    uint64_t now = now_ns(), passed = now - watch->seen, most = most_ms * UINT64_C(1000000);
    watch->seen = now;
    watch->waited += passed < most ? passed : most;
}

void end_process(const struct text *text, int thread)
{
    sigset_t aborts;

    say(text);
    /* The signal interrupts a thread that waits for a page, but not within a system call: then the process ends here. */
    if (thread > 0 && syscall(SYS_tgkill, getpid(), thread, SIGABRT) == 0)
        sleep(1);
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
        __atomic_store_n(&watch->used, 0, __ATOMIC_SEQ_CST); /* first: `in_child` closes what is in use */
        disown_all(watch);
    }
    pthread_mutex_unlock(&watches_lock);
}
