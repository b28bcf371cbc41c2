/* The peers: page-fault handlers in C, and touchers that are never the bottleneck.
 *
 * Built on demand by benchmarks/native.py into a shared library; called through ctypes, which drops the GIL.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
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

/* Writes a byte to each page, in order; one each `interval` nanoseconds at most. Returns the nanoseconds that took. */
uint64_t write_pages(char *base, const uint32_t *pages, size_t count, uint64_t interval)
{
	uint64_t began = now();

	for (size_t i = 0; i < count; i++) {
		while (interval && now() < began + i * interval)
			;
		((volatile char *)base)[pages[i] * PAGE + 8] += 1;
	}
	return now() - began;
}

/* Keeps each page before its first write goes on: reads in a loop and never sleeps, copies, lifts the protection. */
void keep_pages(int fd, char *kept, uint64_t base)
{
	struct uffd_msg message;

	for (;;) {
		if (read(fd, &message, sizeof(message)) != sizeof(message)) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			return;
		}
		uint64_t page = message.arg.pagefault.address & -PAGE;
		struct uffdio_writeprotect lift = { .range = { page, PAGE } };
		memcpy(kept + (page - base), (const void *)page, PAGE);
		ioctl(fd, UFFDIO_WRITEPROTECT, &lift);
	}
}

struct visit {
	int connection, file;
	long size, delay_us;
};

static int send_all(int connection, const char *text, size_t length, int flags)
{
	while (length) {
		ssize_t sent = send(connection, text, length, flags);

		if (sent <= 0)
			return -1;
		text += sent;
		length -= sent;
	}
	return 0;
}

/* Reads up to the empty line behind a request or an answer; returns how many bytes of `text` belong to it, 0: none.
 * *filled counts all that was read. */
static size_t read_head(int connection, char *text, size_t most, size_t *filled)
{
	for (;;) {
		text[*filled] = 0;
		char *end = strstr(text, "\r\n\r\n");
		if (end)
			return end + 4 - text;
		ssize_t more = *filled < most ? recv(connection, text + *filled, most - *filled, 0) : 0;
		if (more <= 0)
			return 0;
		*filled += more;
	}
}

/* Answers the requests of one connection, each for one range of the file. */
static void *answer(void *argument)
{
	struct visit visit = *(struct visit *)argument;
	char request[8193], head[512];
	size_t filled = 0, length;

	free(argument);
	while ((length = read_head(visit.connection, request, sizeof(request) - 1, &filled))) {
		long first, last;
		char *range = strcasestr(request, "\nrange: bytes=");

		if (!range || sscanf(range + 14, "%ld-%ld", &first, &last) != 2)
			break;
		if (last >= visit.size)
			last = visit.size - 1;
		snprintf(head, sizeof(head),
			 "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %ld-%ld/%ld\r\nContent-Length: %ld\r\n"
			 "ETag: \"1\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
			 first, last, visit.size, last - first + 1);
		if (visit.delay_us)
			usleep(visit.delay_us);
		if (send_all(visit.connection, head, strlen(head), MSG_MORE))
			break;
		off_t at = first;
		while (at <= last && sendfile(visit.connection, visit.file, &at, last - at + 1) > 0)
			;
		if (at <= last)
			break;
		filled -= length;
		memmove(request, request + length, filled);
	}
	close(visit.connection);
	return NULL;
}

/* Serves a file to any number of connections by HTTP, as cheaply as that can be done: what is to be measured is the
 * other end. */
void serve_http(int listening, int file, long size, long delay_us)
{
	int connection, one = 1;

	signal(SIGPIPE, SIG_IGN);
	while ((connection = accept(listening, NULL, NULL)) >= 0) {
		pthread_t thread;
		struct visit *visit = malloc(sizeof(*visit));

		setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		*visit = (struct visit){ connection, file, size, delay_us };
		pthread_create(&thread, NULL, answer, visit);
		pthread_detach(thread);
	}
}

/* The plain way to bring all that a URL has: one request, one buffer, receive and UFFDIO_COPY. Returns 0 if it fails. */
int receive_http(int port, int fd, uint64_t base, long size, long step)
{
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(port) };
	int connection = socket(AF_INET, SOCK_STREAM, 0);
	char *buffer = aligned_alloc(PAGE, step), head[8193], request[128];
	long done = 0;
	size_t filled = 0, length;

	server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	snprintf(request, sizeof(request), "GET /file HTTP/1.1\r\nHost: a\r\nRange: bytes=0-%ld\r\n\r\n", size - 1);
	if (connect(connection, (struct sockaddr *)&server, sizeof(server)) ||
	    send_all(connection, request, strlen(request), 0) ||
	    !(length = read_head(connection, head, sizeof(head) - 1, &filled)))
		return 0;
	filled -= length;
	memcpy(buffer, head + length, filled);
	while (done < size) {
		long want = size - done < step ? size - done : step;

		if (filled < want && recv(connection, buffer + filled, want - filled, MSG_WAITALL) != want - (ssize_t)filled)
			return 0;
		struct uffdio_copy copy = { .dst = base + done, .src = (uint64_t)buffer, .len = want };
		if (ioctl(fd, UFFDIO_COPY, &copy))
			return 0;
		done += want;
		filled = 0;
	}
	close(connection);
	free(buffer);
	return 1;
}
