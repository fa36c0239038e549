/* HTTP/1.1 response reader without I/O: bytes in, content out.
 *
 * Framing is followed exactly (content-length, chunked with trailers, until close), so a proxy that sends too
 * much, too little or broken chunks is counted as an error and not as a fast answer. One response is in flight
 * per connection; bytes behind its end are an error. */
#ifndef BENCH_RESPONSE_H
#define BENCH_RESPONSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RESPONSE_HEAD_LIMIT 8192

enum response_state {
    READ_HEAD,
    READ_LENGTH,
    READ_CHUNK_SIZE,
    READ_CHUNK,
    READ_CHUNK_END,
    READ_TRAILER,
    READ_UNTIL_CLOSE,
    READ_DONE,
    READ_BROKEN,
};

struct response {
    enum response_state state;
    int status;
    bool closes;            /* the connection ends with this response */
    uint64_t left;          /* bytes left of the content or of the current chunk */
    uint64_t content_bytes; /* without framing */
    size_t line_used;
    char line[RESPONSE_HEAD_LIMIT + 1]; /* the head, later one line of chunk framing */
};

typedef void content_visitor(void *owner, const char *bytes, size_t count);

void response_start(struct response *response);

/* Read more bytes; each piece of content goes to the visitor. Returns the new state. */
enum response_state response_feed(struct response *response, const char *bytes, size_t count,
                                  content_visitor *visit, void *owner);

/* The peer closed: complete when the framing allows it, else broken. */
enum response_state response_end(struct response *response);

#endif
