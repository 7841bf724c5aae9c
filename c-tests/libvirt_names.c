/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The same job by libvirt's own names and signatures, with a guest of ours in the place of libvirt's. */
#include <instantsnap-libvirt.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)

/* These are libvirt's functions in libvirt's daemon: a signature that differs would not be noticed at run time. */
static virDomainSnapshotPtr (*const create)(virDomainPtr, virDomainObj *, const char *, unsigned int) =
    qemuSnapshotCreateXML;
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

/* NULL is for a client of libvirt, whose objects are missing; a driver's own are not built yet; others are nobody's. */
static void without_a_guest(void)
{
    char nobody[256];

    memset(nobody, 0x5a, sizeof(nobody));
    CHECK_FAILS(!create(NULL, NULL, "<domainsnapshot/>", INSTANT), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(revert(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(delete(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG);

    CHECK_FAILS(!create(NULL, (virDomainObj *) nobody, "<domainsnapshot/>", INSTANT), VIR_ERR_OPERATION_UNSUPPORTED);
    /* Without INSTANT it would be for the next definition of the symbol: this process has none. */
    CHECK_FAILS(!create(NULL, (virDomainObj *) nobody, "<domainsnapshot/>", 0), VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(revert((virDomainObj *) nobody, NULL, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(delete((virDomainObj *) nobody, NULL, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);

    CHECK_FAILS(!name_of((virDomainSnapshotPtr) nobody), VIR_ERR_INVALID_ARG);
    free_snapshot((virDomainSnapshotPtr) nobody);
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
    CHECK_FAILS(!create(NULL, vm, "<domainsnapshot/>", VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT), VIR_ERR_INVALID_ARG);
    first = create(NULL, vm, "<domainsnapshot><name>first</name></domainsnapshot>", INSTANT);
    CHECK(first);
    CHECK(strcmp(name_of(first), "first") == 0);
    second = create(NULL, vm, "<domainsnapshot><name>second</name></domainsnapshot>", 0);
    CHECK(second);
    CHECK(strcmp(name_of(second), "second") == 0);
    CHECK(harness_status_is("qmp", "running"));

    continue_in_another(first);

    /* A snapshot of ours is none of libvirt's. */
    CHECK_FAILS(revert(NULL, first, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(delete(NULL, first, 0) == -1, VIR_ERR_INVALID_ARG);

    /* Of one with a child only the record can go, and the child goes up to where its parent was: here, to the top. */
    CHECK_FAILS(delete(vm, first, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(delete(vm, NULL, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1, VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 2);
    CHECK(delete(vm, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == 0);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 1);
    CHECK(harness_file_size(harness_path("state/first.mem")) > 0);
    xml = instantsnap_snapshot_get_xml(guest, "second");
    CHECK(xml);
    CHECK(!strstr(xml, "<parent>"));
    instantsnap_free_string(xml);
    CHECK_FAILS(delete(vm, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1, VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(delete(vm, second, 1u << 20) == -1, VIR_ERR_INVALID_ARG);
    CHECK(delete(vm, second, 0) == 0);
    CHECK(instantsnap_snapshot_list(guest, NULL) == 0);
    CHECK(harness_status_is("qmp", "running"));

    free_snapshot(first);
    /* Freed: no longer a snapshot of ours, whoever looks. */
    CHECK_FAILS(!name_of(first), VIR_ERR_INVALID_ARG);
    free_snapshot(first);
    free_snapshot(second);
    instantsnap_close(guest);
    return 0;
}
