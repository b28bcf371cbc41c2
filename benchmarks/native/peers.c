/* The peers: page-fault handlers in C, and touchers that are never the bottleneck.
 *
 * Built on demand by benchmarks/native.py into a shared library; called through ctypes, which drops the GIL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

/* Serves one fault after the other, as the program in userfaultfd(2): poll, read one message, UFFDIO_COPY.
 * With spin it reads in a loop and never sleeps: the least that a handler in another thread can take. */
void handle(int fd, const char *source, uint64_t base, int spin)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };
	struct uffd_msg message;

	for (;;) {
		if (!spin)
			poll(&poller, 1, -1);
		if (read(fd, &message, sizeof(message)) != sizeof(message)) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			return;
		}
		uint64_t page = message.arg.pagefault.address & -PAGE;
		struct uffdio_copy copy = { .dst = page, .src = (uint64_t)source + (page - base), .len = PAGE };
		ioctl(fd, UFFDIO_COPY, &copy);
	}
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000UL + time.tv_nsec;
}

struct share {
	const char *base;
	const uint32_t *pages;
	uint32_t *latencies;
	size_t count;
	uint64_t wrong;
};

/* Touches its pages in order, and compares the first word of each with the page's number plus one. */
static void *touch_share(void *argument)
{
	struct share *share = argument;
	uint64_t before = share->latencies ? now() : 0;

	for (size_t i = 0; i < share->count; i++) {
		uint64_t word = *(const volatile uint64_t *)(share->base + share->pages[i] * PAGE);

		share->wrong += word != share->pages[i] + 1UL;
		if (share->latencies) {
			uint64_t after = now();

			share->latencies[i] = after - before;
			before = after;
		}
	}
	return NULL;
}

/* Has `threads` threads touch the pages, a contiguous share of the list each. Returns the nanoseconds that took;
 * *wrong counts pages with the wrong content. latencies may be NULL. */
uint64_t touch(const char *base, const uint32_t *pages, uint32_t *latencies, size_t count, int threads, uint64_t *wrong)
{
	pthread_t handles[256];
	struct share shares[256];
	uint64_t began = now();

	for (int i = 0; i < threads; i++) {
		size_t low = count * i / threads, high = count * (i + 1) / threads;

		shares[i] = (struct share){ base, pages + low, latencies ? latencies + low : NULL, high - low, 0 };
		if (pthread_create(&handles[i], NULL, touch_share, &shares[i]))
			return 0;
	}
	*wrong = 0;
	for (int i = 0; i < threads; i++) {
		pthread_join(handles[i], NULL);
		*wrong += shares[i].wrong;
	}
	return now() - began;
}
