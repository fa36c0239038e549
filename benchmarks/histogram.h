/* Log-linear histogram of durations: every power of two is cut into 128 equal parts, so a value read back
 * is within 0.8 % of the value recorded, at any scale, in constant memory. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>

#define HISTOGRAM_PART_BITS 7
#define HISTOGRAM_PARTS (1 << HISTOGRAM_PART_BITS)
#define HISTOGRAM_BUCKETS ((64 - HISTOGRAM_PART_BITS + 1) * HISTOGRAM_PARTS)

struct histogram {
    uint64_t buckets[HISTOGRAM_BUCKETS];
    uint64_t count;
    int64_t smallest, largest;
    double sum;
};

void histogram_add(struct histogram *histogram, int64_t ns);

/* The duration (ns) below or at which the given part (0..1) of all recorded values lies; 0 when empty. */
int64_t histogram_quantile(const struct histogram *histogram, double part);

/* Write {"count": n, "p50": ..., ...} with all durations in microseconds. */
void histogram_print_json(const struct histogram *histogram, FILE *stream);

#endif
