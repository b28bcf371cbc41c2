/* The chain of SIGBUS handlers: ours on top, below it the handlers of others.
 *
 * Handlers that were there before are kept and get each SIGBUS that is not ours. A handler that is installed while we
 * have the signal is put below ours.
 */

#ifndef AIOUFFD_CHAIN_H
#define AIOUFFD_CHAIN_H

#include "common.h"

typedef void handler(int number, siginfo_t *info, void *context);

/* Install `ours` on top. 0: it was on top already; 1: it was not; -1: too many others have been installed. The caller
 * holds a lock, as for `uninstall`. */
int install(handler *ours);

/* Reinstall the handler below ours, if ours is on top. A SIGBUS that reaches ours all the same must be passed on. */
void uninstall(void);

/* In a handler: let SIGBUS be handled as it would be without us. `ours`: it is for one of our pages, which cannot be
 * had, so that the handlers below must not return to it again and again. */
void pass_on(int number, siginfo_t *info, void *context, int ours);

/* In a handler, before a SIGBUS that will be passed on for good: one thread after the other. */
void wait_for_turn(void);

#endif
