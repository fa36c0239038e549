#include "histogram.h"

#include <math.h>

static unsigned bucket_of(uint64_t value)
{
    if (value < HISTOGRAM_PARTS)
        return (unsigned)value;
    unsigned top_bit = 63 - (unsigned)__builtin_clzll(value);
    unsigned shift = top_bit - HISTOGRAM_PART_BITS;
    unsigned part = (unsigned)(value >> shift) & (HISTOGRAM_PARTS - 1);
    return (shift + 1) * HISTOGRAM_PARTS + part;
}

static int64_t middle_of(unsigned bucket)
{
    if (bucket < HISTOGRAM_PARTS)
        return bucket;
    unsigned shift = bucket / HISTOGRAM_PARTS - 1;
    uint64_t low = (uint64_t)(HISTOGRAM_PARTS + bucket % HISTOGRAM_PARTS) << shift;
    return (int64_t)(low + ((1ULL << shift) >> 1));
}

void histogram_add(struct histogram *histogram, int64_t ns)
{
    if (ns < 0)
        ns = 0;
    histogram->buckets[bucket_of((uint64_t)ns)]++;
    if (histogram->count == 0 || ns < histogram->smallest)
        histogram->smallest = ns;
    if (ns > histogram->largest)
        histogram->largest = ns;
    histogram->count++;
    histogram->sum += (double)ns;
}

int64_t histogram_quantile(const struct histogram *histogram, double part)
{
    if (histogram->count == 0)
        return 0;
    uint64_t rank = (uint64_t)ceil(part * (double)histogram->count);
    if (rank < 1)
        rank = 1;
    uint64_t seen = 0;
    for (unsigned bucket = 0; bucket < HISTOGRAM_BUCKETS; bucket++) {
        seen += histogram->buckets[bucket];
        if (seen >= rank) {
            int64_t middle = middle_of(bucket);
            return middle > histogram->largest ? histogram->largest : middle;
        }
    }
    return histogram->largest;
}

void histogram_print_json(const struct histogram *histogram, FILE *stream)
{
    static const struct {
        const char *name;
        double part;
    } quantiles[] = {{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p999", 0.999}};

    fprintf(stream, "{\"count\": %llu", (unsigned long long)histogram->count);
    for (unsigned i = 0; i < sizeof quantiles / sizeof *quantiles; i++)
        fprintf(stream, ", \"%s\": %.1f", quantiles[i].name,
                (double)histogram_quantile(histogram, quantiles[i].part) / 1e3);
    fprintf(stream, ", \"min\": %.1f, \"max\": %.1f, \"mean\": %.1f}", (double)histogram->smallest / 1e3,
            (double)histogram->largest / 1e3,
            histogram->count ? histogram->sum / (double)histogram->count / 1e3 : 0.0);
}
