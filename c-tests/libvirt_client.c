/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libvirt_client KEEPER TICK: a client of a stock libvirt that uses instantsnap by its headers
 * only. It has libvirt's objects before and after each call, and runs no event loop of libvirt.
 */
#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <instantsnap-libvirt.h>

#include "harness.h"
#include "harness_libvirt.h"

#define CREATE(flag) VIR_DOMAIN_SNAPSHOT_CREATE_##flag
#define INSTANT (CREATE(LIVE) | CREATE(INSTANT))

static const char *uri;
static const char *tick;

static virConnectPtr open_connection(void)
{
    virConnectPtr connect = virConnectOpen(uri);

    CHECK(connect);
    return connect;
}

/* Nothing has kept the connection open, not even the library. */
static void close_connection(virConnectPtr connect)
{
    CHECK(virConnectClose(connect) == 0);
}

static virDomainPtr look_up(virConnectPtr connect, const char *name)
{
    virDomainPtr domain = virDomainLookupByName(connect, name);

    CHECK(domain);
    return domain;
}

static const char *memory_file(virDomainPtr domain, const char *name)
{
    return harness_domain_path(virDomainGetName(domain), harness_text("%s.mem", name));
}

static const char *snapshot_xml(virDomainPtr domain, const char *name)
{
    return harness_text(
        "<domainsnapshot><name>%s</name><memory snapshot='external' file='%s'/></domainsnapshot>",
        name, memory_file(domain, name));
}

static int is_running(virDomainPtr domain)
{
    int state = VIR_DOMAIN_NOSTATE;

    CHECK(virDomainGetState(domain, &state, NULL, 0) == 0);
    return state == VIR_DOMAIN_RUNNING;
}

/* Checks that the guest runs, counts on, and finds memory and disks as it left them. */
static void check_guest_runs(virDomainPtr domain)
{
    CHECK(is_running(domain));
    harness_wait_for_tick_after(domain, harness_ticks(domain));
}

static void check_xml(virDomainSnapshotPtr snapshot, const char *part)
{
    char *xml = virDomainSnapshotGetXMLDesc(snapshot, 0);

    CHECK(xml);
    CHECK(strstr(xml, part));
    free(xml);
}

static void begins_with(const char *path, const char *magic)
{
    char bytes[16] = "";
    FILE *file = fopen(path, "r");

    CHECK(file);
    CHECK(fread(bytes, 1, sizeof(bytes), file) == sizeof(bytes));
    CHECK(memcmp(bytes, magic, sizeof(bytes)) == 0);
    fclose(file);
}

/* The call returns libvirt's own object, and libvirt's own functions work on it. */
static void instant(virDomainPtr domain)
{
    virConnectPtr connect = virDomainGetConnect(domain);
    virDomainSnapshotPtr first, second, parent;
    char *names[2] = {NULL};

    first = qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "first"), INSTANT);
    CHECK(first);
    CHECK(virGetLastErrorCode() == VIR_ERR_OK);
    check_guest_runs(domain);

    CHECK(strcmp(virDomainSnapshotGetName(first), "first") == 0);
    CHECK(virDomainSnapshotGetConnect(first) == connect);
    CHECK(strcmp(virDomainGetName(virDomainSnapshotGetDomain(first)), virDomainGetName(domain)) ==
          0);
    CHECK(virDomainSnapshotIsCurrent(first, 0) == 1);
    CHECK(virDomainSnapshotHasMetadata(first, 0) == 1);
    CHECK(virDomainSnapshotNumChildren(first, 0) == 0);
    CHECK(!virDomainSnapshotGetParent(first, 0));
    check_xml(first, "<state>running</state>");
    check_xml(first, memory_file(domain, "first"));
    check_xml(first, harness_domain_path(virDomainGetName(domain), "disk.first"));
    /* Complete: libvirt's own image format says so. */
    begins_with(memory_file(domain, "first"), "LibvirtQemudSave");

    second = qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "second"),
                                   INSTANT | CREATE(ATOMIC));
    CHECK(second);
    CHECK(virDomainSnapshotIsCurrent(first, 0) == 0);
    CHECK(virDomainSnapshotNumChildren(first, 0) == 1);
    parent = virDomainSnapshotGetParent(second, 0);
    CHECK(parent);
    CHECK(strcmp(virDomainSnapshotGetName(parent), "first") == 0);
    CHECK(virDomainSnapshotListNames(domain, names, 2, 0) == 2);
    free(names[0]);
    free(names[1]);

    /* A name that exists is an error, and the snapshot of that name is unharmed. */
    CHECK_VIR_FAILS(!qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "first"), INSTANT),
                    VIR_ERR_OPERATION_INVALID, VIR_FROM_QEMU);
    CHECK(virDomainSnapshotNum(domain, 0) == 2);
    check_guest_runs(domain);

    CHECK(virDomainSnapshotFree(first) == 0);
    CHECK(virDomainSnapshotFree(second) == 0);
    CHECK(virDomainSnapshotFree(parent) == 0);
}

