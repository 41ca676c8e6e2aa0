/* What the load clients share: clock, prompts, connections, answers, quantiles.
 *
 * A prompt is a chat message of `size` bytes. Three quarters are one of `groups` shared beginnings, as chats
 * under a few system prompts have; the rest begins with a serial number and never comes twice:
 *
 *     |<------------- size ------------------->|
 *     | beginning of group g | serial | noise  |        groups = 0: no beginning, nothing is shared
 *
 * All requests have the same length, so that a client overwrites one buffer per connection. The serial is
 * mixed (a bijection): two prompts of a group differ from its first byte on, not only in their last digits.
 */
#ifndef CLIENT_H
#define CLIENT_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
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

#define NOISE (1 << 20)
#define SERIAL 16    /* hexadecimal digits */
#define LAST_CHUNK 7 /* bytes of the end of a chunked body: \r\n0\r\n\r\n */

struct prompts {
    size_t size, shared, length, offset; /* length: of a whole request; offset: of the prompt in it */
    uint64_t groups, serial;
    char *template, *beginnings, *noise;
};

struct samples {
    double *values;
    size_t count, room;
};

/* Nanoseconds of the clock that all processes of this machine share. */
static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void *checked(void *memory) {
    if (!memory) {
        perror("memory");
        exit(1);
    }
    return memory;
}

static inline uint64_t mixed(uint64_t x) { /* the finisher of splitmix64 */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static inline void write_text(char *to, size_t size, uint64_t seed) {
    static const char letters[] = "etaoin shrdlu etaoin cmfwypvbgk ";
    for (size_t i = 0; i < size; i++) to[i] = letters[mixed(seed + i) & 31];
}

static inline struct prompts make_prompts(size_t size, uint64_t groups, uint64_t seed, const char *options) {
    static const char before[] = "{\"model\":\"mock\",\"messages\":[{\"role\":\"user\",\"content\":\"";
    static const char head[] = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                               "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s";
    struct prompts p = {.size = size, .groups = groups, .serial = seed << 32};
    p.shared = groups ? size * 3 / 4 : 0;
    if (size < p.shared + SERIAL || size > NOISE / 2) {
        fprintf(stderr, "the size of a prompt must be from %d to %d\n", SERIAL * 4, NOISE / 2);
        exit(2);
    }
    char after[128];
    size_t ending = (size_t)snprintf(after, sizeof after, "\"}],%s}", options);
    p.template = checked(calloc(1, sizeof head + sizeof before + 32 + size + ending));
    p.offset = (size_t)sprintf(p.template, head, sizeof before - 1 + size + ending, before);
    memcpy(p.template + p.offset + size, after, ending);
    p.length = p.offset + size + ending;
    p.beginnings = checked(malloc(p.shared * groups + 1));
    for (uint64_t g = 0; g < groups; g++) write_text(p.beginnings + g * p.shared, p.shared, mixed(g + 1));
    p.noise = checked(malloc(NOISE));
    write_text(p.noise, NOISE, mixed(~0u));
    return p;
}

static inline char *new_request(const struct prompts *p) {
    return memcpy(checked(malloc(p->length)), p->template, p->length);
}

/* Turns `request`, a copy of the template, into the next request. */
static inline void next_prompt(struct prompts *p, char *request) {
    uint64_t serial = mixed(p->serial++);
    char *to = request + p->offset, digits[SERIAL + 1];
    if (p->groups) memcpy(to, p->beginnings + mixed(serial) % p->groups * p->shared, p->shared);
    snprintf(digits, sizeof digits, "%016llx", (unsigned long long)serial);
    memcpy(to + p->shared, digits, SERIAL);
    size_t rest = p->size - p->shared - SERIAL;
    memcpy(to + p->shared + SERIAL, p->noise + mixed(serial + 1) % (NOISE - rest), rest);
}

/* A connection to the loopback port; -1 if it is refused. With SOCK_NONBLOCK it may be on its way still. */
static inline int connect_to(int port, int flags) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | flags, 0);
    if (fd < 0) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!connect(fd, (struct sockaddr *)&to, sizeof to) || errno == EINPROGRESS) return fd;
    close(fd);
    return -1;
}

