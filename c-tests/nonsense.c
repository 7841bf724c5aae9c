/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Nonsense that no program should pass. The library returns errors, does not change the guest, and
 * goes on working.
 */
#include <pthread.h>
#include <stdint.h>

#include <instantsnap.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)
#define CREATE(flag) VIR_DOMAIN_SNAPSHOT_CREATE_##flag

/* Passes a pointer that is not a guest to every function that takes a guest. */
static void not_a_guest(instantsnap_guest *guest)
{
    instantsnap_stats stats = {.size = sizeof(stats)};
    instantsnap_load_stats loaded = {.size = sizeof(loaded)};
    instantsnap_memory_progress progress = {.size = sizeof(progress)};
    char **names = NULL;
    char *name = NULL;

    CHECK_FAILS(instantsnap_set_pause_limit(guest, 1000) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_set_overlap_tries(guest, 3) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_set_watchdog_required(guest, 1) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_set_storage_hook(guest, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>", INSTANT, &name) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK(!name);
    CHECK_FAILS(instantsnap_snapshot_cancel(guest) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_get_stats(guest, &stats) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_list(guest, &names) == -1, VIR_ERR_INVALID_ARG);
    CHECK(!names);
    CHECK_FAILS(!instantsnap_snapshot_get_xml(guest, "name"), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_current(guest), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_load(guest, "name", 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "name", 0, NULL, &loaded) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_memory_get_progress(guest, &progress) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_memory_wait(guest, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_delete(guest, "name", 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_recover(guest, &name) == -1, VIR_ERR_INVALID_ARG);
    if (guest)
        CHECK_FAILS(instantsnap_doctor(guest, &name) == -1, VIR_ERR_INVALID_ARG);
    CHECK(!name);
    instantsnap_close(guest);
}

/* Passes a pointer that is neither a plan nor a snapshot to every function that takes one. */
static void not_a_plan_nor_a_snapshot(void *wild)
{
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    instantsnap_memory_backend backend = {.size = sizeof(backend)};

    CHECK(instantsnap_revert_plan_disk_count(wild) == 0);
    CHECK_FAILS(instantsnap_revert_plan_get_disk(wild, 0, &disk) == -1, VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_revert_plan_memory_backend_count(wild) == 0);
    CHECK_FAILS(instantsnap_revert_plan_get_memory_backend(wild, 0, &backend) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_revert_plan_memory_file(wild), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_revert_plan_domain_xml(wild), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_get_name(wild), VIR_ERR_INVALID_ARG);
    instantsnap_revert_plan_free(wild);
    instantsnap_snapshot_free(wild);
}

static void wild_pointers(void)
{
    unsigned char junk[256];
    void *wild[] = {NULL,
                    junk,
                    junk + 1,
                    junk + 8,
                    (void *) (uintptr_t) 1,
                    (void *) (uintptr_t) 0x1000,
                    (void *) UINTPTR_MAX,
                    (void *) (uintptr_t) wild_pointers};

    memset(junk, 0xa5, sizeof(junk));
    for (size_t i = 0; i < sizeof(wild) / sizeof(wild[0]); i++) {
        not_a_guest(wild[i]);
        not_a_plan_nor_a_snapshot(wild[i]);
    }
    instantsnap_free_string(NULL);
    instantsnap_free_string_list(NULL);
}

static void bad_openings(void)
{
    const char *here = ".";

    CHECK_FAILS(!instantsnap_open_qmp(NULL, NULL, NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_open_qmp(NULL, NULL, here), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_open_qmp("/nonexistent/qmp", NULL, NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_open_qmp("/nonexistent/qmp", NULL, here), VIR_ERR_SYSTEM_ERROR);
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert(NULL, "name", NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert(here, NULL, NULL), VIR_ERR_INVALID_ARG);
}

static void bad_images(void)
{
    static const char *const paths[] = {"/nonexistent/image", ".", "/dev/null", "/dev/zero", ""};
    const unsigned int raw = INSTANTSNAP_IMAGE_RAW;

    CHECK_FAILS(!instantsnap_image_info(NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_verify(NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_convert(NULL, raw, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_convert(paths[0], INSTANTSNAP_IMAGE_DEFAULT, 0) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_convert(paths[0], 1u << 31, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_convert(paths[0], raw, 1) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_index(NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_image_index(paths[0], 1) == -1, VIR_ERR_INVALID_ARG);
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        CHECK_FAILS(!instantsnap_image_info(paths[i]), VIR_ERR_INVALID_DOMAIN_SNAPSHOT);
        CHECK_FAILS(instantsnap_image_verify(paths[i]) == -1, VIR_ERR_INVALID_DOMAIN_SNAPSHOT);
        CHECK_FAILS(instantsnap_image_convert(paths[i], raw, 0) == -1,
                    VIR_ERR_INVALID_DOMAIN_SNAPSHOT);
        CHECK_FAILS(instantsnap_image_index(paths[i], 0) == -1, VIR_ERR_INVALID_DOMAIN_SNAPSHOT);
    }
}

static void bad_revert_options(void)
{
    const char *here = ".";
    instantsnap_revert_options options = {.size = sizeof(options), .memory = 99};

    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_with(NULL, "name", NULL),
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_with(here, "name", &options),
                VIR_ERR_INVALID_ARG);
    options.memory = INSTANTSNAP_MEMORY_AUTO;
    options.reserved = 1;
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_with(here, "name", &options),
                VIR_ERR_INVALID_ARG);
    options.reserved = 0;
    options.size = sizeof(options) - 1;
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert_with(here, "name", &options),
                VIR_ERR_INVALID_ARG);
}

static void bad_load_options(instantsnap_guest *guest)
{
    instantsnap_load_options options = {.size = sizeof(options), .memory = 99};
    instantsnap_load_stats stats = {.size = sizeof(stats)};
    instantsnap_memory_progress progress = {.size = 0};

    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    options.memory = INSTANTSNAP_MEMORY_FULL;
    options.reserved = 1;
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    options.reserved = 0;
    options.size = 0;
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    options.size = sizeof(options);
    options.bandwidth = 1;
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    options.bandwidth = 0;
    stats.size = 0;
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, &stats) == -1,
                VIR_ERR_INVALID_ARG);
    stats.size = sizeof(stats);
    CHECK_FAILS(instantsnap_snapshot_load_with(guest, "none", 0, &options, &stats) == -1,
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK(stats.memory == INSTANTSNAP_MEMORY_AUTO);
    CHECK_FAILS(instantsnap_memory_get_progress(guest, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_memory_get_progress(guest, &progress) == -1, VIR_ERR_INVALID_ARG);
    progress.size = sizeof(progress);
    CHECK(instantsnap_memory_get_progress(guest, &progress) == 0);
    CHECK(progress.coming == 0 && progress.bytes_in == 0 && progress.bytes_total == 0);
    CHECK(instantsnap_memory_wait(guest, 0) == 1);
}

static void *fail_in_a_thread(void *unused)
{
    (void) unused;
    /* The main thread's errors are not visible in this thread. */
    CHECK(instantsnap_last_error()->code == VIR_ERR_OK);
    CHECK(instantsnap_last_error()->message[0] == '\0');
    CHECK_FAILS(!instantsnap_open_qmp("/nonexistent/qmp", NULL, "."), VIR_ERR_SYSTEM_ERROR);
    return NULL;
}

static void errors_are_per_thread(void)
{
    pthread_t thread;

    CHECK_FAILS(instantsnap_set_pause_limit(NULL, 1) == -1, VIR_ERR_INVALID_ARG);
    CHECK(pthread_create(&thread, NULL, fail_in_a_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(instantsnap_last_error()->code == VIR_ERR_INVALID_ARG);
    /* A call that succeeds does not change the last error. */
    CHECK(instantsnap_version());
    CHECK(instantsnap_last_error()->code == VIR_ERR_INVALID_ARG);
}

static void bad_flags(instantsnap_guest *guest)
{
    static const unsigned int forbidden[] = {
        1u << 11,
        1u << 31,
        INSTANT | 1u << 11,
        CREATE(INSTANT),
        CREATE(INSTANT) | CREATE(NO_METADATA),
        INSTANT | CREATE(DISK_ONLY),
        INSTANT | CREATE(REDEFINE),
        CREATE(REDEFINE) | CREATE(NO_METADATA),
        CREATE(REDEFINE) | CREATE(HALT),
        CREATE(REDEFINE) | CREATE(LIVE),
        CREATE(CURRENT),
        INSTANT | CREATE(CURRENT),
        CREATE(QUIESCE),
        INSTANT | CREATE(QUIESCE),
        ~0u,
    };
    static const struct {
        unsigned int flags;
        const char *named;
    } not_built[] = {
        {CREATE(REDEFINE), "CREATE_REDEFINE"},
        {CREATE(REDEFINE) | CREATE(CURRENT), "CREATE_REDEFINE"},
        {CREATE(DISK_ONLY), "CREATE_DISK_ONLY"},
        {CREATE(DISK_ONLY) | CREATE(QUIESCE), "CREATE_DISK_ONLY"},
        {CREATE(LIVE), "CREATE_LIVE"},
        {CREATE(VALIDATE), "CREATE_VALIDATE"},
        {INSTANT | CREATE(VALIDATE), "CREATE_VALIDATE"},
    };

    for (size_t i = 0; i < sizeof(forbidden) / sizeof(forbidden[0]); i++) {
        CHECK_FAILS(
            instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>", forbidden[i], NULL) == -1,
            VIR_ERR_INVALID_ARG);
        /* The flags are checked first, whatever else is wrong. */
        CHECK_FAILS(instantsnap_snapshot_create_xml(guest, "<not XML", forbidden[i], NULL) == -1,
                    VIR_ERR_INVALID_ARG);
    }
    for (size_t i = 0; i < sizeof(not_built) / sizeof(not_built[0]); i++) {
        CHECK_FAILS(instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>", not_built[i].flags,
                                                    NULL) == -1,
                    VIR_ERR_OPERATION_UNSUPPORTED);
        CHECK(strstr(instantsnap_last_error()->message, not_built[i].named));
    }
    /* An overlay for REUSE_EXT must exist. */
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>",
                                                INSTANT | CREATE(REUSE_EXT), NULL) == -1,
                VIR_ERR_CONFIG_UNSUPPORTED);
    CHECK(strstr(instantsnap_last_error()->message, "to be reused"));
    CHECK_FAILS(instantsnap_snapshot_load(guest, "none",
                                          VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING |
                                              VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_load(guest, "none", 1u << 31) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_delete(guest, "none",
                                            VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN |
                                                VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_delete(guest, "none", 1u << 31) == -1, VIR_ERR_INVALID_ARG);
}

static void bad_strings(instantsnap_guest *guest)
{
    static const char *const xmls[] = {
        "",
        " ",
        "<",
        "<domainsnapshot",
        "<domainsnapshot>",
        "<domainsnapshot></domain>",
        "<domain/>",
        "plain text",
        "<domainsnapshot/><domainsnapshot/>",
        "\xff\xfe",
        "<domainsnapshot><name>\xff</name></domainsnapshot>",
        "<domainsnapshot><name>../escape</name></domainsnapshot>",
        "<domainsnapshot><name>a/b</name></domainsnapshot>",
        "<domainsnapshot><name>.</name></domainsnapshot>",
        "<domainsnapshot><name>..</name></domainsnapshot>",
        "<domainsnapshot><disks><disk name='nowhere' "
        "snapshot='external'/></disks></domainsnapshot>",
    };
    static char endless[1 << 16];
    const char *too_long;

    for (size_t i = 0; i < sizeof(xmls) / sizeof(xmls[0]); i++)
        CHECK(instantsnap_snapshot_create_xml(guest, xmls[i], INSTANT, NULL) == -1);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, NULL, INSTANT, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, "<domainsnapshot", INSTANT, NULL) == -1,
                VIR_ERR_XML_DETAIL);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest,
                                                "<domainsnapshot><name>a/b</name></domainsnapshot>",
                                                INSTANT, NULL) == -1,
                VIR_ERR_XML_DETAIL);

    memset(endless, 'x', sizeof(endless) - 1);
    too_long = harness_text("<domainsnapshot><name>%s</name></domainsnapshot>", endless);
    CHECK(instantsnap_snapshot_create_xml(guest, too_long, INSTANT, NULL) == -1);

    CHECK_FAILS(!instantsnap_snapshot_get_xml(guest, NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_get_xml(guest, "none"), VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK(!instantsnap_snapshot_get_xml(guest, "../../etc/passwd"));
    CHECK(!instantsnap_snapshot_get_xml(guest, endless));
    CHECK_FAILS(instantsnap_snapshot_load(guest, NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    bad_load_options(guest);
    CHECK_FAILS(instantsnap_snapshot_delete(guest, NULL, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_delete(guest, "none", 0) == -1, VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK(instantsnap_snapshot_delete(guest, "../../etc/passwd", 0) == -1);
    CHECK(instantsnap_snapshot_delete(guest, endless, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) ==
          -1);
    CHECK_FAILS(!instantsnap_snapshot_prepare_revert(harness_path("state"), "none", NULL),
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(!instantsnap_open_qmp(harness_path("qmp"), "<domain", harness_path("state")),
                VIR_ERR_XML_DETAIL);
    CHECK_FAILS(!instantsnap_open_qmp(harness_path("qmp"), NULL, harness_path("nowhere")),
                VIR_ERR_SYSTEM_ERROR);
}

/* An older or careless caller's `size`: the library must not write beyond it. */
static void bad_sizes(instantsnap_guest *guest)
{
    struct {
        instantsnap_stats stats;
        uint64_t beyond;
    } padded;

    memset(&padded, 0x77, sizeof(padded));
    padded.stats.size = 0;
    CHECK_FAILS(instantsnap_get_stats(guest, &padded.stats) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_get_stats(guest, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK(padded.beyond == UINT64_C(0x7777777777777777));
    CHECK(padded.stats.disks == 0x77777777);
}

int main(void)
{
    instantsnap_guest *guest;

    wild_pointers();
    bad_openings();
    bad_images();
    bad_revert_options();
    errors_are_per_thread();

    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);
    guest = instantsnap_open_qmp(harness_path("qmp"), NULL, harness_path("state"));
    CHECK(guest);
    bad_flags(guest);
    bad_strings(guest);
    bad_sizes(guest);
    not_a_plan_nor_a_snapshot(guest);
    CHECK_FAILS(instantsnap_set_pause_limit(guest, 0) == -1, VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_set_pause_limit(guest, 30000) == 0);
    CHECK(instantsnap_set_overlap_tries(guest, 0) == 0);
    CHECK_FAILS(instantsnap_set_watchdog_required(guest, 2) == -1, VIR_ERR_INVALID_ARG);
    CHECK(instantsnap_set_watchdog_required(guest, 1) == 0);
    CHECK_FAILS(instantsnap_recover_offline(NULL, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_recover_offline(harness_path("nowhere"), NULL) == -1,
                VIR_ERR_SYSTEM_ERROR);
    CHECK(instantsnap_recover(guest, NULL) == 0);
    CHECK(instantsnap_doctor(guest, NULL) >= 0);
    CHECK(instantsnap_doctor(NULL, NULL) >= 0);
    CHECK(instantsnap_recover_offline(harness_path("state"), NULL) == 0);
    CHECK(instantsnap_set_storage_hook(guest, NULL) == 0);

    /* After all of that the guest is unchanged, and snapshots of it still work. */
    CHECK(instantsnap_snapshot_list(guest, NULL) == 0);
    CHECK(harness_status_is("qmp", "running"));
    CHECK(strstr(harness_qmp("qmp", "{\"execute\": \"query-block\"}"), harness_path("disk.raw")));
    CHECK(instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>", INSTANT, NULL) == 0);
    bad_sizes(guest);

    instantsnap_close(guest);
    not_a_guest(guest);
    not_a_plan_nor_a_snapshot(guest);
    CHECK(harness_status_is("qmp", "running"));
    return 0;
}
