/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots with events, and jobs, on real guests: the contracts of the header. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <instantsnap.h>

#include "harness.h"

#define INSTANT (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT)
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define TYPES (INSTANTSNAP_EVENT_FAILED + 1)
/* The number of rounds for what depends on timing: not all of them miss in a row. */
#define ROUNDS 20

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t) now.tv_sec * 1000000 + (uint64_t) now.tv_nsec / 1000;
}

static const char *named(const char *name)
{
    return harness_text("<domainsnapshot><name>%s</name></domainsnapshot>", name);
}

static instantsnap_guest *open_guest(const char *socket_name, const char *state)
{
    instantsnap_guest *guest =
        instantsnap_open_qmp(harness_path(socket_name), NULL, harness_path(state));

    CHECK(guest);
    return guest;
}

static int count(instantsnap_guest *guest)
{
    return instantsnap_snapshot_list(guest, NULL);
}

/* The events of one snapshot so far. */
struct history {
    int non_live; /* memory is saved before the instant */
    int seen[TYPES];
    int paused_already;
    instantsnap_event last, at[TYPES];
};

/* Adds an event, and checks what holds for every event and for its order. */
static void add(struct history *history, const instantsnap_event *event)
{
    const instantsnap_event *last = &history->last;

    CHECK(event->size == sizeof(*event));
    CHECK(event->type >= INSTANTSNAP_EVENT_PAUSED && event->type <= INSTANTSNAP_EVENT_FAILED);
    CHECK(last->type != INSTANTSNAP_EVENT_COMPLETE && last->type != INSTANTSNAP_EVENT_FAILED);
    CHECK(event->time_us >= last->time_us);
    CHECK((event->error_code != 0) == (event->type == INSTANTSNAP_EVENT_FAILED));

    switch (event->type) {
    case INSTANTSNAP_EVENT_PAUSED:
        CHECK(last->type == 0);
        break;
    case INSTANTSNAP_EVENT_SWITCHED:
        CHECK(last->type == (history->paused_already ? 0 : INSTANTSNAP_EVENT_PAUSED));
        CHECK(event->paused_us >= last->paused_us);
        break;
    case INSTANTSNAP_EVENT_INSTANT:
        CHECK(last->type == INSTANTSNAP_EVENT_SWITCHED ||
              (history->non_live && last->type == INSTANTSNAP_EVENT_PROGRESS));
        break;
    case INSTANTSNAP_EVENT_PROGRESS:
        CHECK(history->seen[INSTANTSNAP_EVENT_INSTANT] == !history->non_live);
        CHECK(event->bytes_total == 0 || event->bytes_total >= event->bytes_done);
        break;
    case INSTANTSNAP_EVENT_COMPLETE:
        CHECK(history->seen[INSTANTSNAP_EVENT_INSTANT]);
        CHECK(event->bytes_done > 0 && event->bytes_total == event->bytes_done &&
              event->pages_left == 0);
        break;
    default:
        CHECK(event->bytes_done == 0 && event->bytes_total == 0 && event->pages_left == 0);
    }
    CHECK(event->bytes_per_second == 0 || event->type == INSTANTSNAP_EVENT_PROGRESS);
    if (event->type <= INSTANTSNAP_EVENT_SWITCHED)
        CHECK(event->bytes_done == 0 && event->bytes_total == 0 && event->pages_left == 0);
    else if (event->type != INSTANTSNAP_EVENT_FAILED)
        CHECK(event->bytes_done >= last->bytes_done);
    if (history->seen[INSTANTSNAP_EVENT_INSTANT])
        CHECK(event->paused_us == history->at[INSTANTSNAP_EVENT_INSTANT].paused_us);

    history->seen[event->type]++;
    history->at[event->type] = history->last = *event;
}

/* A receiver of the events. */
struct listener {
    struct history history;
    /* At this event it posts `held`, and waits for `release`. */
    uint32_t hold;
    sem_t held, release;
    /* Posted at the last event. */
    sem_t ended;
    /* What else the callback does. */
    void (*act)(struct listener *listener, const instantsnap_event *event);
    instantsnap_guest *guest;
    instantsnap_job *job;
    pthread_t thread;
    int signals_blocked;
};

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) < 0)
        ;
}

static int is_posted(sem_t *semaphore)
{
    return sem_trywait(semaphore) == 0;
}

static void listen(const instantsnap_event *event, void *opaque)
{
    struct listener *listener = opaque;
    sigset_t blocked;

    add(&listener->history, event);
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0);
    listener->signals_blocked = sigismember(&blocked, SIGUSR1);
    listener->thread = pthread_self();
    if (event->type == listener->hold) {
        sem_post(&listener->held);
        wait_for(&listener->release);
    }
    if (listener->act)
        listener->act(listener, event);
    if (event->type >= INSTANTSNAP_EVENT_COMPLETE)
        sem_post(&listener->ended);
}

/* Initialises a listener, and returns options with it. */
static instantsnap_create_options begin(struct listener *listener, instantsnap_guest *guest,
                                        uint32_t hold, uint32_t flags)
{
    instantsnap_create_options options = {.size = sizeof(options),
                                          .callback = listen,
                                          .opaque = listener,
                                          .progress_interval_ms = 1,
                                          .flags = flags};

    memset(listener, 0, sizeof(*listener));
    listener->guest = guest;
    listener->hold = hold;
    CHECK(sem_init(&listener->held, 0, 0) == 0);
    CHECK(sem_init(&listener->release, 0, 0) == 0);
    CHECK(sem_init(&listener->ended, 0, 0) == 0);
    return options;
}

