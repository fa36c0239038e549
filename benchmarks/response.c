#include "response.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

void response_start(struct response *response)
{
    response->state = READ_HEAD;
    response->status = 0;
    response->closes = false;
    response->left = 0;
    response->content_bytes = 0;
    response->line_used = 0;
}

/* The value of a header in a NUL-terminated head, or NULL. */
static const char *header_value(const char *head, const char *name_with_colon)
{
    size_t length = strlen(name_with_colon);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name_with_colon, length) == 0) {
            const char *value = line + 2 + length;
            return value + strspn(value, " \t");
        }
    }
    return NULL;
}

static enum response_state framing_of(struct response *response)
{
    const char *head = response->line;
    if (strncmp(head, "HTTP/1.", 7) != 0)
        return READ_BROKEN;
    response->status = atoi(head + 9);
    if (response->status >= 100 && response->status < 200)
        return READ_HEAD;
    const char *connection = header_value(head, "connection:");
    response->closes = connection && strncasecmp(connection, "close", 5) == 0;
    const char *coding = header_value(head, "transfer-encoding:");
    if (coding)
        return strncasecmp(coding, "chunked", 7) == 0 ? READ_CHUNK_SIZE : READ_BROKEN;
    const char *length = header_value(head, "content-length:");
    if (length) {
        response->left = strtoull(length, NULL, 10);
        return response->left ? READ_LENGTH : READ_DONE;
    }
    response->closes = true;
    return READ_UNTIL_CLOSE;
}

/* Take bytes up to the end of the line; *complete when that line ends the head, or is all that was wanted. */
static size_t collect(struct response *response, const char *bytes, size_t count, bool *complete)
{
    const char *line_end = memchr(bytes, '\n', count);
    size_t room = RESPONSE_HEAD_LIMIT - response->line_used;
    size_t taken = line_end ? (size_t)(line_end - bytes) + 1 : count;
    if (taken > room)
        taken = room;
    memcpy(response->line + response->line_used, bytes, taken);
    response->line_used += taken;
    char *end = response->line + response->line_used;
    *end = '\0';
    bool is_head = response->state == READ_HEAD;
    *complete = line_end && (!is_head || (response->line_used >= 4 && memcmp(end - 4, "\r\n\r\n", 4) == 0));
    if (*complete)
        response->line_used = 0;
    return taken;
}

static size_t read_content(struct response *response, const char *bytes, size_t count, content_visitor *visit,
                           void *owner)
{
    size_t taken = response->state == READ_UNTIL_CLOSE || response->left > count ? count : response->left;
    response->content_bytes += taken;
    visit(owner, bytes, taken);
    if (response->state == READ_UNTIL_CLOSE)
        return taken;
    response->left -= taken;
    if (response->left == 0)
        response->state = response->state == READ_LENGTH ? READ_DONE : READ_CHUNK_END;
    return taken;
}

static void read_chunk_size(struct response *response)
{
    char *end;
    response->left = strtoull(response->line, &end, 16);
    if (end == response->line || (*end != '\r' && *end != ';' && *end != ' '))
        response->state = READ_BROKEN;
    else
        response->state = response->left ? READ_CHUNK : READ_TRAILER;
}

static void end_line(struct response *response)
{
    switch (response->state) {
    case READ_HEAD:
        response->state = framing_of(response);
        break;
    case READ_CHUNK_SIZE:
        read_chunk_size(response);
        break;
    case READ_CHUNK_END:
        response->state = strcmp(response->line, "\r\n") == 0 ? READ_CHUNK_SIZE : READ_BROKEN;
        break;
    case READ_TRAILER:
        if (strcmp(response->line, "\r\n") == 0)
            response->state = READ_DONE;
        break;
    default:
        response->state = READ_BROKEN;
    }
}

enum response_state response_feed(struct response *response, const char *bytes, size_t count,
                                  content_visitor *visit, void *owner)
{
    while (count > 0 && response->state != READ_BROKEN) {
        size_t taken = 0;
        bool complete = false;
        switch (response->state) {
        case READ_LENGTH:
        case READ_CHUNK:
        case READ_UNTIL_CLOSE:
            taken = read_content(response, bytes, count, visit, owner);
            break;
        case READ_DONE:
            response->state = READ_BROKEN;
            break;
        default:
            taken = collect(response, bytes, count, &complete);
            if (complete)
                end_line(response);
            else if (response->line_used >= RESPONSE_HEAD_LIMIT)
                response->state = READ_BROKEN;
        }
        bytes += taken;
        count -= taken;
    }
    return response->state;
}

enum response_state response_end(struct response *response)
{
    if (response->state == READ_UNTIL_CLOSE)
        response->state = READ_DONE;
    else if (response->state != READ_DONE)
        response->state = READ_BROKEN;
    return response->state;
}
