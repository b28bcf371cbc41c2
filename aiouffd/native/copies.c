#include "common.h"
#include "uffd.h"
#include <errno.h>
#include <unistd.h>

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

struct range {
    uint64_t start, len;
};

/* Write-protect ranges one after the other; returns how many were done, up to the first that was not. */
EXPORT uint32_t aiouffd_protects(int uffd, const struct range *ranges, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct writeprotect_argument protect = {ranges[i].start, ranges[i].len, 1};
        if (ioctl(uffd, IOC_WRITEPROTECT, &protect))
            return i;
    }
    return count;
}

/* Read parts of a file one behind the other; returns how many were read, up to the first that was not, or not all. */
EXPORT uint32_t aiouffd_reads(int fd, const struct range *parts, uint32_t count, uint8_t *to)
{
    for (uint32_t i = 0; i < count; to += parts[i++].len) {
        ssize_t done;
        do
            done = pread(fd, to, parts[i].len, (off_t)parts[i].start);
        while (done < 0 && errno == EINTR);
        if (done != (ssize_t)parts[i].len)
            return i;
    }
    return count;
}

/* Write parts of a file; returns how many were written, up to the first that was not, or not all. */
EXPORT uint32_t aiouffd_writes(int fd, const struct range *parts, uint32_t count, const char *const *from)
{
    for (uint32_t i = 0; i < count; i++) {
        ssize_t done;
        do
            done = pwrite(fd, from[i], parts[i].len, (off_t)parts[i].start);
        while (done < 0 && errno == EINTR);
        if (done != (ssize_t)parts[i].len)
            return i;
    }
    return count;
}
