/* Asking the event loop for a page whose bytes are not at hand, and waiting for it. */

#ifndef AIOUFFD_ASK_H
#define AIOUFFD_ASK_H

#include "table.h"

/* Ask for a page and wait. The caller is counted `inside`, and no longer when this returns. 1: touch again; 0: the page
 * cannot be had, which has been said. */
int ask(struct region *r, uint64_t page, uint64_t address, void *context);

/* Wait until *word is no longer `value`. 1: it is not; 0: the loop has not run for `limit_ms`. */
int wait_for(struct region *r, _Atomic uint32_t *word, uint32_t value, uint64_t address);

/* Say on standard error that this thread touched the missing page at `address`, and then `why`. */
void complain(uint64_t address, const char *why);

#endif
