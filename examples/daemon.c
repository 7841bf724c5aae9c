/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * daemon: starts a QEMU, owns its monitor, and takes instant snapshots of it through a driver's
 * callbacks, with one event loop. Each line on its standard input is the name of a snapshot.
 *
 *     cc -std=c99 examples/daemon.c $(pkg-config --cflags --libs instantsnap) -lpthread -o daemon
 *     echo before-upgrade | ./daemon /tmp/vm /tmp/vm/disk.raw qemu-system-x86_64 -display none \
 *         -blockdev driver=raw,node-name=disk,file.driver=file,file.filename=/tmp/vm/disk.raw \
 *         -device virtio-blk-pci,drive=disk,id=vda \
 *         -chardev socket,id=monitor,fd=0 -mon chardev=monitor,mode=control \
 *         -qmp unix:/tmp/vm/guard.sock,server=on,wait=off
 *
 * The event loop alone reads QEMU's monitor. The library calls back on the job's thread: such a
 * callback writes a command and sleeps until the loop hands it QEMU's reply. So the loop never
 * waits for QEMU. c-tests/daemon.c does the same for many guests, and reverts them.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <instantsnap.h>

struct guest {
    const char *directory, *image;
    instantsnap_guest *handle;
    instantsnap_job *job; /* NULL: no snapshot is being taken */
    char name[256];       /* of the job's snapshot */
    int monitor;          /* -1 once QEMU has closed it */
    char received[1 << 20];
    size_t length;
    /* The command whose reply a callback waits for; `awaited` is its id, or empty. */
    pthread_mutex_t lock;
    pthread_cond_t answered;
    unsigned int commands;
    char awaited[32], *reply;
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static char *print(const char *format, const char *value)
{
    char *text;

    if (asprintf(&text, format, value) < 0)
        die("asprintf");
    return text;
}

/* Sends a line and at most one descriptor. Never blocks, even if QEMU hangs and reads nothing. */
static int send_line(int monitor, const char *line, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } rights = {.space = {0}};
    struct iovec bytes = {.iov_base = (char *) line, .iov_len = strlen(line)};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};

    if (fd_count > 0) {
        rights.header.cmsg_level = SOL_SOCKET;
        rights.header.cmsg_type = SCM_RIGHTS;
        rights.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&rights.header), fds, sizeof(int));
        message.msg_control = &rights;
        message.msg_controllen = sizeof(rights.space);
    }
    if (sendmsg(monitor, &message, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t) strlen(line))
        return -1;
    return 0;
}

/* Callback: runs one QMP command. */
static int run_command(void *opaque, const char *command, const int *fds, size_t fd_count,
                       unsigned int timeout_ms, char **reply)
{
    struct guest *guest = opaque;
    struct timespec deadline;
    int late = 0;
    char *line;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_nsec += timeout_ms % 1000 * 1000000L;
    deadline.tv_sec += timeout_ms / 1000 + deadline.tv_nsec / 1000000000;
    deadline.tv_nsec %= 1000000000;

    pthread_mutex_lock(&guest->lock);
    snprintf(guest->awaited, sizeof(guest->awaited), "\"id\": \"command-%u\"", ++guest->commands);
    /* The id goes into the command's own object, after its brace. */
    if (asprintf(&line, "{%s, %s\n", guest->awaited, command + 1) < 0)
        die("asprintf");
    if (guest->monitor < 0 || send_line(guest->monitor, line, fds, fd_count) < 0)
        guest->awaited[0] = '\0';
    while (guest->awaited[0] && !late)
        late = pthread_cond_clockwait(&guest->answered, &guest->lock, CLOCK_MONOTONIC, &deadline);
    guest->awaited[0] = '\0';
    *reply = guest->reply;
    guest->reply = NULL;
    pthread_mutex_unlock(&guest->lock);
    free(line);
    if (!*reply)
        instantsnap_driver_set_reason(late ? "QEMU did not answer" : "QEMU closed its monitor");
    return *reply ? 0 : -1;
}

/* Callback: the guest's run state. */
static int state(void *opaque)
{
    char *reply;
    int running;

    if (run_command(opaque, "{\"execute\": \"query-status\"}", NULL, 0, 5000, &reply) < 0)
        return -1;
    running = strstr(reply, "\"running\": true") != NULL;
    free(reply);
    return running ? INSTANTSNAP_DRIVER_RUNNING : INSTANTSNAP_DRIVER_PAUSED;
}

/* Callback: as much of libvirt's <domain> as the library needs. QEMU says where the disk is now. */
static char *domain_xml(void *opaque)
{
    return print("<domain type='qemu'><name>guest</name><devices><disk type='file' device='disk'>"
                 "<driver name='qemu' type='raw'/><source file='%s'/>"
                 "<target dev='vda' bus='virtio'/></disk></devices></domain>",
                 ((struct guest *) opaque)->image);
}

/* Callback: where snapshots are recorded. */
static char *state_dir(void *opaque)
{
    return print("%s", ((struct guest *) opaque)->directory);
}

/* Callback: the socket that the watchdog uses to resume the guest if this process is killed. */
static char *guard_socket(void *opaque)
{
    return print("%s/guard.sock", ((struct guest *) opaque)->directory);
}

