/* Many streams at the same time, each connection beginning the next when its last has ended.
 *
 *     streams PORT STREAMS SECONDS SIZE GROUPS SEED
 *
 *     0           1 s       1.5 s                1.5 s + SECONDS
 *     |--starts---|--settle--|------- window --------|-- running streams end --|
 *
 * Every chunk carries the time at which the worker sent it (worker.c). Its delay is what it took from there to here,
 * the router and both sockets included; chunks that come in the window count. `chunks` are all that came, so that
 * CPU time of the whole run can be divided by it. Prints one JSON object; delays in microseconds.
 */
#include "client.h"

#define SECOND 1000000000           /* nanoseconds, as all times here */
#define PATIENCE (10 * (int64_t)SECOND)
#define TAIL 32                     /* bytes kept between reads: more than a timestamp with its key, more than the end of a stream */

struct stream {
    int fd;
    bool busy, fresh, failed; /* fresh: nothing of the answer has come yet */
    char *request, tail[TAIL];
    size_t sent, kept;
};

static struct prompts prompts;
static struct samples delays;
static int epoll, port;
static long chunks, finished, errors, under_way;
static int64_t window, closing; /* the window's begin and end */

static void begin(struct stream *s) {
    if (s->fd < 0 && (s->fd = open_connection(epoll, port, 0, s)) < 0) {
        errors++;
        return;
    }
    next_prompt(&prompts, s->request);
    s->sent = s->kept = 0;
    s->busy = s->fresh = true;
    under_way++;
    write_rest(s->fd, s->request, prompts.length, &s->sent); /* if it is broken, reading says so */
}

static void end(struct stream *s, bool good) {
    int64_t now = now_ns();
    s->busy = false;
    under_way--;
    if (!good) errors++;
    else if (now >= window && now < closing) finished++;
    if (now < closing && s->fd >= 0) begin(s);
}

/* Takes the timestamps out of `data`; returns how many of its bytes are done with. */
static size_t read_stamps(const char *data, size_t size) {
    static const char key[] = "\"t\":";
    int64_t now = now_ns();
    const char *at = data, *stop = data + size, *found;
    while ((found = memmem(at, (size_t)(stop - at), key, 4)) && stop - found >= 24) {
        chunks++;
        if (now >= window && now < closing) add_sample(&delays, (double)(now - strtoll(found + 4, NULL, 10)) / 1e3);
        at = found + 24;
    }
    return (size_t)(at - data);
}

/* Reads all there is; false if the connection is broken. */
static bool receive(struct stream *s) {
    static char buffer[TAIL + 65536 + 1];
    for (;;) {
        memcpy(buffer, s->tail, s->kept);
        ssize_t n = read(s->fd, buffer + s->kept, 65536);
        if (n <= 0) return n < 0 && errno == EAGAIN;
        if (!s->busy) return false;
        size_t size = s->kept + (size_t)n;
        buffer[size] = 0;
        if (s->fresh) s->failed = strncmp(buffer, "HTTP/1.1 200", 12) != 0;
        s->fresh = false;
        if (s->failed) return false; /* an error answer need not be chunked: its end is not looked for */
        size_t rest = size - read_stamps(buffer, size);
        if (size >= 7 && memcmp(buffer + size - 7, "\r\n0\r\n\r\n", 7) == 0) {
            end(s, true);
            continue;
        }
        s->kept = rest < TAIL ? rest : TAIL;
        memcpy(s->tail, buffer + size - s->kept, s->kept);
    }
}

static void serve(struct stream *s, uint32_t events) {
    bool good = !(events & EPOLLOUT) || !s->busy || write_rest(s->fd, s->request, prompts.length, &s->sent);
    if (good && receive(s)) return;
    close(s->fd);
    s->fd = -1;
    if (s->busy) end(s, false);
}

static void run(struct stream *all, int count, int64_t start) {
    struct epoll_event events[1024];
    int64_t retry = start + SECOND;
    int started = 0;
    for (int64_t now = start; now < closing + PATIENCE; now = now_ns()) {
        int due = now - start >= SECOND ? count : (int)((now - start) * count / SECOND);
        while (started < due) begin(&all[started++]);
        if (now >= retry && now < closing) { /* broken ones return a few times a second, not in a spin */
            for (int i = 0; i < started; i++)
                if (!all[i].busy) begin(&all[i]);
            retry = now + SECOND / 10;
        }
        if (!under_way && now >= closing) break;
        int ready = epoll_wait(epoll, events, 1024, started < count ? 1 : 50);
        for (int i = 0; i < ready; i++) serve(events[i].data.ptr, events[i].events);
    }
    errors += under_way;
}

int main(int words, char **word) {
    if (words != 7) {
        fprintf(stderr, "usage: streams PORT STREAMS SECONDS SIZE GROUPS SEED\n");
        return 2;
    }
    int count = atoi(word[2]);
    double seconds = atof(word[3]);
    port = atoi(word[1]);
    prompts = make_prompts(strtoul(word[4], NULL, 10), strtoul(word[5], NULL, 10), strtoul(word[6], NULL, 10),
                           "\"max_tokens\":50,\"stream\":true");
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    struct stream *all = checked(calloc((size_t)count, sizeof *all));
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        all[i].request = new_request(&prompts);
    }
    int64_t start = now_ns();
    window = start + SECOND + SECOND / 2;
    closing = window + (int64_t)(seconds * SECOND);
    run(all, count, start);
    print_result("chunks", chunks, (double)finished / seconds, &delays, errors);
    return 0;
}
