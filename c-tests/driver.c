/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The driver backend, with a driver like libvirt's: it has its own lock, held when it calls, its
 * own monitor and its own metadata. Then its callbacks fail, lie, stall and call the library, one
 * after the other, and the guest must not suffer.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <instantsnap.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)
#define PAUSE_LIMIT_MS 300

/* As in instantsnap-libvirt.h, which is for programs that have libvirt's headers. */
void *qemuSnapshotCreateXML(void *domain, void *vm, const char *xml, unsigned int flags);
int qemuSnapshotRevert(void *vm, void *snapshot, unsigned int flags);
int qemuSnapshotDelete(void *vm, void *snapshot, unsigned int flags);

enum callback {
    MONITOR, STATE, DOMAIN_XML, STATE_DIR, RECORD, FORGET, SNAPSHOT_XML, CURRENT, PAUSE, RESUME,
    SWITCH, MERGED, BEGIN, END, WATCHDOG, REPORT, MAKE, NAME, RESTART, CALLBACKS
};

/* A fault: what goes wrong, at which call of which callback. */
struct fault {
    enum { NOTHING, FAILS, FAILS_AFTERWARDS, LIES, STALLS, ACTS } kind;
    enum callback in;
    unsigned int nth;                  /* 1: the first */
    const char *lie;
    void (*act)(instantsnap_guest *); /* with the guest of the domain */
    unsigned int calls, hits;
};

struct snapshot {
    struct snapshot *next;
    char *name, *xml;
};

struct domain {
    pthread_mutex_t lock;
    int uses_lock, works, claims_off; /* an operation is between begin_job and end_job */
    const char *directory, *disk, *format, *watchdog_socket;
    pid_t qemu;
    int socket;
    FILE *monitor;
    struct snapshot *snapshots; /* the current one first */
    unsigned int calls[CALLBACKS], succeeded;
    struct fault fault;
    instantsnap_guest *guest;
    int reported;
    char message[1024];
};

/* The monitor. */

static void connect_monitor(struct domain *domain, const char *socket_name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char *line = NULL;
    size_t size = 0;

    domain->watchdog_socket = harness_path(harness_text("%s.aside", socket_name));
    domain->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strcpy(address.sun_path, harness_path(socket_name));
    CHECK(connect(domain->socket, (struct sockaddr *) &address, sizeof(address)) == 0);
    domain->monitor = fdopen(domain->socket, "r");
    CHECK(domain->monitor);
    CHECK(dprintf(domain->socket, "{\"execute\": \"qmp_capabilities\"}") > 0);
    CHECK(getline(&line, &size, domain->monitor) > 0 && getline(&line, &size, domain->monitor) > 0);
    CHECK(strstr(line, "\"return\""));
    free(line);
}

/* Runs one command. Returns its reply, for free(); NULL if QEMU has ended. */
static char *converse(struct domain *domain, const char *command, const int *fds, size_t fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } ancillary = {.space = {0}};
    struct iovec text = {.iov_base = (char *) command, .iov_len = strlen(command)};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1};

    if (fd_count > 0) {
        ancillary.header.cmsg_level = SOL_SOCKET;
        ancillary.header.cmsg_type = SCM_RIGHTS;
        ancillary.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&ancillary.header), fds, sizeof(int));
        message.msg_control = &ancillary;
        message.msg_controllen = sizeof(ancillary.space);
    }
    if (sendmsg(domain->socket, &message, MSG_NOSIGNAL) != (ssize_t) strlen(command))
        return NULL;
    for (;;) {
        char *line = NULL;
        size_t size = 0;

        if (getline(&line, &size, domain->monitor) < 0) {
            free(line);
            return NULL;
        }
        if (strncmp(line, "{\"timestamp\"", 12) != 0)
            return line;
        instantsnap_driver_event(domain, line);
        free(line);
    }
}

/* Whether QEMU's reply contains this. */
static int says(struct domain *domain, const char *command, const char *part)
{
    char *reply = converse(domain, harness_text("{\"execute\": \"%s\"}", command), NULL, 0);
    int found = reply && strstr(reply, part);

    if (!found)
        fprintf(stderr, "%s: %s\n", command, reply ? reply : "nothing");
    free(reply);
    return found;
}

/* The callbacks. */

static int refuse(void)
{
    instantsnap_driver_set_reason("because the test wants it so");
    return -1;
}

/* Each callback begins with this. Returns whether this call is the one that goes wrong. */
static int enter(struct domain *domain, enum callback callback)
{
    struct fault *fault = &domain->fault;

    if (domain->uses_lock)
        CHECK(pthread_mutex_lock(&domain->lock) == EDEADLK);
    domain->calls[callback]++;
    if (fault->kind == NOTHING || fault->in != callback || ++fault->calls != fault->nth)
        return 0;
    fault->hits++;
    if (fault->act)
        fault->act(domain->guest);
    return fault->kind != ACTS;
}

static int fails(struct domain *domain, enum callback callback)
{
    return enter(domain, callback) && domain->fault.kind == FAILS;
}

/* A hit takes longer than the callback's time. */
static void stall(struct domain *domain, unsigned int timeout_ms)
{
    if (domain->fault.kind == STALLS && timeout_ms <= PAUSE_LIMIT_MS)
        usleep((timeout_ms + 20) * 1000);
}

