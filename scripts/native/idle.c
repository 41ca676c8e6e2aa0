/* Idle connections: each sends one small request, reads the answer, and stays open until standard input ends.
 *
 *     idle PORT COUNT SEED
 *
 * Prints how many are open once all have had their answer, or once one has failed: the rest is not tried then.
 */
#include "client.h"

#define PROMPT 200
#define BATCH 32    /* requests in flight */
#define PATIENCE 10 /* seconds for an answer */

static struct prompts prompts;

/* A connection on which a request was sent; -1 if it was refused or broke. */
static int ask(int port, char *request) {
    struct timeval patience = {.tv_sec = PATIENCE};
    int fd = connect_to(port, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    next_prompt(&prompts, request);
    size_t sent = 0;
    if (write_rest(fd, request, prompts.length, &sent)) return fd;
    close(fd);
    return -1;
}

static bool answered(int fd) {
    static struct answer answer;
    expect_answer(&answer);
    while (fd >= 0 && read_more(fd, &answer) > 0)
        if (read_answer(&answer)) return !answer.failed;
    return false;
}

int main(int words, char **word) {
    if (words != 4) {
        fprintf(stderr, "usage: idle PORT COUNT SEED\n");
        return 2;
    }
    int port = atoi(word[1]), count = atoi(word[2]), open = 0, asked[BATCH];
    prompts = make_prompts(PROMPT, 1, strtoul(word[3], NULL, 10), "\"max_tokens\":16");
    signal(SIGPIPE, SIG_IGN);
    char *request = new_request(&prompts);
    for (bool good = true; good && open < count;) {
        int batch = count - open < BATCH ? count - open : BATCH;
        for (int i = 0; i < batch; i++) asked[i] = ask(port, request);
        for (int i = 0; good && i < batch; i++) open += good = answered(asked[i]);
    }
    printf("%d\n", open);
    fflush(stdout);
    while (read(STDIN_FILENO, request, 1) > 0) continue;
    return 0;
}
