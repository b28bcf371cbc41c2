/* Small things that may be done in the handler of a synchronous signal: no malloc, no stdio, no lock. */

#include "native.h"
#include <errno.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int thread_id(void)
{
    return (int)syscall(SYS_gettid);
}

/* By system call, and not by glibc's functions: those are points of cancellation, and this must not end half-way. */
void futex_wait(_Atomic uint32_t *word, uint32_t value, unsigned milliseconds)
{
    struct timespec limit = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &limit, NULL, 0);
}

void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* --- Messages --- */

void add(struct text *text, const char *part)
{
    while (*part && text->length < sizeof text->data)
        text->data[text->length++] = *part++;
}

void add_number(struct text *text, uint64_t value, unsigned base)
{
    char digits[24];
    char *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = "0123456789abcdef"[value % base];
    while (value /= base);
    add(text, base == 16 ? "0x" : "");
    add(text, at);
}

void say(const struct text *text)
{
    long written = syscall(SYS_write, 2, text->data, text->length);
    (void)written; /* nobody is left to be told */
}

/* --- Python --- */

/* PyEval_SaveThread and PyEval_RestoreThread leave exceptions and frames alone. */
static struct {
    void *(*save_thread)(void);
    void (*restore_thread)(void *);
    void *(*current)(void); /* 3.12 and later: of this thread, if it holds the GIL; before: of whoever holds it */
    void *(*mine)(void);    /* before 3.12: of this thread, whether it holds the GIL or not; else NULL */
} python;

_Atomic int32_t finalizing;

void *release_gil(void)
{
    void *state = python.current == NULL ? NULL : python.current();
    if (state == NULL || (python.mine != NULL && python.mine() != state))
        return NULL;
    return python.save_thread();
}

void take_gil(void *state)
{
    if (state == NULL)
        return;
    /* A thread that wants the GIL when the interpreter ends is ended by Python (before 3.14), which unwinds its stack:
     * here through code that is not prepared for it. So it waits for the end of the process instead. */
    for (int32_t by; (by = atomic_load(&finalizing)) != 0 && by != thread_id();)
        futex_wait((_Atomic uint32_t *)&finalizing, (uint32_t)by, 60000);
    python.restore_thread(state);
}

EXPORT void aiouffd_python(void *save_thread, void *restore_thread, void *current, void *this_thread)
{
    memcpy(&python.save_thread, &save_thread, sizeof save_thread);
    memcpy(&python.restore_thread, &restore_thread, sizeof restore_thread);
    memcpy(&python.mine, &this_thread, sizeof this_thread);
    memcpy(&python.current, &current, sizeof current);
}

/* The interpreter ends, in the calling thread. */
EXPORT void aiouffd_finalizing(void)
{
    atomic_store(&finalizing, thread_id());
}

/* Of the C files, at build time. */
EXPORT uint32_t aiouffd_fingerprint(void)
{
    return AIOUFFD_FINGERPRINT;
}
