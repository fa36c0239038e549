/* Load generator: one thread, one epoll set, latencies in histograms, one JSON object at the end.
 *
 * Closed loop: every connection sends its next request as soon as an answer is complete. Streams are nothing
 * special: a connection loops over them the same way, and with --events the delay of every stamped event is
 * recorded. Open loop: requests are due at fixed times; when all connections are busy the next one waits, and its
 * latency counts from the time it was due, so a stalled server cannot hide behind a generator that waits for it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "clock.h"
#include "histogram.h"
#include "load_options.h"
#include "response.h"
#include "variants.h"

#define EVENTS_AT_ONCE 512
#define ERROR_LIMIT 1000
#define STAMP_MARK '@'
#define STAMP_DIGITS_LEAST 8

enum client_state { CONNECTING, IDLE, BUSY };

struct client {
    int socket;
    enum client_state state;
    int64_t sent_at; /* in the open loop: when it was due */
    const char *unsent;
    size_t unsent_size;
    bool has_content, ever_had_content;
    bool in_stamp;
    unsigned stamp_digits;
    int64_t stamp;
    struct client *next_idle;
    struct response response;
};

static struct load_options options;
static struct variants variants;

/* State of the one run this program makes. */
static struct {
    struct client *clients;
    unsigned opened;
    struct client *idle;
    int poll, timer;
    int64_t armed_for;
    int64_t start, window_start, window_end, last_answer;
    int64_t next_due;
    uint64_t started, answered, failed, open_answers;
    uint64_t measured, content_bytes, delayed;
    unsigned with_content;
    int64_t received_at; /* when the bytes being read arrived */
    struct histogram latency, first_byte, event_delay;
} run;

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
}

static bool in_window(int64_t now)
{
    return options.count || (now >= run.window_start && now < run.window_end);
}

static bool may_start(int64_t now)
{
    return !interrupted && now < run.window_end && (!options.count || run.started < options.count);
}

static void connect_client(struct client *client)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(options.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    client->state = CONNECTING;
    client->socket = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->socket < 0) {
        perror("load: socket");
        exit(1);
    }
    setsockopt(client->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* A refusal shows up as an epoll event like every other outcome. */
    (void)connect(client->socket, (struct sockaddr *)&address, sizeof address);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = client};
    epoll_ctl(run.poll, EPOLL_CTL_ADD, client->socket, &event);
}

static void forget_idle(struct client *client)
{
    for (struct client **link = &run.idle; *link; link = &(*link)->next_idle) {
        if (*link == client) {
            *link = client->next_idle;
            return;
        }
    }
}

static void reconnect(struct client *client)
{
    if (client->state == IDLE)
        forget_idle(client);
    close(client->socket);
    connect_client(client);
}

static void fail(struct client *client, const char *reason)
{
    if (run.failed++ < 3)
        fprintf(stderr, "load: %s (status %d)\n", reason, client->response.status);
    if (client->state == BUSY) {
        run.open_answers--;
        run.answered++;
    } else if (client->state == CONNECTING && options.count && run.answered < options.count) {
        /* A connection that cannot be made counts as a request that failed, so a counted run ends. */
        run.started++;
        run.answered++;
    }
    reconnect(client);
}

static bool send_rest(struct client *client)
{
    while (client->unsent_size > 0) {
        ssize_t sent = send(client->socket, client->unsent, client->unsent_size, MSG_NOSIGNAL);
        if (sent < 0)
            return errno == EAGAIN;
        client->unsent += sent;
        client->unsent_size -= (size_t)sent;
    }
    return true;
}

static void start_request(struct client *client, int64_t due)
{
    const struct variant *variant = &variants.list[run.started % variants.count];
    run.started++;
    run.open_answers++;
    response_start(&client->response);
    client->state = BUSY;
    client->has_content = false;
    client->in_stamp = false;
    client->sent_at = due;
    client->unsent = variant->bytes;
    client->unsent_size = variant->size;
    if (!send_rest(client))
        fail(client, "the connection broke while sending");
}

