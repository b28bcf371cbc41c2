/* Placing the bytes that are in memory already: by one COPY, ZEROPAGE or CONTINUE, in the thread that touched. */

#ifndef AIOUFFD_PLAIN_H
#define AIOUFFD_PLAIN_H

#include "table.h"

/* ASKED: the bytes are not at hand, or the kernel refused: the engine decides. */
enum outcome { PLACED, PRESENT, ASKED };

/* Place a missing page, and what readahead adds to it. The caller is counted `inside`. */
enum outcome place(struct region *r, uint64_t page);

void count(struct region *r, int which, uint64_t much);

#endif
