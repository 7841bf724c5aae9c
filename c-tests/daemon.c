/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * daemon SOCKET DIRECTORY GUEST=IMAGE... -- QEMU [ARGUMENT]...: runs a QEMU for each guest, and
 * takes, reverts and deletes their snapshots for the clients that connect to SOCKET. It uses the
 * driver backend with one event loop. examples/daemon.c is a short one.
 *
 * All guests run the command after `--`; the daemon adds the disk (a qcow2 IMAGE) and the monitor.
 * It runs the command in DIRECTORY/GUEST, where the guest's snapshots are recorded too.
 *
 * A client sends lines, and receives lines:
 *
 *     snapshot GUEST [NAME]   instant GUEST NAME: the guest may be changed; later, done GUEST NAME
 *     list GUEST              ok NAME...
 *     revert GUEST NAME       done GUEST NAME
 *     delete GUEST NAME       done GUEST NAME
 *     stats                   ok longest iteration of the event loop: N us
 *
 * or, in place of any of these, error GUEST WHY. SIGTERM ends the daemon and its guests.
 *
 * The event loop alone reads QEMU's monitors. The library calls back on threads of its own, one for
 * each job: such a callback writes a command, and sleeps until the loop hands it QEMU's reply. The
 * loop itself never waits for QEMU.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <instantsnap.h>

#define MAX_GUESTS 64
#define MAX_ARGUMENTS 256
#define LINE 4096

/* A descriptor in the event loop, and the function to call when it is readable. */
struct watch {
    int fd;
    void (*ready)(void *owner);
    void *owner;
};

/* A client, and the part of a line that it has sent so far. */
struct client {
    struct watch watch;
    char line[LINE];
    size_t length;
};

struct guest {
    const char *name;
    char *directory, *watchdog_socket;
    pid_t qemu;
    instantsnap_guest *handle;

    /*
     * The client's request, one at a time. Only the loop uses these, except for `error`, which the
     * reverting thread sets.
     */
    struct client *client;
    struct watch job_watch;
    instantsnap_job *job;
    int busy;
    char snapshot[256];
    char *error;

    /* QEMU's monitor: the loop reads it; a thread of the library writes to it and waits. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct watch monitor; /* its fd is -1 after the end of QEMU */
    char *image;          /* the image that QEMU was started on */
    char *received;       /* the part of a line that has arrived */
    size_t length;
    unsigned int last_id, awaited; /* 0: no thread waits */
    char *reply;
};

static struct guest guests[MAX_GUESTS];
static int guest_count, epoll, ended[2];
static char **qemu_command;
static long long longest_us;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static char *text(const char *format, ...)
{
    va_list arguments;
    char *result;

    va_start(arguments, format);
    if (vasprintf(&result, format, arguments) < 0)
        die("vasprintf");
    va_end(arguments);
    return result;
}

static void watch(struct watch *watch, int fd, void (*ready)(void *), void *owner)
{
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = watch}};

    *watch = (struct watch) {.fd = fd, .ready = ready, .owner = owner};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

static void unwatch(struct watch *watch)
{
    epoll_ctl(epoll, EPOLL_CTL_DEL, watch->fd, NULL);
}

/* QEMU's monitor, as the event loop sees it. */

/*
 * Returns where the value of this member of a JSON object begins; NULL if the object itself has no
 * such member.
 */
static const char *member(const char *json, const char *name)
{
    int depth = 0;

    for (; *json; json++) {
        if (*json == '{' || *json == '[')
            depth++;
        if (*json == '}' || *json == ']')
            depth--;
        if (*json == '"') {
            const char *begin = json + 1;

            for (json++; *json && *json != '"'; json++)
                json += *json == '\\' && json[1];
            if (!*json)
                return NULL;
            if (depth == 1 && json[1] == ':' && (size_t) (json - begin) == strlen(name) &&
                strncmp(begin, name, strlen(name)) == 0)
                return json + 2 + strspn(json + 2, " ");
        }
    }
    return NULL;
}

/*
 * Called with the lock held. Passes an event to the library, and a reply to the thread that waits
 * for it. Drops a reply that comes too late.
 */
static void read_message(struct guest *guest, const char *line)
{
    const char *id = member(line, "id");

    if (member(line, "event"))
        instantsnap_driver_event(guest, line);
    if (id && guest->awaited > 0 && strtoul(id, NULL, 10) == guest->awaited) {
        guest->reply = strdup(line);
        guest->awaited = 0;
        pthread_cond_broadcast(&guest->changed);
    }
}

