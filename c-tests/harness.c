/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE

#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Long enough for a busy machine: only a failing test waits that long. */
#define DEADLINE_SECONDS 60

#define MAX_QEMUS 8
#define MAX_TEXTS 16384

static char directory[64];
static pid_t owner;
static pid_t qemus[MAX_QEMUS];
static char *texts[MAX_TEXTS];
static size_t text_count;
static unsigned int memory_mib = 64;

static void die(const char *what)
{
    fprintf(stderr, "harness: %s: %s\n", what, strerror(errno));
    exit(1);
}

static time_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
}

/* Waits between two checks of something that sends no event. */
static void breathe(void)
{
    poll(NULL, 0, 10);
}

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *position)
{
    (void) status;
    (void) type;
    (void) position;
    /* The library may be removing it at the same time. */
    remove(path);
    return 0;
}

static void clean_up(void)
{
    /*
     * Never unlocked: the main thread and the signal thread may both end the test, and only one may
     * clean up.
     */
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;

    if (getpid() != owner)
        return;
    pthread_mutex_lock(&once);
    for (size_t i = 0; i < MAX_QEMUS; i++) {
        if (qemus[i] > 0) {
            kill(qemus[i], SIGKILL);
            waitpid(qemus[i], NULL, 0);
        }
    }
    for (int tries = 0; tries < 10 && access(directory, F_OK) == 0; tries++)
        nftw(directory, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    for (size_t i = 0; i < text_count; i++)
        free(texts[i]);
}

/*
 * Meson ends a test that takes too long by SIGTERM. The test must clean up then, too, wherever its
 * main thread is.
 */
static void *clean_up_on_signal(void *signals)
{
    int signal;

    sigwait(signals, &signal);
    fprintf(stderr, "harness: ended by signal %d\n", signal);
    clean_up();
    _exit(1);
}

static const char *keep(char *text)
{
    if (!text || text_count == MAX_TEXTS)
        die("keeping a string");
    texts[text_count++] = text;
    return text;
}

const char *harness_text(const char *format, ...)
{
    va_list arguments;
    char *text = NULL;

    va_start(arguments, format);
    if (vasprintf(&text, format, arguments) < 0)
        text = NULL;
    va_end(arguments);
    return keep(text);
}

const char *harness_path(const char *name)
{
    return harness_text("%s/%s", directory, name);
}

const char *harness_qemu_program(void)
{
    const char *program = getenv("QEMU");

    return program && *program ? program : "qemu-system-x86_64";
}

/* Executes another program in a child, with no signal blocked. The program ends with its parent. */
static void become(const char *const argv[])
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == owner)
        execvp(argv[0], (char *const *) argv);
    _exit(127);
}

int harness_wait(pid_t child)
{
    int status;

    if (waitpid(child, &status, 0) < 0)
        die("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int harness_run(const char *const argv[])
{
    pid_t child;

    fflush(NULL);
    child = fork();
    if (child == 0)
        become(argv);
    if (child < 0)
        die(argv[0]);
    return harness_wait(child);
}

pid_t harness_spawn(const char *const argv[], FILE **output)
{
    pid_t child;
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0)
        die("pipe");
    fflush(NULL);
    child = fork();
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        become(argv);
    }
    close(ends[1]);
    *output = fdopen(ends[0], "r");
    if (child < 0 || !*output)
        die(argv[0]);
    return child;
}

void harness_missing(const char *what)
{
    printf("skipped: %s\n", what);
    exit(getenv("INSTANTSNAP_CI") ? 1 : HARNESS_SKIP);
}

void harness_begin(void)
{
    static sigset_t signals;
    const char *const version[] = {harness_qemu_program(), "--version", NULL};
    const char *temporary = getenv("TMPDIR");
    pthread_t thread;

    owner = getpid();
    if (harness_run(version) != 0)
        harness_missing(harness_text("there is no %s", harness_qemu_program()));

    /* The path of a socket must be short, also libvirt's. If TMPDIR is long, use /tmp. */
    if (!temporary || strlen(temporary) > 30)
        temporary = "/tmp";
    snprintf(directory, sizeof(directory), "%s/instantsnap-XXXXXX", temporary);
    if (!mkdtemp(directory))
        die(directory);

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    atexit(clean_up);
    if (pthread_create(&thread, NULL, clean_up_on_signal, &signals) != 0)
        die("pthread_create");
    pthread_detach(thread);

    if (mkdir(harness_path("state"), 0700) < 0)
        die("state");
    harness_disk("disk.raw");
}

const char *harness_disk(const char *name)
{
    const char *path = harness_path(name);
    int disk = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);

    if (disk < 0 || ftruncate(disk, 1 << 20) < 0)
        die(name);
    close(disk);
    return path;
}

void harness_set_memory(unsigned int mib)
{
    memory_mib = mib;
}

