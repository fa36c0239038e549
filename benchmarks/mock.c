/* Mock upstream: answers chat completions and messages as fast as one core can, so that it is never what is measured.
 *
 * Usage: mock [PORT]   (0 or nothing: any free port). Prints "PORT\n" once it listens on 127.0.0.1.
 * A request without "stream": true gets one JSON answer, on /v1/messages a message; with it, 200 events of chat
 * completions written at once, or, when the body's metadata holds pace_ms, one write per event at that pace, each
 * stamped with the time of writing. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "answers.h"
#include "clock.h"
#include "due_heap.h"

#define EVENTS_AT_ONCE 512
#define INPUT_START 4096
#define INPUT_LIMIT (4 * 1024 * 1024)
#define CALM (EPOLLIN | EPOLLRDHUP)

struct connection {
    struct due due; /* first, so that the heap's pointers are connections */
    int socket;
    char *input;
    size_t input_used, input_capacity;
    const char *output; /* what the socket did not take yet */
    size_t output_size;
    struct wish wish; /* of the paced stream that is under way */
    bool is_streaming;
    unsigned next_event;
    int64_t late_since; /* when the next event was due, if the socket was full then; else 0 */
    char event[EVENT_ROOM];
};

static int poll_set, timer;
static int64_t timer_armed_for;
static struct due_heap heap;

static void drop(struct connection *connection)
{
    due_heap_remove(&heap, &connection->due);
    close(connection->socket);
    free(connection->input);
    free(connection);
}

static void watch(struct connection *connection, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    epoll_ctl(poll_set, EPOLL_CTL_MOD, connection->socket, &event);
}

/* Returns false when the peer is gone. What does not fit is sent when the socket is writable. */
static bool send_output(struct connection *connection)
{
    while (connection->output_size > 0) {
        ssize_t sent = send(connection->socket, connection->output, connection->output_size, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN)
                return false;
            watch(connection, CALM | EPOLLOUT);
            return true;
        }
        connection->output += sent;
        connection->output_size -= (size_t)sent;
    }
    return true;
}

static bool write_bytes(struct connection *connection, struct bytes bytes)
{
    connection->output = bytes.start;
    connection->output_size = bytes.size;
    return send_output(connection);
}

static bool write_event(struct connection *connection, int64_t stamp)
{
    size_t size = paced_event(connection->event, &connection->wish, connection->next_event, stamp);
    connection->is_streaming = connection->next_event < connection->wish.events;
    connection->next_event++;
    connection->due.at += connection->wish.pace_ns;
    if (connection->is_streaming)
        due_heap_push(&heap, &connection->due);
    return write_bytes(connection, (struct bytes){connection->event, size});
}

static bool is_for_messages(const struct connection *connection)
{
    static const char start[] = "POST /v1/messages";
    return memcmp(connection->input, start, strlen(start)) == 0; /* the input has room for more */
}

static bool answer(struct connection *connection, const char *body, size_t size)
{
    struct wish wish = wish_of(body, size);
    if (!wish.streams)
        return write_bytes(connection, is_for_messages(connection) ? message_answer() : json_answer());
    if (!wish.pace_ns)
        return write_bytes(connection, burst_answer(wish.wants_usage));
    connection->wish = wish;
    connection->next_event = 0;
    connection->due.at = now_ns();
    return write_event(connection, connection->due.at);
}

/* Size of a complete chunked body at the start of the text; 0 when more is needed. */
static size_t chunked_size(const char *text, size_t size)
{
    size_t at = 0;
    for (;;) {
        const char *line_end = memmem(text + at, size - at, "\r\n", 2);
        if (!line_end)
            return 0;
        size_t chunk = strtoul(text + at, NULL, 16);
        at = (size_t)(line_end - text) + 2 + chunk + 2;
        if (at > size)
            return 0;
        if (chunk == 0)
            return at; /* no trailers: no proxy under test adds any */
    }
}

/* Size of the complete request at the start of the input, its head's in *head_size; 0 when more is needed. */
static size_t request_size(struct connection *connection, size_t *head_size)
{
    char *input = connection->input;
    char *end = memmem(input, connection->input_used, "\r\n\r\n", 4);
    if (!end)
        return 0;
    *head_size = (size_t)(end - input) + 4;
    *end = '\0'; /* so that the searches stop at the end of the head */
    const char *length = strcasestr(input, "\r\ncontent-length:");
    const char *coding = length ? NULL : strcasestr(input, "\r\ntransfer-encoding: chunked");
    size_t body_size = length ? strtoul(length + strlen("\r\ncontent-length:"), NULL, 10) : 0;
    *end = '\r';
    if (coding) {
        body_size = chunked_size(input + *head_size, connection->input_used - *head_size);
        if (!body_size)
            return 0;
    }
    size_t total = *head_size + body_size;
    return connection->input_used >= total ? total : 0;
}

