#ifndef BENCH_LOAD_OPTIONS_H
#define BENCH_LOAD_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

struct load_options {
    uint16_t port;
    const char *requests; /* file of prepared requests */
    unsigned connections;
    double rate;      /* requests per second in the open loop; 0 means closed loop */
    uint64_t count;   /* send exactly this many requests; 0 means: send during the window */
    int64_t ramp_ns;  /* connections are opened evenly over this time */
    int64_t warmup_ns;
    int64_t window_ns; /* measured time after the warm-up; with a count, the most time the run may take */
    int64_t drain_ns;  /* how long to wait for open answers after the window */
    bool reads_events; /* look for time stamps in the content */
};

/* Parse the command line; exits with the usage text when it cannot be understood. */
struct load_options load_options_parse(int argc, char **argv);

#endif
