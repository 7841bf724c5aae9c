/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the tests need besides the library: a private directory with real QEMUs in it. Both are
 * removed however the test ends. Include the library's header before this one.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

/* The exit status by which Meson counts a test as skipped. */
#define HARNESS_SKIP 77

/*
 * Ends the test if the condition does not hold. Prints the library's last error, often the reason.
 */
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            fprintf(stderr, "(last error of the library: %d, %s)\n", \
                    instantsnap_last_error()->code, instantsnap_last_error()->message); \
            exit(1); \
        } \
    } while (0)

/* Checks that a call failed with this code, in libvirt's domain for QEMU, and with a message. */
#define CHECK_FAILS(failure, expected) \
    do { \
        CHECK(failure); \
        CHECK(instantsnap_last_error()->code == (expected)); \
        CHECK(instantsnap_last_error()->domain == VIR_FROM_QEMU); \
        CHECK(instantsnap_last_error()->message[0] != '\0'); \
    } while (0)

/* Skips the test because a package is missing. Fails it if INSTANTSNAP_CI is set. */
void harness_missing(const char *what) __attribute__((noreturn));

/*
 * Creates the private directory, with the subdirectory `state` and the raw image `disk.raw`. Skips
 * the test without QEMU.
 */
void harness_begin(void);

/* Returns a path in the private directory. The string is valid as long as the test runs. */
const char *harness_path(const char *name);

/* printf into a string that is valid as long as the test runs. */
const char *harness_text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The QEMU that the tests run. */
const char *harness_qemu_program(void);

/*
 * Starts an empty machine with one disk `vda` on this image, and waits until its QMP socket of this
 * name accepts connections. With `incoming` the machine waits for a snapshot instead of running.
 * Skips the test if QEMU has no background snapshots. The test uses a second socket, NAME.aside,
 * while a snapshot uses the first.
 */
pid_t harness_qemu(const char *socket_name, const char *image, const char *format, int incoming);

/* Sets the memory of QEMUs that are started from now on. The default is 64 MiB. */
void harness_set_memory(unsigned int mib);

/* Creates another empty raw image in the private directory, and returns its path. */
const char *harness_disk(const char *name);

/* Runs one QMP command on the socket of this name. The answer is valid as long as the test runs. */
const char *harness_qmp(const char *socket_name, const char *command);

/* Whether the guest has this run state, "running" for one. */
int harness_status_is(const char *socket_name, const char *status);

/* Waits for a QEMU to end by itself. */
void harness_wait_for_end(pid_t qemu);

/* Returns the size of a file, -1 if there is none. */
long long harness_file_size(const char *path);

/* Returns the space that a file takes on its disk, -1 if there is none. */
long long harness_file_space(const char *path);

/* Runs a program to its end, and returns its exit status. */
int harness_run(const char *const argv[]);

/* Starts a program, whose standard output `output` reads. harness_wait() waits for its end. */
pid_t harness_spawn(const char *const argv[], FILE **output);

/* Waits for a child to end. Returns its exit status, or 128 plus its signal. */
int harness_wait(pid_t child);

#endif