/* Nothing is recorded, but the object returned has the requested name, as in libvirt. */
static void without_metadata(virDomainPtr domain)
{
    int before = virDomainSnapshotNum(domain, 0);
    virDomainSnapshotPtr snapshot = qemuSnapshotCreateXML(
        domain, NULL, snapshot_xml(domain, "unrecorded"), INSTANT | CREATE(NO_METADATA));

    CHECK(snapshot);
    CHECK(strcmp(virDomainSnapshotGetName(snapshot), "unrecorded") == 0);
    CHECK(virDomainSnapshotFree(snapshot) == 0);
    CHECK(virDomainSnapshotNum(domain, 0) == before);
    CHECK(harness_file_size(memory_file(domain, "unrecorded")) > 0);
    check_guest_runs(domain);
}

/* Without INSTANT the call is libvirt's own, with the same result and the same error text. */
static void libvirts_own(virDomainPtr domain)
{
    static const char *const disk_only = "<domainsnapshot><name>disks</name></domainsnapshot>";
    static const char *const no_memory_file =
        "<domainsnapshot><memory snapshot='external'/></domainsnapshot>";
    unsigned int wrong[] = {CREATE(LIVE), CREATE(CURRENT), CREATE(QUIESCE), 1u << 20};
    virDomainSnapshotPtr snapshot =
        qemuSnapshotCreateXML(domain, NULL, disk_only, CREATE(DISK_ONLY));

    CHECK(snapshot);
    CHECK(strcmp(virDomainSnapshotGetName(snapshot), "disks") == 0);
    CHECK(virDomainSnapshotIsCurrent(snapshot, 0) == 1);
    check_guest_runs(domain);
    CHECK(virDomainSnapshotFree(snapshot) == 0);

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        virErrorPtr expected;

        CHECK(!virDomainSnapshotCreateXML(domain, no_memory_file, wrong[i]));
        expected = virSaveLastError();
        CHECK_VIR_FAILS(!qemuSnapshotCreateXML(domain, NULL, no_memory_file, wrong[i]),
                        expected->code, expected->domain);
        CHECK(strcmp(virGetLastErrorMessage(), expected->message) == 0);
        CHECK(strcmp(instantsnap_last_error()->message, expected->message) == 0);
        virFreeError(expected);
    }
    CHECK_VIR_FAILS(!qemuSnapshotCreateXML(NULL, NULL, disk_only, 0), VIR_ERR_INVALID_DOMAIN,
                    VIR_FROM_DOM);
    CHECK_VIR_FAILS(!qemuSnapshotCreateXML(domain, NULL, NULL, 0), VIR_ERR_INVALID_ARG,
                    VIR_FROM_DOMAIN_SNAPSHOT);
}

static void fails(virDomainPtr domain, const char *xml, unsigned int flags, int code)
{
    CHECK_VIR_FAILS(!qemuSnapshotCreateXML(domain, NULL, xml, flags), code, VIR_FROM_QEMU);
    /* instantsnap_last_error() has the same error. */
    CHECK(instantsnap_last_error()->code == code);
    CHECK(strcmp(instantsnap_last_error()->message, virGetLastErrorMessage()) == 0);
}

