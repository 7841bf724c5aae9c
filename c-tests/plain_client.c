/*
 * plain_client.c: a client of libvirt that does not use instantsnap. It passes the flags that
 * it is told, and a daemon with instantsnap in it does the rest.
 *
 *   plain_client URI DOMAIN XML FLAGS
 *
 * Prints the snapshot's name, or the error's code and message.
 */
#include <stdio.h>
#include <stdlib.h>

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

int main(int argc, char **argv)
{
    virConnectPtr connection = NULL;
    virDomainPtr domain = NULL;
    virDomainSnapshotPtr snapshot = NULL;
    int code = 1;

    if (argc != 5) {
        fprintf(stderr, "usage: %s URI DOMAIN XML FLAGS\n", argv[0]);
        return 2;
    }
    virSetErrorFunc(NULL, NULL);
    if ((connection = virConnectOpen(argv[1])) &&
        (domain = virDomainLookupByName(connection, argv[2])) &&
        (snapshot = virDomainSnapshotCreateXML(domain, argv[3], strtoul(argv[4], NULL, 0)))) {
        printf("%s\n", virDomainSnapshotGetName(snapshot));
        code = 0;
    } else {
        fprintf(stderr, "%d %s\n", virGetLastErrorCode(), virGetLastErrorMessage());
    }
    if (snapshot)
        virDomainSnapshotFree(snapshot);
    if (domain)
        virDomainFree(domain);
    if (connection)
        virConnectClose(connection);
    return code;
}