/* Starts a job, and returns it at its instant, where it stays until its listener is released. */
static instantsnap_job *hold_job(instantsnap_guest *guest, const char *name,
                                 struct listener *listener)
{
    instantsnap_create_options options = begin(listener, guest, INSTANTSNAP_EVENT_INSTANT, 0);
    instantsnap_job *job = instantsnap_snapshot_create_start(guest, named(name), INSTANT, &options);

    CHECK(job);
    wait_for(&listener->held);
    return job;
}

static int is_readable(instantsnap_job *job)
{
    struct pollfd fd = {.fd = instantsnap_job_get_fd(job), .events = POLLIN};

    CHECK(fd.fd >= 0);
    CHECK(poll(&fd, 1, 0) >= 0);
    CHECK((fd.revents & ~POLLIN) == 0);
    return fd.revents == POLLIN;
}

/*
 * Takes the next event. There must be one exactly if the descriptor is readable. Returns its type,
 * 0 if there is none.
 */
static uint32_t take(instantsnap_job *job, struct history *history)
{
    instantsnap_event event = {.size = sizeof(event)};

    if (!is_readable(job)) {
        CHECK(instantsnap_job_next_event(job, &event) == 0);
        return 0;
    }
    CHECK(instantsnap_job_next_event(job, &event) == 1);
    add(history, &event);
    return event.type;
}

/* Waits for events by poll() alone, and takes them, until the last. */
static void take_all(instantsnap_job *job, struct history *history)
{
    struct pollfd fd = {.fd = instantsnap_job_get_fd(job), .events = POLLIN};

    while (history->last.type < INSTANTSNAP_EVENT_COMPLETE) {
        CHECK(poll(&fd, 1, -1) == 1 || errno == EINTR);
        take(job, history);
    }
    CHECK(take(job, history) == 0);
}

static instantsnap_job_info get_info(instantsnap_job *job)
{
    instantsnap_job_info info = {.size = sizeof(info)};

    CHECK(instantsnap_job_get_info(job, &info) == 0);
    CHECK(info.size == sizeof(info));
    CHECK(info.phase <= INSTANTSNAP_PHASE_ENDED);
    CHECK(info.instant <= 1);
    return info;
}

static instantsnap_stats get_stats(instantsnap_job *job)
{
    instantsnap_stats stats = {.size = sizeof(stats)};

    CHECK(instantsnap_job_get_stats(job, &stats) == 0);
    CHECK(stats.total_us == stats.validate_us + stats.plan_us + stats.prepare_us + stats.pause_us +
                                stats.switch_us + stats.arm_us + stats.drain_us + stats.finish_us +
                                stats.undo_us);
    return stats;
}

