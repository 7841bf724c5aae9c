/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A QEMU and its QMP monitor, for daemon.c. A driver has such code already. Only one thread at a
 * time uses a monitor.
 */
#ifndef MONITOR_H
#define MONITOR_H

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <instantsnap.h>

struct monitor {
    int fd;
    pid_t qemu;
    unsigned int commands;
    char awaited[32], *reply; /* the id of the command that is being run, and its reply */
    char received[1 << 18];
    size_t length;
};

/* Sends a line and at most one descriptor. Never blocks, even if QEMU hangs and reads nothing. */
static int monitor_send(struct monitor *monitor, const char *line, const int *fds, size_t fd_count)
{
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } rights = {.space = {0}};
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
    return sendmsg(monitor->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t) bytes.iov_len
               ? 0 : -1;
}

/*
 * Starts QEMU on the disk.raw of a directory. QEMU's standard input is the monitor; guard.sock is
 * another one, for the watchdog.
 */
static int monitor_start(struct monitor *monitor, const char *qemu, const char *directory)
{
    char disk[512], guard[512];
    int ends[2];

    snprintf(disk, sizeof(disk),
             "driver=raw,node-name=disk,file.driver=file,file.filename=%s/disk.raw", directory);
    snprintf(guard, sizeof(guard), "unix:%s/guard.sock,server=on,wait=off", directory);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0 ||
        (monitor->qemu = fork()) < 0)
        return -1;
    if (monitor->qemu == 0) {
        dup2(ends[1], STDIN_FILENO);
        execlp(qemu, qemu, "-nodefaults", "-display", "none",
               "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk,id=vda",
               "-chardev", "socket,id=monitor,fd=0", "-mon", "chardev=monitor,mode=control",
               "-qmp", guard, (char *) NULL);
        perror(qemu);
        _exit(127);
    }
    close(ends[1]);
    monitor->fd = ends[0];
    return monitor_send(monitor, "{\"execute\": \"qmp_capabilities\"}\n", NULL, 0);
}

/*
 * Reads what QEMU has sent: the awaited reply, and events, which go to the driver's guest with this
 * monitor. Returns -1 if QEMU has closed the monitor.
 */
static int monitor_read(struct monitor *monitor)
{
    char *line = monitor->received, *end;
    ssize_t got = recv(monitor->fd, line + monitor->length,
                       sizeof(monitor->received) - 1 - monitor->length, 0);

    if (got <= 0) {
        close(monitor->fd);
        monitor->fd = -1;
        return -1;
    }
    line[monitor->length + (size_t) got] = '\0';
    for (; (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        if (monitor->awaited[0] && !monitor->reply && strstr(line, monitor->awaited))
            monitor->reply = strdup(line);
        else
            instantsnap_driver_event(monitor, line);
    }
    monitor->length = strlen(line);
    memmove(monitor->received, line, monitor->length + 1);
    return 0;
}

/* Runs a command, `{"execute": ...}`. Returns its reply, or NULL if none came in time. */
static char *monitor_run(struct monitor *monitor, const char *command, const int *fds,
                         size_t fd_count, int timeout_ms)
{
    struct pollfd readable = {.fd = monitor->fd, .events = POLLIN};
    char *line, *reply;

    snprintf(monitor->awaited, sizeof(monitor->awaited), "\"id\": \"command-%u\"",
             ++monitor->commands);
    /* The id goes into the command's own object, after its brace. */
    if (asprintf(&line, "{%s, %s\n", monitor->awaited, command + 1) < 0)
        return NULL;
    if (monitor_send(monitor, line, fds, fd_count) == 0)
        while (!monitor->reply && poll(&readable, 1, timeout_ms) > 0 && monitor_read(monitor) == 0)
            continue;
    free(line);
    reply = monitor->reply;
    monitor->reply = NULL;
    monitor->awaited[0] = '\0';
    if (!reply)
        instantsnap_driver_set_reason("QEMU does not answer");
    return reply;
}

#endif
