/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A storage hook, here one that copies the disk's file: a snapshot is taken, undone, and continued
 * in another QEMU.
 */
#include <instantsnap.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)

struct storage {
    int result; /* what the callbacks return */
    int snapshots, undone, reverted;
};

static const char *copy_of(const instantsnap_storage_call *call)
{
    return harness_path(harness_text("disk.%s", call->snapshot));
}

static void check_call(const instantsnap_storage_call *call)
{
    CHECK(call->size == sizeof(*call));
    CHECK(call->disk_count == 1);
    CHECK(call->disks[0]->size == sizeof(*call->disks[0]));
    CHECK(strcmp(call->disks[0]->name, "vda") == 0);
    CHECK(strcmp(call->disks[0]->source, harness_path("disk.raw")) == 0);
    CHECK(strcmp(call->disks[0]->format, "raw") == 0);
}

static int take(const instantsnap_storage_call *call, void *opaque)
{
    struct storage *storage = opaque;
    const char *copy[] = {"cp", call->disks[0]->source, copy_of(call), NULL};

    check_call(call);
    CHECK(call->paused_us > 0);
    CHECK(call->deadline_us > 0 && call->deadline_us <= 20 * 1000 * 1000);
    CHECK(harness_status_is("qmp.aside", "paused"));
    storage->snapshots++;
    return storage->result ? storage->result : harness_run(copy);
}

static void undo(const instantsnap_storage_call *call, void *opaque)
{
    struct storage *storage = opaque;

    check_call(call);
    CHECK(harness_status_is("qmp.aside", "running"));
    CHECK(remove(copy_of(call)) == 0);
    storage->undone++;
}

static int revert(const instantsnap_storage_call *call, char **files, void *opaque)
{
    struct storage *storage = opaque;

    check_call(call);
    CHECK(!files[0]);
    storage->reverted++;
    files[0] = malloc(strlen(copy_of(call)) + 1);
    CHECK(files[0]);
    strcpy(files[0], copy_of(call));
    return storage->result;
}

static const char *manual(const char *name)
{
    return harness_text(
        "<domainsnapshot><name>%s</name><disks><disk name='vda' snapshot='manual'/></disks>"
        "</domainsnapshot>",
        name);
}

/* Cancels the snapshot after the hook has snapshotted the disk. */
static void cancel_at_instant(const instantsnap_event *event, void *guest)
{
    if (event->type == INSTANTSNAP_EVENT_INSTANT)
        CHECK(instantsnap_snapshot_cancel(guest) == 0);
}

static void nonsense(instantsnap_guest *guest, const instantsnap_storage_hook *hook)
{
    instantsnap_storage_hook wrong = *hook;

    CHECK_FAILS(instantsnap_set_storage_hook(NULL, hook) == -1, VIR_ERR_INVALID_ARG);
    wrong.snapshot = NULL;
    CHECK_FAILS(instantsnap_set_storage_hook(guest, &wrong) == -1, VIR_ERR_INVALID_ARG);
    wrong = *hook;
    wrong.reserved = 1;
    CHECK_FAILS(instantsnap_set_storage_hook(guest, &wrong) == -1, VIR_ERR_INVALID_ARG);
    wrong = *hook;
    wrong.size = sizeof(size_t);
    CHECK_FAILS(instantsnap_set_storage_hook(guest, &wrong) == -1, VIR_ERR_INVALID_ARG);
}

static void continued(instantsnap_storage_hook *hook, struct storage *storage)
{
    const char *state = harness_path("state"), *directory = harness_path("");
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    instantsnap_revert_plan *plan;
    instantsnap_guest *guest;

    CHECK_FAILS(!instantsnap_snapshot_prepare_revert(state, "good", directory),
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_hooked(state, "good", directory, NULL),
                VIR_ERR_OPERATION_UNSUPPORTED);
    storage->result = 7;
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_hooked(state, "good", directory, hook),
                VIR_ERR_OPERATION_FAILED);
    CHECK(strstr(instantsnap_last_error()->message, "it returned 7"));
    storage->result = 0;
    plan = instantsnap_snapshot_prepare_revert_hooked(state, "good", directory, hook);
    CHECK(plan);
    CHECK(storage->reverted == 2);
    CHECK(instantsnap_revert_plan_disk_count(plan) == 1);
    CHECK(instantsnap_revert_plan_get_disk(plan, 0, &disk) == 0);
    CHECK(strcmp(disk.name, "vda") == 0);
    CHECK(strcmp(disk.file, harness_path("disk.good")) == 0);
    CHECK(strcmp(disk.format, "raw") == 0);
    CHECK(!disk.backing_file);

    harness_qemu("qmp-good", disk.file, disk.format, 1);
    guest = instantsnap_open_qmp(harness_path("qmp-good"), NULL, state);
    CHECK(guest);
    CHECK(instantsnap_snapshot_load(guest, "good", 0) == 0);
    CHECK(harness_status_is("qmp-good", "running"));
    instantsnap_close(guest);
    instantsnap_revert_plan_free(plan);
}

int main(void)
{
    struct storage storage = {0};
    instantsnap_storage_hook hook = {
        .size = sizeof(hook),
        .opaque = &storage,
        .snapshot = take,
        .undo = undo,
        .revert = revert,
        .deadline_ms = 20000,
    };
    instantsnap_create_options options = {.size = sizeof(options), .callback = cancel_at_instant};
    instantsnap_guest *guest;

    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);
    guest = instantsnap_open_qmp(harness_path("qmp"), NULL, harness_path("state"));
    CHECK(guest);

    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, manual("none"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_UNSUPPORTED);
    nonsense(guest, &hook);
    CHECK(instantsnap_set_storage_hook(guest, &hook) == 0);

    storage.result = 5;
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, manual("bad"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_FAILED);
    CHECK(strstr(instantsnap_last_error()->message, "it returned 5"));
    CHECK(storage.snapshots == 1 && storage.undone == 0);
    storage.result = 0;

    options.opaque = guest;
    CHECK_FAILS(instantsnap_snapshot_create(guest, manual("cancelled"), INSTANT, &options, NULL) ==
                    -1,
                VIR_ERR_OPERATION_ABORTED);
    CHECK(storage.snapshots == 2 && storage.undone == 1);
    CHECK(harness_file_size(harness_path("disk.cancelled")) == -1);

    CHECK(instantsnap_snapshot_create_xml(guest, manual("good"), INSTANT, NULL) == 0);
    CHECK(storage.snapshots == 3 && storage.undone == 1);
    CHECK(harness_file_size(harness_path("disk.good")) ==
          harness_file_size(harness_path("disk.raw")));
    CHECK(instantsnap_set_storage_hook(guest, NULL) == 0);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, manual("none"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK(harness_status_is("qmp", "running"));
    instantsnap_close(guest);

    continued(&hook, &storage);
    return 0;
}
