/* What the C files share. Each is compiled into the one object; only what is EXPORTed can be seen outside.
 *
 * common.c: futexes, messages on standard error, the GIL. signal.c: who else has SIGBUS. faults.h, table.c: the table of
 * regions; faults.c: what is done about a fault. watchdog.c: when nobody serves any more.
 */

#ifndef AIOUFFD_NATIVE_H
#define AIOUFFD_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
/* Thread-local storage that is there from a thread's beginning: the other models may call malloc at first use. */
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))

/* common.c: all of it may be called in a handler. */

uint64_t now_ns(void);
int thread_id(void);
void futex_wait(_Atomic uint32_t *word, uint32_t value, unsigned milliseconds);
void futex_wake(_Atomic uint32_t *word);

struct text {
    size_t length;
    char data[700];
};
void add(struct text *text, const char *part);
void add_number(struct text *text, uint64_t value, unsigned base);
void say(const struct text *text); /* on standard error */

void *release_gil(void); /* what `take_gil` needs; NULL, if this thread does not hold it */
void take_gil(void *state);
/* The thread in which the interpreter ends; 0 before. */
extern _Atomic int32_t finalizing;

/* signal.c */

typedef void handler(int number, siginfo_t *info, void *context);

/* Have SIGBUS go to `ours`, above whoever has it now. 0: it did already; 1: it did not; -1: too many have taken it. */
int install(handler *ours);
/* Give it back, if it is still ours. What comes to `ours` all the same must be passed on. */
void uninstall(void);
/* In a handler: have it handled as it would have been without us. `ours`: one of our pages that cannot be had, so that
 * it must not come back again and again. */
void pass_on(int number, siginfo_t *info, void *context, int ours);
/* In a handler, before what will be passed on for good: one thread after the other. */
void wait_for_turn(void);

#endif