/* The same, registered edge-triggered under `owner`, and non-blocking from then on. */
static inline int open_connection(int epoll, int port, int flags, void *owner) {
    int fd = connect_to(port, flags);
    if (fd < 0) return -1;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = owner};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    return fd;
}

/* Writes what is left of `request`; false if the connection is broken. */
static inline bool write_rest(int fd, const char *request, size_t length, size_t *sent) {
    while (*sent < length) {
        ssize_t n = write(fd, request + *sent, length - *sent);
        if (n < 0) return errno == EAGAIN;
        *sent += (size_t)n;
    }
    return true;
}

/* The answer to one request, as far as it has come. It is whole after its Content-Length or its last chunk. */
struct answer {
    bool in_head, chunked, failed; /* failed: the status is not 200 */
    size_t have, left;             /* have: bytes in `in`; left: of a body with Content-Length */
    char in[16384];
};

static inline void expect_answer(struct answer *a) {
    a->in_head = true;
    a->have = 0;
}

/* Reads the head at the front of `in` and drops it; false if it is not whole yet. */
static inline bool read_head(struct answer *a) {
    a->in[a->have] = 0;
    char *stop = strstr(a->in, "\r\n\r\n");
    if (!stop) return false;
    *stop = 0;
    char *length = strcasestr(a->in, "\r\ncontent-length:");
    a->chunked = !length && strcasestr(a->in, "\r\ntransfer-encoding:");
    a->left = length ? strtoul(length + 17, NULL, 10) : 0;
    a->failed = strncmp(a->in, "HTTP/1.1 200", 12) != 0;
    a->in_head = false;
    stop += 4;
    a->have -= (size_t)(stop - a->in);
    memmove(a->in, stop, a->have);
    return true;
}

/* Takes the bytes in `in`; whether the answer is whole. */
static inline bool read_answer(struct answer *a) {
    if (a->in_head && !read_head(a)) return false;
    if (!a->chunked) {
        a->left -= a->have < a->left ? a->have : a->left;
        a->have = 0;
        return a->left == 0;
    }
    size_t keep = a->have < LAST_CHUNK ? a->have : LAST_CHUNK;
    memmove(a->in, a->in + a->have - keep, keep);
    a->have = keep;
    return keep == LAST_CHUNK && memcmp(a->in, "\r\n0\r\n\r\n", LAST_CHUNK) == 0;
}

/* Reads once from the socket, as read(2) does; 0 as well if there is no room left: a head that never ends. */
static inline ssize_t read_more(int fd, struct answer *a) {
    ssize_t n = read(fd, a->in + a->have, sizeof a->in - 1 - a->have);
    if (n > 0) a->have += (size_t)n;
    return n;
}

static inline void add_sample(struct samples *s, double value) {
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 1 << 16;
        s->values = checked(realloc(s->values, s->room * sizeof *s->values));
    }
    s->values[s->count++] = value;
}

static inline int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline void sort_samples(struct samples *s) {
    if (s->count) qsort(s->values, s->count, sizeof *s->values, ascending);
}

/* Of sorted samples; 0 if there are none. */
static inline double quantile(const struct samples *s, double share) {
    return s->count ? s->values[(size_t)((double)(s->count - 1) * share)] : 0;
}

/* Prints one JSON object: what was counted, the rate per second, and quantiles of the samples in microseconds. */
static inline void print_result(const char *unit, long count, double rate, struct samples *s, long errors) {
    sort_samples(s);
    printf("{\"%s\":%ld,\"rate\":%.1f,\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"errors\":%ld}\n", unit, count,
           rate, quantile(s, 0.5), quantile(s, 0.99), quantile(s, 0.999), errors);
}

#endif
