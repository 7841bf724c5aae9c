/* SPDX-License-Identifier: LGPL-2.1-or-later */
/**
 * instantsnap-libvirt.h: instant snapshots by the names and signatures of libvirt's qemu driver
 * (qemu_snapshot.h).
 *
 * The shortest useful program, a client of a stock libvirt:
 *
 *     virDomainSnapshotPtr snapshot =
 *         qemuSnapshotCreateXML(domain, NULL,
 *                               "<domainsnapshot>"
 *                               "  <memory snapshot='external' file='/var/lib/libvirt/images/vm.mem'/>"
 *                               "</domainsnapshot>",
 *                               VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT);
 *
 *     if (!snapshot)
 *         fprintf(stderr, "%s\n", virGetLastErrorMessage());
 *
 * `vm` says who runs the guest:
 *
 * - NULL: a client of a stock libvirt, 8.2 or later, on the same machine: any connection to its
 *   QEMU driver (`qemu:///system`, `qemu:///session`, `qemu+unix:///...`). See "Clients" below, and
 *   instantsnap_open_libvirt().
 * - a guest of instantsnap_open_qmp(), cast to `virDomainObj *`, with `domain` NULL: direct QMP.
 *   The snapshot returned is an `instantsnap_snapshot *` in libvirt's clothes: give it to
 *   qemuSnapshotRevert(), qemuSnapshotDelete() and the instantsnap_snapshot_ functions only, never
 *   to libvirt. Errors are in instantsnap_last_error().
 * - anything else: the domain object of a driver, libvirt's or one like it, that has made itself
 *   known by instantsnap_register_driver(): it is called back with `vm`, whatever the flags, its
 *   lock is held at the call, and it is told of errors. See "The driver's way in" in instantsnap.h.
 *   Where no driver is registered, the call goes to the next definition of the symbol in the
 *   process, untouched; where there is none, VIR_ERR_OPERATION_UNSUPPORTED. But in a stock libvirt
 *   daemon into which this library is preloaded, INSTANT is done as for its clients, and so are
 *   revert and delete of a snapshot with its memory in a file: see docs/inside-the-daemon.md.
 *
 * Snapshots of one guest of instantsnap_open_qmp() can be given with another that has the same
 * state directory: a clone's, to revert.
 *
 * Clients (`vm` NULL):
 *
 * - Objects are libvirt's own. Those given are not kept: each call takes the references that it
 *   needs, and has given them back when it returns. A snapshot returned is the caller's, to be
 *   freed with virDomainSnapshotFree(); like every object of libvirt's it keeps its domain's
 *   connection open. All of libvirt's functions work on it.
 * - Errors are in virGetLastError(), from VIR_FROM_QEMU, with a message that says which step failed
 *   on what; and, the same, in instantsnap_last_error(). What libvirt itself refuses has libvirt's
 *   own error. A call that succeeds leaves no error behind. Of errors that are not libvirt's own,
 *   its error handlers (virSetErrorFunc()) and virConnGetLastError() are not told.
 * - libvirt is looked for at the first call. Where it is missing or older, the error is in
 *   instantsnap_last_error() alone: VIR_ERR_OPERATION_UNSUPPORTED.
 * - Every call blocks until it is done: it is for a thread that may wait, not for a callback of
 *   libvirt's event loop. No event loop is needed.
 * - Any thread may call, several at once too, on one connection or on several. Of two operations on
 *   one domain the second fails at once with VIR_ERR_OPERATION_INVALID, also where the first is
 *   another process's.
 * - The caller must be able to write where the domain's images are: root, or the user of a session.
 */
#ifndef INSTANTSNAP_LIBVIRT_H
#define INSTANTSNAP_LIBVIRT_H

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <instantsnap.h>

