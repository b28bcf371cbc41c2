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

/* What came of it, as `Copied` of Python has it. */
struct copied {
    uint64_t passed, present, first, last, copies, partial;
};

/* COPY what is missing of a range, past pages that are there; returns 0, or a negated errno of what is behind `passed`.
 *
 * Those that are there are noted, and not woken: one WAKE from the first to the last of them wakes nobody in vain. */
EXPORT int32_t aiouffd_copy_missing(int uffd, struct copy copy, uint64_t mode, uint64_t page, struct copied *came)
{
    *came = (struct copied){0};
    while (came->passed < copy.len) {
        struct copy_argument next = {copy.dst + came->passed, copy.src + came->passed, copy.len - came->passed, mode, 0};
        came->copies++;
        if (ioctl(uffd, IOC_COPY, &next) == 0) {
            came->passed = copy.len;
        } else if (errno == EAGAIN && next.done > 0) {
            came->partial++;
            came->passed += (uint64_t)next.done;
        } else if (errno == EEXIST) {
            came->first = came->present++ ? came->first : next.dst;
            came->last = next.dst;
            came->passed += page;
        } else {
            return -errno;
        }
    }
    return 0;
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
