/*
 * late-arm.c: an LD_PRELOAD library for QEMU that holds its snapshot thread between "migration is
 * active" and "device state saved, write tracking armed".
 *
 * Every background snapshot has that gap, but it is short. A caller that takes `active` for `armed`
 * and resumes the guest in it gets memory that is newer than the disks. With the gap held open this
 * happens every time.
 *
 * The thread reads the host's clock twice: at its start, and right after it has set the status to
 * `active`, when it does not hold QEMU's big lock yet. At the second reading it waits once, until
 * the file that INSTANTSNAP_LATE_ARM_RELEASE names exists, at most 5 seconds. The thread is found
 * by its name, so QEMU must run with `-name NAME,debug-threads=on`.
 *
 * At the first reading it waits for INSTANTSNAP_SETUP_US microseconds, like a guest with much
 * memory whose setup takes that long.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int in_snapshot_thread(void)
{
    static __thread int known; /* 0: not yet, 1: yes, 2: no */
    char name[16] = "";

    if (!known) {
        pthread_getname_np(pthread_self(), name, sizeof name);
        known = strstr(name, "snapshot") ? 1 : 2;
    }
    return known == 1;
}

static void wait_for_release(void)
{
    const char *release = getenv("INSTANTSNAP_LATE_ARM_RELEASE");
    const struct timespec millisecond = {.tv_nsec = 1000000};

    for (int i = 0; release && i < 5000 && access(release, F_OK) != 0; i++)
        nanosleep(&millisecond, NULL);
}

static void wait_in_setup(void)
{
    const char *text = getenv("INSTANTSNAP_SETUP_US");

    if (text)
        usleep(atoi(text));
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    static __thread int readings;
    static int (*real)(struct timeval *restrict, void *restrict);
    int result;

    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "gettimeofday");
    if (!in_snapshot_thread())
        return real(now, zone);
    if (++readings == 2)
        wait_for_release();
    result = real(now, zone);
    if (readings == 1)
        wait_in_setup();
    return result;
}