static void bad_arguments(virDomainPtr domain, virDomainPtr shut_off)
{
    unsigned int broken[] = {
        CREATE(INSTANT),           INSTANT | CREATE(DISK_ONLY), INSTANT | CREATE(REDEFINE),
        INSTANT | CREATE(QUIESCE), INSTANT | CREATE(CURRENT),   INSTANT | 1u << 11,
        INSTANT | 1u << 31,
    };
    const char *xml = snapshot_xml(domain, "never");
    int before = virDomainSnapshotNum(domain, 0);
    virDomainSnapshotPtr snapshot = virDomainSnapshotCurrent(domain, 0);

    for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++)
        fails(domain, xml, broken[i], VIR_ERR_INVALID_ARG);
    fails(domain, NULL, INSTANT, VIR_ERR_INVALID_ARG);
    fails(NULL, xml, INSTANT, VIR_ERR_INVALID_ARG);
    fails(domain, "", INSTANT, VIR_ERR_XML_DETAIL);
    fails(domain, "<domain/>", INSTANT, VIR_ERR_XML_ERROR);
    fails(domain, "<domainsnapshot/>", INSTANT, VIR_ERR_OPERATION_UNSUPPORTED);
    fails(shut_off, snapshot_xml(shut_off, "never"), INSTANT, VIR_ERR_OPERATION_INVALID);

    /* Objects of libvirt, but of the wrong kind. */
    CHECK(snapshot);
    fails((virDomainPtr) snapshot, xml, INSTANT, VIR_ERR_INVALID_DOMAIN);
    CHECK_FAILS(!instantsnap_open_libvirt((virDomainPtr) snapshot), VIR_ERR_INVALID_DOMAIN);
    CHECK_VIR_FAILS(qemuSnapshotRevert(NULL, (virDomainSnapshotPtr) domain, 0) == -1,
                    VIR_ERR_INVALID_DOMAIN_SNAPSHOT, VIR_FROM_QEMU);
    CHECK_VIR_FAILS(qemuSnapshotDelete(NULL, (virDomainSnapshotPtr) domain, 0) == -1,
                    VIR_ERR_INVALID_DOMAIN_SNAPSHOT, VIR_FROM_QEMU);
    CHECK_VIR_FAILS(qemuSnapshotRevert(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG, VIR_FROM_QEMU);
    CHECK_VIR_FAILS(qemuSnapshotDelete(NULL, NULL, 0) == -1, VIR_ERR_INVALID_ARG, VIR_FROM_QEMU);
    CHECK_VIR_FAILS(qemuSnapshotRevert(NULL, snapshot, 1u << 20) == -1, VIR_ERR_INVALID_ARG,
                    VIR_FROM_QEMU);
    CHECK_VIR_FAILS(qemuSnapshotDelete(NULL, snapshot, 1u << 20) == -1, VIR_ERR_INVALID_ARG,
                    VIR_FROM_QEMU);
    CHECK(virDomainSnapshotFree(snapshot) == 0);

    CHECK(virDomainSnapshotNum(domain, 0) == before);
    CHECK(harness_file_size(memory_file(domain, "never")) == -1);
    check_guest_runs(domain);
}

