/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * hello: takes an instant snapshot of a QEMU by its QMP socket, and lists the guest's snapshots.
 *
 *     cc -std=c99 examples/hello.c $(pkg-config --cflags --libs instantsnap) -o hello
 *     qemu-system-x86_64 -display none -qmp unix:/tmp/vm/qmp.sock,server=on,wait=off &
 *     ./hello /tmp/vm/qmp.sock /tmp/vm/snapshots
 *
 * The second argument is the directory in which the snapshots are recorded.
 */
#include <stdio.h>

#include <instantsnap.h>

int main(int argc, char **argv)
{
    instantsnap_guest *guest;
    char **names = NULL;
    char *name = NULL;
    int result = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: hello QMP_SOCKET STATE_DIR\n");
        return 2;
    }

    guest = instantsnap_open_qmp(argv[1], NULL, argv[2]);
    if (!guest)
        goto out;

    if (instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>",
                                        VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                                        VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, &name) < 0)
        goto out;
    printf("took %s\n", name);

    if (instantsnap_snapshot_list(guest, &names) < 0)
        goto out;
    for (char **each = names; *each; each++)
        printf("has %s\n", *each);
    result = 0;

 out:
    if (result != 0)
        fprintf(stderr, "%s\n", instantsnap_last_error()->message);
    instantsnap_free_string_list(names);
    instantsnap_free_string(name);
    instantsnap_close(guest);
    return result;
}
