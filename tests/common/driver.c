/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A driver for the tests of the driver backend. It has one thread, a lock that must be held in each
 * callback, and QEMU's monitor, which it uses during an operation only.
 * tests/common/src/backend.rs loads it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <instantsnap.h>

#define CONNECT_MS 30000

/* Functions of the library, which is linked with the test. */
struct library {
    void (*event)(void *opaque, const char *event);
    void (*set_reason)(const char *reason);
};

struct domain {
    struct library library;
    pthread_mutex_t lock;
    char *socket_path, *watchdog_path, *state_dir, *xml;
    int socket;
    unsigned int last_id;
    char *buffer; /* QEMU's output, of which the first `used` bytes are valid */
    size_t size, used;
};

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "the driver of the tests: %s\n", what);
        abort();
    }
}

static void check_locked(struct domain *domain)
{
    check(pthread_mutex_lock(&domain->lock) == EDEADLK, "a callback without the lock");
}

static int refuse(struct domain *domain, const char *reason)
{
    domain->library.set_reason(reason);
    return -1;
}

static long long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Returns QEMU's next line without its end, for free(); NULL if it does not come in time. */
static char *read_line(struct domain *domain, long long until)
{
    for (;;) {
        char *end = domain->used > 0 ? memchr(domain->buffer, '\n', domain->used) : NULL;
        struct pollfd ready = {.fd = domain->socket, .events = POLLIN};
        long long left = until - now_ms();
        ssize_t got;

        if (end) {
            size_t length = end - domain->buffer;
            char *line = strndup(domain->buffer, length);

            domain->used -= length + 1;
            memmove(domain->buffer, end + 1, domain->used);
            return line;
        }
        if (domain->size - domain->used < 4096) {
            domain->size = 2 * domain->size + 8192;
            domain->buffer = realloc(domain->buffer, domain->size);
            check(domain->buffer != NULL, "out of memory");
        }
        if (left <= 0 || poll(&ready, 1, left) <= 0) {
            domain->library.set_reason("QEMU has not answered in time");
            return NULL;
        }
        got = recv(domain->socket, domain->buffer + domain->used, domain->size - domain->used, 0);
        if (got <= 0) {
            domain->library.set_reason("QEMU has closed its monitor");
            return NULL;
        }
        domain->used += got;
    }
}

static int send_line(struct domain *domain, const char *line, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } ancillary = {.space = {0}};
    struct iovec text = {.iov_base = (char *) line, .iov_len = strlen(line)};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};

    check(fd_count <= 1, "more than one descriptor");
    if (fd_count > 0) {
        ancillary.header.cmsg_level = SOL_SOCKET;
        ancillary.header.cmsg_type = SCM_RIGHTS;
        ancillary.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&ancillary.header), fds, sizeof(int));
        message.msg_control = &ancillary;
        message.msg_controllen = sizeof(ancillary.space);
    }
    if (sendmsg(domain->socket, &message, MSG_NOSIGNAL) != (ssize_t) strlen(line))
        return refuse(domain, "QEMU has closed its monitor");
    return 0;
}

/* Returns what follows `"key":` and any spaces in a message of QEMU; NULL if the key is missing. */
static char *find(char *message, const char *key)
{
    char *value = strstr(message, key);

    if (!value)
        return NULL;
    value += strlen(key);
    return value + strspn(value, " :");
}

/* Runs one command, and returns QEMU's reply. Skips a late reply to an earlier command. */
static char *converse(struct domain *domain, const char *command, const int *fds, size_t fd_count,
                      unsigned int timeout_ms)
{
    long long until = now_ms() + timeout_ms;
    char *text, *line, id[32];
    int sent;

    /* `command` is an object: the id goes before its other members. */
    snprintf(id, sizeof(id), "\"driver-%u\"", ++domain->last_id);
    check(asprintf(&text, "{\"id\": %s, %s\n", id, strchr(command, '{') + 1) > 0, "out of memory");
    sent = send_line(domain, text, fds, fd_count);
    free(text);
    if (sent < 0)
        return NULL;
    while ((line = read_line(domain, until))) {
        if (strstr(line, id))
            return line;
        /* An event, or the late reply to an earlier command, which the library ignores. */
        domain->library.event(domain, line);
        free(line);
    }
    return NULL;
}

/* Refuses with QEMU's error message. */
static int refuse_as_qemu(struct domain *domain, char *reply)
{
    char *description = find(reply, "\"desc\"");

    if (!description)
        return refuse(domain, "QEMU's reply makes no sense");
    description[1 + strcspn(description + 1, "\"")] = '\0';
    return refuse(domain, description + 1);
}

/* Shuts the connection down, because a process that the test has forked can have it open, too. */
static void hang_up(struct domain *domain)
{
    shutdown(domain->socket, SHUT_RDWR);
    close(domain->socket);
    domain->socket = -1;
}