static void monitor_ready(void *owner)
{
    struct guest *guest = owner;
    char buffer[16384], *end;
    ssize_t got = recv(guest->monitor.fd, buffer, sizeof(buffer), MSG_DONTWAIT);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    pthread_mutex_lock(&guest->lock);
    if (got <= 0) {
        unwatch(&guest->monitor);
        close(guest->monitor.fd);
        guest->monitor.fd = -1;
        guest->awaited = 0;
        guest->length = 0;
        pthread_cond_broadcast(&guest->changed);
    } else {
        guest->received = realloc(guest->received, guest->length + (size_t) got + 1);
        if (!guest->received)
            die("realloc");
        memcpy(guest->received + guest->length, buffer, (size_t) got);
        guest->length += (size_t) got;
        guest->received[guest->length] = '\0';
        /* Only the new bytes can contain the end of a line. */
        if (memchr(buffer, '\n', (size_t) got)) {
            char *line = guest->received;

            while ((end = strchr(line, '\n'))) {
                *end = '\0';
                read_message(guest, line);
                line = end + 1;
            }
            guest->length = strlen(line);
            memmove(guest->received, line, guest->length + 1);
        }
    }
    pthread_mutex_unlock(&guest->lock);
}

/* The callbacks. The library calls them on its own threads, one at a time for one guest. */

/* Never blocks: if QEMU reads nothing any more, the loop must not have to wait for the lock. */
static int send_line(int fd, const char *line, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } ancillary = {.space = {0}};
    struct iovec bytes = {.iov_base = (char *) line, .iov_len = strlen(line)};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};

    if (fd_count > 0) {
        ancillary.header.cmsg_level = SOL_SOCKET;
        ancillary.header.cmsg_type = SCM_RIGHTS;
        ancillary.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&ancillary.header), fds, sizeof(int));
        message.msg_control = &ancillary;
        message.msg_controllen = sizeof(ancillary.space);
    }
    return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t) strlen(line) ? 0 : -1;
}

static int run_command(void *opaque, const char *command, const int *fds, size_t fd_count,
                       unsigned int timeout_ms, char **reply)
{
    struct guest *guest = opaque;
    struct timespec deadline;
    int waited = 0;
    char *line;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (deadline.tv_nsec >= 1000000000L) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000L;
    }

    pthread_mutex_lock(&guest->lock);
    guest->awaited = ++guest->last_id;
    /* The id goes into the command's own object, after its brace. */
    line = text("{\"id\": %u, %s\n", guest->awaited, command + 1);
    if (guest->monitor.fd < 0 || send_line(guest->monitor.fd, line, fds, fd_count) < 0)
        guest->awaited = 0;
    while (guest->awaited > 0 && waited == 0)
        waited = pthread_cond_timedwait(&guest->changed, &guest->lock, &deadline);
    guest->awaited = 0;
    *reply = guest->reply;
    guest->reply = NULL;
    pthread_mutex_unlock(&guest->lock);
    free(line);
    if (!*reply)
        instantsnap_driver_set_reason(waited ? "QEMU did not answer in time"
                                             : "QEMU has closed its monitor");
    return *reply ? 0 : -1;
}

static int ask_state(void *opaque)
{
    struct guest *guest = opaque;
    char *reply;
    int state;

    if (run_command(opaque, "{\"execute\": \"query-status\"}", NULL, 0, 5000, &reply) < 0) {
        pthread_mutex_lock(&guest->lock);
        state = guest->monitor.fd < 0 ? INSTANTSNAP_DRIVER_SHUTOFF : -1;
        pthread_mutex_unlock(&guest->lock);
        return state;
    }
    state = strstr(reply, "\"running\": true") ? INSTANTSNAP_DRIVER_RUNNING
                                               : INSTANTSNAP_DRIVER_PAUSED;
    free(reply);
    return state;
}

/*
 * As much of libvirt's <domain> as the library needs. It finds the disk by its target, and asks
 * QEMU where the disk is now.
 */
static char *tell_domain_xml(void *opaque)
{
    struct guest *guest = opaque;

    return text("<domain type='qemu'><name>%s</name><devices>"
                "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
                "<source file='%s'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
                guest->name, guest->image);
}

