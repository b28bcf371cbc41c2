/* Sentences about ranges of addresses, said when a thread gets a fatal signal there.
 *
 * LEFT: a Monitor that served the range was left, and a touch of a missing page is SIGBUS. ABSENT: a forked child does
 * not have the range (MADV_DONTFORK), and a touch is SIGSEGV there.
 */

#ifndef AIOUFFD_NOTES_H
#define AIOUFFD_NOTES_H

#include "common.h"

enum note_kind { LEFT, ABSENT, NOTE_KINDS };

/* The caller holds a lock for these. */
int take_note(uint64_t start, uint64_t end); /* a number, or -1: there are too many */
void move_note(int number, uint64_t start, uint64_t end);
void set_note(int number, enum note_kind kind, const char *sentence);
void drop_note(int number);
int has_notes(enum note_kind kind);
void drop_notes(enum note_kind kind); /* of all ranges */

/* In a handler: say what is known about an address. Returns whether there was anything. */
int say_note(enum note_kind kind, uint64_t address);

#endif
