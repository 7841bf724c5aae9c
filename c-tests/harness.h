/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the tests need around the library: a private directory, real QEMUs in it, and an end to both
 * however the test ends. Include the library's header before this one.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

/* What Meson takes for "skipped". */
#define HARNESS_SKIP 77

/* Ends the test when something that must hold does not; the library's last error is often the reason. */
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            fprintf(stderr, "(last error of the library: %d, %s)\n", instantsnap_last_error()->code, \
                    instantsnap_last_error()->message); \
            exit(1); \
        } \
    } while (0)

/* Evaluates a call's failure, then checks that it failed with this code, in libvirt's domain for QEMU, saying why. */
#define CHECK_FAILS(failure, expected) \
    do { \
        CHECK(failure); \
        CHECK(instantsnap_last_error()->code == (expected)); \
        CHECK(instantsnap_last_error()->domain == VIR_FROM_QEMU); \
        CHECK(instantsnap_last_error()->message[0] != '\0'); \
    } while (0)

/* Skips the test because a package is missing; fails it where INSTANTSNAP_CI is set, for nothing may be missing there. */
void harness_missing(const char *what) __attribute__((noreturn));

/* Makes the private directory, with the subdirectory `state` and the raw image `disk.raw`. Skips without QEMU. */
void harness_begin(void);

/* A path in the private directory; it lives as long as the test. */
const char *harness_path(const char *name);

/* printf into a string that lives as long as the test. */
const char *harness_text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The QEMU that the tests run. */
const char *harness_qemu_program(void);

/*
 * Starts an empty machine that runs, with one disk `vda` on this image, and waits until its QMP
 * socket of this name accepts. With `incoming` it waits for a snapshot instead of running. Skips
 * where QEMU has no background snapshots. There is a second socket, NAME.aside, for while a
 * snapshot has the first.
 */
pid_t harness_qemu(const char *socket_name, const char *image, const char *format, int incoming);

/* The memory of the QEMUs that are started from now on; 64 MiB before. */
void harness_set_memory(unsigned int mib);

/* Makes another empty raw image in the private directory; its path. */
const char *harness_disk(const char *name);

/* One QMP command on the socket of this name; the answer lives as long as the test. */
const char *harness_qmp(const char *socket_name, const char *command);

/* Whether the guest has this run state, "running" for one. */
int harness_status_is(const char *socket_name, const char *status);

/* Waits for a QEMU to end by itself. */
void harness_wait_for_end(pid_t qemu);

/* The size of a file, -1 where there is none. */
long long harness_file_size(const char *path);

/* Runs a program to its end; its exit status. */
int harness_run(const char *const argv[]);

/* Starts a program whose output can be read; harness_wait() waits for its end. */
pid_t harness_spawn(const char *const argv[], FILE **output);

/* Waits for a child to end; its exit status, or 128 and its signal. */
int harness_wait(pid_t child);

#endif
