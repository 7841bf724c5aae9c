/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define _GNU_SOURCE

#include <libvirt/libvirt-qemu.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <instantsnap.h>

#include "harness.h"
#include "harness_libvirt.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LIBVIRTD "/usr/sbin/libvirtd"

/* The session must not be root's. */
#define NOBODY 65534

/* Long enough for a busy machine, and for libvirt to query QEMU's capabilities. */
#define DEADLINE_SECONDS 120

static pid_t keeper_pid;
static FILE *keeper_commands;
static FILE *keeper_answers;

static void die(const char *what)
{
    fprintf(stderr, "harness: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int is_late(time_t start)
{
    struct timespec now;

    poll(NULL, 0, 10);
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec - start > DEADLINE_SECONDS;
}

static time_t start_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

/* Gives a file to the user that libvirtd and its QEMUs run as. */
static void give(const char *path)
{
    if (geteuid() == 0 && chown(path, NOBODY, NOBODY) < 0)
        die(path);
}

static void make_directory(const char *path, mode_t mode)
{
    if (mkdir(path, mode) < 0)
        die(path);
    give(path);
}

static void write_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "we");

    if (!file || fputs(text, file) < 0 || fclose(file) != 0)
        die(path);
}

/*
 * The keeper ends libvirtd and its QEMUs and removes the directory, on request or when this test
 * ends.
 */
static void end_keeper(void)
{
    fputs("quit\n", keeper_commands);
    fclose(keeper_commands);
    waitpid(keeper_pid, NULL, 0);
    fclose(keeper_answers);
}

static const char *keeper_says(void)
{
    static char line[128];

    if (!fgets(line, sizeof(line), keeper_answers))
        die("the keeper has ended");
    return line;
}