static char *tell_state_dir(void *opaque)
{
    return strdup(((struct guest *) opaque)->directory);
}

/* If this process is killed in a pause, the watchdog resumes the guest by this socket. */
static char *tell_watchdog_socket(void *opaque)
{
    return strdup(((struct guest *) opaque)->watchdog_socket);
}

static const instantsnap_driver_ops driver = {
    .size = sizeof(driver),
    .monitor = run_command,
    .state = ask_state,
    .domain_xml = tell_domain_xml,
    .state_dir = tell_state_dir,
    .guard_socket = tell_watchdog_socket,
};

/* Starting QEMU. */

static void start_qemu(struct guest *guest, const char *image, int incoming)
{
    char *arguments[MAX_ARGUMENTS + 16], *own[3];
    size_t count = 0;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    int ends[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        die("socketpair");
    own[0] = text("driver=qcow2,node-name=disk,file.driver=file,file.filename=%s", image);
    own[1] = text("socket,id=monitor,fd=%d", STDIN_FILENO);
    own[2] = text("unix:%s,server=on,wait=off", guest->watchdog_socket);
    for (; qemu_command[count] && count < MAX_ARGUMENTS; count++)
        arguments[count] = qemu_command[count];
    char *const more[] = {
        "-blockdev", own[0], "-device", "virtio-blk-pci,drive=disk,id=vda",
        "-chardev", own[1], "-mon", "chardev=monitor,mode=control", "-qmp", own[2],
        incoming ? "-incoming" : NULL, "defer", NULL
    };
    memcpy(arguments + count, more, sizeof(more));

    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addchdir_np(&actions, guest->directory);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
    posix_spawnattr_init(&attributes);
    sigemptyset(&none);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    errno = posix_spawnp(&guest->qemu, arguments[0], &actions, &attributes, arguments, environ);
    if (errno != 0)
        die(arguments[0]);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    for (size_t i = 0; i < 3; i++)
        free(own[i]);

    /*
     * The reply has no id, and no thread waits for it: QEMU executes one command after the other.
     */
    send_line(ends[0], "{\"execute\": \"qmp_capabilities\"}\n", NULL, 0);
    pthread_mutex_lock(&guest->lock);
    free(guest->image);
    guest->image = strdup(image);
    watch(&guest->monitor, ends[0], monitor_ready, guest);
    pthread_mutex_unlock(&guest->lock);
}

/* What clients want. */

static void say(struct client *client, const char *format, ...)
{
    va_list arguments;
    char *line;
    int length;

    va_start(arguments, format);
    length = vasprintf(&line, format, arguments);
    va_end(arguments);
    if (length < 0)
        die("vasprintf");
    /*
     * The client may have gone since its request. The daemon does not wait for one that does not
     * read.
     */
    if (client)
        send(client->watch.fd, line, (size_t) length, MSG_DONTWAIT | MSG_NOSIGNAL);
    free(line);
}

/* Ends the client's request. */
static void finish(struct guest *guest, const char *error)
{
    if (error)
        say(guest->client, "error %s %s\n", guest->name, error);
    else
        say(guest->client, "done %s %s\n", guest->name, guest->snapshot);
    guest->client = NULL;
    guest->busy = 0;
}

static void job_ready(void *owner)
{
    struct guest *guest = owner;
    instantsnap_event event = {.size = sizeof(event)};

    while (guest->job && instantsnap_job_next_event(guest->job, &event) == 1) {
        if (event.type == INSTANTSNAP_EVENT_INSTANT)
            say(guest->client, "instant %s %s\n", guest->name, guest->snapshot);
        if (event.type == INSTANTSNAP_EVENT_COMPLETE || event.type == INSTANTSNAP_EVENT_FAILED) {
            finish(guest, instantsnap_job_get_result(guest->job) < 0
                              ? instantsnap_last_error()->message
                              : NULL);
            unwatch(&guest->job_watch);
            instantsnap_job_free(guest->job);
            guest->job = NULL;
        }
    }
}

static void snapshot(struct guest *guest)
{
    /* At once: the job's thread does what takes time, and the job's descriptor reports it. */
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};
    char *xml = text("<domainsnapshot><name>%s</name></domainsnapshot>", guest->snapshot);

    guest->job = instantsnap_snapshot_create_start(
        guest->handle, xml, VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT,
        &options);
    free(xml);
    if (guest->job)
        watch(&guest->job_watch, instantsnap_job_get_fd(guest->job), job_ready, guest);
    else
        finish(guest, instantsnap_last_error()->message);
}

