/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Stands in for libinstantsnap where a test wants it to fail, or to call back. Every call says its
 * name on stderr. With INSTEAD_CODE=N it fails with that virErrorNumber; with 0 a revert or delete
 * does nothing, successfully. Otherwise it calls the function of libvirt's that the whole process
 * sees, which is the preloaded one, with the very flags it was given, INSTANT included.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

struct vir_error {
    int code, domain;
    char *message;
    int level;
    void *conn, *dom;
    char *str1, *str2, *str3;
    int int1, int2;
    void *net;
};

struct instantsnap_error {
    int code, domain;
    const char *message;
};

const struct instantsnap_error *instantsnap_last_error(void)
{
    static const struct instantsnap_error none = { 0, 10, "" };
    return &none;
}

/* Whether it fails. */
static int fails(const char *name, unsigned int flags)
{
    static char message[] = "instead of a snapshot";
    const char *code = getenv("INSTEAD_CODE");
    struct vir_error error = { code ? atoi(code) : 0, 10, message, 2, 0, 0, message, 0, 0, -1, -1, 0 };
    int (*set_error)(struct vir_error *);

    fprintf(stderr, "instead: %s 0x%x\n", name, flags);
    if (!error.code)
        return 0;
    /* A program that opened libvirt has it to itself. */
    *(void **) &set_error = dlsym(dlopen("libvirt.so.0", RTLD_LAZY | RTLD_NOLOAD), "virSetError");
    set_error(&error);
    return 1;
}

void *qemuSnapshotCreateXML(void *domain, void *vm, const char *xml, unsigned int flags)
{
    void *(*create)(void *, const char *, unsigned int);

    if (vm || fails("create", flags))
        return NULL;
    *(void **) &create = dlsym(RTLD_DEFAULT, "virDomainSnapshotCreateXML");
    return create(domain, xml, flags);
}

static int on_snapshot(const char *name, const char *function, void *vm, void *snapshot, unsigned int flags)
{
    int (*call)(void *, unsigned int);

    if (vm || fails(name, flags))
        return -1;
    if (getenv("INSTEAD_CODE"))
        return 0;
    *(void **) &call = dlsym(RTLD_DEFAULT, function);
    return call(snapshot, flags);
}

int qemuSnapshotRevert(void *vm, void *snapshot, unsigned int flags)
{
    return on_snapshot("revert", "virDomainRevertToSnapshot", vm, snapshot, flags);
}

int qemuSnapshotDelete(void *vm, void *snapshot, unsigned int flags)
{
    return on_snapshot("delete", "virDomainSnapshotDelete", vm, snapshot, flags);
}
