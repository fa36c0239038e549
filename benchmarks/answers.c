#define _GNU_SOURCE
#include "answers.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"

#define SEARCHED 1024
#define BURST_LIMIT (EVENTS_PER_STREAM * 320 + 4096)

static const char stream_head[] = "HTTP/1.1 200 OK\r\n"
                                  "Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
                                  "Content-Type: text/event-stream; charset=utf-8\r\n"
                                  "Cache-Control: no-cache\r\n"
                                  "x-request-id: req_0f6c2d7be19a4c53\r\n"
                                  "openai-processing-ms: 12\r\n"
                                  "Transfer-Encoding: chunked\r\n\r\n";
static const char chunk_format[] =
    "data: {\"id\":\"chatcmpl-Bench0123456789abcdefghij\",\"object\":\"chat.completion.chunk\","
    "\"created\":1767225600,\"model\":\"gpt-4o-mini-2024-07-18\",\"choices\":[{\"index\":0,"
    "\"delta\":{%s},\"finish_reason\":%s}]}\n\n";
static const char usage_event[] =
    "data: {\"id\":\"chatcmpl-Bench0123456789abcdefghij\",\"object\":\"chat.completion.chunk\","
    "\"created\":1767225600,\"model\":\"gpt-4o-mini-2024-07-18\",\"choices\":[],"
    "\"usage\":{\"prompt_tokens\":219,\"completion_tokens\":200,\"total_tokens\":419}}\n\n";
static const char done_event[] = "data: [DONE]\n\n";

static struct bytes json_bytes, message_bytes, burst_bytes, burst_bytes_with_usage;

/* The text behind `"name":` and white space, or NULL. */
static const char *member(const char *text, size_t size, const char *quoted_name)
{
    const char *end = text + size;
    const char *found = memmem(text, size, quoted_name, strlen(quoted_name));
    if (!found)
        return NULL;
    found += strlen(quoted_name);
    while (found < end && (isspace((unsigned char)*found) || *found == ':'))
        found++;
    return found < end ? found : NULL;
}

static bool is_true(const char *text, size_t size, const char *quoted_name)
{
    const char *value = member(text, size, quoted_name);
    return value && text + size - value >= 4 && memcmp(value, "true", 4) == 0;
}

/* A number of at most six digits, which OpenAI's metadata wants as a string. */
static unsigned digits(const char *text, size_t size, const char *quoted_name)
{
    const char *value = member(text, size, quoted_name);
    unsigned number = 0;
    if (!value)
        return 0;
    if (*value == '"')
        value++;
    for (int i = 0; i < 6 && value < text + size && isdigit((unsigned char)*value); i++)
        number = number * 10 + (unsigned)(*value++ - '0');
    return number;
}

static void read_wish(struct wish *wish, const char *text, size_t size)
{
    wish->streams |= is_true(text, size, "\"stream\"");
    wish->wants_usage |= is_true(text, size, "\"include_usage\"");
    if (!wish->pace_ns)
        wish->pace_ns = digits(text, size, "\"pace_ms\"") * NS_PER_MS;
    if (!wish->events)
        wish->events = digits(text, size, "\"events\"");
}

struct wish wish_of(const char *body, size_t size)
{
    struct wish wish = {0};
    if (size <= 2 * SEARCHED) {
        read_wish(&wish, body, size);
    } else {
        read_wish(&wish, body, SEARCHED);
        read_wish(&wish, body + size - SEARCHED, SEARCHED);
    }
    if (!wish.events)
        wish.events = EVENTS_PER_STREAM;
    return wish;
}

static size_t append(char *room, size_t used, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    int size = vsprintf(room + used, format, values);
    va_end(values);
    return used + (size_t)size;
}

static size_t append_chunk(char *room, size_t used, const char *event)
{
    return append(room, used, "%zx\r\n%s\r\n", strlen(event), event);
}

static size_t append_content(char *room, size_t used, const char *content)
{
    char delta[64], event[EVENT_LIMIT];
    sprintf(delta, "\"content\":\"%s\"", content);
    sprintf(event, chunk_format, delta, "null");
    return append_chunk(room, used, event);
}