/* Instant snapshots are QEMU's: on another driver's domain only libvirt's own function works. */
static void another_driver(void)
{
    virConnectPtr connect = virConnectOpen("test:///default");
    virDomainPtr domain;
    virDomainSnapshotPtr snapshot;

    if (!connect)
        return;
    domain = look_up(connect, "test");
    fails(domain, "<domainsnapshot/>", INSTANT, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(!instantsnap_open_libvirt(domain), VIR_ERR_OPERATION_UNSUPPORTED);
    snapshot = qemuSnapshotCreateXML(domain, NULL, "<domainsnapshot/>", 0);
    CHECK(snapshot);
    CHECK(virDomainSnapshotFree(snapshot) == 0);
    CHECK(virDomainFree(domain) == 0);
    close_connection(connect);
}

struct one_of_many {
    virDomainPtr domain;
    const char *xml;
    pthread_barrier_t *start;
};

/* The errors of this thread are its own: those of the other thread are about another domain. */
static void *snapshot_one(void *data)
{
    struct one_of_many *one = data;
    virDomainSnapshotPtr snapshot;

    CHECK_VIR_FAILS(!qemuSnapshotCreateXML(one->domain, NULL, one->xml, CREATE(INSTANT)),
                    VIR_ERR_INVALID_ARG, VIR_FROM_QEMU);
    pthread_barrier_wait(one->start);
    snapshot = qemuSnapshotCreateXML(one->domain, NULL, one->xml, INSTANT);
    CHECK(snapshot);
    CHECK(virGetLastErrorCode() == VIR_ERR_OK);
    CHECK(virDomainSnapshotIsCurrent(snapshot, 0) == 1);
    CHECK(virDomainSnapshotFree(snapshot) == 0);
    return NULL;
}

/* Two domains of one connection at once. */
static void side_by_side(virDomainPtr one, virDomainPtr another)
{
    pthread_barrier_t start;
    struct one_of_many both[] = {
        {one, snapshot_xml(one, "beside"), &start},
        {another, snapshot_xml(another, "beside"), &start},
    };
    pthread_t threads[2];

    CHECK(pthread_barrier_init(&start, NULL, 2) == 0);
    for (size_t i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, snapshot_one, &both[i]) == 0);
    for (size_t i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(pthread_barrier_destroy(&start) == 0);
    check_guest_runs(one);
    check_guest_runs(another);
}

/*
 * A snapshot keeps its domain and its connection, as every object of libvirt does; nothing else of
 * the library keeps them.
 */
static void references(const char *name)
{
    virConnectPtr connect = open_connection();
    virDomainPtr domain = look_up(connect, name);
    virDomainSnapshotPtr snapshot =
        qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "kept"), INSTANT);

    CHECK(snapshot);
    CHECK(virDomainFree(domain) == 0);
    CHECK(virConnectRef(connect) == 0);
    CHECK(virConnectClose(connect) > 0);
    CHECK(virDomainSnapshotIsCurrent(snapshot, 0) == 1);
    CHECK(virDomainSnapshotFree(snapshot) == 0);
    close_connection(connect);
}

struct canceller {
    instantsnap_guest *guest;
    const char *file; /* the cancel waits until this file has that size */
    pthread_mutex_t lock;
    int done;
    int cancelled;
};

static void *cancel(void *data)
{
    struct canceller *canceller = data;
    int done = 0;

    while (!canceller->cancelled && !done) {
        if (harness_file_size(canceller->file) >= 100 << 10)
            canceller->cancelled = instantsnap_snapshot_cancel(canceller->guest) == 0;
        sched_yield();
        pthread_mutex_lock(&canceller->lock);
        done = canceller->done;
        pthread_mutex_unlock(&canceller->lock);
    }
    return NULL;
}

/* At whatever moment the cancel comes: the snapshot is complete, or nothing of it is left. */
static void cancelled(instantsnap_guest *guest, virDomainPtr domain)
{
    const char *file = memory_file(domain, "cancelled");
    struct canceller canceller = {.guest = guest, .file = file, .lock = PTHREAD_MUTEX_INITIALIZER};
    int before = instantsnap_snapshot_list(guest, NULL);
    pthread_t thread;
    int result;

    CHECK_FAILS(instantsnap_snapshot_cancel(guest) == -1, VIR_ERR_OPERATION_INVALID);
    CHECK(pthread_create(&thread, NULL, cancel, &canceller) == 0);
    result =
        instantsnap_snapshot_create_xml(guest, snapshot_xml(domain, "cancelled"), INSTANT, NULL);
    if (result < 0) {
        CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_ABORTED);
        CHECK(instantsnap_snapshot_list(guest, NULL) == before);
        CHECK(harness_file_size(file) == -1);
        CHECK(harness_file_size(harness_domain_path(virDomainGetName(domain), "disk.cancelled")) ==
              -1);
    } else {
        CHECK(instantsnap_snapshot_list(guest, NULL) == before + 1);
    }
    pthread_mutex_lock(&canceller.lock);
    canceller.done = 1;
    pthread_mutex_unlock(&canceller.lock);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(result == 0 || canceller.cancelled);
    check_guest_runs(domain);
}