static int on_monitor(void *opaque, const char *command, const int *fds, size_t fd_count,
                      unsigned int timeout_ms, char **reply)
{
    struct domain *domain = opaque;
    int wrong = enter(domain, MONITOR);

    CHECK(timeout_ms > 0);
    CHECK(fd_count <= 1);
    CHECK(!*reply);
    if (wrong && domain->fault.kind == FAILS)
        return refuse();
    *reply = converse(domain, command, fds, fd_count);
    if (!*reply) {
        instantsnap_driver_set_reason("QEMU has closed its monitor");
        return -1;
    }
    if (!wrong)
        return 0;
    stall(domain, timeout_ms);
    if (domain->fault.kind == FAILS_AFTERWARDS)
        return refuse(); /* the library frees a reply even after a failure */
    if (domain->fault.kind == LIES) {
        free(*reply);
        *reply = domain->fault.lie ? strdup(domain->fault.lie) : NULL;
    }
    return 0;
}

static int on_state(void *opaque)
{
    struct domain *domain = opaque;
    int state = INSTANTSNAP_DRIVER_PAUSED;
    char *reply;

    if (enter(domain, STATE))
        return domain->fault.kind == LIES ? 4711 : refuse();
    reply = converse(domain, "{\"execute\": \"query-status\"}", NULL, 0);
    if (!reply || domain->claims_off) {
        free(reply);
        return INSTANTSNAP_DRIVER_SHUTOFF;
    }
    if (strstr(reply, "\"running\": true"))
        state = INSTANTSNAP_DRIVER_RUNNING;
    free(reply);
    return state;
}

/* The string that a callback returns: the right one, or the fault's. */
static char *answer(struct domain *domain, enum callback callback, const char *truth)
{
    if (!enter(domain, callback))
        return truth ? strdup(truth) : NULL;
    if (domain->fault.kind == LIES && domain->fault.lie)
        return strdup(domain->fault.lie);
    refuse();
    return NULL;
}

static char *on_domain_xml(void *opaque)
{
    struct domain *domain = opaque;

    return answer(
        domain, DOMAIN_XML,
        harness_text(
            "<domain type='qemu'><name>guest</name><memory unit='MiB'>64</memory><devices>"
            "<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'/>"
            "<target dev='vda' bus='virtio'/></disk></devices></domain>",
            domain->format, domain->disk));
}

static char *on_state_dir(void *opaque)
{
    return answer(opaque, STATE_DIR, ((struct domain *) opaque)->directory);
}

static struct snapshot **find(struct domain *domain, const char *name)
{
    struct snapshot **link = &domain->snapshots;

    while (*link && strcmp((*link)->name, name) != 0)
        link = &(*link)->next;
    return link;
}

static int on_record(void *opaque, const char *name, const char *xml)
{
    struct domain *domain = opaque;
    struct snapshot *snapshot;

    if (fails(domain, RECORD))
        return refuse();
    CHECK(!*find(domain, name));
    snapshot = malloc(sizeof(*snapshot));
    CHECK(snapshot);
    *snapshot =
        (struct snapshot) {.next = domain->snapshots, .name = strdup(name), .xml = strdup(xml)};
    domain->snapshots = snapshot;
    return 0;
}

static void forget(struct domain *domain, const char *name)
{
    struct snapshot **link = find(domain, name), *snapshot = *link;

    CHECK(snapshot);
    *link = snapshot->next;
    free(snapshot->name);
    free(snapshot->xml);
    free(snapshot);
}

static int on_forget(void *opaque, const char *name)
{
    if (fails(opaque, FORGET))
        return refuse();
    forget(opaque, name);
    return 0;
}

static char *on_snapshot_xml(void *opaque, const char *name)
{
    struct snapshot *snapshot = *find(opaque, name);

    return answer(opaque, SNAPSHOT_XML, snapshot ? snapshot->xml : NULL);
}

static char *on_current(void *opaque)
{
    struct snapshot *snapshot = ((struct domain *) opaque)->snapshots;

    return answer(opaque, CURRENT, snapshot ? snapshot->name : NULL);
}

/* A QMP command that a callback runs itself. */
static int does(struct domain *domain, enum callback callback, const char *command,
                unsigned int timeout_ms)
{
    int wrong = enter(domain, callback), done;
    char *reply;

    if (wrong && domain->fault.kind == FAILS)
        return refuse();
    reply = converse(domain, command, NULL, 0);
    done = reply && strstr(reply, "\"return\"");
    instantsnap_driver_set_reason(reply);
    free(reply);
    if (wrong)
        stall(domain, timeout_ms);
    return done && !(wrong && domain->fault.kind == FAILS_AFTERWARDS) ? 0 : refuse();
}

static int on_pause(void *opaque, unsigned int timeout_ms)
{
    return does(opaque, PAUSE, "{\"execute\": \"stop\"}", timeout_ms);
}

static int on_resume(void *opaque, unsigned int timeout_ms)
{
    return does(opaque, RESUME, "{\"execute\": \"cont\"}", timeout_ms);
}

