#include "due_heap.h"

#include <stdio.h>
#include <stdlib.h>

static void put(struct due_heap *heap, size_t index, struct due *due)
{
    heap->list[index] = due;
    due->place = index + 1;
}

static void sift_up(struct due_heap *heap, size_t index, struct due *due)
{
    while (index > 0) {
        size_t parent = (index - 1) / 2;
        if (heap->list[parent]->at <= due->at)
            break;
        put(heap, index, heap->list[parent]);
        index = parent;
    }
    put(heap, index, due);
}

static void sift_down(struct due_heap *heap, size_t index, struct due *due)
{
    for (;;) {
        size_t child = 2 * index + 1;
        if (child >= heap->count)
            break;
        if (child + 1 < heap->count && heap->list[child + 1]->at < heap->list[child]->at)
            child++;
        if (heap->list[child]->at >= due->at)
            break;
        put(heap, index, heap->list[child]);
        index = child;
    }
    put(heap, index, due);
}

void due_heap_push(struct due_heap *heap, struct due *due)
{
    if (heap->count == heap->capacity) {
        heap->capacity = heap->capacity ? 2 * heap->capacity : 1024;
        heap->list = realloc(heap->list, heap->capacity * sizeof *heap->list);
        if (!heap->list) {
            perror("mock");
            exit(1);
        }
    }
    heap->count++;
    sift_up(heap, heap->count - 1, due);
}

void due_heap_remove(struct due_heap *heap, struct due *due)
{
    if (!due->place)
        return;
    size_t index = due->place - 1;
    due->place = 0;
    struct due *last = heap->list[--heap->count];
    if (last == due)
        return;
    if (index > 0 && last->at < heap->list[(index - 1) / 2]->at)
        sift_up(heap, index, last);
    else
        sift_down(heap, index, last);
}
