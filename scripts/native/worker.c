/* Mock workers: the cheapest engines there are, so that what is measured is the router before them.
 *
 *     worker COUNT CHUNKS INTERVAL_MS
 *
 * One process listens on COUNT free loopback ports and prints them on one line. A POST with "stream":true gets a
 * stream of CHUNKS events, one every INTERVAL_MS (0: all at once), each with the nanosecond it was sent at:
 *
 *     data: {..., "t":00000000001234567890, ...}
 *
 * Everything else gets one small JSON answer, which is enough of every answer that routers ask engines for.
 *
 * The interval is the same for all streams, so a queue in order of arrival is in order of due time too:
 *
 *     due --> [stream 7, 3.1 ms] [stream 2, 3.4 ms] ... [stream 9, 22.9 ms]     sent, it goes to the end
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char ANSWER[] =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock\",\"text\":\"hello\","
    "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"hello world\"},"
    "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":5,\"total_tokens\":15}}";
static const char FACTS[] =
    "{\"status\":\"ok\",\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"owned_by\":\"mock\"}],"
    "\"model_path\":\"mock\",\"model_id\":\"mock\",\"served_model_name\":\"mock\",\"tokenizer_path\":\"mock\","
    "\"is_generation\":true,\"dp_size\":1,\"version\":\"0.5.0\"}";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"mock\",\"t\":%020lld,\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},"
    "\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

struct connection {
    int fd;
    bool listening, closed; /* closed: freed when nothing refers to it any more */
    char *in, *out;
    size_t have, in_room, queued, out_room;
    int chunks_left; /* above 0: in the queue of streams */
    int64_t due;
    struct connection *next;
};

static int epoll, chunks;
static int64_t interval; /* nanoseconds */
static struct connection *first, *last;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *checked(void *memory) {
    if (!memory) {
        perror("memory");
        exit(1);
    }
    return memory;
}

static bool flush(struct connection *c) {
    size_t written = 0;
    if (!c->queued) return true;
    while (written < c->queued) {
        ssize_t n = write(c->fd, c->out + written, c->queued - written);
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) break;
        written += (size_t)n;
    }
    memmove(c->out, c->out + written, c->queued -= written);
    return true;
}

static void put(struct connection *c, const char *data, size_t size) {
    if (c->queued + size > c->out_room) c->out = checked(realloc(c->out, c->out_room = 2 * (c->queued + size)));
    memcpy(c->out + c->queued, data, size);
    c->queued += size;
}

static void put_json(struct connection *c, const char *body, size_t size) {
    char head[128];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", size);
    put(c, head, (size_t)n);
    put(c, body, size);
}

static void put_event(struct connection *c) {
    char event[sizeof EVENT + 32], size[16];
    int n = snprintf(event, sizeof event, EVENT, (long long)now_ns());
    put(c, size, (size_t)snprintf(size, sizeof size, "%x\r\n", (unsigned)n));
    put(c, event, (size_t)n);
    put(c, "\r\n", 2);
    if (--c->chunks_left == 0) put(c, STREAM_END, sizeof STREAM_END - 1);
}

static void enqueue(struct connection *c, int64_t due) {
    c->due = due;
    c->next = NULL;
    *(first ? &last->next : &first) = c;
    last = c;
}

static void start_stream(struct connection *c) {
    put(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    c->chunks_left = chunks;
    if (interval) enqueue(c, now_ns() + interval);
    while (!interval && c->chunks_left) put_event(c);
}

/* Answers the whole requests that have come; false if the connection cannot go on. */
static bool answer(struct connection *c) {
    while (!c->chunks_left && c->have) {
        char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
        if (!end) break;
        *end = 0;
        char *length = strcasestr(c->in, "\r\ncontent-length:");
        bool chunked = strcasestr(c->in, "\r\ntransfer-encoding:") != NULL;
        *end = '\r';
        if (chunked) return false; /* no router sends the clients' bodies on in chunks */
        size_t head = (size_t)(end - c->in) + 4, body = length ? strtoul(length + 17, NULL, 10) : 0;
        if (c->have < head + body) break;
        if (strncmp(c->in, "POST", 4) != 0)
            put_json(c, FACTS, sizeof FACTS - 1);
        else if (memmem(c->in + head, body, "\"stream\":true", 13))
            start_stream(c);
        else
            put_json(c, ANSWER, sizeof ANSWER - 1);
        memmove(c->in, c->in + head + body, c->have -= head + body);
    }
    return flush(c);
}

static bool receive(struct connection *c) {
    for (;;) {
        if (c->in_room - c->have < 32768) c->in = checked(realloc(c->in, c->in_room = 2 * c->in_room + 65536));
        ssize_t n = read(c->fd, c->in + c->have, c->in_room - c->have - 1);
        if (n <= 0) return n < 0 && errno == EAGAIN && answer(c);
        c->in[c->have += (size_t)n] = 0;
    }
}

static void discard(struct connection *c) {
    if (!c->closed) close(c->fd);
    c->closed = true;
    if (c->chunks_left && interval) return; /* the queue of streams refers to it still */
    free(c->in);
    free(c->out);
    free(c);
}

/* Sends what is due; returns the milliseconds until more is, or -1. */
static int send_due(void) {
    for (int64_t now = now_ns(); first; now = now_ns()) {
        struct connection *c = first;
        if (!c->closed && c->due > now) return (int)((c->due - now + 999999) / 1000000);
        first = c->next;
        if (c->closed) c->chunks_left = 0;
        else put_event(c);
        bool good = !c->closed && flush(c);
        if (good && c->chunks_left) enqueue(c, c->due + interval);
        else if (good) good = answer(c);
        else c->chunks_left = 0;
        if (!good) discard(c);
    }
    return -1;
}

static void watch(struct connection *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void accept_all(struct connection *listener) {
    int fd, on = 1;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct connection *c = checked(calloc(1, sizeof *c));
        c->fd = fd;
        watch(c, EPOLLIN | EPOLLOUT | EPOLLET);
    }
}

/* A listener on a free port; prints the port. */
static void listen_anywhere(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    struct connection *c = checked(calloc(1, sizeof *c));
    c->listening = true;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(c->fd, (struct sockaddr *)&address, size) || listen(c->fd, 4096) ||
        getsockname(c->fd, (struct sockaddr *)&address, &size)) {
        perror("listen");
        exit(1);
    }
    watch(c, EPOLLIN);
    printf("%d ", ntohs(address.sin_port));
}

int main(int count, char **words) {
    if (count != 4) {
        fprintf(stderr, "usage: worker COUNT CHUNKS INTERVAL_MS\n");
        return 2;
    }
    chunks = atoi(words[2]);
    interval = (int64_t)(atof(words[3]) * 1e6);
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    for (int i = 0; i < atoi(words[1]); i++) listen_anywhere();
    printf("\n");
    fflush(stdout);
    struct epoll_event events[512];
    for (;;) {
        int ready = epoll_wait(epoll, events, 512, send_due());
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->listening) accept_all(c);
            else if (!flush(c) || !receive(c)) discard(c);
        }
    }
}
