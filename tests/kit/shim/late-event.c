/*
 * late-event.c: an LD_PRELOAD library for libvirtd that delays the handling of QEMU's events in its
 * driver, for instance of the end of a QEMU.
 *
 * The driver's event loop hands such events to a thread pool of the driver. Until they are handled
 * libvirt answers every client as before, and considers a domain running whose QEMU has ended.
 * Every event has that gap, but it is short. While the file that INSTANTSNAP_HOLD_EVENTS names
 * exists, events wait in front of the pool.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int send_job(void *pool, unsigned int priority, void *job);

struct event {
    void *pool;
    unsigned int priority;
    void *job;
};

static int held(void)
{
    const char *hold = getenv("INSTANTSNAP_HOLD_EVENTS");

    return hold && access(hold, F_OK) == 0;
}

static int pass_on(const struct event *event)
{
    static send_job *real;

    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "virThreadPoolSendJob");
    return real(event->pool, event->priority, event->job);
}

static void *wait_and_pass_on(void *opaque)
{
    const struct timespec millisecond = {.tv_nsec = 1000000};

    while (held())
        nanosleep(&millisecond, NULL);
    pass_on(opaque);
    free(opaque);
    return NULL;
}

/* The daemon's own pool, for the calls of clients, uses this function too. */
static int is_drivers(const void *caller)
{
    Dl_info info;

    return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "driver_qemu");
}

int virThreadPoolSendJob(void *pool, unsigned int priority, void *job)
{
    struct event event = {pool, priority, job}, *later;
    pthread_t thread;

    if (!is_drivers(__builtin_return_address(0)) || !held() || !(later = malloc(sizeof *later)))
        return pass_on(&event);
    *later = event;
    if (pthread_create(&thread, NULL, wait_and_pass_on, later) != 0) {
        free(later);
        return pass_on(&event);
    }
    pthread_detach(thread);
    return 0;
}
