/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The complete use by direct QMP: snapshots are taken, described, and continued in other QEMUs. */
#include <pthread.h>
#include <sched.h>

#include <instantsnap.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)

static instantsnap_guest *open_guest(const char *socket_name, const char *disk, const char *format)
{
    const char *xml = harness_text(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>64</memory><devices>"
        "<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>",
        format, disk);
    instantsnap_guest *guest =
        instantsnap_open_qmp(harness_path(socket_name), xml, harness_path("state"));

    CHECK(guest);
    return guest;
}

static const char *named(const char *name)
{
    return harness_text("<domainsnapshot><name>%s</name></domainsnapshot>", name);
}

static int count(instantsnap_guest *guest)
{
    return instantsnap_snapshot_list(guest, NULL);
}

static void check_current(instantsnap_guest *guest, const char *expected)
{
    char *current = instantsnap_snapshot_current(guest);

    CHECK(current);
    CHECK(strcmp(current, expected) == 0);
    instantsnap_free_string(current);
}

static instantsnap_stats get_stats(instantsnap_guest *guest)
{
    instantsnap_stats stats = {.size = sizeof(stats)};

    CHECK(instantsnap_get_stats(guest, &stats) == 0);
    CHECK(stats.size == sizeof(stats));
    /* The phases follow each other without gaps. */
    CHECK(stats.total_us == stats.validate_us + stats.plan_us + stats.prepare_us + stats.pause_us +
                                stats.switch_us + stats.arm_us + stats.drain_us + stats.finish_us +
                                stats.undo_us);
    CHECK(stats.instant_us <= stats.total_us);
    return stats;
}

static void check_capability_is_off(const char *socket_name)
{
    const char *answer = harness_qmp(socket_name, "{\"execute\": \"query-migrate-capabilities\"}");

    /* QEMU prints the members of an object in either order. */
    CHECK(strstr(answer, "{\"state\": false, \"capability\": \"background-snapshot\"}") ||
          strstr(answer, "{\"capability\": \"background-snapshot\", \"state\": false}"));
}

