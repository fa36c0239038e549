#include "variants.h"

#include <stdio.h>
#include <stdlib.h>

static void refuse(const char *reason)
{
    fprintf(stderr, "load: request file: %s\n", reason);
    exit(2);
}

static struct variant read_one(FILE *file, size_t size)
{
    char *bytes = malloc(size);
    if (!bytes || fread(bytes, 1, size, file) != size)
        refuse("a request is cut short");
    return (struct variant){.bytes = bytes, .size = size};
}

struct variants variants_read(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        refuse("cannot be opened");
    struct variants variants = {0};
    unsigned long size;
    while (fscanf(file, "%lu", &size) == 1 && fgetc(file) == '\n') {
        variants.list = realloc(variants.list, (variants.count + 1) * sizeof *variants.list);
        if (!variants.list)
            refuse("too many requests");
        variants.list[variants.count++] = read_one(file, size);
    }
    fclose(file);
    if (variants.count == 0)
        refuse("holds no request");
    return variants;
}
