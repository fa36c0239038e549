/* What the mock says: one JSON answer and a stream of events, in the shape of OpenAI's chat completions, and one
 * answer of Anthropic's messages. */
#ifndef BENCH_ANSWERS_H
#define BENCH_ANSWERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EVENTS_PER_STREAM 200
#define EVENT_LIMIT 1024
#define EVENT_ROOM (4 * EVENT_LIMIT) /* a head and an event, or the last three events */

struct bytes {
    const char *start;
    size_t size;
};

/* What a request asks the mock for. */
struct wish {
    bool streams;
    bool wants_usage; /* stream_options.include_usage */
    int64_t pace_ns;  /* time between events; 0: the whole stream is written at once */
    unsigned events;
};

/* Read the members stream, include_usage, pace_ms and events from a JSON body. Only the first and the last KiB
 * are searched, so a prompt of 100 kB costs the mock nothing. */
struct wish wish_of(const char *body, size_t size);

void answers_prepare(void);

struct bytes json_answer(void);

struct bytes message_answer(void);

/* A whole stream with its head. */
struct bytes burst_answer(bool wants_usage);

/* Event number `index` of a paced stream: the head goes before the first, usage and the end come with the last
 * (index == wish->events). The content is the stamp, written @stamp@. `room` holds EVENT_ROOM bytes. */
size_t paced_event(char *room, const struct wish *wish, unsigned index, int64_t stamp);

#endif
