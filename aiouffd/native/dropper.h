/* What the process that serves private memory asks of the one whose memory it is: to drop pages.
 *
 * A page of shared memory that both have, also the successor of the one that asks. Whoever asks reads no message of the
 * userfaultfd until it has the answer.
 */

#ifndef AIOUFFD_DROPPER_H
#define AIOUFFD_DROPPER_H

#include "common.h"

enum { ASKED_MOST = 64 };
enum asked_state { IDLE, ASKED, TAKEN, ANSWERED };

struct asked {
    _Atomic uint32_t state, bell, closed, count; /* `bell` changes with each thing that the thread is to look at */
    struct {
        uint64_t start, end;
    } ranges[ASKED_MOST];
    int32_t results[ASKED_MOST]; /* 0, or a negated errno: not all of it was dropped */
};

#endif
