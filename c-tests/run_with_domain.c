/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * run_with_domain KEEPER TICK PROGRAM: starts a libvirtd and a domain in it, and runs PROGRAM with
 * the URI, the domain's name, and a file for its memory.
 */
#include <instantsnap-libvirt.h>

#include "harness.h"
#include "harness_libvirt.h"

int main(int argc, char **argv)
{
    const char *command[5] = {NULL};
    virConnectPtr connect;
    virDomainPtr domain;

    if (argc != 4)
        return 2;
    harness_begin();
    command[0] = argv[3];
    command[1] = harness_libvirtd(argv[1]);
    command[2] = "hello";
    command[3] = harness_domain_path("hello", "memory");
    connect = virConnectOpen(command[1]);
    CHECK(connect);
    domain = harness_define(connect, "hello", argv[2]);
    harness_start(domain);

    CHECK(harness_run(command) == 0);
    CHECK(harness_file_size(command[3]) > 0);
    CHECK(virDomainSnapshotNum(domain, 0) == 1);
    harness_wait_for_tick_after(domain, harness_ticks(domain));

    CHECK(virDomainFree(domain) == 0);
    CHECK(virConnectClose(connect) == 0);
    return 0;
}