static void list(struct guest *guest, struct client *client)
{
    char **names = NULL, *line = text("ok"), *longer;

    if (instantsnap_snapshot_list(guest->handle, &names) < 0) {
        say(client, "error %s %s\n", guest->name, instantsnap_last_error()->message);
    } else {
        for (size_t i = 0; names[i]; i++, line = longer) {
            longer = text("%s %s", line, names[i]);
            free(line);
        }
        say(client, "%s\n", line);
    }
    instantsnap_free_string_list(names);
    free(line);
}

/*
 * Replaces QEMU by another one that continues the snapshot. It takes a while, so it has a thread.
 */
static void *revert(void *opaque)
{
    struct guest *guest = opaque;
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    instantsnap_revert_plan *plan =
        instantsnap_snapshot_prepare_revert(guest->directory, guest->snapshot, NULL);
    char *reply = NULL;

    if (!plan || instantsnap_revert_plan_get_disk(plan, 0, &disk) < 0) {
        guest->error = strdup(instantsnap_last_error()->message);
    } else {
        run_command(guest, "{\"execute\": \"quit\"}", NULL, 0, 5000, &reply);
        free(reply);
        waitpid(guest->qemu, NULL, 0);
        /* The loop must have read the monitor to its end, too. */
        pthread_mutex_lock(&guest->lock);
        while (guest->monitor.fd >= 0)
            pthread_cond_wait(&guest->changed, &guest->lock);
        pthread_mutex_unlock(&guest->lock);
        start_qemu(guest, disk.file, 1);
        if (instantsnap_snapshot_load(guest->handle, guest->snapshot, 0) < 0)
            guest->error = strdup(instantsnap_last_error()->message);
    }
    instantsnap_revert_plan_free(plan);
    if (write(ended[1], &guest, sizeof(guest)) < 0)
        die("pipe");
    return NULL;
}

static void work_ended(void *owner)
{
    struct watch *pipe = owner;
    struct guest *guest;

    if (read(pipe->fd, &guest, sizeof(guest)) != sizeof(guest))
        die("pipe");
    finish(guest, guest->error);
    free(guest->error);
    guest->error = NULL;
}

/*
 * Merges what the guest has written since the snapshot; the more it has written, the longer it
 * takes.
 */
static void *delete(void *opaque)
{
    struct guest *guest = opaque;

    if (instantsnap_snapshot_delete(guest->handle, guest->snapshot, 0) < 0)
        guest->error = strdup(instantsnap_last_error()->message);
    if (write(ended[1], &guest, sizeof(guest)) < 0)
        die("pipe");
    return NULL;
}

static void start(void *work(void *), struct guest *guest)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, work, guest) != 0)
        die("pthread_create");
    pthread_detach(thread);
}

static int is_name(const char *name)
{
    return name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")] ==
           '\0';
}

static void obey(struct client *client, char *line)
{
    char *rest = NULL;
    char *command = strtok_r(line, " \r", &rest);
    char *name = strtok_r(NULL, " \r", &rest);
    char *snapshot_name = strtok_r(NULL, " \r", &rest);
    struct guest *guest = NULL;

    if (command && strcmp(command, "stats") == 0) {
        say(client, "ok longest iteration of the event loop: %lld us\n", longest_us);
        return;
    }
    for (int i = 0; i < guest_count && name; i++) {
        if (strcmp(guests[i].name, name) == 0)
            guest = &guests[i];
    }
    if (!guest || (snapshot_name && !is_name(snapshot_name))) {
        say(client, "error %s no such guest, or no name for a snapshot\n", name ? name : "-");
        return;
    }
    if (strcmp(command, "list") == 0) {
        list(guest, client);
        return;
    }
    if (guest->busy) {
        say(client, "error %s the guest is busy\n", name);
        return;
    }
    if (snapshot_name)
        snprintf(guest->snapshot, sizeof(guest->snapshot), "%s", snapshot_name);
    else
        snprintf(guest->snapshot, sizeof(guest->snapshot), "%lld", (long long) time(NULL));
    guest->client = client;
    guest->busy = 1;
    if (strcmp(command, "snapshot") == 0)
        snapshot(guest);
    else if (strcmp(command, "revert") == 0 && snapshot_name)
        start(revert, guest);
    else if (strcmp(command, "delete") == 0 && snapshot_name)
        start(delete, guest);
    else
        finish(guest, "no such command");
}

