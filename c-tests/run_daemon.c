/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* run_daemon PROGRAM: has examples/daemon.c take snapshots of two guests, as its client. */
#define _POSIX_C_SOURCE 200809L

#include <sys/stat.h>

#include <instantsnap.h>

#include "harness.h"

/* Reads the next line. */
static const char *next(FILE *output)
{
    static char line[4096];

    CHECK(fgets(line, sizeof(line), output));
    fputs(line, stdout);
    return line;
}

static int begins(const char *line, const char *with)
{
    return strncmp(line, with, strlen(with)) == 0;
}

int main(int argc, char **argv)
{
    const char *directories[2], *requests;
    int complete[2] = {0}, instant[2] = {0}, number;
    FILE *output, *client;
    pid_t child;

    if (argc != 2)
        return 2;
    harness_begin();
    /* Skips where QEMU has no background snapshots. */
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);

    for (number = 0; number < 2; number++) {
        directories[number] = harness_path(number == 0 ? "a" : "b");
        CHECK(mkdir(directories[number], 0700) == 0);
        harness_disk(number == 0 ? "a/disk.raw" : "b/disk.raw");
    }
    requests = harness_path("requests");
    CHECK(mkfifo(requests, 0600) == 0);
    child = harness_spawn((const char *const[]) {
        "sh", "-c", "exec \"$1\" \"$2\" \"$3\" \"$4\" <\"$5\"", "sh",
        argv[1], harness_qemu_program(), directories[0], directories[1], requests, NULL}, &output);
    client = fopen(requests, "w");
    CHECK(client);
    setvbuf(client, NULL, _IOLBF, 0);

    /* Two side by side. */
    fputs("0 one\n1 two\n", client);
    while (!complete[0] || !complete[1]) {
        const char *line = next(output);

        CHECK(sscanf(line, "%d: ", &number) == 1 && (number == 0 || number == 1));
        if (begins(line + 3, "instant: ")) {
            CHECK(!instant[number]++);
        } else {
            CHECK(begins(line + 3, "complete\n") && instant[number] && !complete[number]++);
        }
    }
    CHECK(harness_file_size(harness_path("a/one.xml")) > 0);
    CHECK(harness_file_size(harness_path("b/two.xml")) > 0);

    /* A guest that there is not, a name that is taken, and another one. */
    fputs("7 none\n", client);
    CHECK(begins(next(output), "no guest, or a busy one: 7 none\n"));
    fputs("0 one\n", client);
    CHECK(strstr(next(output), "exists"));
    fputs("0 three\n", client);
    CHECK(begins(next(output), "0: instant: "));
    CHECK(begins(next(output), "0: complete\n"));

    fclose(client);
    CHECK(harness_wait(child) == 0);
    fclose(output);
    return 0;
}
