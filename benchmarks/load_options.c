#include "load_options.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_CONNECTIONS 10000
#define MAX_SECONDS 3600.0

static const char usage[] =
    "usage: load --port PORT --requests FILE [option ...]\n"
    "  --connections N   connections to 127.0.0.1:PORT (1)\n"
    "  --rate R          open loop: R requests a second, latency from the scheduled time (closed loop)\n"
    "  --count N         send exactly N requests instead of sending during a window\n"
    "  --ramp SECONDS    open the connections evenly over this time (0)\n"
    "  --warmup SECONDS  send, but do not measure (0.5)\n"
    "  --seconds SECONDS measure; with --count, the most time the run may take (2)\n"
    "  --drain SECONDS   wait for open answers after the window (0.5)\n"
    "  --events          measure the delay of events stamped @nanoseconds@\n"
    "Prints one JSON object; before it {\"open\": N} once every connection has received content.\n";

static void refuse(void)
{
    fputs(usage, stderr);
    exit(2);
}

static double number(const char *text, double smallest, double largest)
{
    char *end;
    double value = strtod(text, &end);
    if (*end || end == text || value < smallest || value > largest)
        refuse();
    return value;
}

static int64_t duration(const char *text)
{
    return (int64_t)(number(text, 0, MAX_SECONDS) * 1e9);
}

struct load_options load_options_parse(int argc, char **argv)
{
    static const struct option names[] = {
        {"port", required_argument, NULL, 'p'},    {"requests", required_argument, NULL, 'f'},
        {"connections", required_argument, NULL, 'c'}, {"rate", required_argument, NULL, 'r'},
        {"count", required_argument, NULL, 'n'},   {"ramp", required_argument, NULL, 'u'},
        {"warmup", required_argument, NULL, 'w'},  {"seconds", required_argument, NULL, 's'},
        {"drain", required_argument, NULL, 'd'},   {"events", no_argument, NULL, 'e'},
        {NULL, 0, NULL, 0},
    };
    struct load_options options = {
        .connections = 1, .warmup_ns = 500000000, .window_ns = 2000000000, .drain_ns = 500000000};
    int name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'p': options.port = (uint16_t)number(optarg, 1, 65535); break;
        case 'f': options.requests = optarg; break;
        case 'c': options.connections = (unsigned)number(optarg, 1, MAX_CONNECTIONS); break;
        case 'r': options.rate = number(optarg, 0.001, 1e6); break;
        case 'n': options.count = (uint64_t)number(optarg, 1, 1e9); break;
        case 'u': options.ramp_ns = duration(optarg); break;
        case 'w': options.warmup_ns = duration(optarg); break;
        case 's': options.window_ns = duration(optarg); break;
        case 'd': options.drain_ns = duration(optarg); break;
        case 'e': options.reads_events = true; break;
        default: refuse();
        }
    }
    if (!options.port || !options.requests || optind != argc)
        refuse();
    if (options.count)
        options.warmup_ns = 0;
    return options;
}