static void start_keeper(const char *keeper)
{
    const char *config = harness_path("etc/libvirt/libvirtd.conf");
    const char *const argv[] = {
        keeper, harness_path(""), geteuid() == 0 ? harness_text("%d", NOBODY) : "-", "--",
        LIBVIRTD, "--config", config, "--pid-file", harness_path("run/libvirtd.pid"), NULL
    };
    const char *const environment[] = {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL=C.UTF-8",
        harness_text("HOME=%s", harness_path("")),
        harness_text("XDG_RUNTIME_DIR=%s", harness_path("run")),
        harness_text("XDG_CONFIG_HOME=%s", harness_path("etc")),
        harness_text("XDG_CACHE_HOME=%s", harness_path("cache")),
        harness_text("XDG_DATA_HOME=%s", harness_path("data")),
        NULL};
    int commands[2], answers[2], log;
    sigset_t none;

    log = open(harness_path("libvirtd.log"), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
    if (log < 0 || pipe2(commands, O_CLOEXEC) < 0 || pipe2(answers, O_CLOEXEC) < 0)
        die("pipes to the keeper");
    fflush(NULL);
    keeper_pid = fork();
    if (keeper_pid == 0) {
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        dup2(commands[0], STDIN_FILENO);
        dup2(answers[1], STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        execve(keeper, (char *const *) argv, (char *const *) environment);
        _exit(127);
    }
    if (keeper_pid < 0)
        die(keeper);
    close(commands[0]);
    close(answers[1]);
    close(log);
    keeper_commands = fdopen(commands[1], "w");
    keeper_answers = fdopen(answers[0], "r");
    if (!keeper_commands || !keeper_answers)
        die("pipes to the keeper");
    setvbuf(keeper_commands, NULL, _IOLBF, 0);
    if (strcmp(keeper_says(), "ready\n") != 0)
        die(keeper);
    atexit(end_keeper);
}

const char *harness_libvirtd(const char *keeper)
{
    static const char *const directories[] = {"etc", "etc/libvirt", "cache", "data", "domains"};
    const char *const qemu_img[] = {"qemu-img", "--version", NULL};
    const char *socket = harness_path("run/libvirt/libvirt-sock");
    const char *uri = harness_text("qemu+unix:///session?socket=%s", socket);
    time_t start = start_clock();
    virConnectPtr connect;

    if (access(LIBVIRTD, X_OK) < 0 || harness_run(qemu_img) != 0)
        harness_missing(harness_text("there is no %s, or no qemu-img", LIBVIRTD));

    /*
     * The user must be able to pass through these; libvirt requires a private directory for
     * sockets.
     */
    if (chmod(harness_path(""), 0755) < 0)
        die("chmod");
    give(harness_path(""));
    for (size_t i = 0; i < sizeof(directories) / sizeof(directories[0]); i++)
        make_directory(harness_path(directories[i]), 0755);
    make_directory(harness_path("run"), 0700);
    write_file(harness_path("etc/libvirt/qemu.conf"), "stdio_handler = \"file\"\n");
    write_file(harness_path("etc/libvirt/libvirtd.conf"),
               "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n");

    /* The test must neither read nor write the user's own configuration of libvirt's clients. */
    if (mkdir(harness_path("client"), 0700) < 0 || setenv("HOME", harness_path("client"), 1) < 0 ||
        setenv("XDG_RUNTIME_DIR", harness_path("client"), 1) < 0 ||
        setenv("INSTANTSNAP_STATE_DIRECTORY", harness_path("client"), 1) < 0)
        die("client");
    unsetenv("XDG_CONFIG_HOME");
    unsetenv("XDG_CACHE_HOME");
    unsetenv("LIBVIRT_DEFAULT_URI");

    start_keeper(keeper);
    fputs("start\n", keeper_commands);
    if (strncmp(keeper_says(), "started ", 8) != 0)
        die(LIBVIRTD);
    while (access(socket, F_OK) < 0 || !(connect = virConnectOpen(uri))) {
        if (is_late(start))
            die("libvirtd does not answer");
    }
    virConnectClose(connect);
    return uri;
}

/* libvirt requires an absolute path, of a program that its user can execute. */
static const char *emulator(void)
{
    const char *program = getenv("QEMU");
    char *path = getenv("PATH");

    if (!program || !*program)
        program = "qemu-system-x86_64";
    if (strchr(program, '/'))
        return harness_text("%s", program);
    for (path = path ? strdup(path) : NULL; path;) {
        char *all = path;
        const char *found = NULL;

        for (char *each = strtok(path, ":"); each && !found; each = strtok(NULL, ":")) {
            found = harness_text("%s/%s", each, program);
            if (access(found, X_OK) < 0)
                found = NULL;
        }
        free(all);
        if (found)
            return found;
        break;
    }
    errno = ENOENT;
    die(program);
    return NULL;
}

const char *harness_domain_path(const char *name, const char *file)
{
    return harness_path(harness_text("domains/%s/%s", name, file));
}

static void copy_file(const char *from, const char *to)
{
    char bytes[1 << 16];
    FILE *source = fopen(from, "re"), *target = fopen(to, "we");
    size_t got;

    if (!source || !target)
        die(from);
    while ((got = fread(bytes, 1, sizeof(bytes), source)) > 0) {
        if (fwrite(bytes, 1, got, target) != got)
            die(to);
    }
    if (ferror(source) || fclose(target) != 0)
        die(to);
    fclose(source);
    give(to);
}

virDomainPtr harness_define(virConnectPtr connect, const char *name, const char *tick)
{
    const char *disk = harness_domain_path(name, "disk.raw");
    const char *kernel = harness_domain_path(name, "tick.elf");
    virDomainPtr domain;
    int fd;

    make_directory(harness_domain_path(name, ""), 0755);
    copy_file(tick, kernel);
    fd = open(disk, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, 16 << 20) < 0)
        die(disk);
    close(fd);
    give(disk);

    domain = virDomainDefineXML(
        connect,
        harness_text(
            "<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64' machine='pc'>hvm</type><kernel>%s</kernel>"
            "<cmdline>tick rest=2500</cmdline></os>"
            "<features><acpi/></features>"
            "<on_reboot>destroy</on_reboot><devices><emulator>%s</emulator>"
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='%s'/>"
            "<target dev='vda' bus='virtio'/>"
            "<address type='pci' domain='0x0000' bus='0x00' slot='0x10' function='0x0'/></disk>"
            "<controller type='usb' model='none'/><memballoon model='none'/>"
            "<serial type='file'><source path='%s'/></serial></devices></domain>",
            name, kernel, emulator(), disk, harness_domain_path(name, "serial.log")));
    if (!domain) {
        fprintf(stderr, "harness: cannot define %s\n", name);
        exit(1);
    }
    return domain;
}

/* Skips the test if QEMU has no background snapshots. */
static void require_background_snapshots(virDomainPtr domain)
{
    static const char *const states[] = {"true", "false"};

    for (size_t i = 0; i < 2; i++) {
        char *answer = NULL;

        if (virDomainQemuMonitorCommand(
                domain,
                harness_text(
                    "{\"execute\": \"migrate-set-capabilities\", \"arguments\": {\"capabilities\": "
                    "[{\"capability\": \"background-snapshot\", \"state\": %s}]}}",
                    states[i]),
                &answer, 0) < 0) {
            fprintf(stderr, "harness: no monitor command\n");
            exit(1);
        }
        if (strstr(answer, "\"error\"")) {
            printf("skipped: %s\n", answer);
            exit(HARNESS_SKIP);
        }
        free(answer);
    }
}

void harness_start(virDomainPtr domain)
{
    if (virDomainCreate(domain) < 0) {
        fprintf(stderr, "harness: cannot start %s\n", virDomainGetName(domain));
        exit(1);
    }
    require_background_snapshots(domain);
    harness_wait_for_tick_after(domain, 0);
}

/* Returns the number of the last whole line, "T 17\n"; -1 if the guest reports a fault. */
static long read_ticks(const char *log)
{
    FILE *file = fopen(log, "re");
    char line[128];
    long tick = 0;

    while (file && fgets(line, sizeof(line), file)) {
        if (strncmp(line, "T ", 2) == 0 && strchr(line, '\n')) {
            tick = atol(line + 2);
        } else if (strstr(line, "TORN") || strstr(line, "FAIL")) {
            fprintf(stderr, "harness: the guest says %s\n", line);
            tick = -1;
            break;
        }
    }
    if (file)
        fclose(file);
    return tick;
}

long harness_ticks(virDomainPtr domain)
{
    long tick = read_ticks(harness_domain_path(virDomainGetName(domain), "serial.log"));

    if (tick < 0)
        exit(1);
    return tick;
}

void harness_wait_for_tick_after(virDomainPtr domain, long tick)
{
    const char *log = harness_domain_path(virDomainGetName(domain), "serial.log");
    time_t start = start_clock();

    for (;;) {
        long now = read_ticks(log);

        if (now < 0)
            exit(1);
        if (now > tick)
            return;
        if (is_late(start)) {
            fprintf(stderr, "harness: the guest has not counted on from %ld\n", tick);
            exit(1);
        }
    }
}
