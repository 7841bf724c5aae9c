/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* run_daemon PROGRAM: runs examples/daemon.c with a QEMU, and has it take three snapshots. */
#define _POSIX_C_SOURCE 200809L

#include <instantsnap.h>

#include "harness.h"

/* The third name is taken already. */
#define NAMES "printf 'one\\ntwo\\none\\n' | \"$@\""

static const char *const expected[] = {
    "one: instant: ", "one: complete", "two: instant: ", "two: complete", "one: failed: ", NULL
};

int main(int argc, char **argv)
{
    const char *disk, *command[32] = {"sh", "-c", NAMES, "sh"};
    size_t count = 0;
    char line[4096];
    FILE *output;
    pid_t child;

    if (argc != 2)
        return 2;
    harness_begin();
    /* Skips where QEMU has no background snapshots. */
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);

    disk = harness_disk("daemon.raw");
    const char *const daemon[] = {
        argv[1], harness_path("state"), disk,
        harness_qemu_program(), "-no-user-config", "-nodefaults", "-display", "none",
        "-accel", "tcg", "-m", "64",
        "-blockdev",
        harness_text("driver=raw,node-name=disk,file.driver=file,file.filename=%s", disk),
        "-device", "virtio-blk-pci,drive=disk,id=vda",
        "-chardev", "socket,id=monitor,fd=0", "-mon", "chardev=monitor,mode=control",
        "-qmp", harness_text("unix:%s,server=on,wait=off", harness_path("state/guard.sock")), NULL
    };
    memcpy(command + 4, daemon, sizeof(daemon));
    child = harness_spawn(command, &output);
    while (fgets(line, sizeof(line), output)) {
        fputs(line, stdout);
        CHECK(expected[count]);
        CHECK(strncmp(line, expected[count], strlen(expected[count])) == 0);
        count++;
    }
    fclose(output);
    CHECK(harness_wait(child) == 0);
    CHECK(!expected[count]);
    return 0;
}
