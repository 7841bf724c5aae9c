/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * snapshot_many: takes instant snapshots of several guests at the same time, from one thread with
 * an event loop, and prints each event.
 *
 *     cc -std=c99 examples/snapshot_many.c $(pkg-config --cflags --libs instantsnap) \
 *         -o snapshot_many
 *     ./snapshot_many /tmp/one/qmp.sock /tmp/one/snapshots /tmp/two/qmp.sock /tmp/two/snapshots
 *
 * Each guest has a QMP socket and a directory in which its snapshots are recorded. Ctrl-C cancels
 * all snapshots; the program ends when every guest is as it was. Exit status: 0 all snapshots are
 * complete, 1 not all are, 130 some were cancelled.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include <instantsnap.h>

struct guest {
    const char *socket;
    instantsnap_guest *handle;
    instantsnap_job *job; /* NULL: not started */
};

static struct guest *guests;
static int count, running, complete, cancelled;

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t) now.tv_sec * 1000000 + (uint64_t) now.tv_nsec / 1000;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int epoll, int fd, struct guest *guest)
{
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = guest}};

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

static void start(int epoll, struct guest *guest)
{
    /* At once: without this flag the call would wait for the instant. */
    instantsnap_create_options options = {.size = sizeof(options), .progress_interval_ms = 200,
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};

    guest->job = instantsnap_snapshot_create_start(guest->handle, "<domainsnapshot/>",
                                                   VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                                                   VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, &options);
    if (!guest->job) {
        printf("%s: not started: %s\n", guest->socket, instantsnap_last_error()->message);
        return;
    }
    watch(epoll, instantsnap_job_get_fd(guest->job), guest);
    running++;
}

/* Prints one line for all guests. */
static void print_progress(void)
{
    uint64_t bytes = 0, pages_left = 0;
    int instants = 0;

    for (int i = 0; i < count; i++) {
        instantsnap_job_info info = {.size = sizeof(info)};

        if (guests[i].job && instantsnap_job_get_info(guests[i].job, &info) == 0) {
            instants += info.instant == 1;
            bytes += info.bytes_done;
            pages_left += info.pages_left;
        }
    }
    printf("progress: %d of %d past the instant, %d complete; "
           "%" PRIu64 " KiB written, %" PRIu64 " pages left\n",
           instants, count, complete, bytes >> 10, pages_left);
}

static void print_event(const struct guest *guest, const instantsnap_event *event, uint64_t since)
{
    char *name;

    if (event->type == INSTANTSNAP_EVENT_PROGRESS) {
        print_progress();
        return;
    }
    printf("%8.1f ms %s: ", (double) (event->time_us - since) / 1000, guest->socket);
    switch (event->type) {
    case INSTANTSNAP_EVENT_PAUSED:
        printf("paused\n");
        break;
    case INSTANTSNAP_EVENT_SWITCHED:
        printf("switched: its disks are on their overlays\n");
        break;
    case INSTANTSNAP_EVENT_INSTANT:
        printf("instant: it was paused for %.1f ms\n", (double) event->paused_us / 1000);
        break;
    case INSTANTSNAP_EVENT_COMPLETE:
        name = instantsnap_job_get_name(guest->job);
        printf("complete: %s, %" PRIu64 " KiB\n", name, event->bytes_done >> 10);
        instantsnap_free_string(name);
        complete++;
        running--;
        break;
    case INSTANTSNAP_EVENT_FAILED:
        instantsnap_job_get_result(guest->job);
        printf("failed: %s\n", instantsnap_last_error()->message);
        cancelled += event->error_code == VIR_ERR_OPERATION_ABORTED;
        running--;
        break;
    default: /* an event of a later version of the library */
        printf("event %" PRIu32 "\n", event->type);
    }
}

static void cancel_all(int signals)
{
    struct signalfd_siginfo info;

    if (read(signals, &info, sizeof(info)) < 0)
        die("signalfd");
    printf("cancelling: %d snapshots are still to be undone\n", running);
    for (int i = 0; i < count; i++) {
        if (guests[i].job)
            instantsnap_job_cancel(guests[i].job);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event ready[16];
    uint64_t started, woken, longest = 0;
    sigset_t interrupt;
    int epoll, signals;

    if (argc < 3 || argc % 2 == 0) {
        fprintf(stderr, "usage: snapshot_many QMP_SOCKET STATE_DIR [QMP_SOCKET STATE_DIR]...\n");
        return 2;
    }
    count = argc / 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    sigprocmask(SIG_BLOCK, &interrupt, NULL);
    signals = signalfd(-1, &interrupt, SFD_CLOEXEC | SFD_NONBLOCK);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    guests = calloc((size_t) count, sizeof(*guests));
    if (signals < 0 || epoll < 0 || !guests)
        die("snapshot_many");
    watch(epoll, signals, NULL);

    /*
     * Opens the guests before the loop, because opening can block: for 5 seconds while another
     * client uses the socket.
     */
    for (int i = 0; i < count; i++) {
        guests[i].socket = argv[1 + 2 * i];
        guests[i].handle = instantsnap_open_qmp(guests[i].socket, NULL, argv[2 + 2 * i]);
        if (!guests[i].handle) {
            fprintf(stderr, "%s: %s\n", guests[i].socket, instantsnap_last_error()->message);
            return 1;
        }
    }

    started = woken = now_us();
    for (int i = 0; i < count; i++)
        start(epoll, &guests[i]);
    for (;;) {
        uint64_t away = now_us() - woken;
        int n;

        longest = away > longest ? away : longest;
        if (running == 0)
            break;
        n = epoll_wait(epoll, ready, 16, -1);
        woken = now_us();
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            instantsnap_event event = {.size = sizeof(event)};
            struct guest *guest = ready[i].data.ptr;

            if (!guest)
                cancel_all(signals);
            while (guest && instantsnap_job_next_event(guest->job, &event) == 1)
                print_event(guest, &event, started);
        }
    }
    printf("%d of %d complete; never away from epoll_wait for more than %.3f ms\n", complete, count,
           (double) longest / 1000);

    for (int i = 0; i < count; i++) {
        instantsnap_job_free(guests[i].job);
        instantsnap_close(guests[i].handle);
    }
    free(guests);
    return cancelled > 0 ? 130 : complete < count;
}