static int on_switch(void *opaque, const instantsnap_driver_disk *disks, size_t count,
                     unsigned int timeout_ms)
{
    CHECK(count == 1);
    CHECK(disks->size == sizeof(*disks));
    CHECK(strcmp(disks->name, "vda") == 0);
    CHECK(disks->overlay[0] == '/');
    return does(
        opaque, SWITCH,
        harness_text("{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": "
                     "\"blockdev-snapshot\", \"data\": {\"node\": \"%s\", \"overlay\": \"%s\"}}]}}",
                     disks->node, disks->overlay_node),
        timeout_ms);
}

static void on_merged(void *opaque, const instantsnap_driver_disk *disks, size_t count)
{
    enter(opaque, MERGED);
    CHECK(count == 1);
    CHECK(strcmp(disks->name, "vda") == 0);
}

static int on_begin(void *opaque)
{
    struct domain *domain = opaque;

    if (fails(domain, BEGIN))
        return refuse();
    CHECK(!domain->works);
    domain->works = 1;
    return 0;
}

static void on_end(void *opaque)
{
    struct domain *domain = opaque;

    enter(domain, END);
    CHECK(domain->works);
    domain->works = 0;
}

static void on_lock(void *opaque)
{
    CHECK(pthread_mutex_lock(&((struct domain *) opaque)->lock) == 0);
}

static void on_unlock(void *opaque)
{
    CHECK(pthread_mutex_unlock(&((struct domain *) opaque)->lock) == 0);
}

static char *on_watchdog_socket(void *opaque)
{
    return answer(opaque, WATCHDOG, ((struct domain *) opaque)->watchdog_socket);
}

static void on_report(void *opaque, int code, int from, const char *message)
{
    struct domain *domain = opaque;

    enter(domain, REPORT);
    CHECK(from == VIR_FROM_QEMU);
    domain->reported = code;
    snprintf(domain->message, sizeof(domain->message), "%s", message);
}

/* The driver's own snapshot object: here, the snapshot's name. */
static void *on_make(void *opaque, void *connection, const char *name)
{
    CHECK(connection == opaque); /* what qemuSnapshotCreateXML() was given */
    if (fails(opaque, MAKE)) {
        refuse();
        return NULL;
    }
    return strdup(name);
}

static char *on_name(void *opaque, void *snapshot)
{
    return answer(opaque, NAME, snapshot);
}

static int on_restart(void *opaque, const instantsnap_revert_plan *plan)
{
    struct domain *domain = opaque;
    instantsnap_revert_disk disk = {.size = sizeof(disk)};
    const char *socket_name;

    if (fails(domain, RESTART))
        return refuse();
    CHECK(instantsnap_revert_plan_disk_count(plan) == 1);
    CHECK(instantsnap_revert_plan_get_disk(plan, 0, &disk) == 0);
    free(converse(domain, "{\"execute\": \"quit\"}", NULL, 0));
    fclose(domain->monitor);
    harness_wait_for_end(domain->qemu);
    domain->disk = harness_text("%s", disk.file);
    domain->format = harness_text("%s", disk.format);
    socket_name = harness_text("well/reverted-%u", domain->calls[RESTART]);
    domain->qemu = harness_qemu(socket_name, domain->disk, domain->format, 1);
    connect_monitor(domain, socket_name);
    return 0;
}

/* Only the required callbacks, with the driver's own metadata. */
static const instantsnap_driver_ops bare = {
    .size = sizeof(bare), .monitor = on_monitor, .state = on_state, .domain_xml = on_domain_xml,
    .record = on_record, .forget = on_forget, .snapshot_xml = on_snapshot_xml
};

/* All callbacks except the lock and those for the qemuSnapshot functions. */
static instantsnap_driver_ops full_ops(void)
{
    instantsnap_driver_ops ops = bare;

    ops.current_snapshot = on_current;
    ops.pause = on_pause;
    ops.resume = on_resume;
    ops.switch_disks = on_switch;
    ops.disks_merged = on_merged;
    ops.begin_job = on_begin;
    ops.end_job = on_end;
    ops.guard_socket = on_watchdog_socket;
    return ops;
}

/* The callbacks that libvirt's driver would have. */
static instantsnap_driver_ops libvirts_ops(void)
{
    instantsnap_driver_ops ops = full_ops();

    ops.lock = on_lock;
    ops.unlock = on_unlock;
    ops.report_error = on_report;
    ops.make_snapshot = on_make;
    ops.snapshot_name = on_name;
    ops.restart = on_restart;
    return ops;
}

/* The same, but the library records the snapshots. */
static instantsnap_driver_ops recording_ops(void)
{
    instantsnap_driver_ops ops = libvirts_ops();

    ops.record = NULL;
    ops.forget = NULL;
    ops.snapshot_xml = NULL;
    ops.current_snapshot = NULL;
    ops.state_dir = on_state_dir;
    ops.make_snapshot = NULL;
    return ops;
}

/* Domains, and their state. */

static void start(struct domain *domain, const char *name)
{
    pthread_mutexattr_t checking;

    memset(domain, 0, sizeof(*domain));
    pthread_mutexattr_init(&checking);
    pthread_mutexattr_settype(&checking, PTHREAD_MUTEX_ERRORCHECK);
    CHECK(pthread_mutex_init(&domain->lock, &checking) == 0);
    pthread_mutexattr_destroy(&checking);
    domain->directory = harness_path(name);
    CHECK(mkdir(domain->directory, 0700) == 0);
    domain->disk = harness_disk(harness_text("%s/disk.raw", name));
    domain->format = "raw";
    domain->qemu = harness_qemu(harness_text("%s/qmp", name), domain->disk, domain->format, 0);
    connect_monitor(domain, harness_text("%s/qmp", name));
}

