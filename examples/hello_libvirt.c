/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * hello_libvirt: takes an instant snapshot of a running domain of a stock libvirt.
 *
 *     cc -std=c99 examples/hello_libvirt.c \
 *         $(pkg-config --cflags --libs instantsnap libvirt) -o hello_libvirt
 *     ./hello_libvirt qemu:///system vm /var/lib/libvirt/images/vm.mem
 *
 * The third argument is the file for the guest's memory. The disks get overlays beside their
 * images. `virsh snapshot-list vm` shows the snapshot like any other. With a libvirt before 9.9
 * virsh cannot revert to it; qemuSnapshotRevert(NULL, snapshot, 0) can.
 */
#include <stdio.h>

#include <instantsnap-libvirt.h>

int main(int argc, char **argv)
{
    char xml[4096];
    virConnectPtr connect = NULL;
    virDomainPtr domain = NULL;
    virDomainSnapshotPtr snapshot = NULL;

    if (argc != 4) {
        fprintf(stderr, "usage: hello_libvirt URI DOMAIN MEMORY_FILE\n");
        return 2;
    }
    snprintf(xml, sizeof(xml),
             "<domainsnapshot><memory snapshot='external' file='%s'/></domainsnapshot>", argv[3]);

    if ((connect = virConnectOpen(argv[1])) && (domain = virDomainLookupByName(connect, argv[2])))
        snapshot = qemuSnapshotCreateXML(domain, NULL, xml,
                                         VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                                         VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT);
    if (snapshot)
        printf("took %s\n"
               "to revert to it, with libvirt 9.9 or later: virsh -c '%s' snapshot-revert %s %s\n",
               virDomainSnapshotGetName(snapshot), argv[1], argv[2],
               virDomainSnapshotGetName(snapshot));
    else
        fprintf(stderr, "%s\n", virGetLastErrorMessage());

    if (domain)
        virDomainFree(domain);
    if (connect)
        virConnectClose(connect);
    if (!snapshot)
        return 1;
    virDomainSnapshotFree(snapshot);
    return 0;
}