/* Checks that a job that has not ended gives no result. */
static void check_at_work(instantsnap_job *job)
{
    instantsnap_stats stats = {.size = sizeof(stats)};

    CHECK(instantsnap_job_wait(job, 0) == 0);
    CHECK(get_info(job).phase != INSTANTSNAP_PHASE_ENDED);
    CHECK_FAILS(instantsnap_job_get_result(job) == -1, VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(!instantsnap_job_get_name(job), VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(!instantsnap_job_get_xml(job), VIR_ERR_OPERATION_INVALID);
    CHECK_FAILS(instantsnap_job_get_stats(job, &stats) == -1, VIR_ERR_OPERATION_INVALID);
}

/* Waits for the job's end, which must be a complete snapshot of this name. */
static void check_complete(instantsnap_job *job, instantsnap_guest *guest, const char *name)
{
    char *given, *xml, *recorded;
    instantsnap_job_info info;

    CHECK(instantsnap_job_wait(job, -1) == 1);
    CHECK(instantsnap_job_wait(job, 0) == 1);
    CHECK(instantsnap_job_get_result(job) == 0);
    given = instantsnap_job_get_name(job);
    xml = instantsnap_job_get_xml(job);
    recorded = instantsnap_snapshot_get_xml(guest, name);
    CHECK(given && xml && recorded);
    CHECK(strcmp(given, name) == 0);
    CHECK(strcmp(xml, recorded) == 0);
    CHECK(strstr(xml, harness_text("<name>%s</name>", name)));
    instantsnap_free_string(given);
    instantsnap_free_string(xml);
    instantsnap_free_string(recorded);

    info = get_info(job);
    CHECK(info.phase == INSTANTSNAP_PHASE_ENDED && info.instant == 1);
    CHECK(info.bytes_done > 0 && info.bytes_total == info.bytes_done);
    CHECK(get_stats(job).memory_image_bytes > 0);
    CHECK(info.paused_us == get_stats(job).guest_paused_us);
    CHECK(info.elapsed_us == get_info(job).elapsed_us);
    CHECK(get_stats(job).undo_us == 0);

    /* It is too late to cancel, and that is no error. */
    CHECK(instantsnap_job_cancel(job) == 0);
    CHECK(instantsnap_job_get_result(job) == 0);
}

/* Waits for the job's end, which must be a failure. */
static void check_failed(instantsnap_job *job, int code)
{
    CHECK(instantsnap_job_wait(job, -1) == 1);
    CHECK_FAILS(instantsnap_job_get_result(job) == -1, code);
    CHECK_FAILS(!instantsnap_job_get_name(job), code);
    CHECK_FAILS(!instantsnap_job_get_xml(job), code);
    CHECK(get_info(job).phase == INSTANTSNAP_PHASE_ENDED);
    get_stats(job);
}

/*
 * Takes a snapshot and checks its events. Returns whether there was progress: memory can be saved
 * before the first interval ends.
 */
static int told(instantsnap_guest *guest, const char *name)
{
    struct listener listener;
    instantsnap_create_options options = begin(&listener, guest, 0, 0);
    const struct history *history = &listener.history;
    instantsnap_stats stats = {.size = sizeof(stats)};
    uint64_t before, after;
    char *given = NULL;

    options.image_format = INSTANTSNAP_IMAGE_RAW;
    before = now_us();
    CHECK(instantsnap_snapshot_create(guest, named(name), INSTANT, &options, &given) == 0);
    after = now_us();
    CHECK(strcmp(given, name) == 0);
    instantsnap_free_string(given);

    CHECK(pthread_equal(listener.thread, pthread_self()));
    CHECK(is_posted(&listener.ended));
    for (int type = INSTANTSNAP_EVENT_PAUSED; type <= INSTANTSNAP_EVENT_COMPLETE; type++)
        CHECK(history->seen[type] == 1 || type == INSTANTSNAP_EVENT_PROGRESS);
    CHECK(before <= history->at[INSTANTSNAP_EVENT_PAUSED].time_us &&
          history->last.time_us <= after);
    CHECK(history->at[INSTANTSNAP_EVENT_INSTANT].paused_us > 0);
    CHECK(history->at[INSTANTSNAP_EVENT_INSTANT].pages_left > 0);
    CHECK(instantsnap_get_stats(guest, &stats) == 0);
    CHECK(history->last.paused_us == stats.guest_paused_us);
    CHECK(history->last.bytes_done == stats.memory_image_bytes);
    CHECK(history->at[INSTANTSNAP_EVENT_INSTANT].time_us >= before + stats.instant_us);
    return history->seen[INSTANTSNAP_EVENT_PROGRESS] > 0;
}

static void blocking(instantsnap_guest *guest)
{
    struct listener listener;
    const struct history *history = &listener.history;
    instantsnap_create_options options = {.size = sizeof(options)};
    char *name = NULL;
    int rounds = 1;

    while (!told(guest, harness_text("told-%d", rounds)))
        CHECK(rounds++ < ROUNDS);

    /* A snapshot needs no listener. */
    CHECK(instantsnap_snapshot_create(guest, named("nobody"), INSTANT, &options, NULL) == 0);
    CHECK(instantsnap_snapshot_create(guest, named("no-options"), INSTANT, NULL, &name) == 0);
    instantsnap_free_string(name);
    CHECK(count(guest) == rounds + 2);

    /* An error is an event too. */
    options = begin(&listener, guest, 0, 0);
    CHECK_FAILS(instantsnap_snapshot_create(guest, named("nobody"), INSTANT, &options, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK(history->seen[INSTANTSNAP_EVENT_FAILED] == 1 &&
          history->last.error_code == VIR_ERR_OPERATION_INVALID);
    CHECK(!history->seen[INSTANTSNAP_EVENT_PAUSED]);
}

static void at_the_instant(instantsnap_guest *guest)
{
    instantsnap_stats stats = {.size = sizeof(stats)};
    struct listener listener;
    instantsnap_job *job = hold_job(guest, "at-the-instant", &listener);
    instantsnap_job_info info = get_info(job);
    struct history history = {0};
    uint64_t before;

    CHECK(info.instant == 1);
    CHECK(info.paused_us > 0 && info.elapsed_us >= info.paused_us);
    CHECK(harness_status_is("qmp.aside", "running"));
    check_at_work(job);
    before = now_us();
    CHECK(instantsnap_job_wait(job, 20) == 0);
    CHECK(now_us() - before >= 20000);
    CHECK(!pthread_equal(listener.thread, pthread_self()) && listener.signals_blocked);

    CHECK(take(job, &history) == INSTANTSNAP_EVENT_PAUSED);
    CHECK(take(job, &history) == INSTANTSNAP_EVENT_SWITCHED);
    CHECK(take(job, &history) == INSTANTSNAP_EVENT_INSTANT);
    CHECK(info.paused_us == history.last.paused_us);
    CHECK(take(job, &history) == 0);
    CHECK(get_info(job).elapsed_us > info.elapsed_us);

    sem_post(&listener.release);
    check_complete(job, guest, "at-the-instant");
    CHECK(harness_file_size(harness_path("disk.at-the-instant")) > 0);
    /* The listener received the last event before this thread can see it. */
    CHECK(is_posted(&listener.ended));
    take_all(job, &history);
    CHECK(history.last.type == INSTANTSNAP_EVENT_COMPLETE);
    CHECK(memcmp(&history.last, &listener.history.last, sizeof(history.last)) == 0);
    CHECK(instantsnap_get_stats(guest, &stats) == 0);
    CHECK(stats.total_us == get_stats(job).total_us);
    instantsnap_job_free(job);
}

static void at_once(instantsnap_guest *guest)
{
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};
    static const struct {
        const char *xml;
        unsigned int flags;
        int code;
    } wrong[] = {
        {"<domainsnapshot", INSTANT, VIR_ERR_XML_DETAIL},
        {"<domainsnapshot/>", ~0u, VIR_ERR_INVALID_ARG},
        {"<domainsnapshot/>", VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY, VIR_ERR_OPERATION_UNSUPPORTED},
        {"<domainsnapshot><name>existing</name></domainsnapshot>", INSTANT,
         VIR_ERR_OPERATION_INVALID},
    };
    struct history history = {0};
    instantsnap_job *job =
        instantsnap_snapshot_create_start(guest, named("at-once"), INSTANT, &options);

    CHECK(job);
    take_all(job, &history);
    CHECK(history.seen[INSTANTSNAP_EVENT_PAUSED] && history.seen[INSTANTSNAP_EVENT_INSTANT]);
    check_complete(job, guest, "at-once");
    instantsnap_job_free(job);

    /*
     * With AT_ONCE the job reports errors, else the call. The listener has received the last event
     * by the time that the end can be seen.
     */
    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct listener listener;

        options = begin(&listener, guest, 0, INSTANTSNAP_CREATE_AT_ONCE);
        job = instantsnap_snapshot_create_start(guest, wrong[i].xml, wrong[i].flags, &options);
        CHECK(job);
        check_failed(job, wrong[i].code);
        CHECK(is_posted(&listener.ended));
        memset(&history, 0, sizeof(history));
        CHECK(take(job, &history) == INSTANTSNAP_EVENT_FAILED);
        CHECK(history.last.error_code == wrong[i].code);
        CHECK(take(job, &history) == 0);
        CHECK(get_info(job).instant == 0);
        instantsnap_job_free(job);

        options = begin(&listener, guest, 0, 0);
        CHECK_FAILS(
            !instantsnap_snapshot_create_start(guest, wrong[i].xml, wrong[i].flags, &options),
            wrong[i].code);
        CHECK(is_posted(&listener.ended) == (listener.history.last.type != 0));
        CHECK(listener.history.last.type == 0 || listener.history.last.error_code == wrong[i].code);
    }
}

/* Non-live: memory is saved while the guest is paused; also for a guest that is paused already. */
static void other_kinds(instantsnap_guest *guest)
{
    struct history non_live = {.non_live = 1}, paused = {.paused_already = 1};
    instantsnap_create_options options = {.size = sizeof(options), .progress_interval_ms = 1};
    instantsnap_job *job = instantsnap_snapshot_create_start(guest, named("non-live"), 0, &options);

    CHECK(job);
    CHECK(get_info(job).instant == 1);
    take_all(job, &non_live);
    check_complete(job, guest, "non-live");
    CHECK(get_stats(job).drain_us == 0);
    instantsnap_job_free(job);

    CHECK(strstr(harness_qmp("qmp.aside", "{\"execute\": \"stop\"}"), "return"));
    job = instantsnap_snapshot_create_start(guest, named("paused"), INSTANT, NULL);
    CHECK(job);
    CHECK(instantsnap_job_wait(job, -1) == 1);
    paused.non_live = get_stats(job).drain_us == 0;
    take_all(job, &paused);
    CHECK(paused.last.paused_us == 0);
    check_complete(job, guest, "paused");
    instantsnap_job_free(job);
    CHECK(
        !strstr(harness_qmp("qmp.aside", "{\"execute\": \"query-status\"}"), "\"running\": true"));
    CHECK(strstr(harness_qmp("qmp.aside", "{\"execute\": \"cont\"}"), "return"));
}

/* Checks that a cancelled snapshot leaves a running guest, and nothing else. */
static void check_undone(instantsnap_guest *guest, const char *name, int before)
{
    CHECK(harness_status_is("qmp.aside", "running"));
    CHECK(count(guest) == before);
    CHECK(harness_file_size(harness_path(harness_text("state/%s.mem", name))) == -1);
    CHECK(harness_file_size(harness_path(harness_text("disk.%s", name))) == -1);
    CHECK_FAILS(instantsnap_snapshot_cancel(guest) == -1, VIR_ERR_OPERATION_INVALID);
}

static void cancelled_from_outside(instantsnap_guest *guest)
{
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};
    struct history history = {0};
    struct listener listener;
    int before = count(guest);
    instantsnap_job *job;

    job = instantsnap_snapshot_create_start(guest, named("gone"), INSTANT, &options);
    CHECK(job);
    CHECK(instantsnap_job_cancel(job) == 0);
    take_all(job, &history);
    CHECK(history.last.type == INSTANTSNAP_EVENT_FAILED);
    CHECK(history.last.error_code == VIR_ERR_OPERATION_ABORTED);
    check_failed(job, VIR_ERR_OPERATION_ABORTED);
    check_undone(guest, "gone", before);
    instantsnap_job_free(job);

    /* Cancels while memory flows, twice; then by the guest's handle. */
    for (int by_guest = 0; by_guest <= 1; by_guest++) {
        job = hold_job(guest, "gone", &listener);
        CHECK((by_guest ? instantsnap_snapshot_cancel(guest) : instantsnap_job_cancel(job)) == 0);
        CHECK(instantsnap_job_cancel(job) == 0);
        check_at_work(job);
        sem_post(&listener.release);
        check_failed(job, VIR_ERR_OPERATION_ABORTED);
        CHECK(get_info(job).instant == 1);
        CHECK(get_stats(job).undo_us > 0);
        CHECK(listener.history.last.error_code == VIR_ERR_OPERATION_ABORTED);
        check_undone(guest, "gone", before);
        instantsnap_job_free(job);
    }
}

/* The type of event at which the listener cancels. */
static uint32_t cancel_at;

static void cancel_guest(struct listener *listener, const instantsnap_event *event)
{
    instantsnap_stats stats = {.size = sizeof(stats)};

    if (event->type != cancel_at)
        return;
    /* A callback may call any function. */
    CHECK_FAILS(instantsnap_snapshot_create_xml(listener->guest, named("inner"), INSTANT, NULL) ==
                    -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK(count(listener->guest) >= 0);
    CHECK(instantsnap_get_stats(listener->guest, &stats) == 0);
    CHECK(instantsnap_snapshot_cancel(listener->guest) == 0);
}

static void cancel_job(struct listener *listener, const instantsnap_event *event)
{
    const char *message;

    /* From the instant on the caller has the job, so this has it too. */
    if (event->type < INSTANTSNAP_EVENT_INSTANT)
        return;
    CHECK(get_info(listener->job).instant == 1);
    if (event->type == INSTANTSNAP_EVENT_INSTANT) {
        check_at_work(listener->job);
        message = instantsnap_last_error()->message;
        CHECK(strstr(message, "wait"));
        CHECK(instantsnap_job_wait(listener->job, 1) == 0);
        CHECK(instantsnap_job_cancel(listener->job) == 0);
    } else if (event->type == INSTANTSNAP_EVENT_FAILED) {
        /* The result is visible already, but the job has not ended yet. */
        CHECK_FAILS(instantsnap_job_get_result(listener->job) == -1, VIR_ERR_OPERATION_ABORTED);
        CHECK(get_info(listener->job).phase == INSTANTSNAP_PHASE_ENDED);
        get_stats(listener->job);
        CHECK(instantsnap_job_wait(listener->job, 0) == 0);
    }
}

/* Whether the job was seen: only with the event, and there may be no progress. */
static int cancelled_at(instantsnap_guest *guest, const char *name)
{
    struct listener listener;
    instantsnap_create_options options = begin(&listener, guest, 0, 0);
    const struct history *history = &listener.history;
    int before = count(guest);

    listener.act = cancel_guest;
    if (instantsnap_snapshot_create(guest, named(name), INSTANT, &options, NULL) == 0) {
        CHECK(cancel_at == INSTANTSNAP_EVENT_PROGRESS && !history->seen[cancel_at]);
        return 0;
    }
    CHECK(instantsnap_last_error()->code == VIR_ERR_OPERATION_ABORTED);
    CHECK(history->last.type == INSTANTSNAP_EVENT_FAILED &&
          history->last.error_code == VIR_ERR_OPERATION_ABORTED);
    CHECK(history->seen[cancel_at] == 1);
    CHECK(!history->seen[cancel_at + 1]);
    CHECK(history->last.paused_us > 0);
    CHECK(count(guest) == before);
    return 1;
}

static void cancelled_by_the_listener(instantsnap_guest *guest, instantsnap_guest *big)
{
    instantsnap_create_options options;
    struct listener listener;
    int rounds = 1, before = count(guest);

    for (cancel_at = INSTANTSNAP_EVENT_PAUSED; cancel_at <= INSTANTSNAP_EVENT_INSTANT;
         cancel_at++) {
        CHECK(cancelled_at(guest, "gone"));
        check_undone(guest, "gone", before);
    }
    cancel_at = INSTANTSNAP_EVENT_PROGRESS;
    while (!cancelled_at(big, harness_text("gone-%d", rounds)))
        CHECK(rounds++ < ROUNDS);

    options = begin(&listener, guest, INSTANTSNAP_EVENT_INSTANT, 0);
    listener.act = cancel_job;
    listener.job = instantsnap_snapshot_create_start(guest, named("gone"), INSTANT, &options);
    CHECK(listener.job);
    sem_post(&listener.release);
    check_failed(listener.job, VIR_ERR_OPERATION_ABORTED);
    check_undone(guest, "gone", before);
    instantsnap_job_free(listener.job);
}

static instantsnap_job *next_job;

static void start_next(struct listener *listener, const instantsnap_event *event)
{
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};

    if (event->type == INSTANTSNAP_EVENT_COMPLETE) {
        next_job =
            instantsnap_snapshot_create_start(listener->guest, named("next"), INSTANT, &options);
        CHECK(next_job);
    }
}

/* The receiver of the last event can start the next snapshot at once. */
static void one_after_the_other(instantsnap_guest *guest)
{
    struct listener listener;
    instantsnap_create_options options = begin(&listener, guest, 0, INSTANTSNAP_CREATE_AT_ONCE);
    instantsnap_job *job;

    listener.act = start_next;
    job = instantsnap_snapshot_create_start(guest, named("first"), INSTANT, &options);
    CHECK(job);
    check_complete(job, guest, "first");
    check_complete(next_job, guest, "next");
    instantsnap_job_free(job);
    instantsnap_job_free(next_job);
}

/*
 * Passes a pointer that is not a job to every function that takes a job; or any job, in a forked
 * child.
 */
static void not_a_job(instantsnap_job *job, int code)
{
    instantsnap_event event = {.size = sizeof(event)};
    instantsnap_job_info info = {.size = sizeof(info)};
    instantsnap_stats stats = {.size = sizeof(stats)};

    CHECK_FAILS(instantsnap_job_wait(job, 0) == -1, code);
    CHECK_FAILS(instantsnap_job_wait(job, -1) == -1, code);
    CHECK_FAILS(instantsnap_job_get_fd(job) == -1, code);
    CHECK_FAILS(instantsnap_job_next_event(job, &event) == -1, code);
    CHECK_FAILS(instantsnap_job_get_info(job, &info) == -1, code);
    CHECK_FAILS(instantsnap_job_get_result(job) == -1, code);
    CHECK_FAILS(!instantsnap_job_get_name(job), code);
    CHECK_FAILS(!instantsnap_job_get_xml(job), code);
    CHECK_FAILS(instantsnap_job_get_stats(job, &stats) == -1, code);
    CHECK_FAILS(instantsnap_job_cancel(job) == -1, code);
    if (job) {
        /* A function without a result leaves the error. */
        CHECK_FAILS(!instantsnap_snapshot_get_xml(NULL, NULL), VIR_ERR_INVALID_ARG);
        CHECK_FAILS((instantsnap_job_free(job), 1), code);
    }
}

/* The jobs go on although their handles are freed. */
static void freed_and_closed(void)
{
    instantsnap_guest *guest = open_guest("qmp", "state");
    struct listener listener;
    instantsnap_job *job = hold_job(guest, "freed", &listener);
    int before = count(guest);

    instantsnap_job_free(job);
    not_a_job(job, VIR_ERR_INVALID_ARG);
    CHECK(!is_posted(&listener.ended));
    sem_post(&listener.release);
    wait_for(&listener.ended);
    CHECK(listener.history.last.type == INSTANTSNAP_EVENT_COMPLETE);
    CHECK(count(guest) == before + 1);
    not_a_job(job, VIR_ERR_INVALID_ARG);

    job = hold_job(guest, "closed", &listener);
    instantsnap_close(guest);
    check_at_work(job);
    sem_post(&listener.release);
    CHECK(instantsnap_job_wait(job, -1) == 1);
    guest = open_guest("qmp", "state");
    check_complete(job, guest, "closed");
    instantsnap_job_free(job);

    job = hold_job(guest, "freed-and-closed", &listener);
    instantsnap_close(guest);
    instantsnap_job_free(job);
    sem_post(&listener.release);
    wait_for(&listener.ended);
    guest = open_guest("qmp", "state");
    CHECK(count(guest) == before + 3);
    CHECK(harness_status_is("qmp", "running"));
    instantsnap_close(guest);
}

/* Two jobs on one guest: the second changes nothing. A job on another guest succeeds. */
static void busy(instantsnap_guest *guest, instantsnap_guest *other_guest)
{
    instantsnap_guest *same = open_guest("qmp", "state");
    struct listener listener, second;
    instantsnap_job *job = hold_job(guest, "busy", &listener);
    int before = count(guest);
    instantsnap_create_options options;
    instantsnap_job *other;

    CHECK_FAILS(instantsnap_snapshot_create_xml(guest, named("second"), INSTANT, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    for (uint32_t flags = 0; flags <= INSTANTSNAP_CREATE_AT_ONCE; flags++) {
        options = begin(&second, guest, 0, flags);
        CHECK_FAILS(!instantsnap_snapshot_create_start(guest, named("second"), INSTANT, &options),
                    VIR_ERR_OPERATION_INVALID);
        CHECK(!second.history.last.type);
    }
    options = begin(&second, guest, 0, 0);
    CHECK_FAILS(instantsnap_snapshot_create(guest, named("second"), INSTANT, &options, NULL) == -1,
                VIR_ERR_OPERATION_INVALID);
    CHECK(!second.history.last.type);

    /* By another handle, which has to find out first. */
    CHECK_FAILS(!instantsnap_snapshot_create_start(same, named("second"), INSTANT, NULL),
                VIR_ERR_OPERATION_INVALID);
    options.flags = INSTANTSNAP_CREATE_AT_ONCE;
    other = instantsnap_snapshot_create_start(same, named("second"), INSTANT, &options);
    CHECK(other);
    check_failed(other, VIR_ERR_OPERATION_INVALID);
    CHECK(second.history.seen[INSTANTSNAP_EVENT_FAILED] == 1);
    instantsnap_job_free(other);

    other = instantsnap_snapshot_create_start(other_guest, named("meanwhile"), INSTANT, NULL);
    CHECK(other);
    check_complete(other, other_guest, "meanwhile");
    instantsnap_job_free(other);

    CHECK(count(guest) == before);
    CHECK(harness_file_size(harness_path("disk.second")) == -1);
    check_at_work(job);
    sem_post(&listener.release);
    check_complete(job, guest, "busy");
    instantsnap_job_free(job);
    instantsnap_close(same);
}

struct crowd {
    instantsnap_job *job;
    pthread_mutex_t lock;
    int seen[TYPES];
};

static void *wait_for_end(void *data)
{
    struct crowd *crowd = data;

    CHECK(instantsnap_job_wait(crowd->job, -1) == 1);
    CHECK(instantsnap_job_get_result(crowd->job) == 0);
    return NULL;
}

static void *take_some(void *data)
{
    struct crowd *crowd = data;
    instantsnap_event event = {.size = sizeof(event)};
    int ended = 0, taken;

    do {
        /* In this order: events from before the end are taken after the end was seen. */
        ended = instantsnap_job_wait(crowd->job, 1);
        CHECK(get_info(crowd->job).instant == 1);
        while ((taken = instantsnap_job_next_event(crowd->job, &event)) == 1) {
            pthread_mutex_lock(&crowd->lock);
            crowd->seen[event.type]++;
            pthread_mutex_unlock(&crowd->lock);
        }
        CHECK(taken == 0);
    } while (!ended);
    return NULL;
}

/* The job that a thread waits for may be freed meanwhile. */
static void *wait_while_it_is_freed(void *data)
{
    struct crowd *crowd = data;
    int result = instantsnap_job_wait(crowd->job, -1);

    CHECK(result == 1 || instantsnap_last_error()->code == VIR_ERR_INVALID_ARG);
    return NULL;
}

static void cancel_this_thread(const instantsnap_event *event, void *opaque)
{
    (void) opaque;
    if (event->type == INSTANTSNAP_EVENT_INSTANT)
        CHECK(pthread_cancel(pthread_self()) == 0);
}

struct cancelled {
    instantsnap_guest *guest;
    int returned;
};

static void *snapshot_until_cancelled(void *data)
{
    struct cancelled *cancelled = data;
    instantsnap_create_options options = {.size = sizeof(options), .callback = cancel_this_thread};

    CHECK(instantsnap_snapshot_create(cancelled->guest, named("thread"), INSTANT, &options, NULL) ==
          0);
    cancelled->returned = 1;
    pthread_testcancel();
    return NULL;
}

/*
 * A thread is cancelled while it is in the library: first the call ends normally, then the thread.
 */
static void cancelled_thread(instantsnap_guest *guest)
{
    struct cancelled cancelled = {.guest = guest};
    pthread_t thread;
    void *result;

    CHECK(pthread_create(&thread, NULL, snapshot_until_cancelled, &cancelled) == 0);
    CHECK(pthread_join(thread, &result) == 0);
    CHECK(result == PTHREAD_CANCELED && cancelled.returned);
}

static void start_threads(pthread_t *threads, size_t how_many, void *(*function)(void *),
                          void *data)
{
    for (size_t i = 0; i < how_many; i++)
        CHECK(pthread_create(&threads[i], NULL, function, data) == 0);
}

static void join_threads(pthread_t *threads, size_t how_many)
{
    for (size_t i = 0; i < how_many; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

static void many_threads(instantsnap_guest *guest)
{
    struct crowd crowd = {.lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t waiters[16], takers[4];
    struct listener listener;

    crowd.job = hold_job(guest, "crowd", &listener);
    start_threads(waiters, ARRAY_SIZE(waiters), wait_for_end, &crowd);
    start_threads(takers, ARRAY_SIZE(takers), take_some, &crowd);
    sem_post(&listener.release);
    join_threads(waiters, ARRAY_SIZE(waiters));
    join_threads(takers, ARRAY_SIZE(takers));
    /* Each event went to one of the threads. */
    for (int type = INSTANTSNAP_EVENT_PAUSED; type < TYPES; type++) {
        if (type != INSTANTSNAP_EVENT_PROGRESS)
            CHECK(crowd.seen[type] == (type != INSTANTSNAP_EVENT_FAILED));
    }
    check_complete(crowd.job, guest, "crowd");
    instantsnap_job_free(crowd.job);

    crowd.job = hold_job(guest, "freed-in-a-crowd", &listener);
    start_threads(waiters, ARRAY_SIZE(waiters), wait_while_it_is_freed, &crowd);
    instantsnap_job_free(crowd.job);
    sem_post(&listener.release);
    join_threads(waiters, ARRAY_SIZE(waiters));
    wait_for(&listener.ended);
    CHECK(listener.history.last.type == INSTANTSNAP_EVENT_COMPLETE);
}

/*
 * Runs a function in a child. SIGALRM ends a child that hangs. Afterwards the child is killed, so
 * that valgrind does not report what the parent's threads hold as leaks of the child.
 */
static void in_a_child(void (*function)(instantsnap_job *job), instantsnap_job *job)
{
    pid_t child;

    fflush(NULL);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(120);
        function(job);
        raise(SIGKILL);
    }
    CHECK(harness_wait(child) == 128 + SIGKILL);
}

static void jobs_are_the_parents(instantsnap_job *job)
{
    not_a_job(job, VIR_ERR_OPERATION_INVALID);
    instantsnap_job_free(NULL);
}

/* The child opens the guest again and has its own job. The parent's job stays the parent's. */
static void own_job(instantsnap_job *job)
{
    instantsnap_guest *guest = open_guest("qmp", "state");
    instantsnap_job *own = instantsnap_snapshot_create_start(guest, named("childs"), INSTANT, NULL);

    CHECK(own);
    not_a_job(job, VIR_ERR_OPERATION_INVALID);
    check_complete(own, guest, "childs");
    instantsnap_job_free(own);
    instantsnap_close(guest);
}

static void forked(instantsnap_guest *guest)
{
    struct history history = {0};
    struct listener listener;
    instantsnap_job *job = hold_job(guest, "forked", &listener);
    char *childs;

    in_a_child(jobs_are_the_parents, job);
    /* The child has taken none of the job's events. */
    check_at_work(job);
    CHECK(take(job, &history) == INSTANTSNAP_EVENT_PAUSED);
    sem_post(&listener.release);
    take_all(job, &history);
    check_complete(job, guest, "forked");

    in_a_child(jobs_are_the_parents, job);
    in_a_child(own_job, job);
    check_complete(job, guest, "forked");
    childs = instantsnap_snapshot_get_xml(guest, "childs");
    CHECK(childs);
    instantsnap_free_string(childs);
    instantsnap_job_free(job);
}

/* Each structure of the caller, with an impossible size, and with the size of a later version. */
static void sizes(instantsnap_guest *guest)
{
    static const size_t wrong[] = {0, 1, sizeof(size_t), SIZE_MAX};
    struct { instantsnap_event event; uint64_t beyond[2]; } event;
    struct { instantsnap_job_info info; uint64_t beyond[2]; } info;
    struct { instantsnap_stats stats; uint64_t beyond[2]; } stats;
    struct { instantsnap_create_options options; uint64_t beyond[2]; } options;
    const uint64_t untouched = UINT64_C(0x7777777777777777);
    instantsnap_job *job = instantsnap_snapshot_create_start(guest, named("sizes"), INSTANT, NULL);

    CHECK(job);
    check_complete(job, guest, "sizes");
    memset(&event, 0x77, sizeof(event));
    memset(&info, 0x77, sizeof(info));
    memset(&stats, 0x77, sizeof(stats));
    memset(&options, 0, sizeof(options));
    for (size_t i = 0; i <= ARRAY_SIZE(wrong); i++) {
        int is_last = i == ARRAY_SIZE(wrong);

        event.event.size = is_last ? sizeof(event.event) - 1 : wrong[i];
        info.info.size = is_last ? sizeof(info.info) - 1 : wrong[i];
        stats.stats.size = is_last ? sizeof(stats.stats) - 1 : wrong[i];
        options.options.size = is_last ? sizeof(options.options) - 1 : wrong[i];
        CHECK_FAILS(instantsnap_job_next_event(job, &event.event) == -1, VIR_ERR_INVALID_ARG);
        CHECK_FAILS(instantsnap_job_get_info(job, &info.info) == -1, VIR_ERR_INVALID_ARG);
        CHECK_FAILS(instantsnap_job_get_stats(job, &stats.stats) == -1, VIR_ERR_INVALID_ARG);
        CHECK_FAILS(
            !instantsnap_snapshot_create_start(guest, named("no"), INSTANT, &options.options),
            VIR_ERR_INVALID_ARG);
        CHECK_FAILS(
            instantsnap_snapshot_create(guest, named("no"), INSTANT, &options.options, NULL) == -1,
            VIR_ERR_INVALID_ARG);
    }
    CHECK(event.event.time_us == untouched && info.info.elapsed_us == untouched &&
          stats.stats.total_us == untouched);
    CHECK_FAILS(instantsnap_job_next_event(job, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_job_get_info(job, NULL) == -1, VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_job_get_stats(job, NULL) == -1, VIR_ERR_INVALID_ARG);

    /* No event was lost. The library fills the unknown part, and not a byte beyond. */
    event.event.size = sizeof(event) - sizeof(event.beyond[1]);
    CHECK(instantsnap_job_next_event(job, &event.event) == 1);
    CHECK(event.event.type == INSTANTSNAP_EVENT_PAUSED && event.beyond[0] == 0 &&
          event.beyond[1] == untouched);
    info.info.size = sizeof(info) - sizeof(info.beyond[1]);
    CHECK(instantsnap_job_get_info(job, &info.info) == 0);
    CHECK(info.info.instant == 1 && info.beyond[0] == 0 && info.beyond[1] == untouched);
    stats.stats.size = sizeof(stats) - sizeof(stats.beyond[1]);
    CHECK(instantsnap_job_get_stats(job, &stats.stats) == 0);
    CHECK(stats.stats.total_us > 0 && stats.beyond[0] == 0 && stats.beyond[1] == untouched);
    instantsnap_job_free(job);

    /* A newer option that is set is an error; one that is zero is ignored. */
    options.options.size = sizeof(options);
    options.beyond[1] = 1;
    CHECK_FAILS(!instantsnap_snapshot_create_start(guest, named("no"), INSTANT, &options.options),
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_create(guest, named("no"), INSTANT, &options.options, NULL) ==
                    -1,
                VIR_ERR_INVALID_ARG);
    options.beyond[1] = 0;
    job = instantsnap_snapshot_create_start(guest, named("newer"), INSTANT, &options.options);
    CHECK(job);
    check_complete(job, guest, "newer");
    instantsnap_job_free(job);
}

static void nonsense(instantsnap_guest *guest)
{
    instantsnap_create_options options = {.size = sizeof(options),
                                          .flags = INSTANTSNAP_CREATE_AT_ONCE};
    unsigned char junk[256];
    void *wild[] = {NULL, junk, junk + 1, (void *) (uintptr_t) 1, (void *) UINTPTR_MAX, guest};
    instantsnap_guest *closed = open_guest("qmp", "state");
    struct listener listener;
    int before = count(guest);
    instantsnap_job *job;

    memset(junk, 0xa5, sizeof(junk));
    for (size_t i = 0; i < ARRAY_SIZE(wild); i++) {
        not_a_job(wild[i], VIR_ERR_INVALID_ARG);
        if (wild[i] != guest) {
            CHECK_FAILS(!instantsnap_snapshot_create_start(wild[i], named("no"), INSTANT, NULL),
                        VIR_ERR_INVALID_ARG);
            CHECK_FAILS(instantsnap_snapshot_create(wild[i], named("no"), INSTANT, NULL, NULL) ==
                            -1,
                        VIR_ERR_INVALID_ARG);
        }
    }
    instantsnap_job_free(NULL);
    instantsnap_close(closed);
    CHECK_FAILS(!instantsnap_snapshot_create_start(closed, named("no"), INSTANT, &options),
                VIR_ERR_INVALID_ARG);

    CHECK_FAILS(!instantsnap_snapshot_create_start(guest, NULL, INSTANT, &options),
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(!instantsnap_snapshot_create_start(guest, "\xff", INSTANT, &options),
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_create(guest, NULL, INSTANT, NULL, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    CHECK_FAILS(instantsnap_snapshot_create(guest, named("no"), INSTANT, &options, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    for (int bit = 1; bit < 32; bit++) {
        options = begin(&listener, guest, 0, UINT32_C(1) << bit);
        CHECK_FAILS(!instantsnap_snapshot_create_start(guest, named("no"), INSTANT, &options),
                    VIR_ERR_INVALID_ARG);
        CHECK_FAILS(instantsnap_snapshot_create(guest, named("no"), INSTANT, &options, NULL) == -1,
                    VIR_ERR_INVALID_ARG);
        CHECK(!listener.history.last.type);
    }
    CHECK(count(guest) == before);

    job = instantsnap_snapshot_create_start(guest, named("sense"), INSTANT, NULL);
    CHECK(job);
    /* A job is not a guest. */
    CHECK_FAILS(instantsnap_snapshot_list((instantsnap_guest *) job, NULL) == -1,
                VIR_ERR_INVALID_ARG);
    instantsnap_close((instantsnap_guest *) job);
    check_complete(job, guest, "sense");
    instantsnap_job_free(job);
    /* Once more. */
    not_a_job(job, VIR_ERR_INVALID_ARG);
    sizes(guest);
}

int main(void)
{
    instantsnap_guest *guest, *big;

    harness_begin();
    harness_qemu("qmp", harness_path("disk.raw"), "raw", 0);
    guest = open_guest("qmp", "state");
    /* Enough memory for PROGRESS events. */
    harness_set_memory(256);
    harness_qemu("qmp2", harness_disk("disk2.raw"), "raw", 0);
    CHECK(mkdir(harness_path("state2"), 0700) == 0);
    big = open_guest("qmp2", "state2");

    blocking(big);
    CHECK(instantsnap_snapshot_create_xml(guest, named("existing"), INSTANT, NULL) == 0);
    at_the_instant(guest);
    at_once(guest);
    other_kinds(guest);
    cancelled_from_outside(guest);
    cancelled_by_the_listener(guest, big);
    one_after_the_other(guest);
    freed_and_closed();
    busy(guest, big);
    many_threads(guest);
    cancelled_thread(guest);
    forked(guest);
    nonsense(guest);

    CHECK(harness_status_is("qmp", "running"));
    CHECK(harness_status_is("qmp2", "running"));
    instantsnap_close(guest);
    instantsnap_close(big);
    return 0;
}
