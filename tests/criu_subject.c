/*
 * The process that is checkpointed and restored: it knows what each word of its memory must be.
 *
 * usage: criu_subject scan|tree DIRECTORY MEBIBYTES
 *
 * It fills its memory, makes DIRECTORY/ready, and waits for DIRECTORY/go. `scan` then reads every word once. `tree`
 * is three processes and a zombie, which share memory by copy-on-write; each then moves, drops, unmaps, protects and
 * writes at random and forks, checks what it touches, and every word at the end. Each process appends a line to
 * DIRECTORY/results: "ok PID MICROSECONDS", or "wrong PID PAGE WORD GOT"; the first one ends it with "done".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define MOST (64ul << 20 >> 12)
#define ZEROS 0ul

static struct {
	uint64_t *at; /* where the page is now; none: unmapped */
	uint64_t seed; /* what is in it */
	int begins; /* a mapping may begin here */
} pages[MOST];
static size_t count;
static const char *directory;
static uint64_t state = 1;
static int depth;

static uint64_t draw(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static uint64_t word(uint64_t seed, size_t page, size_t index)
{
	return seed == ZEROS ? 0 : (page * WORDS + index + seed) * 0x9e3779b97f4a7c15ul;
}

static uint64_t microseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ul + now.tv_nsec / 1000;
}

static int in_directory(const char *name, int flags)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", directory, name);
	return open(path, flags | O_CLOEXEC, 0600);
}

static void report(const char *line)
{
	int fd = in_directory("results", O_WRONLY | O_CREAT | O_APPEND);
	if (fd < 0 || write(fd, line, strlen(line)) != (ssize_t)strlen(line))
		_exit(3);
	close(fd);
}

static void fail(const char *what, size_t page, size_t index, uint64_t got)
{
	char line[160];
	snprintf(line, sizeof line, "%s %d %zu %zu %#lx\n", what, getpid(), page, index, got);
	report(line);
	_exit(2);
}

static void fill(size_t low, size_t high, uint64_t seed)
{
	for (size_t page = low; page < high; page++) {
		if (!pages[page].at)
			continue;
		pages[page].seed = seed;
		for (size_t index = 0; index < WORDS; index++)
			pages[page].at[index] = word(seed, page, index);
	}
}

static void check(size_t low, size_t high)
{
	for (size_t page = low; page < high; page++) {
		volatile uint64_t *at = pages[page].at;
		for (size_t index = 0; at && index < WORDS; index++)
			if (at[index] != word(pages[page].seed, page, index))
				fail("wrong", page, index, at[index]);
	}
}

/* The end of the run of pages from `low` on that lie behind each other; with `one`, in one mapping. */
static size_t adjacent(size_t low, size_t high, int one)
{
	size_t page = low + 1;
	while (page < high && pages[page].at == pages[page - 1].at + WORDS && !(one && pages[page].begins))
		page++;
	return page;
}

static void split(size_t low, size_t high)
{
	pages[low].begins = 1;
	if (high < count)
		pages[high].begins = 1;
}

static void protect(size_t low, size_t high, int protection)
{
	split(low, high);
	while (low < high) {
		size_t end = adjacent(low, high, 0);
		if (mprotect(pages[low].at, (end - low) * PAGE, protection))
			fail("mprotect", low, errno, 0);
		low = end;
	}
}

/* Of pages in several mappings some kernels move none and some a part: so one by one. */
static void move(size_t low, size_t high, int flags)
{
	split(low, high);
	while (low < high) {
		size_t end = adjacent(low, high, 1), length = (end - low) * PAGE;
		uint64_t *old = pages[low].at;
		char *new = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | flags, new) != new)
			fail("mremap", low, errno, (uint64_t)old);
		for (size_t page = low; page < end; page++) {
			if (flags & MREMAP_DONTUNMAP) /* what stays behind is empty */
				for (size_t index = 0; index < WORDS; index++)
					if (pages[page].at[index])
						fail("left", page, index, pages[page].at[index]);
			pages[page].at = (uint64_t *)(new + (page - low) * PAGE);
		}
		if (flags & MREMAP_DONTUNMAP)
			munmap(old, length);
		low = end;
	}
}

