/* The prepared requests a generator rotates among, so that nothing can profit from identical bytes. */
#ifndef BENCH_VARIANTS_H
#define BENCH_VARIANTS_H

#include <stddef.h>

struct variant {
    const char *bytes; /* a whole HTTP request: head and body */
    size_t size;
};

struct variants {
    struct variant *list;
    size_t count;
};

/* Read a file of requests, each written as its size in decimal, a line feed and that many bytes.
 * Exits with a message when the file cannot be read or is cut short. */
struct variants variants_read(const char *path);

#endif