static void before_the_first(instantsnap_guest *guest)
{
    instantsnap_stats stats = {.size = sizeof(stats)};
    char **names = NULL;

    CHECK(instantsnap_snapshot_list(guest, &names) == 0);
    CHECK(names && !names[0]);
    instantsnap_free_string_list(names);
    CHECK_FAILS(!instantsnap_snapshot_current(guest), VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(!instantsnap_snapshot_get_xml(guest, "none"), VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(instantsnap_get_stats(guest, &stats) == -1, VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(instantsnap_snapshot_cancel(guest) == -1, VIR_ERR_OPERATION_INVALID);
}

static void instant(instantsnap_guest *guest)
{
    const char *overlay = harness_path("first.qcow2");
    const char *memory = harness_path("first.mem");
    const char *xml =
        harness_text("<domainsnapshot><name>first</name><description>by hand</description>"
                     "<memory snapshot='external' file='%s'/><disks>"
                     "<disk name='vda' snapshot='external'><source file='%s'/></disk>"
                     "</disks></domainsnapshot>",
                     memory, overlay);
    instantsnap_stats stats;
    char **names = NULL;
    char *name = NULL;
    char *recorded;

    CHECK(instantsnap_snapshot_create_xml(guest, xml, INSTANT, &name) == 0);
    CHECK(strcmp(name, "first") == 0);
    instantsnap_free_string(name);

    CHECK(harness_status_is("qmp", "running"));
    check_capability_is_off("qmp");
    CHECK(strstr(harness_qmp("qmp", "{\"execute\": \"query-block\"}"), overlay));

    stats = get_stats(guest);
    CHECK(stats.disks == 1);
    CHECK(stats.undo_us == 0);
    CHECK(stats.memory_image_bytes > 0);
    CHECK(harness_file_space(memory) == (long long) stats.memory_image_bytes);

    CHECK(instantsnap_snapshot_list(guest, &names) == 1);
    CHECK(strcmp(names[0], "first") == 0);
    CHECK(!names[1]);
    instantsnap_free_string_list(names);
    check_current(guest, "first");

    recorded = instantsnap_snapshot_get_xml(guest, "first");
    CHECK(recorded);
    CHECK(strstr(recorded, "<domainsnapshot"));
    CHECK(strstr(recorded, "<name>first</name>"));
    CHECK(strstr(recorded, "by hand"));
    CHECK(strstr(recorded, overlay));
    CHECK(strstr(recorded, memory));
    CHECK(!strstr(recorded, "<parent>"));
    instantsnap_free_string(recorded);

    /* A name that exists is an error, and the snapshot of that name is unharmed. */
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, named("first"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK(count(guest) == 1);
    CHECK(harness_status_is("qmp", "running"));
}

/* Takes a non-live snapshot. The library chooses names and files. Returns the snapshot's name. */
static const char *non_live(instantsnap_guest *guest)
{
    instantsnap_stats stats;
    const char *kept;
    char *name = NULL;
    char *recorded;

    CHECK(instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>", 0, &name) == 0);
    CHECK(name && *name);
    CHECK(harness_status_is("qmp", "running"));

    stats = get_stats(guest);
    CHECK(stats.drain_us == 0);
    CHECK(harness_file_space(harness_path(harness_text("state/%s.mem", name))) ==
          (long long) stats.memory_image_bytes);
    check_current(guest, name);

    recorded = instantsnap_snapshot_get_xml(guest, name);
    CHECK(recorded);
    CHECK(strstr(recorded, "<parent>"));
    instantsnap_free_string(recorded);

    kept = harness_text("%s", name);
    instantsnap_free_string(name);
    return kept;
}

struct canceller {
    instantsnap_guest *guest;
    const char *file; /* the cancel waits until this file has that size */
    long long size;
    pthread_mutex_t lock;
    int done;
    int cancelled;
};

static int is_done(struct canceller *canceller)
{
    int done;

    pthread_mutex_lock(&canceller->lock);
    done = canceller->done;
    pthread_mutex_unlock(&canceller->lock);
    return done;
}

/* Cancels once the snapshot has come that far, unless it ends before. */
static void *cancel(void *data)
{
    struct canceller *canceller = data;

    while (!canceller->cancelled && !is_done(canceller)) {
        if (harness_file_size(canceller->file) >= canceller->size)
            canceller->cancelled = instantsnap_snapshot_cancel(canceller->guest) == 0;
        sched_yield();
    }
    return NULL;
}

/* At whatever moment the cancel comes: the snapshot is complete, or nothing of it is left. */
static void cancelled(instantsnap_guest *guest, const char *name, long long at_size)
{
    const char *memory = harness_path(harness_text("state/%s.mem", name));
    struct canceller canceller = {
        .guest = guest, .file = memory, .size = at_size, .lock = PTHREAD_MUTEX_INITIALIZER};
    int before = count(guest);
    pthread_t thread;
    int result;

    CHECK(pthread_create(&thread, NULL, cancel, &canceller) == 0);
    result = instantsnap_snapshot_create_xml(guest, named(name), INSTANT, NULL);
    if (result < 0) {
        CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_ABORTED);
        CHECK(count(guest) == before);
        CHECK(harness_file_size(memory) == -1);
    } else {
        CHECK(count(guest) == before + 1);
    }
    pthread_mutex_lock(&canceller.lock);
    canceller.done = 1;
    pthread_mutex_unlock(&canceller.lock);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(result == 0 || canceller.cancelled);

    CHECK(harness_status_is("qmp", "running"));
    check_capability_is_off("qmp");
    /*
     * Nothing is left in QEMU either: left-over write tracking would make the next snapshot fail.
     */
    CHECK(instantsnap_snapshot_create_xml(guest, named(harness_text("after-%s", name)), INSTANT,
                                          NULL) == 0);
    CHECK(harness_status_is("qmp", "running"));
}

/* Prepares a revert, and fills *disk with the plan's only disk. */
static instantsnap_revert_plan *plan(const char *name, const char *backing_file,
                                     instantsnap_revert_disk *disk)
{
    instantsnap_revert_plan *plan =
        instantsnap_snapshot_prepare_revert(harness_path("state"), name, harness_path(""));

    CHECK(plan);
    CHECK(instantsnap_revert_plan_disk_count(plan) == 1);
    memset(disk, 0, sizeof(*disk));
    disk->size = sizeof(*disk);
    CHECK(instantsnap_revert_plan_get_disk(plan, 0, disk) == 0);
    CHECK(strcmp(disk->name, "vda") == 0);
    CHECK(strcmp(disk->format, "qcow2") == 0);
    CHECK(strcmp(disk->backing_file, backing_file) == 0);
    CHECK(disk->file[0] == '/');
    CHECK(harness_file_size(disk->file) > 0);
    CHECK(harness_file_size(instantsnap_revert_plan_memory_file(plan)) > 0);
    CHECK(strstr(instantsnap_revert_plan_domain_xml(plan), "<domain"));
    CHECK_FAILS(instantsnap_revert_plan_get_disk(plan, 1, disk) == -1, VIR_ERR_INVALID_ARG);
    return plan;
}

/* Prepares a revert by a mapping of the memory image. */
static void map(const char *name)
{
    instantsnap_revert_options options = {.size = sizeof(options),
                                          .directory = harness_path(""),
                                          .memory = INSTANTSNAP_MEMORY_MAP};
    instantsnap_memory_backend backend = {.size = sizeof(backend)};
    instantsnap_revert_plan *plan;

    CHECK(instantsnap_image_convert(harness_path(harness_text("state/%s.mem", name)),
                                    INSTANTSNAP_IMAGE_SPARSE, 0) == 0);
    plan = instantsnap_snapshot_prepare_revert_with(harness_path("state"), name, &options);
    CHECK(plan);
    CHECK(instantsnap_revert_plan_disk_count(plan) == 1);
    CHECK(instantsnap_revert_plan_memory_backend_count(plan) == 1);
    CHECK(instantsnap_revert_plan_get_memory_backend(plan, 0, &backend) == 0);
    CHECK(strcmp(backend.id, "pc.ram") == 0);
    CHECK(strcmp(backend.file, instantsnap_revert_plan_memory_file(plan)) == 0);
    CHECK(backend.offset + backend.length <= (uint64_t) harness_file_size(backend.file));
    CHECK(strstr(backend.object, "memory-backend-file,id=pc.ram,"));
    CHECK(strstr(backend.object, "share=off,readonly=on,rom=off"));
    CHECK_FAILS(instantsnap_revert_plan_get_memory_backend(plan, 1, &backend) == -1,
                VIR_ERR_INVALID_ARG);
    instantsnap_revert_plan_free(plan);
}

static void revert(instantsnap_guest *original, const char *second)
{
    instantsnap_revert_disk first_disk, second_disk;
    instantsnap_revert_plan *first_plan = plan("first", harness_path("disk.raw"), &first_disk);
    instantsnap_revert_plan *second_plan = plan(second, harness_path("first.qcow2"), &second_disk);
    const instantsnap_load_options options = {.size = sizeof(options),
                                              .memory = INSTANTSNAP_MEMORY_FULL};
    instantsnap_load_stats stats = {.size = sizeof(stats)};
    instantsnap_guest *guest;
    int recorded = count(original);
    pid_t qemu;

    /* The original guest runs: it is not a QEMU that waits for a snapshot. */
    CHECK_FAILS(instantsnap_snapshot_load(original, "first", 0) == -1, VIR_ERR_OPERATION_INVALID);
    CHECK(harness_status_is("qmp", "running"));

    /* The guest ran at the instant, so it runs again. */
    qemu = harness_qemu("qmp-first", first_disk.file, first_disk.format, 1);
    guest = open_guest("qmp-first", first_disk.file, first_disk.format);
    CHECK(instantsnap_snapshot_load_with(guest, "first", 0, &options, &stats) == 0);
    CHECK(harness_status_is("qmp-first", "running"));
    CHECK(stats.memory == INSTANTSNAP_MEMORY_FULL);
    CHECK(stats.running == 1);
    CHECK(stats.load_us > 0);
    CHECK(stats.check_us + stats.load_us + stats.finish_us == stats.total_us);
    check_current(guest, "first");

    /*
     * The continued guest is like any other. HALT ends it after its snapshot, NO_METADATA records
     * nothing.
     */
    CHECK(instantsnap_snapshot_create_xml(guest, named("last"),
                                          INSTANT | VIR_DOMAIN_SNAPSHOT_CREATE_HALT |
                                              VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
                                          NULL) == 0);
    harness_wait_for_end(qemu);
    CHECK(count(guest) == recorded);
    instantsnap_close(guest);

    /* A wrong disk is found before QEMU gets any memory: the right snapshot still loads. */
    harness_qemu("qmp-second", second_disk.file, second_disk.format, 1);
    guest = open_guest("qmp-second", second_disk.file, second_disk.format);
    CHECK_FAILS(instantsnap_snapshot_load(guest, "first", 0) == -1, VIR_ERR_CONFIG_UNSUPPORTED);
    CHECK_FAILS(instantsnap_snapshot_load(guest, second,
                                          VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING |
                                              VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_snapshot_load(guest, second, VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED) == 0);
    CHECK(harness_status_is("qmp-second", "paused"));
    check_current(guest, second);
    instantsnap_close(guest);

    /* A plan is not a guest. */
    CHECK_FAILS(instantsnap_snapshot_list((instantsnap_guest *) first_plan, NULL) == -1,
                VIR_ERR_INVALID_ARG);

    map(second);

    instantsnap_revert_plan_free(first_plan);
    instantsnap_revert_plan_free(second_plan);
}

/*
 * Deletes the newest snapshot: its parent becomes current, the guest runs on, and its files are
 * removed.
 */
static void deleted(instantsnap_guest *guest)
{
    int recorded = count(guest);

    CHECK_FAILS(instantsnap_snapshot_delete(guest, "first", 0) == -1,
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK(instantsnap_snapshot_create_xml(guest, named("newest"), INSTANT, NULL) == 0);
    CHECK(harness_file_size(harness_path("state/newest.mem")) > 0);
    CHECK(instantsnap_snapshot_delete(guest, "newest", 0) == 0);
    CHECK(count(guest) == recorded);
    CHECK(harness_file_size(harness_path("state/newest.mem")) == -1);
    CHECK(harness_status_is("qmp", "running"));
    CHECK_FAILS(instantsnap_snapshot_delete(guest, "newest", 0) == -1,
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
}

int main(void)
{
    instantsnap_guest *guest;
    const char *second;

    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);
    guest = open_guest("qmp", harness_path("disk.raw"), "raw");

    before_the_first(guest);
    instant(guest);
    second = non_live(guest);
    /* Cancels at once, and while memory flows: after the image's header, and before its end. */
    cancelled(guest, "cancelled-at-once", -1);
    cancelled(guest, "cancelled-in-drain", 100 << 10);
    revert(guest, second);
    deleted(guest);

    instantsnap_close(guest);
    CHECK(harness_status_is("qmp", "running"));
    return 0;
}
