/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A private libvirtd for the tests, and guests in it: the machine's own is never touched, and
 * nothing is left of this one however the test ends. Include the library's headers and harness.h
 * before this one.
 */
#ifndef HARNESS_LIBVIRT_H
#define HARNESS_LIBVIRT_H

/* Evaluates a call's failure, then checks that libvirt's last error has this code and origin, and says why. */
#define CHECK_VIR_FAILS(failure, expected, origin) \
    do { \
        CHECK(failure); \
        CHECK(virGetLastError()); \
        CHECK(virGetLastError()->code == (expected)); \
        CHECK(virGetLastError()->domain == (origin)); \
        CHECK(virGetLastError()->level == VIR_ERR_ERROR); \
        CHECK(virGetLastErrorMessage()[0] != '\0'); \
    } while (0)

/*
 * Starts a session's libvirtd in the private directory of harness_begin(), as nobody when the test
 * is root. `keeper` is the program of that name, which looks after it. Returns what clients connect
 * to. Skips where there is no libvirtd.
 */
const char *harness_libvirtd(const char *keeper);

/* Defines a domain with 64 MiB and one disk `vda`. It boots the tick guest, the program `tick`, which counts. */
virDomainPtr harness_define(virConnectPtr connect, const char *name, const char *tick);

/* Starts a domain, and waits until it counts. Skips where its QEMU has no background snapshots. */
void harness_start(virDomainPtr domain);

/* A path that belongs to the domain of this name; it lives as long as the test. */
const char *harness_domain_path(const char *name, const char *file);

/* How far the domain's guest has counted. */
long harness_ticks(virDomainPtr domain);

/* Waits until the domain's guest has counted on from there. The test fails when the guest finds itself torn. */
void harness_wait_for_tick_after(virDomainPtr domain, long tick);

#endif
