/* A closed loop of chat requests: each connection sends the next one when its answer is complete.
 *
 *     load PORT CONNECTIONS SECONDS SIZE GROUPS SEED [stream | REQUESTS]
 *
 * Ends after SECONDS, or after REQUESTS if they come first, once the requests in flight are answered; none is
 * cut short. `stream` requests streamed answers. See client.h for SIZE and GROUPS; the same SEED gives the same
 * prompts. Prints one JSON object; latencies in microseconds, from the first byte written to the last byte read. An
 * error is an answer that is not 200, or none: a connection refused, broken, or silent for 10 s at the end.
 */
#include "client.h"

#define PATIENCE 10000000000 /* nanoseconds */

struct connection {
    int fd;
    bool busy;
    char *request;
    size_t sent;
    int64_t began;
    struct answer answer;
};

static struct prompts prompts;
static struct samples latencies;
static int epoll, port;
static long started, finished, errors, under_way, limit;

static void begin(struct connection *c) {
    next_prompt(&prompts, c->request);
    expect_answer(&c->answer);
    c->sent = 0;
    c->busy = true;
    c->began = now_ns();
    started++;
    under_way++;
    write_rest(c->fd, c->request, prompts.length, &c->sent); /* if it is broken, reading says so */
}

static void end(struct connection *c, bool good) {
    c->busy = false;
    under_way--;
    if (good) add_sample(&latencies, (double)(now_ns() - c->began) / 1e3);
    *(good ? &finished : &errors) += 1;
}

/* Reads all there is; false if the connection is broken. */
static bool receive(struct connection *c) {
    for (;;) {
        ssize_t n = read_more(c->fd, &c->answer);
        if (n <= 0) return n < 0 && errno == EAGAIN;
        if (!c->busy) return false;
        if (read_answer(&c->answer)) end(c, !c->answer.failed);
    }
}

static void serve(struct connection *c, uint32_t events) {
    bool good = !(events & EPOLLOUT) || !c->busy || write_rest(c->fd, c->request, prompts.length, &c->sent);
    if (good && receive(c)) return;
    if (c->busy) end(c, false);
    close(c->fd);
    c->fd = -1;
}

static void start_on(struct connection *c) {
    if (c->fd < 0) c->fd = open_connection(epoll, port, 0, c);
    if (c->fd >= 0) {
        begin(c);
        return;
    }
    errors++;
    usleep(10000); /* refused: do not spin */
}

static void run(struct connection *all, int count, int64_t until) {
    struct epoll_event events[256];
    for (int64_t now = now_ns(); now < until + PATIENCE; now = now_ns()) {
        bool more = now < until;
        for (int i = 0; more && i < count; i++)
            if (!all[i].busy && started < limit) start_on(&all[i]);
        if (!under_way && (!more || started >= limit)) break;
        int ready = epoll_wait(epoll, events, 256, 100);
        for (int i = 0; i < ready; i++) serve(events[i].data.ptr, events[i].events);
    }
    errors += under_way;
}

int main(int words, char **word) {
    if (words < 7) {
        fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS SIZE GROUPS SEED [stream | REQUESTS]\n");
        return 2;
    }
    bool stream = words > 7 && strcmp(word[7], "stream") == 0;
    int count = atoi(word[2]);
    port = atoi(word[1]);
    limit = words > 7 && !stream ? atol(word[7]) : INT64_MAX;
    prompts = make_prompts(strtoul(word[4], NULL, 10), strtoul(word[5], NULL, 10), strtoul(word[6], NULL, 10),
                           stream ? "\"max_tokens\":100,\"stream\":true" : "\"max_tokens\":16");
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    struct connection *all = checked(calloc((size_t)count, sizeof *all));
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        all[i].request = new_request(&prompts);
    }
    int64_t start = now_ns();
    run(all, count, start + (int64_t)(atof(word[3]) * 1e9));
    double seconds = (double)(now_ns() - start) / 1e9;
    print_result("requests", finished, (double)finished / seconds, &latencies, errors);
    return 0;
}
