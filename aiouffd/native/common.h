/* Time, futexes and messages on standard error.
 *
 * Everything here may be called in the handler of a synchronous signal: no malloc, no stdio, no lock.
 */

#ifndef AIOUFFD_COMMON_H
#define AIOUFFD_COMMON_H

#if !defined __x86_64__ && !defined __aarch64__
#error "aiouffd supports x86-64 and aarch64"
#endif

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Every file is compiled into one object. Only EXPORTed functions are visible outside it. */
#define EXPORT __attribute__((visibility("default")))
/* Thread-local storage that exists from the start of a thread: the other models may call malloc at first use. */
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))

/* The size of a small page: 4, 16 or 64 KiB. Set when the library is loaded. */
extern uint64_t page_size;

uint64_t now_ns(void);
int thread_id(void);
void futex_wait(_Atomic uint32_t *word, uint32_t value, unsigned milliseconds);
void futex_wake(_Atomic uint32_t *word);

struct text {
    size_t length;
    char data[1000]; /* what does not fit is cut off */
};
void add(struct text *text, const char *part);
void add_number(struct text *text, uint64_t value, unsigned base);
void add_seconds(struct text *text, uint64_t milliseconds); /* "1.5 s" */
void say(const struct text *text);                          /* writes to standard error */

#endif
