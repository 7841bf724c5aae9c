/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * storage_hook: takes an instant snapshot of a guest whose disk `vda` is snapshotted by the
 * caller's own storage, in the pause, and not by QEMU. The "storage" here is `cp`, which copies the
 * disk's image to IMAGE.SNAPSHOT; a real hook runs `lvcreate --snapshot`, `zfs snapshot` or
 * `rbd snap create`.
 *
 *     cc -std=c99 examples/storage_hook.c $(pkg-config --cflags --libs instantsnap) -o storage_hook
 *     qemu-system-x86_64 -display none -m 256 \
 *         -blockdev driver=raw,node-name=disk,file.driver=file,file.filename=/tmp/vm/disk.raw \
 *         -device virtio-blk-pci,drive=disk,id=vda \
 *         -qmp unix:/tmp/vm/qmp.sock,server=on,wait=off &
 *     ./storage_hook /tmp/vm/qmp.sock /tmp/vm/snapshots
 */
#define _GNU_SOURCE
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <instantsnap.h>

/* IMAGE.SNAPSHOT, for the caller to free; NULL without memory. */
static char *copy_of(const instantsnap_storage_call *call, size_t disk)
{
    char *path;

    return asprintf(&path, "%s.%s", call->disks[disk]->source, call->snapshot) < 0 ? NULL : path;
}

static int copy(const char *from, const char *to)
{
    char *const command[] = {"cp", "--reflink=auto", "--", (char *) from, (char *) to, NULL};
    int status;
    pid_t child;

    if (posix_spawnp(&child, command[0], NULL, NULL, command, environ) != 0)
        return -1;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            return -1;
    }
    return status == 0 ? 0 : -1;
}

static void remove_copies(const instantsnap_storage_call *call, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        char *path = copy_of(call, i);

        if (path)
            unlink(path);
        free(path);
    }
}

/*
 * Called in the pause: snapshots every disk of the call. It must be quick, because the guest is
 * paused, and it must return by the deadline. If it fails, it leaves nothing behind.
 */
static int take(const instantsnap_storage_call *call, void *opaque)
{
    (void) opaque;
    for (size_t i = 0; i < call->disk_count; i++) {
        char *path = copy_of(call, i);
        int result = path ? copy(call->disks[i]->source, path) : -1;

        free(path);
        if (result < 0) {
            remove_copies(call, i + 1);
            return -1;
        }
    }
    return 0;
}

/*
 * Called if the snapshot of the guest fails after take() has succeeded, and after the snapshot was
 * deleted: removes the copies.
 */
static void undo(const instantsnap_storage_call *call, void *opaque)
{
    (void) opaque;
    remove_copies(call, call->disk_count);
}

/* Names the image that a new QEMU uses for each disk: a clone, because its guest writes to it. */
static int revert(const instantsnap_storage_call *call, char **files, void *opaque)
{
    (void) opaque;
    for (size_t i = 0; i < call->disk_count; i++) {
        char *path = copy_of(call, i);

        if (!path || asprintf(&files[i], "%s.clone", path) < 0)
            files[i] = NULL;
        if (!files[i] || copy(path, files[i]) < 0) {
            free(path);
            return -1;
        }
        free(path);
    }
    return 0;
}

int main(int argc, char **argv)
{
    const instantsnap_storage_hook hook = {.size = sizeof(hook), .snapshot = take, .undo = undo,
                                           .revert = revert, .deadline_ms = 10000};
    const char *xml = "<domainsnapshot><disks><disk name='vda' snapshot='manual'/></disks>"
                      "</domainsnapshot>";
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    instantsnap_revert_plan *plan = NULL;
    instantsnap_guest *guest;
    char *name = NULL;
    int result = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: storage_hook QMP_SOCKET STATE_DIR\n");
        return 2;
    }

    guest = instantsnap_open_qmp(argv[1], NULL, argv[2]);
    if (!guest || instantsnap_set_storage_hook(guest, &hook) < 0)
        goto out;
    if (instantsnap_snapshot_create_xml(guest, xml, VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                                        VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, &name) < 0)
        goto out;
    printf("took %s\n", name);

    /* Prepares a clone of the guest as it was at the instant. */
    plan = instantsnap_snapshot_prepare_revert_hooked(argv[2], name, NULL, &hook);
    if (!plan || instantsnap_revert_plan_get_disk(plan, 0, &disk) < 0)
        goto out;
    printf("a QEMU that continues it uses %s as %s\n", disk.file, disk.name);
    result = 0;

 out:
    if (result != 0)
        fprintf(stderr, "%s\n", instantsnap_last_error()->message);
    instantsnap_revert_plan_free(plan);
    instantsnap_free_string(name);
    instantsnap_close(guest);
    return result;
}
