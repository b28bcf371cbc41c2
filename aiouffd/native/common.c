#include "common.h"
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t page_size;

static __attribute__((constructor)) void on_load(void)
{
    page_size = (uint64_t)sysconf(_SC_PAGESIZE);
}

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

/* A system call instead of glibc's functions: those are cancellation points, and a handler must not be left half-way. */
void futex_wait(_Atomic uint32_t *word, uint32_t value, unsigned milliseconds)
{
    struct timespec limit = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &limit, NULL, 0);
}

void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

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

void add_seconds(struct text *text, uint64_t milliseconds)
{
    add_number(text, milliseconds / 1000, 10);
    add(text, ".");
    add_number(text, milliseconds / 100 % 10, 10);
    add(text, " s");
}

void say(const struct text *text)
{
    long written = syscall(SYS_write, 2, text->data, text->length);
    (void)written; /* there is nobody else to tell */
}

/* The checksum of the C files this library was built from. */
EXPORT uint32_t aiouffd_fingerprint(void)
{
    return AIOUFFD_FINGERPRINT;
}