/* A file of the caller's for the domain's journal, which exists during a snapshot. */
static const char *journal_of(virDomainPtr domain)
{
    char uuid[VIR_UUID_STRING_BUFLEN];

    CHECK(virDomainGetUUIDString(domain, uuid) == 0);
    return harness_path(harness_text("client/libvirt/.%s.journal", uuid));
}

static void keep_journal(const instantsnap_event *event, void *domain)
{
    const char *journal = journal_of(domain);

    if (event->type == INSTANTSNAP_EVENT_INSTANT)
        CHECK(link(journal, harness_text("%s.kept", journal)) == 0);
}

/* A caller that is killed after its snapshot was complete leaves its journal. */
static void recovered(instantsnap_guest *guest, virDomainPtr domain)
{
    const char *journal = journal_of(domain);
    instantsnap_create_options options = {.size = sizeof(options),
                                          .callback = keep_journal,
                                          .opaque = domain};
    char *report = NULL;

    CHECK(instantsnap_recover(guest, NULL) == 0);
    CHECK(instantsnap_snapshot_create(guest, snapshot_xml(domain, "kept"), INSTANT, &options, NULL) ==
          0);
    CHECK(rename(harness_text("%s.kept", journal), journal) == 0);
    CHECK(instantsnap_recover(guest, &report) == 1);
    CHECK(strstr(report, "\"finished\""));
    CHECK(strstr(report, "\"kept\""));
    instantsnap_free_string(report);
    CHECK(harness_file_size(journal) == -1);
    check_guest_runs(domain);
}

