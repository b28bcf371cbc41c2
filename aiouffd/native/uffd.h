/* What the kernel takes and gives (linux/userfaultfd.h, linux/fs.h). Old headers lack CONTINUE and PAGEMAP_SCAN. */

#ifndef AIOUFFD_UFFD_H
#define AIOUFFD_UFFD_H

#include <stdint.h>
#include <sys/ioctl.h>

struct copy_argument {
    uint64_t dst, src, len, mode;
    int64_t done;
};
struct range_argument { /* of ZEROPAGE and CONTINUE */
    uint64_t start, len, mode;
    int64_t done;
};
struct wake_argument {
    uint64_t start, len;
};
struct writeprotect_argument {
    uint64_t start, len, mode;
};
struct message { /* struct uffd_msg of a page fault */
    uint8_t event, padding[7];
    uint64_t flags, address;
    uint32_t thread, unused;
};
struct scan_argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};
_Static_assert(sizeof(struct message) == 32, "struct uffd_msg has 32 bytes");
_Static_assert(sizeof(struct scan_argument) == 96, "struct pm_scan_arg has 96 bytes");

#define IOC_WAKE _IOR(0xAA, 0x02, struct wake_argument)
#define IOC_COPY _IOWR(0xAA, 0x03, struct copy_argument)
#define IOC_ZEROPAGE _IOWR(0xAA, 0x04, struct range_argument)
#define IOC_WRITEPROTECT _IOWR(0xAA, 0x06, struct writeprotect_argument)
#define IOC_CONTINUE _IOWR(0xAA, 0x07, struct range_argument)
#define IOC_PAGEMAP_SCAN _IOWR('f', 16, struct scan_argument)
enum { EVENT_PAGEFAULT = 0x12, FAULT_WRITE = 1, FAULT_WP = 2, FAULT_MINOR = 4, MODE_DONTWAKE = 1, MODE_WP = 2 };
enum { PAGE_IS_WRITTEN = 2, PAGE_IS_PRESENT = 8, PAGE_IS_SWAPPED = 16 };

#endif
