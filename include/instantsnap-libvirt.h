/* SPDX-License-Identifier: LGPL-2.1-or-later */
/**
 * instantsnap-libvirt.h: instant snapshots by the names and signatures of libvirt's qemu driver (qemu_snapshot.h).
 *
 * `vm` says who runs the guest:
 *
 * - a guest from instantsnap_open_qmp(), cast to `virDomainObj *`, with `domain` NULL: direct QMP. The snapshot returned is
 *   an `instantsnap_snapshot *` in libvirt's clothes: give it to qemuSnapshotRevert(), qemuSnapshotDelete() and the
 *   instantsnap_snapshot_ functions only, never to libvirt.
 * - NULL: a client of a stock libvirt. Not built yet: VIR_ERR_OPERATION_UNSUPPORTED.
 * - anything else: libvirt's driver, or one like it. Without INSTANT the call goes to the next definition of the symbol in
 *   the process where there is one, untouched; with INSTANT, and where there is none, VIR_ERR_OPERATION_UNSUPPORTED: not
 *   built yet.
 *
 * Snapshots of one guest handle can be given with another that has the same state directory: a clone's, to revert.
 * Errors are in instantsnap_last_error(), with libvirt's codes; NULL for a snapshot is VIR_ERR_INVALID_ARG.
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
 * Takes a snapshot: instantsnap_snapshot_create_xml() under libvirt's signature. Blocks until it is complete.
 *
 * @domain   NULL for a guest of ours.
 * @vm       see above.
 * @xmlDesc  libvirt's `<domainsnapshot>`.
 * @flags    virDomainSnapshotCreateFlags and VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT.
 *
 * Returns the snapshot (for a guest of ours to be freed with instantsnap_snapshot_free()), or NULL.
 */
virDomainSnapshotPtr qemuSnapshotCreateXML(virDomainPtr domain, virDomainObj *vm, const char *xmlDesc, unsigned int flags);

/**
 * Loads a snapshot: for a guest of ours instantsnap_snapshot_load() into a QEMU that waits with `-incoming defer`, started
 * as instantsnap_snapshot_prepare_revert() said. Returns 0 or -1.
 */
int qemuSnapshotRevert(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

/**
 * Deletes a snapshot. For a guest of ours only VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY is built: the record goes, its children
 * become children of its parent, disks and memory image stay; anything else is VIR_ERR_OPERATION_UNSUPPORTED.
 * Returns 0 or -1.
 */
int qemuSnapshotDelete(virDomainObj *vm, virDomainSnapshotPtr snapshot, unsigned int flags);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_LIBVIRT_H */