static void act(size_t low, size_t high)
{
	size_t length = (high - low) * PAGE;
	void *at = pages[low].at;
	switch (draw(9)) {
	case 0:
		return move(low, high, 0);
	case 1:
		return move(low, high, MREMAP_DONTUNMAP);
	case 2: /* dropped pages hold zeros; CRIU's own daemon makes a mapping of its own of them */
		split(low, high);
		if (madvise(at, length, MADV_DONTNEED))
			fail("madvise", low, errno, 0);
		for (size_t page = low; page < high; page++)
			pages[page].seed = ZEROS;
		return;
	case 3:
		munmap(at, length);
		split(low, high);
		for (size_t page = low; page < high; page++)
			pages[page].at = NULL;
		return;
	case 4: /* new memory in place of the old */
		mmap(at, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		for (size_t page = low; page < high; page++)
			pages[page].seed = ZEROS, pages[page].begins = 0;
		split(low, high);
		return;
	case 5: /* one mapping becomes three */
		protect(low, high, PROT_READ);
		check(low, low + (high - low) / 2);
		if (draw(2) == 0)
			move(low, high, 0);
		return protect(low, high, PROT_READ | PROT_WRITE);
	case 6:
		return fill(low, high, draw(1ul << 40) + 1);
	default:
		return check(low, high);
	}
}

static void play(int steps)
{
	int children = 0, status, wrong = 0;
	for (int step = 0; step < steps; step++) {
		size_t low = draw(count), high = low + 1 + draw(draw(2) ? 8 : 512);
		if (high > count)
			high = count;
		if (step % 40 == 20 && depth < 2) {
			pid_t child = fork();
			if (child < 0)
				fail("fork", 0, errno, 0);
			if (child == 0) {
				depth++;
				state += 77;
				children = 0;
				steps = step + 60;
				continue;
			}
			children++;
		}
		while (low < high) {
			size_t end = adjacent(low, high, 0);
			if (pages[low].at)
				act(low, end);
			low = end;
		}
	}
	check(0, count);
	while (children-- > 0)
		if (wait(&status) > 0 && status)
			wrong = 1;
	if (wrong)
		fail("child", depth, 0, 0);
}

static void await_go(void)
{
	int fd;
	while ((fd = in_directory("go", O_RDONLY)) < 0) {
		struct timespec pause = {0, 200000};
		nanosleep(&pause, NULL);
	}
	close(fd);
}

static void work(const char *mode)
{
	char line[80];
	await_go();
	uint64_t before = microseconds();
	pid_t self = getpid();
	if (!strcmp(mode, "tree"))
		play(200);
	else
		check(0, count);
	snprintf(line, sizeof line, "ok %d %lu\n", getpid(), microseconds() - before);
	report(line);
	if (getpid() != self)
		_exit(0);
}

int main(int arguments, char **argument)
{
	int status, wrong = 0, fd;
	if (arguments != 4)
		return 64;
	directory = argument[2];
	count = strtoul(argument[3], NULL, 10) << 8;
	if (count > MOST)
		return 64;
	char *memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 71;
	for (size_t page = 0; page < count; page++)
		pages[page].at = (uint64_t *)(memory + page * PAGE);
	fill(0, count, 1);
	if (!strcmp(argument[1], "tree")) {
		int ready[2];
		if (pipe(ready))
			return 71;
		if (fork() == 0)
			_exit(0); /* a zombie, until the end */
		for (size_t child = 1; child <= 2; child++) {
			pid_t forked = fork();
			if (forked < 0)
				return 71;
			if (forked > 0)
				break;
			state += 1000 * child;
			for (size_t page = child; page < count; page += 5) /* differs from what is shared */
				fill(page, page + 1, 1 + child);
			for (size_t page = 100 * child; page < 100 * child + 50 && page < count; page++)
				munmap(pages[page].at, PAGE), pages[page].at = NULL, split(page, page + 1);
		}
		if (write(ready[1], "x", 1) != 1)
			return 71;
		close(ready[1]);
		char all[3];
		if (getsid(0) == getpid())
			for (int got = 0; got < 3; got++)
				if (read(ready[0], all, 1) != 1)
					return 71;
		close(ready[0]);
	}
	if (getsid(0) == getpid()) {
		fd = in_directory("ready", O_WRONLY | O_CREAT);
		close(fd);
	}
	work(argument[1]);
	while (wait(&status) > 0)
		wrong |= status;
	if (wrong)
		fail("child", depth, 0, 0);
	if (getsid(0) == getpid())
		report("done\n");
	return 0;
}