static bool answer_requests(struct connection *connection)
{
    while (!connection->is_streaming && connection->output_size == 0 && connection->input_used > 0) {
        size_t head_size;
        connection->input[connection->input_used] = '\0';
        size_t total = request_size(connection, &head_size);
        if (!total)
            return connection->input_used < INPUT_LIMIT;
        if (!answer(connection, connection->input + head_size, total - head_size))
            return false;
        connection->input_used -= total;
        memmove(connection->input, connection->input + total, connection->input_used);
    }
    return true;
}

static bool make_room(struct connection *connection)
{
    if (connection->input_used < connection->input_capacity)
        return true;
    if (connection->input_capacity >= INPUT_LIMIT)
        return false;
    connection->input_capacity *= 4;
    connection->input = realloc(connection->input, connection->input_capacity + 1);
    return connection->input != NULL;
}

static bool read_input(struct connection *connection)
{
    for (;;) {
        if (!make_room(connection))
            return false;
        size_t room = connection->input_capacity - connection->input_used;
        ssize_t count = recv(connection->socket, connection->input + connection->input_used, room, 0);
        if (count == 0 || (count < 0 && errno != EAGAIN))
            return false;
        if (count < 0)
            return true;
        connection->input_used += (size_t)count;
        if ((size_t)count < room)
            return true;
    }
}

static void on_event(struct connection *connection, uint32_t events)
{
    bool alive = true;
    if (events & EPOLLOUT) {
        alive = send_output(connection);
        if (alive && connection->output_size == 0)
            watch(connection, CALM);
    }
    if (alive && (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
        alive = read_input(connection);
    if (!alive || !answer_requests(connection))
        drop(connection);
}

static void write_due_events(void)
{
    int64_t now = now_ns();
    struct due *first;
    while ((first = due_heap_first(&heap)) && first->at <= now) {
        struct connection *connection = (struct connection *)first;
        due_heap_remove(&heap, first);
        if (connection->output_size > 0) {
            /* The socket is full: look again in a millisecond, and let the event's age include the wait. */
            if (!connection->late_since)
                connection->late_since = first->at;
            first->at += NS_PER_MS;
            due_heap_push(&heap, first);
            continue;
        }
        int64_t stamp = connection->late_since ? connection->late_since : now;
        connection->late_since = 0;
        if (!write_event(connection, stamp) || !answer_requests(connection))
            drop(connection);
    }
    if (first && first->at != timer_armed_for) {
        struct itimerspec when = {.it_value = to_timespec(first->at)};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        timer_armed_for = first->at;
    }
}

static void accept_all(int listener)
{
    int socket;
    while ((socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        int on = 1;
        setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct connection *connection = calloc(1, sizeof *connection);
        connection->socket = socket;
        connection->input_capacity = INPUT_START;
        connection->input = malloc(INPUT_START + 1);
        struct epoll_event event = {.events = CALM, .data.ptr = connection};
        epoll_ctl(poll_set, EPOLL_CTL_ADD, socket, &event);
    }
}

static int listen_on(uint16_t port)
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("mock: listen");
        exit(1);
    }
    printf("%u\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    answers_prepare();
    poll_set = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int listener = listen_on((uint16_t)(argc > 1 ? atoi(argv[1]) : 0));
    struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = &listener};
    struct epoll_event ticks = {.events = EPOLLIN, .data.ptr = &timer};
    epoll_ctl(poll_set, EPOLL_CTL_ADD, listener, &accepts);
    epoll_ctl(poll_set, EPOLL_CTL_ADD, timer, &ticks);
    for (;;) {
        struct epoll_event events[EVENTS_AT_ONCE];
        int count = epoll_wait(poll_set, events, EVENTS_AT_ONCE, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &listener) {
                accept_all(listener);
            } else if (events[i].data.ptr == &timer) {
                uint64_t expirations;
                (void)!read(timer, &expirations, sizeof expirations);
                timer_armed_for = 0;
            } else {
                on_event(events[i].data.ptr, events[i].events);
            }
        }
        write_due_events();
    }
}
