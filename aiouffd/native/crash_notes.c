#include "crash_notes.h"
#include <string.h>
#include <unistd.h>

enum { NOTES = 512, LONGEST = 600 };

static struct note {
    _Atomic uint64_t start, end; /* 0: not used */
    _Atomic int set[NOTE_KINDS];
    char sentence[NOTE_KINDS][LONGEST]; /* a handler that reads one while it is changed finds a mixture, and an end */
} notes[NOTES];

int take_note(uint64_t start, uint64_t end)
{
    for (int i = 0; i < NOTES; i++)
        if (atomic_load(&notes[i].end) == 0) {
            for (int kind = 0; kind < NOTE_KINDS; kind++)
                atomic_store(&notes[i].set[kind], 0);
            move_note(i, start, end);
            return i;
        }
    return -1;
}

void move_note(int number, uint64_t start, uint64_t end)
{
    atomic_store(&notes[number].start, start);
    atomic_store(&notes[number].end, end);
}

void set_note(int number, enum note_kind kind, const char *sentence)
{
    struct note *note = &notes[number];
    atomic_store(&note->set[kind], 0);
    strncpy(note->sentence[kind], sentence, LONGEST - 1);
    atomic_store(&note->set[kind], 1);
}

void drop_note(int number)
{
    atomic_store(&notes[number].end, 0);
}

int has_notes(enum note_kind kind)
{
    for (int i = 0; i < NOTES; i++)
        if (atomic_load(&notes[i].end) != 0 && atomic_load(&notes[i].set[kind]))
            return 1;
    return 0;
}

void drop_notes(enum note_kind kind)
{
    for (int i = 0; i < NOTES; i++)
        atomic_store(&notes[i].set[kind], 0);
}

int say_note(enum note_kind kind, uint64_t address)
{
    for (struct note *note = notes; note < notes + NOTES; note++) {
        uint64_t start = atomic_load(&note->start);
        if (address < start || address >= atomic_load(&note->end) || !atomic_load(&note->set[kind]))
            continue;
        struct text text = {.length = 0};
        add(&text, "aiouffd: thread ");
        add_number(&text, (uint64_t)thread_id(), 10);
        add(&text, " of process ");
        add_number(&text, (uint64_t)getpid(), 10);
        add(&text, " has touched ");
        add_number(&text, address, 16);
        add(&text, ", byte ");
        add_number(&text, address - start, 10);
        add(&text, " of a region. ");
        add(&text, note->sentence[kind]);
        add(&text, "\n");
        say(&text);
        return 1;
    }
    return 0;
}