static int try_connect(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        die("socket");
    if (strlen(path) >= sizeof(address.sun_path)) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address.sun_path, path);
    if (connect(fd, (struct sockaddr *) &address, sizeof(address)) == 0)
        return fd;
    close(fd);
    return -1;
}

/* Reads one line of QMP, whose lines are shorter than 64 KiB here. */
static const char *read_line(int fd)
{
    char *line = calloc(1, 1 << 16);
    size_t length = 0;

    keep(line);
    while (length + 1 < 1 << 16) {
        ssize_t got = read(fd, line + length, 1);

        if (got <= 0)
            die("QMP ended, or took too long");
        if (line[length] == '\n')
            break;
        length++;
    }
    line[length] = '\0';
    return line;
}

static const char *converse(int fd, const char *command)
{
    const char *line;

    if (dprintf(fd, "%s\n", command) < 0)
        die("QMP");
    do {
        line = read_line(fd);
    } while (strncmp(line, "{\"timestamp\"", 12) == 0); /* an event */
    return line;
}

const char *harness_qmp(const char *socket_name, const char *command)
{
    /* QEMU serves one client at a time, and greets the next one when this one has disconnected. */
    struct timeval patience = {.tv_sec = DEADLINE_SECONDS};
    int fd = try_connect(harness_path(socket_name));
    const char *answer;

    if (fd < 0)
        die(socket_name);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    read_line(fd);
    converse(fd, "{\"execute\": \"qmp_capabilities\"}");
    answer = converse(fd, command);
    close(fd);
    return answer;
}

int harness_status_is(const char *socket_name, const char *status)
{
    const char *answer = harness_qmp(socket_name, "{\"execute\": \"query-status\"}");

    if (strstr(answer, harness_text("\"status\": \"%s\"", status)))
        return 1;
    fprintf(stderr, "harness: %s\n", answer);
    return 0;
}

static const char *set_background_snapshot(const char *socket_name, int on)
{
    return harness_qmp(
        socket_name,
        harness_text(
            "{\"execute\": \"migrate-set-capabilities\", \"arguments\": {\"capabilities\": "
            "[{\"capability\": \"background-snapshot\", \"state\": %s}]}}",
            on ? "true" : "false"));
}

/* Skips the test if QEMU has no background snapshots. */
static void require_background_snapshots(const char *socket_name)
{
    static int known;
    const char *answer;

    if (known)
        return;
    answer = set_background_snapshot(socket_name, 1);
    if (strncmp(answer, "{\"error\"", 8) == 0) {
        printf("skipped: %s\n", answer);
        exit(HARNESS_SKIP);
    }
    set_background_snapshot(socket_name, 0);
    known = 1;
}

pid_t harness_qemu(const char *socket_name, const char *image, const char *format, int incoming)
{
    const char *path = harness_path(socket_name);
    const char *const argv[] = {
        harness_qemu_program(), "-no-user-config", "-nodefaults", "-display", "none",
        "-accel", "tcg", "-m", harness_text("%u", memory_mib),
        "-qmp", harness_text("unix:%s.aside,server=on,wait=off", path),
        "-qmp", harness_text("unix:%s,server=on,wait=off", path),
        "-blockdev",
        harness_text("driver=%s,node-name=disk,file.driver=file,file.filename=%s", format, image),
        "-device", "virtio-blk-pci,drive=disk,id=vda",
        incoming ? "-incoming" : NULL, "defer", NULL
    };
    time_t deadline = now() + DEADLINE_SECONDS;
    size_t slot = 0;
    int fd;

    while (slot < MAX_QEMUS && qemus[slot] != 0)
        slot++;
    if (slot == MAX_QEMUS)
        die("one QEMU too many");

    fflush(NULL);
    qemus[slot] = fork();
    if (qemus[slot] == 0)
        become(argv);
    if (qemus[slot] < 0)
        die("fork");

    while ((fd = try_connect(path)) < 0) {
        if (waitpid(qemus[slot], NULL, WNOHANG) != 0) {
            qemus[slot] = 0;
            die("QEMU ended at its start");
        }
        if (now() > deadline)
            die("QEMU took too long to start");
        breathe();
    }
    close(fd);
    if (!incoming)
        require_background_snapshots(socket_name);
    return qemus[slot];
}

void harness_wait_for_end(pid_t qemu)
{
    time_t deadline = now() + DEADLINE_SECONDS;

    while (waitpid(qemu, NULL, WNOHANG) == 0) {
        if (now() > deadline)
            die("QEMU took too long to end");
        breathe();
    }
    for (size_t i = 0; i < MAX_QEMUS; i++) {
        if (qemus[i] == qemu)
            qemus[i] = 0;
    }
}

long long harness_file_size(const char *path)
{
    struct stat status;

    return stat(path, &status) < 0 ? -1 : (long long) status.st_size;
}

long long harness_file_space(const char *path)
{
    struct stat status;

    return stat(path, &status) < 0 ? -1 : (long long) status.st_blocks * 512;
}
