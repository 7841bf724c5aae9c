/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * run_with_guest PROGRAM: starts a guest, and runs PROGRAM with its QMP socket and a state
 * directory.
 */
#include <instantsnap.h>

#include "harness.h"

int main(int argc, char **argv)
{
    const char *command[4] = {NULL};
    int status;

    if (argc != 2)
        return 2;
    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);

    command[0] = argv[1];
    command[1] = harness_path("qmp");
    command[2] = harness_path("state");
    status = harness_run(command);
    CHECK(status == 0);
    CHECK(harness_status_is("qmp", "running"));
    return 0;
}