static const instantsnap_driver_ops driver = {
    .size = sizeof(driver), .monitor = run_command, .state = state, .domain_xml = domain_xml,
    .state_dir = state_dir, .guard_socket = guard_socket,
};

/* Starts QEMU. Its standard input is the monitor. */
static pid_t start_qemu(struct guest *guest, char **command)
{
    int ends[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0 || (pid = fork()) < 0)
        die("start_qemu");
    if (pid == 0) {
        dup2(ends[1], STDIN_FILENO);
        execvp(command[0], command);
        perror(command[0]);
        _exit(127);
    }
    close(ends[1]);
    guest->monitor = ends[0];
    send_line(guest->monitor, "{\"execute\": \"qmp_capabilities\"}\n", NULL, 0);
    return pid;
}

/* Event loop: QEMU has sent a reply or an event, or has closed its monitor. */
static void monitor_ready(struct guest *guest)
{
    char *begin = guest->received + guest->length, *end;
    ssize_t got = recv(guest->monitor, begin, sizeof(guest->received) - 1 - guest->length, 0);

    pthread_mutex_lock(&guest->lock);
    if (got <= 0) {
        close(guest->monitor);
        guest->monitor = -1;
        guest->awaited[0] = '\0';
        got = 0;
    }
    guest->length += (size_t) got;
    guest->received[guest->length] = '\0';
    while ((end = strchr(guest->received, '\n'))) {
        *end++ = '\0';
        if (guest->awaited[0] && strstr(guest->received, guest->awaited)) {
            guest->reply = print("%s", guest->received);
            guest->awaited[0] = '\0';
        } else {
            instantsnap_driver_event(guest, guest->received);
        }
        guest->length = strlen(end);
        memmove(guest->received, end, guest->length + 1);
    }
    pthread_cond_signal(&guest->answered);
    pthread_mutex_unlock(&guest->lock);
}

/* Event loop: starts the snapshot that the next line of standard input names; 0 at its end. */
static int start_snapshot(struct guest *guest)
{
    /* At once: the job's own thread does everything that takes time. */
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};
    char *xml;

    if (!fgets(guest->name, sizeof(guest->name), stdin))
        return 0;
    guest->name[strcspn(guest->name, "\n")] = '\0';
    xml = print("<domainsnapshot><name>%s</name></domainsnapshot>", guest->name);
    guest->job = instantsnap_snapshot_create_start(guest->handle, xml,
                                                   VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                                                   VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, &options);
    if (!guest->job)
        printf("%s: failed: %s\n", guest->name, instantsnap_last_error()->message);
    free(xml);
    return 1;
}

/* Event loop: the job has events. */
static void job_ready(struct guest *guest)
{
    instantsnap_event event = {.size = sizeof(event)};

    while (guest->job && instantsnap_job_next_event(guest->job, &event) == 1) {
        if (event.type == INSTANTSNAP_EVENT_INSTANT)
            printf("%s: instant: the guest may be changed\n", guest->name);
        if (event.type == INSTANTSNAP_EVENT_COMPLETE)
            printf("%s: complete\n", guest->name);
        if (event.type == INSTANTSNAP_EVENT_FAILED && instantsnap_job_get_result(guest->job) < 0)
            printf("%s: failed: %s\n", guest->name, instantsnap_last_error()->message);
        if (event.type == INSTANTSNAP_EVENT_COMPLETE || event.type == INSTANTSNAP_EVENT_FAILED) {
            instantsnap_job_free(guest->job);
            guest->job = NULL;
        }
    }
}

int main(int argc, char **argv)
{
    static struct guest guest = {.lock = PTHREAD_MUTEX_INITIALIZER,
                                 .answered = PTHREAD_COND_INITIALIZER};
    int more = 1;
    pid_t qemu;

    if (argc < 4) {
        fprintf(stderr, "usage: daemon DIRECTORY IMAGE QEMU [ARGUMENT]...\n");
        return 2;
    }
    setvbuf(stdin, NULL, _IONBF, 0); /* poll() knows only of what stdin has not read ahead */
    setvbuf(stdout, NULL, _IOLBF, 0);
    guest.directory = argv[1];
    guest.image = argv[2];
    qemu = start_qemu(&guest, argv + 3);
    guest.handle = instantsnap_open_driver(&driver, &guest);
    if (!guest.handle)
        fprintf(stderr, "%s\n", instantsnap_last_error()->message);

    /* A job outlives QEMU's monitor: it ends with FAILED. */
    while (guest.handle && (guest.job || (more && guest.monitor >= 0))) {
        struct pollfd ready[] = {
            {.fd = guest.monitor, .events = POLLIN},
            {.fd = guest.job ? instantsnap_job_get_fd(guest.job) : STDIN_FILENO, .events = POLLIN},
        };

        if (poll(ready, 2, -1) < 0)
            die("poll");
        if (ready[0].revents)
            monitor_ready(&guest);
        if (ready[1].revents && guest.job)
            job_ready(&guest);
        else if (ready[1].revents)
            more = start_snapshot(&guest);
    }
    instantsnap_close(guest.handle);
    kill(qemu, SIGTERM);
    waitpid(qemu, NULL, 0);
    return guest.handle ? 0 : 1;
}