/* The same domain by the native API. */
static void our_functions(const char *name)
{
    virConnectPtr connect = open_connection();
    virDomainPtr domain = look_up(connect, name);
    instantsnap_guest *guest = instantsnap_open_libvirt(domain);
    instantsnap_stats stats = {.size = sizeof(stats)};
    char **names = NULL;
    char *taken = NULL, *current, *xml;
    int before;

    CHECK(guest);
    CHECK_FAILS(!instantsnap_open_libvirt(NULL), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_get_stats(guest, &stats) == -1, VIR_ERR_OPERATION_INVALID);
    before = instantsnap_snapshot_list(guest, NULL);
    CHECK(before == virDomainSnapshotNum(domain, 0));

    /* The caller may have dropped its own references. */
    CHECK(virDomainRef(domain) == 0);
    CHECK(virDomainFree(domain) == 0);
    CHECK(instantsnap_snapshot_create_xml(guest, snapshot_xml(domain, "ours"), INSTANT, &taken) ==
          0);
    CHECK(strcmp(taken, "ours") == 0);
    instantsnap_free_string(taken);
    check_guest_runs(domain);

    CHECK(instantsnap_get_stats(guest, &stats) == 0);
    CHECK(stats.disks == 1);
    CHECK(stats.guest_paused_us > 0);
    CHECK(stats.undo_us == 0);
    CHECK((long long) stats.memory_image_bytes == harness_file_size(memory_file(domain, "ours")));
    CHECK(stats.instant_us <= stats.total_us);

    CHECK(instantsnap_snapshot_list(guest, &names) == before + 1);
    instantsnap_free_string_list(names);
    current = instantsnap_snapshot_current(guest);
    CHECK(current);
    CHECK(strcmp(current, "ours") == 0);
    instantsnap_free_string(current);
    xml = instantsnap_snapshot_get_xml(guest, "ours");
    CHECK(xml);
    CHECK(strstr(xml, memory_file(domain, "ours")));
    instantsnap_free_string(xml);

    CHECK_FAILS(!instantsnap_snapshot_get_xml(guest, "nobody"), VIR_ERR_NO_DOMAIN_SNAPSHOT);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, NULL, INSTANT, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(
        instantsnap_snapshot_create_xml(guest, snapshot_xml(domain, "ours"), INSTANT, NULL) == -1,
        VIR_ERR_OPERATION_INVALID);
    /* instantsnap_snapshot_load() refuses, because libvirt runs the domain. */
    CHECK_FAILS(instantsnap_snapshot_load(guest, "ours", 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);

    cancelled(guest, domain);
    recovered(guest, domain);

    instantsnap_close(guest);
    CHECK_FAILS(instantsnap_snapshot_list(guest, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK(virDomainFree(domain) == 0);
    close_connection(connect);
}

/* Reverts back and forward; then deletes both snapshots, and the guest goes on. */
static void revert_and_delete(virDomainPtr domain)
{
    long at_instant = harness_ticks(domain);
    virDomainSnapshotPtr back =
        qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "back"), INSTANT);
    virDomainSnapshotPtr last;
    long now;

    CHECK(back);
    harness_wait_for_tick_after(domain, harness_ticks(domain));
    now = harness_ticks(domain);
    CHECK(now > at_instant);

    CHECK(qemuSnapshotRevert(NULL, back, VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING) == 0);
    CHECK(virGetLastErrorCode() == VIR_ERR_OK);
    CHECK(virDomainSnapshotIsCurrent(back, 0) == 1);
    /*
     * The serial line's file begins again; a guest whose memory and disks are of different moments
     * says so there.
     */
    check_guest_runs(domain);
    CHECK(qemuSnapshotRevert(NULL, back, VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED) == 0);
    CHECK(!is_running(domain));
    CHECK(virDomainResume(domain) == 0);
    check_guest_runs(domain);

    last = qemuSnapshotCreateXML(domain, NULL, snapshot_xml(domain, "last"), INSTANT);
    CHECK(last);
    CHECK(virDomainSnapshotNumChildren(back, 0) == 1);
    CHECK(qemuSnapshotDelete(NULL, last, 0) == 0);
    CHECK(virGetLastErrorCode() == VIR_ERR_OK);
    CHECK(virDomainSnapshotNumChildren(back, 0) == 0);
    CHECK(harness_file_size(memory_file(domain, "last")) == -1);
    check_guest_runs(domain);
    CHECK_VIR_FAILS(qemuSnapshotDelete(NULL, last, 0) == -1, VIR_ERR_NO_DOMAIN_SNAPSHOT,
                    VIR_FROM_QEMU);

    /* Deletes only the record. */
    CHECK(qemuSnapshotDelete(NULL, back, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == 0);
    CHECK(harness_file_size(memory_file(domain, "back")) > 0);
    check_guest_runs(domain);

    CHECK(virDomainSnapshotFree(back) == 0);
    CHECK(virDomainSnapshotFree(last) == 0);
}

int main(int argc, char **argv)
{
    virConnectPtr connect;
    virDomainPtr one, another, shut_off;

    if (argc != 3)
        return 2;
    harness_begin();
    uri = harness_libvirtd(argv[1]);
    tick = argv[2];

    connect = open_connection();
    one = harness_define(connect, "one", tick);
    harness_start(one);
    another = harness_define(connect, "another", tick);
    harness_start(another);
    shut_off = harness_define(connect, "shut-off", tick);

    instant(one);
    without_metadata(one);
    libvirts_own(one);
    bad_arguments(one, shut_off);
    another_driver();
    side_by_side(one, another);
    references("one");
    our_functions("another");
    revert_and_delete(another);

    CHECK(virDomainFree(one) == 0);
    CHECK(virDomainFree(another) == 0);
    CHECK(virDomainFree(shut_off) == 0);
    close_connection(connect);
    return 0;
}
