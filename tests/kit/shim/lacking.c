/*
 * lacking.c: an LD_PRELOAD library for libvirtd, preloaded after the library under test, that makes
 * its libvirt look like another one.
 *
 * INSTANTSNAP_TEST_LACKS=NAME: dlsym() does not find that symbol. INSTANTSNAP_TEST_VERSION=NUMBER:
 * the virGetVersion() that dlsym() finds returns that number; 9000000 is 9.0.0.
 * INSTANTSNAP_TEST_NO_STDERR=1: the daemon's standard error has no reader.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void __attribute__((constructor)) lose_stderr(void)
{
    int ends[2];

    if (!getenv("INSTANTSNAP_TEST_NO_STDERR") || pipe(ends) < 0)
        return;
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
}

static int get_version(unsigned long *number, const char *type, unsigned long *type_number)
{
    (void)type, (void)type_number;
    *number = strtoul(getenv("INSTANTSNAP_TEST_VERSION"), NULL, 10);
    return 0;
}

void *dlsym(void *library, const char *name)
{
    static void *(*real)(void *, const char *);
    const char *lacks = getenv("INSTANTSNAP_TEST_LACKS");

    if (!real) {
        /* glibc's version of the symbol on every x86-64 machine. */
        void *found = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");

        *(void **)&real = found ? found : dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    }
    if (lacks && !strcmp(name, lacks))
        return NULL;
    if (getenv("INSTANTSNAP_TEST_VERSION") && !strcmp(name, "virGetVersion"))
        return (void *)get_version;
    return real(library, name);
}