#ifdef __cplusplus
extern "C" {
#endif

/** libvirt's own domain object, opaque here; or an `instantsnap_guest`, see above. */
typedef struct _virDomainObj virDomainObj;

/**
 * Takes a snapshot. Blocks until it is complete and on disk.
 *
 * @domain   the domain, where `vm` is NULL; NULL for a guest of instantsnap_open_qmp().
 * @vm       see above.
 * @xmlDesc  libvirt's `<domainsnapshot>`. For an instant snapshot of a client, memory needs a place:
 *           `<memory snapshot='external' file='...'/>`. All else may be left out.
 * @flags    virDomainSnapshotCreateFlags and VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT.
 *
 * For a client, without INSTANT this is virDomainSnapshotCreateXML(), its result and its error as
 * they are. With INSTANT, and LIVE, which belongs to it, it is an instant snapshot of the running
 * domain; NO_METADATA, HALT, REUSE_EXT, ATOMIC and VALIDATE (which takes libvirt's schema and
 * xmllint) go with it, in libvirt's meaning (of overlays that are there beforehand see
 * instantsnap_snapshot_create_xml(); inside a daemon none are taken); DISK_ONLY, REDEFINE, CURRENT
 * and QUIESCE do not. libvirt records the snapshot like one of its own, as the current one. A
 * domain that is paused gets a snapshot of libvirt's own, and stays paused.
 *
 * For a guest of instantsnap_open_qmp() it is instantsnap_snapshot_create_xml(); so it is for a
 * registered driver, which gets what its `make_snapshot` makes.
 *
 * Returns the snapshot, for virDomainSnapshotFree() (of a guest of instantsnap_open_qmp(), for
 * instantsnap_snapshot_free()); or NULL with everything as it was before. Errors are those of
 * instantsnap_snapshot_create_xml(); further, for a client, VIR_ERR_INVALID_DOMAIN,
 * VIR_ERR_NO_DOMAIN, VIR_ERR_OPERATION_UNSUPPORTED (another driver, or a connection to another
 * machine), VIR_ERR_RPC (libvirt's daemon is gone).
 */
virDomainSnapshotPtr qemuSnapshotCreateXML(virDomainPtr domain, virDomainObj *vm, const char *xmlDesc,
                                           unsigned int flags);

/**
 * Brings a guest back to a snapshot.
 *
 * @snapshot  for a client libvirt's own, however it was taken; for a guest of instantsnap_open_qmp() one of ours.
 * @flags     virDomainSnapshotRevertFlags. RUNNING and PAUSED exclude each other.
 *
 * For a client, libvirt does it where it can: virDomainRevertToSnapshot(). libvirt before 9.9
 * cannot for a snapshot with a memory image, and later ones not for every one; there it is done
 * here: the domain is ended, and started again with the snapshot's memory and fresh overlays on the
 * snapshot's images, which stay as they are. What the guest has written since the last snapshot is
 * lost. All that can be checked is checked before the domain is ended. An image that was written or
 * replaced since the snapshot froze it would be newer than the memory:
 * VIR_ERR_SNAPSHOT_REVERT_RISKY, which names it, unless VIR_DOMAIN_SNAPSHOT_REVERT_FORCE says that
 * its content is the same (snapshots of libvirt's own are not looked at so; a snapshot-delete by a
 * client without this library counts as a change). Overlays that another guest uses, or of disks
 * that the domain does not get back, stay.
 *
 * For a guest of instantsnap_open_qmp() it is instantsnap_snapshot_load(), into a QEMU that waits
 * with `-incoming defer`, started as instantsnap_snapshot_prepare_revert() said. A registered
 * driver's `restart` starts that QEMU.
 *
 * Blocks until memory is loaded. Returns 0 or -1.
 */
int qemuSnapshotRevert(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

/**
 * Deletes a snapshot.
 *
 * @snapshot  as for qemuSnapshotRevert(). It stays the caller's to be freed.
 * @flags     virDomainSnapshotDeleteFlags. CHILDREN and CHILDREN_ONLY exclude each other.
 *
 * For a client, libvirt does it where it can: virDomainSnapshotDelete(). libvirt before 9.9 cannot
 * for a snapshot with a memory image, and later ones not for every one; there it is done here: its
 * memory image is removed, images that neither the domain nor another snapshot needs are removed,
 * and others are merged where that loses nothing. Images that the user made stay.
 * VIR_ERR_OPERATION_INVALID, with nothing changed, where an image that would be changed or removed
 * is open in another QEMU, or another domain of the connection stands on it, and where the overlay
 * of a disk that the domain does not have any more can hold what was written to it last.
 * METADATA_ONLY is always libvirt's: the record goes, all files stay.
 *
 * For a guest of instantsnap_open_qmp(), and for a registered driver's domain, it is
 * instantsnap_snapshot_delete(): of snapshots without children, and of the record alone
 * (METADATA_ONLY).
 *
 * Blocks until images are merged. Returns 0 or -1.
 */
int qemuSnapshotDelete(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_LIBVIRT_H */