static size_t append_end(char *room, size_t used, bool wants_usage)
{
    char event[EVENT_LIMIT];
    sprintf(event, chunk_format, "", "\"stop\"");
    used = append_chunk(room, used, event);
    if (wants_usage)
        used = append_chunk(room, used, usage_event);
    used = append_chunk(room, used, done_event);
    return append(room, used, "0\r\n\r\n");
}

static struct bytes make_burst(bool wants_usage)
{
    char *room = malloc(BURST_LIMIT);
    size_t used = append(room, 0, "%s", stream_head);
    for (unsigned index = 0; index < EVENTS_PER_STREAM; index++) {
        char content[32];
        sprintf(content, " token%u", index);
        used = append_content(room, used, content);
    }
    used = append_end(room, used, wants_usage);
    return (struct bytes){room, used};
}

static struct bytes with_head(const char *body)
{
    char *room = malloc(4096);
    size_t used = append(room, 0,
                         "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
                         "Content-Type: application/json\r\nContent-Length: %zu\r\n"
                         "x-request-id: req_0f6c2d7be19a4c53\r\nopenai-processing-ms: 12\r\n\r\n%s",
                         strlen(body), body);
    return (struct bytes){room, used};
}

static size_t append_text(char *room, size_t used, size_t until)
{
    while (used < until)
        used = append(room, used, "The gate opens, the water runs, the wheel turns. ");
    return used;
}

static struct bytes make_json(void)
{
    char body[2048];
    size_t size = append(body, 0,
                         "{\n  \"id\": \"chatcmpl-Bench0123456789abcdefghij\",\n"
                         "  \"object\": \"chat.completion\",\n  \"created\": 1767225600,\n"
                         "  \"model\": \"gpt-4o-mini-2024-07-18\",\n  \"choices\": [\n    {\n"
                         "      \"index\": 0,\n      \"message\": {\n        \"role\": \"assistant\",\n"
                         "        \"content\": \"");
    size = append_text(body, size, 750);
    append(body, size,
           "\",\n        \"refusal\": null,\n        \"annotations\": []\n      },\n"
           "      \"logprobs\": null,\n      \"finish_reason\": \"stop\"\n    }\n  ],\n"
           "  \"usage\": {\n    \"prompt_tokens\": 219,\n    \"completion_tokens\": 120,\n"
           "    \"total_tokens\": 339,\n    \"prompt_tokens_details\": {\"cached_tokens\": 0},\n"
           "    \"completion_tokens_details\": {\"reasoning_tokens\": 0}\n  },\n"
           "  \"service_tier\": \"default\"\n}\n");
    return with_head(body);
}

static struct bytes make_message(void)
{
    char body[2048];
    size_t size = append(body, 0,
                         "{\"model\":\"claude-haiku-4-5-20251001\",\"id\":\"msg_01Bench0123456789abcdefg\","
                         "\"type\":\"message\",\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"");
    size = append_text(body, size, 750);
    append(body, size,
           "\"}],\"stop_reason\":\"end_turn\",\"stop_sequence\":null,\"usage\":{\"input_tokens\":219,"
           "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,\"cache_creation\":"
           "{\"ephemeral_5m_input_tokens\":0,\"ephemeral_1h_input_tokens\":0},\"output_tokens\":120,"
           "\"service_tier\":\"standard\"}}");
    return with_head(body);
}

void answers_prepare(void)
{
    json_bytes = make_json();
    message_bytes = make_message();
    burst_bytes = make_burst(false);
    burst_bytes_with_usage = make_burst(true);
}

struct bytes json_answer(void)
{
    return json_bytes;
}

struct bytes message_answer(void)
{
    return message_bytes;
}

struct bytes burst_answer(bool wants_usage)
{
    return wants_usage ? burst_bytes_with_usage : burst_bytes;
}

size_t paced_event(char *room, const struct wish *wish, unsigned index, int64_t stamp)
{
    size_t used = index == 0 ? append(room, 0, "%s", stream_head) : 0;
    if (index >= wish->events)
        return append_end(room, used, wish->wants_usage);
    char content[32];
    sprintf(content, "@%lld@", (long long)stamp);
    return append_content(room, used, content);
}