static void become_idle(struct client *client, int64_t now)
{
    if (options.rate == 0 && may_start(now)) {
        start_request(client, now);
        return;
    }
    client->state = IDLE;
    client->next_idle = run.idle;
    run.idle = client;
}

static void end_stamp(struct client *client)
{
    if (client->stamp_digits >= STAMP_DIGITS_LEAST && in_window(run.received_at))
        histogram_add(&run.event_delay, run.received_at - client->stamp);
    client->in_stamp = false;
}

/* Find @digits@ in content that may be cut anywhere. */
static void read_stamps(struct client *client, const char *bytes, size_t count)
{
    const char *end = bytes + count;
    while (bytes < end) {
        if (!client->in_stamp) {
            bytes = memchr(bytes, STAMP_MARK, (size_t)(end - bytes));
            if (!bytes)
                return;
            bytes++;
            client->in_stamp = true;
            client->stamp = 0;
            client->stamp_digits = 0;
            continue;
        }
        char byte = *bytes++;
        if (byte >= '0' && byte <= '9') {
            client->stamp = client->stamp * 10 + (byte - '0');
            client->stamp_digits++;
        } else if (byte == STAMP_MARK) {
            end_stamp(client);
        } else {
            client->in_stamp = false;
        }
    }
}

static void on_content(void *owner, const char *bytes, size_t count)
{
    struct client *client = owner;
    if (!client->has_content) {
        client->has_content = true;
        if (in_window(run.received_at))
            histogram_add(&run.first_byte, run.received_at - client->sent_at);
        if (!client->ever_had_content) {
            client->ever_had_content = true;
            if (++run.with_content == options.connections) {
                printf("{\"open\": %u}\n", run.with_content);
                fflush(stdout);
            }
        }
    }
    if (options.reads_events)
        read_stamps(client, bytes, count);
}

static void complete(struct client *client)
{
    int64_t now = run.received_at;
    if (client->response.status != 200) {
        fail(client, "an answer was not 200");
        return;
    }
    run.open_answers--;
    run.answered++;
    run.last_answer = now;
    if (in_window(now)) {
        run.measured++;
        run.content_bytes += client->response.content_bytes;
        histogram_add(&run.latency, now - client->sent_at);
    }
    client->state = IDLE;
    if (client->response.closes) {
        close(client->socket);
        connect_client(client);
    } else {
        become_idle(client, now);
    }
}

static void on_end_of_input(struct client *client)
{
    if (client->state != BUSY)
        reconnect(client); /* a server may end an idle connection */
    else if (response_end(&client->response) == READ_DONE)
        complete(client);
    else
        fail(client, "the connection ended within an answer");
}

static void on_readable(struct client *client, bool hung_up)
{
    static char buffer[256 * 1024];
    for (;;) {
        ssize_t count = recv(client->socket, buffer, sizeof buffer, 0);
        run.received_at = now_ns();
        if (count < 0 && errno == EAGAIN)
            return;
        if (count <= 0) {
            on_end_of_input(client);
            return;
        }
        if (client->state != BUSY) {
            fail(client, "bytes without a request");
            return;
        }
        int socket = client->socket;
        enum response_state state =
            response_feed(&client->response, buffer, (size_t)count, on_content, client);
        if (state == READ_DONE)
            complete(client);
        else if (state == READ_BROKEN)
            fail(client, "an answer was not well framed");
        /* After a short read the socket is empty (see epoll(7)) unless the peer has hung up. */
        if (client->socket != socket || client->state == CONNECTING ||
            ((size_t)count < sizeof buffer && !hung_up))
            return;
    }
}