static void stop(struct domain *domain)
{
    CHECK(says(domain, "query-status", "\"running\": true"));
    while (domain->snapshots)
        forget(domain, domain->snapshots->name);
    instantsnap_close(domain->guest);
    fclose(domain->monitor);
    pthread_mutex_destroy(&domain->lock);
}

static const char *named(struct domain *domain, const char *name)
{
    return harness_text("<domainsnapshot><name>%s</name><memory snapshot='external' "
                        "file='%s/%s.mem'/></domainsnapshot>",
                        name, domain->directory, name);
}

static int memory_is_there(struct domain *domain, const char *name)
{
    return harness_file_size(harness_text("%s/%s.mem", domain->directory, name)) > 0;
}

/* The state that a failure must not change. */
struct trace {
    char *capabilities, *parameters, *jobs;
    char nodes[4096];
    int files;
};

static struct trace trace(struct domain *domain)
{
    struct trace trace = {.files = 0};
    char *nodes = converse(
        domain, "{\"execute\": \"query-named-block-nodes\", \"arguments\": {\"flat\": true}}", NULL,
        0);
    DIR *directory = opendir(domain->directory);

    trace.capabilities = converse(domain, "{\"execute\": \"query-migrate-capabilities\"}", NULL, 0);
    trace.parameters = converse(domain, "{\"execute\": \"query-migrate-parameters\"}", NULL, 0);
    trace.jobs = converse(domain, "{\"execute\": \"query-jobs\"}", NULL, 0);
    CHECK(nodes && trace.capabilities && trace.parameters && trace.jobs && directory);
    for (const char *at = nodes; (at = strstr(at, "\"node-name\": ")); at++)
        snprintf(trace.nodes + strlen(trace.nodes), 40, "%.39s", at);
    while (readdir(directory))
        trace.files++;
    closedir(directory);
    free(nodes);
    return trace;
}

static void release(struct trace *trace)
{
    free(trace->capabilities);
    free(trace->parameters);
    free(trace->jobs);
}

/* Checks that the guest runs, and that nothing is left in QEMU or in the directory. */
static void check_untouched(struct domain *domain, const struct trace *before)
{
    struct trace after = trace(domain);

    CHECK(says(domain, "query-status", "\"running\": true"));
    CHECK(strcmp(before->capabilities, after.capabilities) == 0);
    CHECK(strcmp(before->parameters, after.parameters) == 0);
    CHECK(strcmp(before->jobs, after.jobs) == 0);
    CHECK(strcmp(before->nodes, after.nodes) == 0);
    CHECK(before->files == after.files);
    CHECK(!domain->works);
    release(&after);
}

/*
 * Takes a snapshot with this fault. If it fails, it must leave nothing. Returns whether it
 * succeeded. If the fault was not reached, it has no hits.
 */
static int try_with(struct domain *domain, struct fault fault, unsigned int flags)
{
    const char *name = harness_text("tried-%u", domain->succeeded);
    struct trace before = trace(domain);
    int result;

    domain->fault = fault;
    result = instantsnap_snapshot_create_xml(domain->guest, named(domain, name), flags, NULL);
    domain->fault.kind = NOTHING;
    if (result < 0) {
        CHECK(domain->fault.hits > 0);
        check_untouched(domain, &before);
        CHECK(!*find(domain, name));
    } else {
        CHECK(says(domain, "query-status", "\"running\": true"));
        CHECK(memory_is_there(domain, name));
        forget(domain, name);
        CHECK(remove(harness_text("%s/%s.mem", domain->directory, name)) == 0);
        domain->succeeded++;
    }
    release(&before);
    return result == 0;
}

/* The tests. */

