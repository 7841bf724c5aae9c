/*
 * imports.c: prints the file of the function that a call of libvirt's virDomainSnapshotCreateXML()
 * would reach.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#ifdef IMPORTS
void *virDomainSnapshotCreateXML(void *domain, const char *xml, unsigned int flags);
#endif

int main(void)
{
    Dl_info info = {.dli_fname = "nothing"};

#ifdef IMPORTS
    dladdr((void *)virDomainSnapshotCreateXML, &info);
#endif
    puts(info.dli_fname);
    return 0;
}
