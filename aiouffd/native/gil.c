#include "gil.h"
#include <string.h>

/* PyEval_SaveThread and PyEval_RestoreThread leave exceptions and frames alone. */
static struct {
    void *(*save_thread)(void);
    void (*restore_thread)(void *);
    void *(*current)(void); /* 3.12 and later: this thread's state, if it holds the GIL. Before: the GIL holder's */
    void *(*mine)(void);    /* before 3.12: this thread's state, whether or not it holds the GIL. Later: NULL */
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
    /* Before 3.14, Python ends a thread that wants the GIL of a finalizing interpreter, which unwinds the thread's
     * stack: here through code that is not prepared for it. So such a thread waits for the end of the process. */
    for (int32_t by; (by = atomic_load(&finalizing)) != 0 && by != thread_id();)
        futex_wait((_Atomic uint32_t *)&finalizing, (uint32_t)by, 60000);
    python.restore_thread(state);
}

/* Tell where Python's functions are: this library links with no Python, so that one build serves each version. */
EXPORT void aiouffd_python(void *save_thread, void *restore_thread, void *current, void *this_thread)
{
    memcpy(&python.save_thread, &save_thread, sizeof save_thread);
    memcpy(&python.restore_thread, &restore_thread, sizeof restore_thread);
    memcpy(&python.mine, &this_thread, sizeof this_thread);
    memcpy(&python.current, &current, sizeof current);
}

/* The interpreter is finalizing, in the calling thread. */
EXPORT void aiouffd_finalizing(void)
{
    atomic_store(&finalizing, thread_id());
}
