/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * run_snapshot_many PROGRAM [interrupt]: runs examples/snapshot_many.c on four guests, to its end,
 * or with a Ctrl-C as soon as the first guest is past its instant.
 */
#define _POSIX_C_SOURCE 200809L

#include <signal.h>
#include <sys/stat.h>

#include <instantsnap.h>

#include "harness.h"

#define GUESTS 4
/*
 * If all snapshots are complete before the signal comes, the test needs another round. That does
 * not happen in all of these rounds.
 */
#define ROUNDS 5

/* The events that the program has printed for one guest. */
struct said {
    int paused, switched, instant, complete, failed;
};

static const char *sockets[GUESTS];
static const char *states[GUESTS];
static int snapshots[GUESTS]; /* the number that there must be */

static void start_guests(void)
{
    for (int i = 0; i < GUESTS; i++) {
        const char *socket_name = harness_text("qmp%d", i);

        sockets[i] = harness_path(socket_name);
        states[i] = harness_path(harness_text("state%d", i));
        CHECK(mkdir(states[i], 0700) == 0);
        harness_qemu(socket_name, harness_disk(harness_text("disk%d.raw", i)), "raw", 0);
    }
}

static void read_line(const char *line, struct said *said)
{
    for (int i = 0; i < GUESTS; i++) {
        if (strstr(line, harness_text("%s: ", sockets[i]))) {
            said[i].paused += !!strstr(line, ": paused");
            said[i].switched += !!strstr(line, ": switched");
            said[i].instant += !!strstr(line, ": instant");
            said[i].complete += !!strstr(line, ": complete");
            said[i].failed += !!strstr(line, ": failed");
        }
    }
}

/* Runs the program once, and returns its exit status. */
static int run(const char *program, int interrupt, struct said *said)
{
    const char *command[2 + 2 * GUESTS] = {program};
    int interrupted = 0, cancelling = 0, summed_up = 0;
    char line[4096];
    FILE *output;
    pid_t child;

    for (int i = 0; i < GUESTS; i++) {
        command[1 + 2 * i] = sockets[i];
        command[2 + 2 * i] = states[i];
    }
    child = harness_spawn(command, &output);
    while (fgets(line, sizeof(line), output)) {
        fputs(line, stdout);
        CHECK(!summed_up);
        read_line(line, said);
        cancelling += strncmp(line, "cancelling", strlen("cancelling")) == 0;
        summed_up += !!strstr(line, "never away from epoll_wait");
        if (interrupt && !interrupted && strstr(line, ": instant")) {
            CHECK(kill(child, SIGINT) == 0);
            interrupted = 1;
        }
    }
    fclose(output);
    CHECK(summed_up == 1);
    CHECK(cancelling <= interrupted);
    return harness_wait(child);
}

/*
 * Checks that each guest runs, and has exactly the snapshots that the program reported as complete.
 */
static void check_guests(const struct said *said)
{
    for (int i = 0; i < GUESTS; i++) {
        instantsnap_guest *guest = instantsnap_open_qmp(sockets[i], NULL, states[i]);
        const char *blocks;

        CHECK(guest);
        CHECK(said[i].complete + said[i].failed == 1);
        snapshots[i] += said[i].complete;
        CHECK(instantsnap_snapshot_list(guest, NULL) == snapshots[i]);
        CHECK(harness_status_is(harness_text("qmp%d", i), "running"));
        blocks = harness_qmp(harness_text("qmp%d", i), "{\"execute\": \"query-named-block-nodes\", "
                                                       "\"arguments\": {\"flat\": true}}");
        CHECK(snapshots[i] > 0 || !strstr(blocks, "qcow2"));
        instantsnap_close(guest);
    }
}

static void to_the_end(const char *program)
{
    const char *const nowhere[] = {program, harness_path("nowhere"), states[0], NULL};
    struct said said[GUESTS] = {{0}};

    /* A socket that cannot be opened is an error, not a crash. */
    CHECK(harness_run(nowhere) == 1);

    CHECK(run(program, 0, said) == 0);
    for (int i = 0; i < GUESTS; i++)
        CHECK(said[i].paused == 1 && said[i].switched == 1 && said[i].instant == 1 &&
              said[i].complete == 1);
    check_guests(said);
}

static void interrupted(const char *program)
{
    int in_drain = 0;

    for (int round = 0; in_drain == 0 && round < ROUNDS; round++) {
        struct said said[GUESTS] = {{0}};
        int complete = 0, status = run(program, 1, said);

        for (int i = 0; i < GUESTS; i++) {
            complete += said[i].complete;
            in_drain += said[i].failed && said[i].instant;
        }
        CHECK(status == (complete == GUESTS ? 0 : 130));
        check_guests(said);
    }
    CHECK(in_drain > 0);

    /* Nothing is left: the next snapshots are like the first. */
    {
        struct said said[GUESTS] = {{0}};

        CHECK(run(program, 0, said) == 0);
        check_guests(said);
    }
}

int main(int argc, char **argv)
{
    int interrupt = argc == 3 && strcmp(argv[2], "interrupt") == 0;

    if (argc != 2 && !interrupt)
        return 2;
    harness_begin();
    /* Enough memory that draining it takes longer than the signal. */
    harness_set_memory(interrupt ? 256 : 64);
    start_guests();
    if (interrupt)
        interrupted(argv[1]);
    else
        to_the_end(argv[1]);
    return 0;
}
