/* Touches lazy memory in the ways that Python alone cannot: with the GIL held and a C exception pending, from threads
 * that Python has not made, and with other owners of SIGBUS about.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* errno after a touch, which was 1234 before. */
int errno_after(const volatile char *at)
{
    volatile int *number = &errno; /* or the compiler takes it for unchanged */
    *number = 1234;
    (void)*at;
    return *number;
}

/* Sum a byte of each of `number` pages: called as a Python function it holds the GIL, and a pending exception stays. */
uint64_t sum(const volatile unsigned char *at, uint64_t number)
{
    uint64_t total = 0;
    for (uint64_t page = 0; page < number; page++)
        total += at[page * 4096];
    return total;
}

/* Raise a Python exception, touch while it is pending, and return as a C function that has failed. */
void *raise_and_touch(void (*set)(void *, const char *), void *kind, const volatile unsigned char *at, uint64_t number)
{
    set(kind, "pending");
    sum(at, number);
    return NULL;
}

struct share {
    const volatile unsigned char *at;
    uint64_t number, step, total;
};

static void *work(void *argument)
{
    struct share *share = argument;
    for (uint64_t page = 0; page < share->number; page += share->step)
        share->total += share->at[page * 4096];
    return NULL;
}

/* The same from threads, which are waited for: whoever calls this with the GIL held keeps it meanwhile. */
uint64_t sum_in_threads(const volatile unsigned char *at, uint64_t number, int threads)
{
    pthread_t ids[64];
    struct share shares[64];
    uint64_t total = 0;
    for (int i = 0; i < threads; i++) {
        shares[i] = (struct share){at + i * 4096, number - (uint64_t)i, (uint64_t)threads, 0};
        pthread_create(&ids[i], NULL, work, &shares[i]);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        total += shares[i].total;
    }
    return total;
}

/* --- Other owners of SIGBUS --- */

static struct sigaction before;
static volatile int called;
static sigjmp_buf here;

/* Puts back what was there and returns, so that the fault comes again (as crash reporters do). */
static void restoring(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    called++;
    (void)!write(2, "restoring\n", 10);
    sigaction(SIGBUS, &before, NULL);
}

/* Calls what was there. */
static void calling(int number, siginfo_t *info, void *context)
{
    called++;
    before.sa_sigaction(number, info, context);
}

static void jumping(int number)
{
    (void)number;
    called++;
    siglongjmp(here, 1);
}

static void counting(int number)
{
    (void)number;
    called++;
}

void take_sigbus(int how)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_flags = how < 2 ? SA_SIGINFO : 0;
    if (how == 0)
        action.sa_sigaction = restoring;
    else if (how == 1)
        action.sa_sigaction = calling;
    else
        action.sa_handler = how == 2 ? jumping : how == 3 ? counting : SIG_DFL;
    sigaction(SIGBUS, &action, &before);
}

int times_called(void)
{
    return called;
}

/* Who has SIGBUS, as a number; 0: nobody. */
uint64_t sigbus(void)
{
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    return (uint64_t)(uintptr_t)now.sa_sigaction;
}

/* Read a byte as a program does that expects SIGBUS: -1, if it came. With `take_sigbus(2)` before. */
int probe(const volatile unsigned char *at)
{
    if (sigsetjmp(here, 1))
        return -1;
    return *at;
}

/* Other signals are not blocked while a thread waits: SIGUSR1 is counted, which a thread sends again and again. */
struct pesterer {
    pthread_t whom;
    volatile int stop;
};

static void *pester(void *argument)
{
    struct pesterer *it = argument;
    while (!it->stop) {
        pthread_kill(it->whom, SIGUSR1);
        usleep(500);
    }
    return NULL;
}

int pestered_touch(const volatile unsigned char *at)
{
    struct sigaction action;
    struct pesterer it = {pthread_self(), 0};
    pthread_t thread;
    memset(&action, 0, sizeof action);
    action.sa_handler = counting;
    sigaction(SIGUSR1, &action, NULL);
    pthread_create(&thread, NULL, pester, &it);
    (void)*at;
    int during = called;
    it.stop = 1;
    pthread_join(thread, NULL);
    return during;
}
