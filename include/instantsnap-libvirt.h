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
 *                               "<memory snapshot='external' file='/srv/vm.mem'/>"
 *                               "</domainsnapshot>",
 *                               VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
 *                               VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT);
 *
 *     if (!snapshot)
 *         fprintf(stderr, "%s\n", virGetLastErrorMessage());
 *
 * `vm` says what runs the guest:
 *
 * - NULL: the caller is a client of a stock libvirt, 8.2 or later, on the same machine, by any
 *   connection to its QEMU driver (`qemu:///system`, `qemu:///session`, `qemu+unix:///...`). See
 *   "Clients" below, and instantsnap_open_libvirt().
 * - A guest of instantsnap_open_qmp(), cast to `virDomainObj *`, with `domain` NULL: direct QMP.
 *   The snapshot returned is an `instantsnap_snapshot *` cast to libvirt's type. Pass it only to
 *   qemuSnapshotRevert(), qemuSnapshotDelete() and the instantsnap_snapshot_ functions, never to
 *   libvirt. Errors are in instantsnap_last_error().
 * - Anything else: the domain object of a driver, libvirt's or one like it, that was registered
 *   with instantsnap_register_driver(). The library calls the driver back with `vm`, whatever the
 *   flags. The driver holds its lock at the call, and the library reports errors to it. See "The
 *   driver backend" in instantsnap.h. If no driver is registered, the call goes unchanged to the
 *   next definition of the symbol in the process, also with INSTANT; if there is none, it fails
 *   with VIR_ERR_OPERATION_UNSUPPORTED. Inside a stock libvirt daemon instant snapshots are taken
 *   by libinstantsnap-preload.so, not by this library: see docs/inside-the-daemon.md.
 *
 * A snapshot of one guest of instantsnap_open_qmp() can be passed together with another guest that
 * has the same state directory: a clone reverts to a snapshot of the original in this way.
 *
 * Clients (`vm` NULL):
 *
 * - Objects are libvirt's own. The library does not keep the objects that it is given: each call
 *   takes the references that it needs, and drops them before it returns. A snapshot returned
 *   belongs to the caller, who frees it with virDomainSnapshotFree(); like every libvirt object it
 *   keeps its domain's connection open. All functions of libvirt work on it.
 * - Errors are in virGetLastError(), from VIR_FROM_QEMU, with a message that says which step failed
 *   on which object; instantsnap_last_error() has the same. If libvirt itself refuses, the error is
 *   libvirt's own. A call that succeeds leaves no error behind. libvirt's error handlers
 *   (virSetErrorFunc()) and virConnGetLastError() do not receive errors that are not libvirt's own.
 * - The library loads libvirt at the first call. If libvirt is missing or too old, the error is
 *   only in instantsnap_last_error(): VIR_ERR_OPERATION_UNSUPPORTED.
 * - Every call blocks until it is done: call it on a thread that may wait, not in a callback of
 *   libvirt's event loop. The library needs no event loop.
 * - Any thread may call, also several at the same time, on one connection or on several. Of two
 *   operations on one domain the second fails at once with VIR_ERR_OPERATION_INVALID, also if the
 *   first belongs to another process.
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
 * @domain   the domain, if `vm` is NULL; NULL for a guest of instantsnap_open_qmp().
 * @vm       see above.
 * @xmlDesc  libvirt's `<domainsnapshot>`. For an instant snapshot of a client it must name the file
 *           for the memory: `<memory snapshot='external' file='...'/>`. Everything else is
 *           optional.
 * @flags    virDomainSnapshotCreateFlags and VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT.
 *
 * For a client, without INSTANT this is virDomainSnapshotCreateXML(), with its result and its
 * error. With INSTANT, which requires LIVE, this is an instant snapshot of the running domain.
 * NO_METADATA, HALT, REUSE_EXT, ATOMIC and VALIDATE (which needs libvirt's schema and xmllint) may
 * be combined with it, in libvirt's meaning; for overlays that exist already see
 * instantsnap_snapshot_create_xml(); a daemon with the library in it accepts no such overlays.
 * DISK_ONLY, REDEFINE, CURRENT and QUIESCE may not be combined with it. libvirt records the
 * snapshot like one of its own, as the current one. If the domain is paused, libvirt takes a
 * snapshot of its own, and the domain stays paused.
 *
 * For a guest of instantsnap_open_qmp() this is instantsnap_snapshot_create_xml(). The same
 * holds for a registered driver; the call then returns what its `make_snapshot` returns.
 *
 * Returns the snapshot, for virDomainSnapshotFree() (of a guest of instantsnap_open_qmp(), for
 * instantsnap_snapshot_free()); or NULL with everything as it was before. Errors are those of
 * instantsnap_snapshot_create_xml(); for a client also VIR_ERR_INVALID_DOMAIN, VIR_ERR_NO_DOMAIN,
 * VIR_ERR_OPERATION_UNSUPPORTED (another driver, or a connection to another machine), VIR_ERR_RPC
 * (the connection to libvirt's daemon is lost).
 */
virDomainSnapshotPtr qemuSnapshotCreateXML(virDomainPtr domain, virDomainObj *vm,
                                           const char *xmlDesc, unsigned int flags);

/**
 * Brings a guest back to a snapshot.
 *
 * @snapshot  for a client libvirt's own snapshot, however it was taken; for a guest of
 *            instantsnap_open_qmp() one of this library.
 * @flags     virDomainSnapshotRevertFlags. RUNNING and PAUSED exclude each other.
 *
 * For a client, libvirt does it where it can: virDomainRevertToSnapshot(). libvirt before 9.9
 * cannot revert to a snapshot with a memory image, and later versions not to every one. Where
 * libvirt cannot, the library does it: it ends the domain, and starts it again with the snapshot's
 * memory and with fresh overlays on the snapshot's images, which stay as they are. What the guest
 * has written since the last snapshot is lost. Everything that can be checked is checked before the
 * domain is ended. An image that was written or replaced since the snapshot froze it would be newer
 * than the memory: VIR_ERR_SNAPSHOT_REVERT_RISKY, and the message names the image.
 * VIR_DOMAIN_SNAPSHOT_REVERT_FORCE tells the library that the image's content is the same. (The
 * library does not check the images of libvirt's own snapshots in this way. A snapshot-delete by a
 * client without this library counts as a change.) Overlays stay if another guest uses them, or if
 * they belong to disks that the domain does not get back.
 *
 * For a guest of instantsnap_open_qmp() this is instantsnap_snapshot_load(), into a QEMU that waits
 * with `-incoming defer` and was started as instantsnap_snapshot_prepare_revert() said. For a
 * registered driver, its `restart` starts that QEMU.
 *
 * Blocks until memory is loaded. Returns 0 or -1.
 */
int qemuSnapshotRevert(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

/**
 * Deletes a snapshot.
 *
 * @snapshot  as for qemuSnapshotRevert(). The caller still has to free it.
 * @flags     virDomainSnapshotDeleteFlags. CHILDREN and CHILDREN_ONLY exclude each other.
 *
 * For a client, libvirt does it where it can: virDomainSnapshotDelete(). libvirt before 9.9 cannot
 * delete a snapshot with a memory image, and later versions not every one. Where libvirt cannot,
 * the library does it: it removes the memory image, removes images that neither the domain nor
 * another snapshot needs, and merges other images where that loses nothing. Images that the user
 * created stay. It fails with VIR_ERR_OPERATION_INVALID, with nothing changed, if another QEMU has
 * an image open that would be changed or removed, if another domain of the connection uses such an
 * image, or if the overlay of a disk that the domain does not have any more may hold that disk's
 * newest data. METADATA_ONLY is always libvirt's own: it removes the record, and all files stay.
 *
 * For a guest of instantsnap_open_qmp(), and for a registered driver's domain, this is
 * instantsnap_snapshot_delete(): it deletes snapshots without children, or the record alone
 * (METADATA_ONLY).
 *
 * Blocks until images are merged. Returns 0 or -1.
 */
int qemuSnapshotDelete(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_LIBVIRT_H */