static void on_event(struct client *client, uint32_t events)
{
    if (client->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(client->socket, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error)
            fail(client, strerror(error));
        else if (events & EPOLLOUT)
            become_idle(client, now_ns());
        return;
    }
    if ((events & EPOLLOUT) && client->unsent_size && !send_rest(client)) {
        fail(client, "the connection broke while sending");
        return;
    }
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        on_readable(client, events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
}

static int64_t opening_time(unsigned number)
{
    return run.start + options.ramp_ns * number / options.connections;
}

static void open_due_clients(int64_t now)
{
    while (run.opened < options.connections && opening_time(run.opened) <= now)
        connect_client(&run.clients[run.opened++]);
}

static void send_due_requests(int64_t now)
{
    int64_t step = (int64_t)(1e9 / options.rate);
    while (run.next_due <= now && run.idle && may_start(now)) {
        struct client *client = run.idle;
        run.idle = client->next_idle;
        if (now - run.next_due > NS_PER_MS)
            run.delayed++;
        start_request(client, run.next_due);
        run.next_due += step;
    }
}

static bool is_finished(int64_t now)
{
    if (interrupted || run.failed > ERROR_LIMIT)
        return true;
    if (options.count && run.answered >= options.count)
        return true;
    return now >= run.window_end && (run.open_answers == 0 || now >= run.window_end + options.drain_ns);
}

static void arm_timer(int64_t now)
{
    int64_t wake = now < run.window_end ? run.window_end : run.window_end + options.drain_ns;
    if (run.opened < options.connections && opening_time(run.opened) < wake)
        wake = opening_time(run.opened);
    if (options.rate > 0 && run.idle && may_start(now) && run.next_due < wake)
        wake = run.next_due;
    if (wake == run.armed_for)
        return;
    run.armed_for = wake;
    struct itimerspec when = {.it_value = to_timespec(wake)};
    timerfd_settime(run.timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static void drive(void)
{
    struct epoll_event events[EVENTS_AT_ONCE];
    int64_t now = now_ns();
    while (!is_finished(now)) {
        open_due_clients(now);
        if (options.rate > 0)
            send_due_requests(now);
        arm_timer(now);
        int count = epoll_wait(run.poll, events, EVENTS_AT_ONCE, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr) {
                on_event(events[i].data.ptr, events[i].events);
            } else {
                uint64_t expirations;
                run.armed_for = 0;
                (void)!read(run.timer, &expirations, sizeof expirations);
            }
        }
        now = now_ns();
    }
}

static void prepare(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    run.poll = epoll_create1(EPOLL_CLOEXEC);
    run.timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(run.poll, EPOLL_CTL_ADD, run.timer, &event);
    run.clients = calloc(options.connections, sizeof *run.clients);
    if (!run.clients) {
        perror("load");
        exit(1);
    }
    run.start = now_ns();
    run.next_due = run.start + 20 * NS_PER_MS; /* the first connections need a moment */
    run.window_start = run.start + options.ramp_ns + options.warmup_ns;
    run.window_end = run.window_start + options.window_ns;
}

static void print_result(void)
{
    double seconds = (double)(options.count ? run.last_answer - run.start : options.window_ns) / 1e9;
    printf("{\"requests\": %llu, \"errors\": %llu, \"unfinished\": %llu, \"seconds\": %.6f, \"per_second\": %.2f",
           (unsigned long long)run.measured, (unsigned long long)run.failed,
           (unsigned long long)run.open_answers, seconds,
           seconds > 0 ? (double)run.measured / seconds : 0.0);
    printf(", \"started\": %llu, \"started_late\": %llu, \"content_bytes\": %llu, \"latency_us\": ",
           (unsigned long long)run.started, (unsigned long long)run.delayed,
           (unsigned long long)run.content_bytes);
    histogram_print_json(&run.latency, stdout);
    printf(", \"first_byte_us\": ");
    histogram_print_json(&run.first_byte, stdout);
    printf(", \"event_delay_us\": ");
    histogram_print_json(&run.event_delay, stdout);
    printf("}\n");
}

int main(int argc, char **argv)
{
    options = load_options_parse(argc, argv);
    variants = variants_read(options.requests);
    prepare();
    drive();
    print_result();
    return run.failed > ERROR_LIMIT ? 1 : 0;
}
