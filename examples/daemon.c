/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * daemon: starts QEMUs, owns their monitors, and takes instant snapshots of them by a driver's
 * callbacks, with one event loop. Its client names guests and snapshots on the standard input.
 *
 *     cc -std=c99 examples/daemon.c $(pkg-config --cflags --libs instantsnap) -o daemon
 *     mkdir /tmp/a /tmp/b && truncate -s 1G /tmp/a/disk.raw /tmp/b/disk.raw
 *     echo 0 before-upgrade | ./daemon qemu-system-x86_64 /tmp/a /tmp/b
 *
 * A guest is a directory with its disk and its snapshots; the client counts guests from 0. While
 * there is a job, its callbacks read the guest's monitor, on the job's own thread. At any other
 * time the event loop reads it. So the loop never waits for QEMU.
 */
#define _GNU_SOURCE
#include <signal.h>

#include <instantsnap.h>

#include "monitor.h"

static struct guest {
    struct monitor monitor; /* the first member: its address is the guest's */
    const char *directory;
    instantsnap_guest *handle;
    instantsnap_job *job; /* NULL: no snapshot is being taken */
} *guests;

/* Callback: runs one QMP command. */
static int run_command(void *guest, const char *command, const int *fds, size_t fd_count,
                       unsigned int timeout_ms, char **reply)
{
    *reply = monitor_run(guest, command, fds, fd_count, (int) timeout_ms);
    return *reply ? 0 : -1;
}

/* Callback: whether the guest runs. */
static int state(void *guest)
{
    char *reply = monitor_run(guest, "{\"execute\": \"query-status\"}", NULL, 0, 5000);
    int running = reply && strstr(reply, "\"running\": true");

    if (!reply)
        return -1;
    free(reply);
    return running ? INSTANTSNAP_DRIVER_RUNNING : INSTANTSNAP_DRIVER_PAUSED;
}

static char *print(const char *format, const struct guest *guest)
{
    char *text;

    return asprintf(&text, format, guest->directory) < 0 ? NULL : text;
}

/* Callback: the parts of libvirt's <domain> that the library needs; QEMU reports the image. */
static char *domain_xml(void *guest)
{
    return print("<domain type='qemu'><name>guest</name><devices><disk type='file' device='disk'>"
                 "<driver name='qemu' type='raw'/><source file='%s/disk.raw'/>"
                 "<target dev='vda' bus='virtio'/></disk></devices></domain>", guest);
}

/* Callbacks: where snapshots are recorded, and how the watchdog reaches QEMU. */
static char *state_dir(void *guest) { return print("%s", guest); }
static char *guard_socket(void *guest) { return print("%s/guard.sock", guest); }

static const instantsnap_driver_ops driver = {
    .size = sizeof(driver), .monitor = run_command, .state = state, .domain_xml = domain_xml,
    .state_dir = state_dir, .guard_socket = guard_socket,
};

/* Event loop: starts the snapshot that the client asks for. Returns 0 at the end of the input. */
static int client_ready(size_t count)
{
    const unsigned int flags = VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT;
    instantsnap_create_options options = {sizeof(options), .flags = INSTANTSNAP_CREATE_AT_ONCE};
    char line[128], name[64], xml[128];
    size_t n;

    if (!fgets(line, sizeof(line), stdin))
        return 0;
    if (sscanf(line, "%zu %63s", &n, name) != 2 || n >= count || guests[n].job) {
        printf("no guest, or a busy one: %s", line);
        return 1;
    }
    snprintf(xml, sizeof(xml), "<domainsnapshot><name>%s</name></domainsnapshot>", name);
    guests[n].job = instantsnap_snapshot_create_start(guests[n].handle, xml, flags, &options);
    if (!guests[n].job)
        printf("%zu: %s\n", n, instantsnap_last_error()->message);
    return 1;
}

/* Event loop: reads a job's events, or the monitor of a guest without a job. */
static void guest_ready(struct guest *guest)
{
    instantsnap_event event = {.size = sizeof(event)};

    if (!guest->job)
        monitor_read(&guest->monitor);
    while (guest->job && instantsnap_job_next_event(guest->job, &event) == 1) {
        if (event.type == INSTANTSNAP_EVENT_INSTANT)
            printf("%td: instant: the guest may be changed\n", guest - guests);
        if (event.type != INSTANTSNAP_EVENT_COMPLETE && event.type != INSTANTSNAP_EVENT_FAILED)
            continue;
        printf("%td: %s\n", guest - guests, instantsnap_job_get_result(guest->job) == 0
               ? "complete" : instantsnap_last_error()->message);
        instantsnap_job_free(guest->job);
        guest->job = NULL;
    }
}

int main(int argc, char **argv)
{
    size_t count = argc < 3 ? 0 : (size_t) argc - 2, jobs = 0, n;
    struct pollfd *ready = calloc(1 + count, sizeof(*ready));

    ready[0] = (struct pollfd) {.fd = STDIN_FILENO, .events = POLLIN};
    guests = calloc(1 + count, sizeof(*guests));
    setvbuf(stdin, NULL, _IONBF, 0); /* poll() does not see input that stdin has read ahead */
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (n = 0; n < count; n++) {
        guests[n].directory = argv[n + 2];
        guests[n].handle = instantsnap_open_driver(&driver, &guests[n]);
        if (!guests[n].handle || monitor_start(&guests[n].monitor, argv[1], argv[n + 2]) < 0) {
            fprintf(stderr, "%s: %s\n", argv[n + 2], instantsnap_last_error()->message);
            return 1;
        }
    }
    while (ready[0].fd >= 0 || jobs > 0) {
        for (n = 0; n < count; n++)
            ready[n + 1] = (struct pollfd) {
                .fd = guests[n].job ? instantsnap_job_get_fd(guests[n].job) : guests[n].monitor.fd,
                .events = POLLIN};
        if (poll(ready, 1 + count, -1) < 0)
            return 1;
        if (ready[0].revents && !client_ready(count))
            ready[0].fd = -1;
        for (n = jobs = 0; n < count; n++) {
            if (ready[n + 1].revents)
                guest_ready(&guests[n]);
            jobs += guests[n].job != NULL;
        }
    }
    for (n = 0; n < count; n++) {
        instantsnap_close(guests[n].handle);
        kill(guests[n].monitor.qemu, SIGTERM);
    }
    free(ready);
    return 0;
}
