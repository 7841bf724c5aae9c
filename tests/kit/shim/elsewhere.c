/*
 * elsewhere.c: an LD_PRELOAD library for libvirtd whose snapshots do not reach the library under
 * test.
 *
 * With -DBY_ITSELF it is preloaded before that library, and its qemuSnapshotCreateXML() calls that
 * of libvirt's driver. Otherwise it is preloaded after that library, and its
 * virDomainSnapshotCreateXML() has another thread do the work.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef BY_ITSELF

typedef void *(*create)(void *, void *, const char *, unsigned int);

void *qemuSnapshotCreateXML(void *domain, void *vm, const char *xml, unsigned int flags)
{
    char path[4096];
    void *driver;

    snprintf(path, sizeof path, "%s/libvirt_driver_qemu.so", getenv("LIBVIRT_DRIVER_DIR"));
    driver = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    return ((create)dlsym(driver, "qemuSnapshotCreateXML"))(domain, vm, xml, flags);
}

#else

typedef void *(*create)(void *, const char *, unsigned int);

struct call {
    create function;
    void *domain;
    const char *xml;
    unsigned int flags;
};

static void *run(void *opaque)
{
    struct call *call = opaque;

    return call->function(call->domain, call->xml, call->flags);
}

void *virDomainSnapshotCreateXML(void *domain, const char *xml, unsigned int flags)
{
    struct call call = {(create)dlsym(RTLD_NEXT, "virDomainSnapshotCreateXML"), domain, xml, flags};
    pthread_t thread;
    void *result;

    /* An error belongs to the thread in which it happens. */
    if ((flags & 1 << 10) || pthread_create(&thread, NULL, run, &call) != 0)
        return run(&call);
    pthread_join(thread, &result);
    return result;
}

#endif