static void client_ready(void *owner)
{
    struct client *client = owner;
    ssize_t got = recv(client->watch.fd, client->line + client->length, LINE - 1 - client->length,
                       MSG_DONTWAIT);
    char *end;

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        /* The client has disconnected, or its line is too long. Its request goes on. */
        for (int i = 0; i < guest_count; i++) {
            if (guests[i].client == client)
                guests[i].client = NULL;
        }
        unwatch(&client->watch);
        close(client->watch.fd);
        free(client);
        return;
    }
    client->length += (size_t) got;
    while ((end = memchr(client->line, '\n', client->length))) {
        size_t used = (size_t) (end + 1 - client->line);

        *end = '\0';
        obey(client, client->line);
        client->length -= used;
        memmove(client->line, end + 1, client->length);
    }
}

static void listener_ready(void *owner)
{
    struct watch *listener = owner;
    int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    struct client *client = fd < 0 ? NULL : calloc(1, sizeof(*client));

    if (client)
        watch(&client->watch, fd, client_ready, client);
    else if (fd >= 0)
        close(fd);
}

/* The daemon. */

static void end(void *owner)
{
    (void) owner;
    for (int i = 0; i < guest_count; i++)
        kill(guests[i].qemu, SIGTERM);
    for (int i = 0; i < guest_count; i++)
        waitpid(guests[i].qemu, NULL, 0);
    _exit(0);
}

static void add_guest(const char *directory, char *word)
{
    struct guest *guest = &guests[guest_count++];
    char *image = strchr(word, '=');
    pthread_condattr_t monotonic;

    if (!image || guest_count == MAX_GUESTS)
        die(word);
    *image++ = '\0';
    guest->name = word;
    image = realpath(image, NULL);
    guest->directory = text("%s/%s", directory, guest->name);
    guest->watchdog_socket = text("%s/guard.sock", guest->directory);
    guest->monitor.fd = -1;
    pthread_mutex_init(&guest->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&guest->changed, &monotonic);
    if (!image || !is_name(guest->name) || (mkdir(guest->directory, 0700) < 0 && errno != EEXIST))
        die(word);
    start_qemu(guest, image, 0);
    free(image);
    guest->handle = instantsnap_open_driver(&driver, guest);
    if (!guest->handle) {
        fprintf(stderr, "%s: %s\n", guest->name, instantsnap_last_error()->message);
        end(NULL);
    }
}

static long long now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
    struct watch listener, signals, pipe;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char *directory = argc > 2 ? realpath(argv[2], NULL) : NULL;
    int word = 3, fd;
    sigset_t terminate;

    while (word < argc && strcmp(argv[word], "--") != 0)
        word++;
    if (!directory || word + 1 >= argc || strlen(argv[1]) >= sizeof(address.sun_path)) {
        fprintf(stderr, "usage: daemon SOCKET DIRECTORY GUEST=IMAGE... -- QEMU [ARGUMENT]...\n");
        return 2;
    }
    qemu_command = argv + word + 1;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    sigemptyset(&terminate);
    sigaddset(&terminate, SIGTERM);
    sigaddset(&terminate, SIGINT);
    /* Before there are threads, because they inherit the mask. */
    pthread_sigmask(SIG_BLOCK, &terminate, NULL);
    watch(&signals, signalfd(-1, &terminate, SFD_CLOEXEC), end, NULL);
    if (pipe2(ended, O_CLOEXEC) < 0)
        die("pipe");
    watch(&pipe, ended[0], work_ended, &pipe);
    for (int i = 3; i < word; i++)
        add_guest(directory, argv[i]);

    strcpy(address.sun_path, argv[1]);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *) &address, sizeof(address)) < 0 || listen(fd, 8) < 0)
        die(argv[1]);
    watch(&listener, fd, listener_ready, &listener);

    for (;;) {
        struct epoll_event event;
        struct watch *ready;
        long long woken;

        /* One event at a time: handling one can remove the owner of another. */
        if (epoll_wait(epoll, &event, 1, -1) < 1)
            continue;
        woken = now_us();
        ready = event.data.ptr;
        ready->ready(ready->owner);
        woken = now_us() - woken;
        longest_us = woken > longest_us ? woken : longest_us;
    }
}
