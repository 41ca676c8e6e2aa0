/* Requests at planned moments, whatever the target does: an open loop, or bursts of new connections.
 *
 *     arrivals PORT RATE SECONDS SIZE GROUPS SEED          RATE requests a second, at random moments (Poisson)
 *     arrivals PORT COUNT SECONDS SIZE GROUPS SEED burst   COUNT requests at the begin of each second, each on a
 *                                                          new connection, which is closed after the answer
 *
 *     planned --------> sent ---------> answered
 *     |<------------ latency ---------->|
 *
 * A latency counts from the planned moment: a target that stalls pays for all that should have been sent meanwhile,
 * and not only for what was in flight (no "coordinated omission"). A planned request takes a connection that is
 * free, or opens one; if all ROOM are in use it waits, and its clock runs. See client.h for SIZE and GROUPS; the same
 * SEED gives the same prompts at the same moments. Prints one JSON object; latencies in microseconds. What is not
 * answered 5 s after the last planned moment is an error.
 */
#include "client.h"

#include <math.h>
#include <sys/timerfd.h>

#define SECOND 1000000000 /* nanoseconds, as all times here */
#define PATIENCE (5 * (int64_t)SECOND)
#define ROOM 2000 /* connections at most */

struct connection {
    int fd;
    bool busy;
    char *request;
    size_t sent;
    int64_t planned;
    struct answer answer;
};

static struct prompts prompts;
static struct samples latencies;
static struct connection all[ROOM], *unused[ROOM];
static int epoll, timer, port, unused_count, rate;
static bool burst;
static long finished, errors, number; /* number: of the next planned request */
static int64_t next;                  /* its planned moment */
static uint64_t chance;

static void plan_next(void) {
    double share = ((double)(mixed(++chance) >> 11) + 1) * 0x1p-53; /* above 0, up to 1 */
    number++;
    next += burst ? (number % rate ? 0 : SECOND) : (int64_t)(-log(share) * SECOND / rate);
}

/* The connection is free again: kept open for the next request, or closed. */
static void release(struct connection *c, bool keep) {
    if (!keep) {
        close(c->fd);
        c->fd = -1;
    }
    if (c->busy) unused[unused_count++] = c;
    c->busy = false;
}

static void begin(struct connection *c) {
    c->busy = true;
    c->planned = next;
    c->sent = 0;
    expect_answer(&c->answer);
    if (!c->request) c->request = new_request(&prompts);
    next_prompt(&prompts, c->request);
    if (c->fd < 0 && (c->fd = open_connection(epoll, port, SOCK_NONBLOCK, c)) < 0) {
        errors++;
        c->busy = false;
        unused[unused_count++] = c;
        return;
    }
    write_rest(c->fd, c->request, prompts.length, &c->sent); /* if it is broken, reading says so */
}

/* Reads all there is; false if the connection is broken, or closed by the target. */
static bool receive(struct connection *c) {
    for (;;) {
        ssize_t n = read_more(c->fd, &c->answer);
        if (n <= 0) return n < 0 && errno == EAGAIN;
        if (!c->busy) return false;
        if (!read_answer(&c->answer)) continue;
        if (c->answer.failed) errors++;
        else {
            finished++;
            add_sample(&latencies, (double)(now_ns() - c->planned) / 1e3);
        }
        release(c, !burst);
        if (burst) return true;
    }
}

static void serve(struct connection *c, uint32_t events) {
    if (c->fd < 0) return;
    bool good = !(events & EPOLLOUT) || !c->busy || write_rest(c->fd, c->request, prompts.length, &c->sent);
    if (good && receive(c)) return;
    if (c->busy) errors++;
    release(c, false);
}

/* Wakes the loop up at the next planned moment; epoll_wait alone is precise to a millisecond. */
static void wake_at(int64_t moment) {
    struct itimerspec at = {.it_value = {.tv_sec = moment / SECOND, .tv_nsec = moment % SECOND}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
}

static void run(int64_t until) {
    struct epoll_event events[512];
    for (int64_t now = now_ns(); now < until + PATIENCE; now = now_ns()) {
        for (; unused_count && next <= now && next < until; plan_next()) begin(unused[--unused_count]);
        if (next >= until && unused_count == ROOM) break;
        if (unused_count && next < until) wake_at(next);
        int ready = epoll_wait(epoll, events, 512, 100);
        for (int i = 0; i < ready; i++)
            if (events[i].data.ptr) serve(events[i].data.ptr, events[i].events);
    }
    errors += ROOM - unused_count;
    for (; next < until; plan_next()) errors++; /* planned, and never sent */
}

int main(int words, char **word) {
    if (words < 7 || atoi(word[2]) < 1) {
        fprintf(stderr, "usage: arrivals PORT RATE SECONDS SIZE GROUPS SEED [burst]\n");
        return 2;
    }
    port = atoi(word[1]);
    rate = atoi(word[2]);
    burst = words > 7;
    prompts = make_prompts(strtoul(word[4], NULL, 10), strtoul(word[5], NULL, 10), strtoul(word[6], NULL, 10),
                           "\"max_tokens\":16");
    chance = ~prompts.serial;
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event ticking = {.events = EPOLLIN | EPOLLET, .data.ptr = NULL};
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &ticking);
    for (int i = 0; i < ROOM; i++) {
        all[i].fd = -1;
        unused[unused_count++] = &all[ROOM - 1 - i];
    }
    int64_t start = now_ns();
    next = start;
    run(start + (int64_t)(atof(word[3]) * SECOND));
    double seconds = (double)(now_ns() - start) / 1e9;
    print_result("requests", finished, (double)finished / seconds, &latencies, errors);
    return 0;
}
