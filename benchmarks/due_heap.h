/* Binary heap of connections ordered by the time their next event is due. */
#ifndef BENCH_DUE_HEAP_H
#define BENCH_DUE_HEAP_H

#include <stddef.h>
#include <stdint.h>

struct due {
    int64_t at;   /* ns */
    size_t place; /* index in the heap plus one; 0 when not in it */
};

struct due_heap {
    struct due **list;
    size_t count, capacity;
};

void due_heap_push(struct due_heap *heap, struct due *due);
void due_heap_remove(struct due_heap *heap, struct due *due);

/* The earliest one, or NULL. */
static inline struct due *due_heap_first(const struct due_heap *heap)
{
    return heap->count ? heap->list[0] : NULL;
}

#endif
