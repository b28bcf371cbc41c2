/* Python's GIL, released and taken back inside a signal handler. */

#ifndef AIOUFFD_GIL_H
#define AIOUFFD_GIL_H

#include "common.h"

/* Release the GIL. Returns what `take_gil` needs; NULL, if this thread does not hold it. */
void *release_gil(void);
void take_gil(void *state);

/* The thread in which the interpreter is finalizing; 0 before that. */
extern _Atomic int32_t finalizing;

#endif
