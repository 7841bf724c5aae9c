/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A private libvirtd for the tests, with guests in it. The machine's own libvirtd is never used,
 * and the private one is removed however the test ends. Include the library's headers and harness.h
 * before this one.
 */
#ifndef HARNESS_LIBVIRT_H
#define HARNESS_LIBVIRT_H

/*
 * Checks that a call failed, and that libvirt's last error has this code, this origin and a
 * message.
 */
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
 * Starts a session's libvirtd in the private directory of harness_begin(), as user nobody if the
 * test is root. `keeper` is the program of that name, which ends libvirtd with the test. Returns
 * the URI for clients. Skips the test without libvirtd.
 */
const char *harness_libvirtd(const char *keeper);

/*
 * Defines a domain with 64 MiB and one disk `vda`. It boots the tick guest, the program `tick`,
 * which counts.
 */
virDomainPtr harness_define(virConnectPtr connect, const char *name, const char *tick);

/* Starts a domain, and waits until it counts. Skips the test without background snapshots. */
void harness_start(virDomainPtr domain);

/* Returns the path of a domain's file. The string is valid as long as the test runs. */
const char *harness_domain_path(const char *name, const char *file);

/* Returns how far the domain's guest has counted. */
long harness_ticks(virDomainPtr domain);

/*
 * Waits until the domain's guest has counted beyond this number. Fails the test if the guest is
 * torn.
 */
void harness_wait_for_tick_after(virDomainPtr domain, long tick);

#endif
