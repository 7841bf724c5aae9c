/*
 * keeper.c: runs a private libvirtd for a test, and leaves nothing of it behind.
 *
 *   keeper DIRECTORY UID [SOURCE=TARGET]... -- PROGRAM [ARGUMENT]...
 *
 * With SOURCE=TARGET pairs it creates a mount namespace of its own and mounts each SOURCE over its
 * TARGET there. PROGRAM runs as UID without groups ("-": as the keeper itself).
 *
 * It reads commands from standard input, one a line, and answers each by a line on standard output:
 *   start  starts PROGRAM: "started PID"
 *   kill   kills PROGRAM, but not the processes that it has started: "killed"
 * At "quit", at the end of the input (the test has ended), and at SIGTERM it kills all processes,
 * removes DIRECTORY, and ends.
 *
 * QEMUs that libvirtd starts detach from libvirtd, but not from the keeper: as a child subreaper it
 * inherits every process whose parent ends.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *directory;
static char **program;
static long uid = -1;
static sigset_t handled;
static pid_t daemon_pid;

static void say(const char *what, long number)
{
    char line[64];
    int length = number < 0 ? snprintf(line, sizeof line, "%s\n", what)
                            : snprintf(line, sizeof line, "%s %ld\n", what, number);

    if (write(STDOUT_FILENO, line, length) != length)
        return; /* the reader has gone, and the end of the input follows */
}

static void __attribute__((noreturn)) fail(const char *what, const char *on)
{
    printf("error %s %s: %s\n", what, on, strerror(errno));
    fflush(stdout);
    exit(1);
}

static void mount_over(char *pair)
{
    char *target = strchr(pair, '=');

    if (!target)
        errno = EINVAL, fail("mount", pair);
    *target++ = 0;
    if (mount(pair, target, NULL, MS_BIND, NULL))
        fail("mount over", target);
}

static pid_t run(void)
{
    pid_t pid = fork();

    if (pid < 0)
        fail("fork for", program[0]);
    if (pid)
        return pid;
    int null = open("/dev/null", O_RDWR);

    dup2(null, STDIN_FILENO);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    close(null);
    sigprocmask(SIG_UNBLOCK, &handled, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (uid >= 0 && (setgroups(0, NULL) || setgid(uid) || setuid(uid)))
        _exit(126);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execvp(program[0], program);
    fprintf(stderr, "%s: %s\n", program[0], strerror(errno));
    _exit(127);
}

/* Reaps the processes that have ended, so that none stays a zombie. */
static void reap(void)
{
    pid_t pid;

    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        if (pid == daemon_pid)
            daemon_pid = 0;
}

static void kill_children(void)
{
    DIR *processes = opendir("/proc");
    struct dirent *entry;

    while (processes && (entry = readdir(processes))) {
        char path[300], state;
        int pid = atoi(entry->d_name), parent = 0;
        FILE *file;

        if (pid <= 0)
            continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        if (!(file = fopen(path, "r")))
            continue;
        /* PID (NAME) STATE PARENT. No name here has a parenthesis in it. */
        if (fscanf(file, "%*d (%*[^)]) %c %d", &state, &parent) == 2 && parent == getpid())
            kill(pid, SIGKILL);
        fclose(file);
    }
    if (processes)
        closedir(processes);
}

static void __attribute__((noreturn)) end(void)
{
    /* The children of a killed process become the keeper's, and are killed next. */
    while (kill_children(), waitpid(-1, NULL, WNOHANG) >= 0 || errno == EINTR)
        usleep(1000);
    execlp("rm", "rm", "-rf", "--", directory, (char *)NULL);
    _exit(1);
}

static void obey(const char *command)
{
    if (!strcmp(command, "start")) {
        daemon_pid = run();
        say("started", daemon_pid);
    } else if (!strcmp(command, "kill")) {
        if (daemon_pid) {
            kill(daemon_pid, SIGKILL);
            waitpid(daemon_pid, NULL, 0);
            daemon_pid = 0;
        }
        say("killed", -1);
    } else {
        end();
    }
}

int main(int argc, char **argv)
{
    char line[64];
    size_t length = 0;
    int next = 3;

    if (argc < 5)
        return 2;
    directory = argv[1];
    if (strcmp(argv[2], "-"))
        uid = atol(argv[2]);
    setsid(); /* the terminal's signals to the test must not reach the keeper */
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    if (strcmp(argv[next], "--")) {
        if (unshare(CLONE_NEWNS))
            fail("unshare", "mounts");
        if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
            fail("make private", "/");
        while (argv[next] && strcmp(argv[next], "--"))
            mount_over(argv[next++]);
    }
    if (!argv[next] || !argv[next + 1])
        return 2;
    program = argv + next + 1;

    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGTERM);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    struct pollfd wait_for[] = {{STDIN_FILENO, POLLIN, 0},
                                {signalfd(-1, &handled, SFD_CLOEXEC), POLLIN, 0}};
    say("ready", -1);
    for (;;) {
        if (poll(wait_for, 2, -1) < 0)
            continue;
        if (wait_for[1].revents) {
            struct signalfd_siginfo signal;

            if (read(wait_for[1].fd, &signal, sizeof signal) == sizeof signal &&
                signal.ssi_signo == SIGTERM)
                end();
            reap();
        }
        if (wait_for[0].revents) {
            if (length == sizeof line || read(STDIN_FILENO, line + length, 1) != 1)
                end();
            if (line[length++] == '\n') {
                line[length - 1] = 0;
                length = 0;
                obey(line);
            }
        }
    }
}