static int on_begin(void *opaque)
{
    struct domain *domain = opaque;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char *line;

    check_locked(domain);
    check(domain->socket < 0, "two operations at once");
    check(strlen(domain->socket_path) < sizeof(address.sun_path), "a socket's path is too long");
    strcpy(address.sun_path, domain->socket_path);
    domain->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    domain->used = 0;
    if (connect(domain->socket, (struct sockaddr *) &address, sizeof(address)) == 0 &&
        (line = read_line(domain, now_ms() + CONNECT_MS))) {
        free(line); /* QEMU's greeting */
        line = converse(domain, "{\"execute\": \"qmp_capabilities\"}", NULL, 0, CONNECT_MS);
        free(line);
        if (line)
            return 0;
    }
    hang_up(domain);
    return refuse(domain, "QEMU's monitor is not to be had");
}

static void on_end(void *opaque)
{
    struct domain *domain = opaque;

    check_locked(domain);
    check(domain->socket >= 0, "an operation ends that has not begun");
    hang_up(domain);
}

static int on_monitor(void *opaque, const char *command, const int *fds, size_t fd_count,
                      unsigned int timeout_ms, char **reply)
{
    check_locked(opaque);
    *reply = converse(opaque, command, fds, fd_count, timeout_ms);
    return *reply ? 0 : -1;
}

static int on_state(void *opaque)
{
    struct domain *domain = opaque;
    char *reply, *running;
    int state;

    check_locked(domain);
    reply = converse(domain, "{\"execute\": \"query-status\"}", NULL, 0, CONNECT_MS);
    if (!reply)
        return INSTANTSNAP_DRIVER_SHUTOFF;
    running = find(reply, "\"running\"");
    if (running)
        state = *running == 't' ? INSTANTSNAP_DRIVER_RUNNING : INSTANTSNAP_DRIVER_PAUSED;
    else
        state = refuse_as_qemu(domain, reply);
    free(reply);
    return state;
}

static char *on_domain_xml(void *opaque)
{
    check_locked(opaque);
    return strdup(((struct domain *) opaque)->xml);
}

static char *on_state_dir(void *opaque)
{
    check_locked(opaque);
    return strdup(((struct domain *) opaque)->state_dir);
}

static char *on_watchdog_socket(void *opaque)
{
    check_locked(opaque);
    return strdup(((struct domain *) opaque)->watchdog_path);
}

static int does(struct domain *domain, const char *command, unsigned int timeout_ms)
{
    char *reply;
    int done;

    check_locked(domain);
    reply = converse(domain, command, NULL, 0, timeout_ms);
    if (!reply)
        return -1;
    done = find(reply, "\"error\"") ? refuse_as_qemu(domain, reply) : 0;
    free(reply);
    return done;
}

static int on_pause(void *opaque, unsigned int timeout_ms)
{
    return does(opaque, "{\"execute\": \"stop\"}", timeout_ms);
}

static int on_resume(void *opaque, unsigned int timeout_ms)
{
    return does(opaque, "{\"execute\": \"cont\"}", timeout_ms);
}

static void on_lock(void *opaque)
{
    check(pthread_mutex_lock(&((struct domain *) opaque)->lock) == 0, "the lock is held already");
}

static void on_unlock(void *opaque)
{
    check(pthread_mutex_unlock(&((struct domain *) opaque)->lock) == 0, "the lock is not held");
}

/* The library itself switches, merges and records here, as it does by a QMP socket. */
static const instantsnap_driver_ops ops = {
    .size = sizeof(ops), .monitor = on_monitor, .state = on_state, .domain_xml = on_domain_xml,
    .state_dir = on_state_dir, .pause = on_pause, .resume = on_resume, .begin_job = on_begin,
    .end_job = on_end, .lock = on_lock, .unlock = on_unlock, .guard_socket = on_watchdog_socket
};

/* For tests/common/src/backend.rs. A domain is never freed. */

const instantsnap_driver_ops *test_driver_ops(void);
void *test_driver_domain(const struct library *library, const char *socket_path,
                         const char *watchdog_path, const char *state_dir, const char *xml);

const instantsnap_driver_ops *test_driver_ops(void)
{
    return &ops;
}

void *test_driver_domain(const struct library *library, const char *socket_path,
                         const char *watchdog_path, const char *state_dir, const char *xml)
{
    struct domain *domain = calloc(1, sizeof(*domain));
    pthread_mutexattr_t checking;

    check(domain != NULL, "out of memory");
    pthread_mutexattr_init(&checking);
    pthread_mutexattr_settype(&checking, PTHREAD_MUTEX_ERRORCHECK);
    check(pthread_mutex_init(&domain->lock, &checking) == 0, "no lock");
    pthread_mutexattr_destroy(&checking);
    domain->library = *library;
    domain->socket_path = strdup(socket_path);
    domain->watchdog_path = strdup(watchdog_path);
    domain->state_dir = strdup(state_dir);
    domain->xml = strdup(xml);
    domain->socket = -1;
    return domain;
}