static void registering(struct domain *domain)
{
    instantsnap_driver_ops ops = bare;

    CHECK_FAILS(!qemuSnapshotCreateXML(NULL, domain, "<domainsnapshot/>", INSTANT),
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(qemuSnapshotDelete(domain, domain, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    ops.size = 8;
    CHECK_FAILS(instantsnap_register_driver(&ops) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_open_driver(NULL, domain), VIR_ERR_INVALID_ARG);
#define WITHOUT(field) \
    ops = bare; \
    ops.field = NULL; \
    CHECK_FAILS(instantsnap_register_driver(&ops) == -1, VIR_ERR_INVALID_ARG); \
    CHECK_FAILS(!instantsnap_open_driver(&ops, domain), VIR_ERR_INVALID_ARG);
    WITHOUT(monitor)
    WITHOUT(state)
    WITHOUT(domain_xml)
    WITHOUT(record)
    WITHOUT(forget)
    WITHOUT(snapshot_xml)
    ops = bare;
    ops.lock = on_lock;
    CHECK_FAILS(instantsnap_register_driver(&ops) == -1, VIR_ERR_INVALID_ARG);

    CHECK(instantsnap_register_driver(&bare) == 0);
    CHECK_FAILS(instantsnap_register_driver(&bare) == -1, VIR_ERR_OPERATION_INVALID);
    CHECK(instantsnap_register_driver(NULL) == 0);
    CHECK(instantsnap_register_driver(NULL) == 0);
    /* No callback is called for an event of an unknown domain, or for text that is not an event. */
    instantsnap_driver_event(domain, "{\"event\": \"STOP\"}");
    instantsnap_driver_event(NULL, "nonsense");
    instantsnap_driver_set_reason(NULL);
    CHECK(domain->calls[MONITOR] == 0);
}

/* Takes the driver's lock while memory is being saved. */
struct peeker {
    struct domain *domain;
    const char *memory;
    int done, seen;
};

static void *peek(void *data)
{
    struct peeker *peeker = data;
    struct domain *domain = peeker->domain;

    for (int over = 0; !over; usleep(200)) {
        CHECK(pthread_mutex_lock(&domain->lock) == 0);
        over = peeker->done;
        /* More than the image's header. */
        peeker->seen += domain->works && harness_file_size(peeker->memory) > 100 << 10;
        CHECK(pthread_mutex_unlock(&domain->lock) == 0);
    }
    return NULL;
}

static void check_locked(struct domain *domain)
{
    CHECK(pthread_mutex_lock(&domain->lock) == EDEADLK);
}

static void libvirts_driver(struct domain *domain)
{
    instantsnap_driver_ops ops = libvirts_ops();
    struct peeker peeker = {.domain = domain, .memory = harness_path("well/first.mem")};
    struct trace before;
    pthread_t thread;
    char *first, *second;

    CHECK(instantsnap_register_driver(&ops) == 0);
    domain->uses_lock = 1;
    CHECK(pthread_create(&thread, NULL, peek, &peeker) == 0);
    on_lock(domain);

    first = qemuSnapshotCreateXML(domain, domain, named(domain, "first"), INSTANT);
    CHECK(first);
    check_locked(domain);
    CHECK(strcmp(first, "first") == 0);
    CHECK(memory_is_there(domain, "first"));
    CHECK(peeker.seen > 0);
    CHECK(domain->calls[PAUSE] == 1 && domain->calls[SWITCH] == 1 && domain->calls[RECORD] == 1);
    CHECK(domain->calls[BEGIN] == 1 && domain->calls[END] == 1 && domain->calls[WATCHDOG] == 1 &&
          domain->calls[MERGED] == 0);
    CHECK(says(domain, "query-status", "\"running\": true"));
    CHECK(strcmp(domain->snapshots->name, "first") == 0);
    CHECK(strstr(domain->snapshots->xml, "<domainsnapshot") &&
          !strstr(domain->snapshots->xml, "<parent>"));
    peeker.done = 1;
    on_unlock(domain);
    CHECK(pthread_join(thread, NULL) == 0);

    on_lock(domain);
    second = qemuSnapshotCreateXML(domain, domain, named(domain, "second"), 0);
    check_locked(domain);
    CHECK(second && strcmp(second, "second") == 0);
    CHECK(domain->calls[RESUME] > 0);
    CHECK(strstr(domain->snapshots->xml, "<parent>") &&
          strstr(domain->snapshots->xml, "<name>first</name>"));

    /* The library reports errors, with the lock held. */
    before = trace(domain);
    CHECK(domain->calls[REPORT] == 0);
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, named(domain, "first"), INSTANT),
                VIR_ERR_OPERATION_INVALID);
    CHECK(domain->reported == VIR_ERR_OPERATION_INVALID &&
          strstr(domain->message, "'first' already exists"));
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, "<domainsnapshot/>", INSTANT),
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK(domain->reported == VIR_ERR_OPERATION_UNSUPPORTED && strstr(domain->message, "memory"));
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, NULL, INSTANT), VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, "<domainsnapshot/>", 1u << 31),
                VIR_ERR_INVALID_ARG);
    domain->fault = (struct fault) {.kind = FAILS, .in = SWITCH, .nth = 1};
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, named(domain, "third"), INSTANT),
                VIR_ERR_OPERATION_FAILED);
    CHECK(strstr(domain->message, "because the test wants it so"));
    check_locked(domain);
    CHECK(domain->calls[MERGED] == 1);
    check_untouched(domain, &before);
    CHECK(domain->calls[REPORT] == 5);
    release(&before);

    CHECK_FAILS(qemuSnapshotRevert(domain, first, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(qemuSnapshotDelete(domain, first, 0) == -1, VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK_FAILS(qemuSnapshotDelete(domain, NULL, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK(qemuSnapshotDelete(domain, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == 0);
    check_locked(domain);
    CHECK(!*find(domain, "first"));
    CHECK(memory_is_there(domain, "first"));
    CHECK_FAILS(qemuSnapshotDelete(domain, first, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
    domain->fault = (struct fault) {.kind = FAILS, .in = FORGET, .nth = 1};
    CHECK_FAILS(qemuSnapshotDelete(domain, second, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_OPERATION_FAILED);
    domain->fault = (struct fault) {.kind = FAILS, .in = NAME, .nth = 1};
    CHECK_FAILS(qemuSnapshotDelete(domain, second, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == -1,
                VIR_ERR_OPERATION_FAILED);
    CHECK(*find(domain, "second"));

    /* The snapshot is complete and recorded, but has no object. */
    domain->fault = (struct fault) {.kind = FAILS, .in = MAKE, .nth = 1};
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, named(domain, "third"), INSTANT),
                VIR_ERR_OPERATION_FAILED);
    CHECK(*find(domain, "third"));
    /* Snapshots without a name get different names, even within one second. */
    for (unsigned int n = 0; n < 2; n++) {
        char *unnamed = qemuSnapshotCreateXML(
            domain, domain,
            harness_text("<domainsnapshot><memory snapshot='external' file='%s/unnamed-%u.mem'/>"
                         "<disks><disk name='vda' snapshot='no'/></disks></domainsnapshot>",
                         domain->directory, n),
            INSTANT);
        CHECK(unnamed && *find(domain, unnamed));
        free(unnamed);
    }
    on_unlock(domain);
    CHECK(instantsnap_register_driver(NULL) == 0);
    free(first);
    free(second);
}

/* The library records the snapshots, and reverts to them. */
static void recorded_by_the_library(struct domain *domain)
{
    instantsnap_driver_ops ops = recording_ops();
    struct trace before;
    void *snapshot;
    int files;

    CHECK(instantsnap_register_driver(&ops) == 0);
    domain->uses_lock = 1;
    on_lock(domain);
    snapshot = qemuSnapshotCreateXML(domain, domain,
                                     "<domainsnapshot><name>s</name></domainsnapshot>", INSTANT);
    CHECK(snapshot);
    CHECK(strcmp(instantsnap_snapshot_get_name(snapshot), "s") == 0);
    CHECK(memory_is_there(domain, "s"));

    before = trace(domain);
    files = before.files;
    domain->fault = (struct fault) {.kind = FAILS, .in = RESTART, .nth = 1};
    CHECK_FAILS(qemuSnapshotRevert(domain, snapshot, 0) == -1, VIR_ERR_OPERATION_FAILED);
    CHECK(strstr(domain->message, "because the test wants it so"));
    check_untouched(domain, &before);
    release(&before);
    CHECK_FAILS(qemuSnapshotRevert(domain, snapshot, 1u << 31) == -1, VIR_ERR_INVALID_ARG);
    domain->fault.kind = NOTHING;
    CHECK(qemuSnapshotRevert(domain, snapshot, VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING) == 0);
    check_locked(domain);
    CHECK(domain->calls[RESTART] == 2);
    CHECK(says(domain, "query-status", "\"running\": true"));
    before = trace(domain);
    /* QEMU's sockets have changed; the fresh image is new. */
    CHECK(before.files == files + 1);
    release(&before);

    CHECK(qemuSnapshotDelete(domain, snapshot, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) == 0);
    CHECK_FAILS(qemuSnapshotDelete(domain, snapshot, VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY) ==
                    -1,
                VIR_ERR_NO_DOMAIN_SNAPSHOT);
    on_unlock(domain);
    instantsnap_snapshot_free(snapshot);
    CHECK(instantsnap_register_driver(NULL) == 0);
}

/* A registered driver's storage hook: its `opaque` is the domain, and the driver's lock is free. */

static struct {
    unsigned int snapshots, undone, reverted;
    int result;
} storage;

static const char *copy_of(const instantsnap_storage_call *call)
{
    return harness_text("%s.%s", call->disks[0]->source, call->snapshot);
}

static void check_storage(const instantsnap_storage_call *call, struct domain *domain)
{
    CHECK(pthread_mutex_trylock(&domain->lock) == 0);
    CHECK(pthread_mutex_unlock(&domain->lock) == 0);
    CHECK(call->disk_count == 1);
    CHECK(strcmp(call->disks[0]->name, "vda") == 0);
}

static int copy(const char *from, const char *to)
{
    const char *words[] = {"cp", from, to, NULL};

    return harness_run(words);
}

static int on_storage_snapshot(const instantsnap_storage_call *call, void *opaque)
{
    check_storage(call, opaque);
    CHECK(strcmp(call->disks[0]->source, ((struct domain *) opaque)->disk) == 0);
    storage.snapshots++;
    return storage.result ? storage.result : copy(call->disks[0]->source, copy_of(call));
}

static void on_storage_undo(const instantsnap_storage_call *call, void *opaque)
{
    check_storage(call, opaque);
    CHECK(remove(copy_of(call)) == 0);
    storage.undone++;
}

/* The continued guest writes to a copy: the snapshot can be reverted to again. */
static int on_storage_revert(const instantsnap_storage_call *call, char **files, void *opaque)
{
    const char *file = harness_text("%s.reverted-%u", copy_of(call), ++storage.reverted);

    check_storage(call, opaque);
    if (copy(copy_of(call), file) != 0)
        return -1;
    files[0] = strdup(file);
    return 0;
}

static void with_storage(struct domain *domain)
{
    static const char manual[] =
        "<domainsnapshot>%s<disks><disk name='vda' snapshot='manual'/></disks></domainsnapshot>";
    instantsnap_storage_hook hook = {.size = sizeof(hook),
                                     .snapshot = on_storage_snapshot,
                                     .undo = on_storage_undo,
                                     .revert = on_storage_revert};
    instantsnap_driver_ops ops = recording_ops();
    struct trace before;
    void *snapshot;
    const char *xml = harness_text(manual, "<name>hooked</name>");

    CHECK(instantsnap_register_driver(&ops) == 0);
    on_lock(domain);
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, xml, INSTANT),
                VIR_ERR_OPERATION_UNSUPPORTED);
    CHECK(instantsnap_register_driver(NULL) == 0);

    hook.reserved = 1;
    ops.storage_hook = &hook;
    CHECK_FAILS(instantsnap_register_driver(&ops) == -1, VIR_ERR_INVALID_ARG);
    hook.reserved = 0;
    CHECK(instantsnap_register_driver(&ops) == 0);
    /* The library has copied the table. */
    memset(&hook, 0xff, sizeof(hook));

    before = trace(domain);
    storage.result = 28;
    CHECK_FAILS(!qemuSnapshotCreateXML(domain, domain, xml, INSTANT), VIR_ERR_OPERATION_FAILED);
    CHECK(strstr(domain->message, "28"));
    check_locked(domain);
    check_untouched(domain, &before);
    storage.result = 0;
    snapshot = qemuSnapshotCreateXML(domain, domain, xml, INSTANT);
    check_locked(domain);
    CHECK(snapshot && storage.snapshots == 2 && storage.undone == 0);
    release(&before);

    CHECK(qemuSnapshotRevert(domain, snapshot, VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING) == 0);
    check_locked(domain);
    CHECK(storage.reverted == 1 && strstr(domain->disk, ".hooked.reverted-1"));
    CHECK(says(domain, "query-status", "\"running\": true"));
    CHECK(qemuSnapshotDelete(domain, snapshot, 0) == 0);
    check_locked(domain);
    CHECK(storage.undone == 1);
    on_unlock(domain);
    instantsnap_snapshot_free(snapshot);
    CHECK(instantsnap_register_driver(NULL) == 0);
}

static void open_guest(struct domain *domain, const instantsnap_driver_ops *ops)
{
    instantsnap_close(domain->guest);
    domain->uses_lock = ops->lock != NULL;
    domain->guest = instantsnap_open_driver(ops, domain);
    CHECK(domain->guest);
}

/*
 * The monitor fails at its first command, at its second, and so on, until a snapshot has no more
 * commands.
 */
static void monitor_goes_wrong(struct domain *domain, int kind, unsigned int flags,
                               const char *const *lies, size_t count)
{
    struct fault fault = {.kind = kind, .in = MONITOR, .nth = 1};

    for (;; fault.nth++) {
        int succeeded;

        fault.lie = count > 0 ? lies[fault.nth % count] : NULL;
        succeeded = try_with(domain, fault, flags);
        if (domain->fault.hits == 0) {
            CHECK(succeeded);
            break;
        }
    }
    CHECK(fault.nth > 20);
}

static void others_fail(struct domain *domain)
{
    static const enum callback callbacks[] = {STATE,   DOMAIN_XML, RECORD, SNAPSHOT_XML,
                                              CURRENT, PAUSE,      SWITCH, BEGIN};

    for (size_t i = 0; i < sizeof(callbacks) / sizeof(*callbacks); i++) {
        struct fault fault = {.kind = FAILS, .in = callbacks[i], .nth = 1};

        CHECK(!try_with(domain, fault, INSTANT));
        CHECK(strstr(instantsnap_last_error()->message, "because the test wants it so"));
        CHECK(instantsnap_last_error()->code ==
              (callbacks[i] == BEGIN ? VIR_ERR_OPERATION_INVALID : VIR_ERR_OPERATION_FAILED));
    }
    for (size_t i = 0; i < 2; i++)
        CHECK(!try_with(
            domain, (struct fault) {.kind = FAILS_AFTERWARDS, .in = i ? SWITCH : PAUSE, .nth = 1},
            INSTANT));
    /* A snapshot succeeds without a socket for the watchdog, too. */
    CHECK(try_with(domain, (struct fault) {.kind = FAILS, .in = WATCHDOG, .nth = 1}, INSTANT));
    /*
     * QEMU 7.2 resumes the guest itself when it is armed: then `resume` is not called and cannot
     * fail.
     */
    try_with(domain, (struct fault) {.kind = FAILS, .in = RESUME, .nth = 1}, INSTANT);
    try_with(domain, (struct fault) {.kind = FAILS, .in = RESUME, .nth = 1}, 0);
}

static void others_lie(struct domain *domain)
{
    static const char *const xmls[] = {"", "no XML", "<domain/>",
                                       "<domain><name>\xff</name></domain>", "<a>"};
    struct fault fault = {.kind = LIES, .in = STATE, .nth = 1};

    CHECK(!try_with(domain, fault, INSTANT));
    CHECK(strstr(instantsnap_last_error()->message, "4711"));
    fault.in = DOMAIN_XML;
    for (size_t i = 0; i < sizeof(xmls) / sizeof(*xmls); i++) {
        fault.lie = xmls[i];
        CHECK(!try_with(domain, fault, INSTANT));
    }
    fault.in = SNAPSHOT_XML;
    fault.lie = "there is one";
    CHECK(!try_with(domain, fault, INSTANT));
    CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_INVALID);
    fault.in = CURRENT;
    fault.lie = "\xff";
    CHECK(!try_with(domain, fault, INSTANT));
    fault.in = WATCHDOG;
    fault.lie = "/nowhere";
    CHECK(!try_with(domain, fault, INSTANT));
}

static void too_late(struct domain *domain)
{
    static const enum callback callbacks[] = {PAUSE, SWITCH};
    struct fault fault = {.kind = STALLS, .nth = 1};

    CHECK(instantsnap_set_pause_limit(domain->guest, PAUSE_LIMIT_MS) == 0);
    for (size_t i = 0; i < sizeof(callbacks) / sizeof(*callbacks); i++) {
        instantsnap_stats stats = {.size = sizeof(stats)};

        fault.in = callbacks[i];
        CHECK(!try_with(domain, fault, INSTANT));
        CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_TIMEOUT);
        CHECK(instantsnap_get_stats(domain->guest, &stats) == 0);
        /* Measured by the events that were passed on. */
        CHECK(stats.pause_from_events == 1);
        CHECK(stats.guest_paused_us >= PAUSE_LIMIT_MS * 1000 * 9 / 10);
    }
    CHECK(instantsnap_set_pause_limit(domain->guest, 30000) == 0);
}

/* Calling back. */

static struct domain *other;
static const instantsnap_driver_ops *reentered;

static void call_back(instantsnap_guest *guest)
{
    struct domain *domain = other + 1;
    instantsnap_guest *again = instantsnap_open_driver(reentered, domain);

    CHECK(again);
    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, named(domain, "inner"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(instantsnap_snapshot_create_xml(again, named(domain, "inner"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(!instantsnap_snapshot_create_start(guest, named(domain, "inner"), INSTANT, NULL),
                VIR_ERR_OPERATION_INVALID);
    instantsnap_close(again);
    CHECK(instantsnap_snapshot_create_xml(other->guest, named(other, "of-the-other"), INSTANT,
                                          NULL) == 0);
    forget(other, "of-the-other");
    CHECK(remove(harness_text("%s/of-the-other.mem", other->directory)) == 0);
}

static void cancel(instantsnap_guest *guest)
{
    CHECK(instantsnap_snapshot_cancel(guest) == 0);
}

/* From now on the driver reports that there is no QEMU, although QEMU uses the images. */
static void cancel_and_lie(instantsnap_guest *guest)
{
    cancel(guest);
    other[1].claims_off = 1;
}

static void calling_back(struct domain *domains)
{
    instantsnap_driver_ops ops = full_ops();

    ops.guard_socket = NULL;
    reentered = &ops;
    other = &domains[0];
    open_guest(&domains[0], &ops);
    open_guest(&domains[1], &ops);
    CHECK(try_with(&domains[1],
                   (struct fault) {.kind = ACTS, .act = call_back, .in = PAUSE, .nth = 1},
                   INSTANT));
    CHECK(domains[1].fault.hits == 1);
    CHECK(!try_with(&domains[1],
                    (struct fault) {.kind = ACTS, .act = cancel, .in = SWITCH, .nth = 1}, INSTANT));
    CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_ABORTED);
    CHECK(!try_with(&domains[1],
                    (struct fault) {.kind = ACTS, .act = cancel_and_lie, .in = SWITCH, .nth = 1},
                    INSTANT));
    CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_ABORTED);
    CHECK(!try_with(&domains[1], (struct fault) {.kind = NOTHING, .hits = 1}, INSTANT));
    CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_INVALID);
    domains[1].claims_off = 0;
}

int main(void)
{
    static char deep[4001];
    static const char *const lies[] = {"no JSON",
                                       "{\"return\": {}}",
                                       deep,
                                       "{\"return\": \"\xff\xfe\"}",
                                       NULL,
                                       "{}",
                                       "",
                                       "{\"error\": {}}",
                                       "{\"return\": [{\"status\": 7}]}",
                                       "[]"};
    static struct domain domains[2]; /* a domain without a fault, and one with a fault */
    instantsnap_driver_ops ops;

    memset(deep, '[', sizeof(deep) - 1);
    harness_begin();
    start(&domains[0], "well");
    registering(&domains[0]);
    libvirts_driver(&domains[0]);
    open_guest(&domains[0], &bare);
    CHECK(try_with(&domains[0], (struct fault) {.kind = NOTHING}, INSTANT));
    CHECK(try_with(&domains[0], (struct fault) {.kind = NOTHING}, 0));

    start(&domains[1], "ill");
    ops = full_ops();
    ops.lock = on_lock;
    ops.unlock = on_unlock;
    open_guest(&domains[1], &ops);
    others_fail(&domains[1]);
    others_lie(&domains[1]);
    too_late(&domains[1]);
    monitor_goes_wrong(&domains[1], FAILS, INSTANT, NULL, 0);
    monitor_goes_wrong(&domains[1], FAILS_AFTERWARDS, 0, NULL, 0);
    open_guest(&domains[1], &bare);
    monitor_goes_wrong(&domains[1], FAILS_AFTERWARDS, INSTANT, NULL, 0);
    monitor_goes_wrong(&domains[1], LIES, INSTANT, lies, sizeof(lies) / sizeof(*lies));
    calling_back(domains);
    stop(&domains[1]);

    recorded_by_the_library(&domains[0]);
    with_storage(&domains[0]);
    stop(&domains[0]);
    return 0;
}
