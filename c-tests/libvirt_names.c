/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The functions of instantsnap.h by libvirt's own names and signatures, with a guest of this
 * library instead of libvirt's domain object.
 */
#include <instantsnap-libvirt.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)

/*
 * In libvirt's daemon these functions replace libvirt's: a different signature would go unnoticed
 * at run time.
 */
static virDomainSnapshotPtr (*const create)(virDomainPtr, virDomainObj *, const char *,
                                            unsigned int) = qemuSnapshotCreateXML;
static int (*const revert)(virDomainObj *, virDomainSnapshotPtr, unsigned int) = qemuSnapshotRevert;
static int (*const delete)(virDomainObj *, virDomainSnapshotPtr, unsigned int) = qemuSnapshotDelete;

static const char *name_of(virDomainSnapshotPtr snapshot)
{
    return instantsnap_snapshot_get_name((instantsnap_snapshot *) snapshot);
}

static void free_snapshot(virDomainSnapshotPtr snapshot)
{
    instantsnap_snapshot_free((instantsnap_snapshot *) snapshot);
}

/*
 * NULL means a client of libvirt, whose objects are missing here. Any other pointer needs a driver,
 * and none is registered.
 */
static void without_a_guest(void)
{
    char wild[256];

    memset(wild, 0x5a, sizeof(wild));
    CHECK_FAILS(!create(NULL, NULL, "<domainsnapshot/>", INSTANT), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(revert(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(delete(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG);

    CHECK_FAILS(!create(NULL, (virDomainObj *) wild, "<domainsnapshot/>", INSTANT),
                VIR_ERR_OPERATION_UNSUPPORTED);
    /*
     * Without INSTANT the call would go to the next definition of the symbol: this process has
     * none.
     */
    CHECK_FAILS(!create(NULL, (virDomainObj *) wild, "<domainsnapshot/>", 0),
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(revert((virDomainObj *) wild, NULL, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(delete((virDomainObj *) wild, NULL, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);

    CHECK_FAILS(!name_of((virDomainSnapshotPtr) wild), VIR_ERR_INVALID_ARG);
    free_snapshot((virDomainSnapshotPtr) wild);
    free_snapshot(NULL);
}

static void continue_in_another(virDomainSnapshotPtr snapshot)
{
    instantsnap_revert_plan *plan =
        instantsnap_snapshot_prepare_revert(harness_path("state"), name_of(snapshot), NULL);
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    instantsnap_guest *guest;
    virDomainObj *vm;

    CHECK(plan);
    CHECK(instantsnap_revert_plan_get_disk(plan, 0, &disk) == 0);
    harness_qemu("qmp-again", disk.file, disk.format, 1);
    guest = instantsnap_open_qmp(harness_path("qmp-again"), NULL, harness_path("state"));
    CHECK(guest);
    vm = (virDomainObj *) guest;

    CHECK_FAILS(revert(vm, NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(revert(vm, snapshot, 1u << 20) == -1, VIR_ERR_INVALID_ARG);
    CHECK(revert(vm, snapshot, VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING) == 0);
    CHECK(harness_status_is("qmp-again", "running"));

    instantsnap_revert_plan_free(plan);
    instantsnap_close(guest);
}

int main(void)
{
    virDomainSnapshotPtr first, second;
    instantsnap_guest *guest;
    virDomainObj *vm;
    char *xml;

    without_a_guest();

    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);
    guest = instantsnap_open_qmp(harness_path("qmp"), NULL, harness_path("state"));
    CHECK(guest);
    vm = (virDomainObj *) guest;

    CHECK_FAILS(!create(NULL, vm, NULL, INSTANT), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!create(NULL, vm, "<domainsnapshot/>", VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT),
                VIR_ERR_INVALID_ARG);
    first = create(NULL, vm, "<domainsnapshot><name>first</name></domainsnapshot>", INSTANT);
    CHECK(first);
    CHECK(strcmp(name_of(first), "first") == 0);
    second = create(NULL, vm, "<domainsnapshot><name>second</name></domainsnapshot>", 0);
    CHECK(second);
    CHECK(strcmp(name_of(second), "second") == 0);
    CHECK(harness_status_is("qmp", "running"));

    continue_in_another(first);

    /* A snapshot of this library is not one of libvirt's. */
    CHECK_FAILS(revert(NULL, first, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(delete(NULL, first, 0) == -1, VIR_ERR_INVALID_ARG);

    /*
     * If a snapshot has a child, only its record can be deleted. The child then gets its parent's
     * parent: here, none.
     */
    CHECK_FAILS(delete(vm, first, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(delete(vm, NULL, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 2);
    CHECK(delete(vm, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == 0);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 1);
    CHECK(harness_file_size(harness_path("state/first.mem")) > 0);
    xml = instantsnap_snapshot_get_xml(guest, "second");
    CHECK(xml);
    CHECK(!strstr(xml, "<parent>"));
    instantsnap_free_string(xml);
    CHECK_FAILS(delete(vm, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(delete(vm, second, 1u << 20) == -1, VIR_ERR_INVALID_ARG);
    CHECK(delete(vm, second, 0) == 0);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 0);
    CHECK(harness_status_is("qmp", "running"));

    free_snapshot(first);
    /* A freed handle is not a snapshot any more. */
    CHECK_FAILS(!name_of(first), VIR_ERR_INVALID_ARG);
    free_snapshot(first);
    free_snapshot(second);
    instantsnap_close(guest);
    return 0;
}
