#include "common.h"
#include "uffd.h"

struct copy {
    uint64_t dst, src, len;
};

/* COPYs one after the other, of which nobody is woken; returns how many were done, up to the first that was not. */
EXPORT uint32_t aiouffd_copies(int uffd, const struct copy *copies, uint32_t count, uint64_t mode)
{
    for (uint32_t i = 0; i < count; i++) {
        struct copy_argument copy = {copies[i].dst, copies[i].src, copies[i].len, mode | MODE_DONTWAKE, 0};
        if (ioctl(uffd, IOC_COPY, &copy))
            return i;
    }
    return count;
}
