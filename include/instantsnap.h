/* SPDX-License-Identifier: LGPL-2.1-or-later */
/**
 * instantsnap.h: full snapshots of running QEMU guests, memory and disks, taken at the moment of
 * the call.
 *
 * The shortest useful program:
 *
 *     instantsnap_guest *guest = instantsnap_open_qmp("/run/vm/qmp.sock", NULL, "/var/lib/vm/snapshots");
 *     char *name = NULL;
 *
 *     if (!guest ||
 *         instantsnap_snapshot_create_xml(guest, "<domainsnapshot/>",
 *                                         VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
 *                                         VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT, &name) < 0)
 *         fprintf(stderr, "%s\n", instantsnap_last_error()->message);
 *
 *     instantsnap_free_string(name);
 *     instantsnap_close(guest);
 *
 * Conventions that hold for every function:
 *
 * - Errors. A function that returns `int` returns 0 or more on success and -1 on failure; one that
 *   returns a pointer returns NULL on failure. instantsnap_last_error() then says why, with
 *   libvirt's error codes.
 * - Strings are NUL-terminated UTF-8. Arguments stay the caller's and are not kept. A `char *` that
 *   the library returns is the caller's, to be given back with instantsnap_free_string(). A `const
 *   char *` is borrowed: it lives as long as the object it was read from.
 * - Pointers. NULL where a value is required, a closed handle and a handle that is not ours are
 *   VIR_ERR_INVALID_ARG errors, never a crash. Functions without a result leave them as the last
 *   error.
 * - Threads. Every function may be called from any thread, also on one handle from several threads
 *   at once. Two operations that change the same guest do not wait for each other: the second fails
 *   at once with VIR_ERR_OPERATION_INVALID, also where it is another process's (of the same network
 *   namespace).
 * - Time. All durations are microseconds of CLOCK_MONOTONIC, all sizes are bytes.
 * - Structures that the caller provides start with `size`, to be set to sizeof the structure before
 *   the call, so that a later version can add fields without breaking the ABI: a size that this
 *   version knows nothing of is filled up with zeros, one too small is VIR_ERR_INVALID_ARG. In a
 *   structure that the caller fills (options), what this version does not know must be zeros: a
 *   newer field that is set is VIR_ERR_INVALID_ARG.
 * - Signals and file descriptors. Threads of the library block every signal; every descriptor it
 *   opens is close-on-exec. It neither installs signal handlers nor changes the umask or the
 *   working directory.
 * - pthread_cancel(). A thread is not cancelled while it is in the library, nor in a callback: the
 *   request is carried out at its next cancellation point after the call. No callback may leave by
 *   pthread_exit() or longjmp().
 * - Processes. A snapshot forks one process of its own session, the watchdog, which ends with it.
 *   Should the caller be killed before that, the watchdog resumes the guest, takes QEMU's memory
 *   stream to its end (QEMU 7.2 would freeze the guest otherwise), puts the migration settings
 *   back, merges the overlays (not those of a driver's domain that its disks were switched to) and
 *   removes what was made for the snapshot. An overlay that it cannot merge stays in use, and the
 *   machine's log (/dev/log) is told of it. The watchdog raises no SIGCHLD, and no wait() of the
 *   caller's sees it. It is in the caller's cgroup: what ends all of that (a container's end,
 *   systemd's KillMode=control-group) ends it too. `qemu-img` is run for
 *   instantsnap_snapshot_prepare_revert() and instantsnap_snapshot_delete(), and where QEMU itself
 *   ends during a snapshot. Programs are found in PATH (in a setuid process in /usr/bin, /bin,
 *   /usr/sbin and /sbin), and have an environment of their own: nothing that the caller is
 *   preloaded with, no INSTANTSNAP_ variable. They too raise no SIGCHLD in the caller and are seen
 *   by no wait() of the caller's, so a caller may ignore SIGCHLD. A program whose end cannot be
 *   known has failed. A process that ends while a job is at work leaves its guest as one that was
 *   killed: wait for the job, or cancel it, first.
 * - fork(). A child has copies of the handles, and none of the library's threads. The jobs stay the
 *   parent's: in the child every instantsnap_job_ function fails at once with
 *   VIR_ERR_OPERATION_INVALID, and changes nothing. A guest handle with which the parent is taking
 *   a snapshot stays busy in the child for good; the child opens the guest anew. As with malloc(),
 *   a child of a process with threads that does not exec is safe only where no other thread was in
 *   the library at the time of the fork. A child that does not exec keeps nothing of a snapshot:
 *   not its end, not the guest, not QEMU's monitor, not a name.
 * - dlclose(). The library stays loaded (it is linked with `-z nodelete`), and its threads go on.
 *   Handles stay valid too.
 * - POSIX record locks (fcntl F_SETLK) that the caller holds on disk images are lost, as a process
 *   loses them whenever it closes a file: the library opens and closes the images that it flushes
 *   and copies.
 */
#ifndef INSTANTSNAP_H
#define INSTANTSNAP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * Flags, under libvirt's own names. A program that also uses libvirt must include
 * <libvirt/libvirt.h> first, and has them from there.
 *
 * | flag        | bit | rules                                                     | by QMP       |
 * |-------------|-----|-----------------------------------------------------------|--------------|
 * | REDEFINE    | 0   | not with NO_METADATA, HALT, LIVE, INSTANT                 | not built    |
 * | CURRENT     | 1   | only with REDEFINE                                        | not built    |
 * | NO_METADATA | 2   | nothing is recorded in the state directory                | yes          |
 * | HALT        | 3   | the guest is ended when its memory is on disk             | yes          |
 * | DISK_ONLY   | 4   | not with INSTANT                                          | not built    |
 * | REUSE_EXT   | 5   | the overlays exist                                        | yes          |
 * | QUIESCE     | 6   | only with DISK_ONLY                                       | not built    |
 * | ATOMIC      | 7   | always so                                                 | yes          |
 * | LIVE        | 8   | active guest, external memory                             | with INSTANT |
 * | VALIDATE    | 9   | XML against libvirt's schema                              | not built    |
 * | INSTANT     | 10  | only with LIVE; not with DISK_ONLY, REDEFINE              | yes          |
 *
 * A broken rule or an unknown bit is VIR_ERR_INVALID_ARG; a flag that is allowed but not built yet
 * is VIR_ERR_OPERATION_UNSUPPORTED, and the message names it. Flags are checked before anything is
 * touched.
 *
 * Domains of libvirt (instantsnap_open_libvirt()): without INSTANT the call is libvirt's own, with
 * all its flags. With INSTANT, VALIDATE is built too; it takes libvirt's schema and xmllint.
 */
#ifndef LIBVIRT_DOMAIN_SNAPSHOT_H
enum {
    VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE = 1 << 0,    /* restore or alter metadata */
    VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT = 1 << 1,     /* with REDEFINE, make the snapshot current */
    VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA = 1 << 2, /* make the snapshot, do not record it */
    VIR_DOMAIN_SNAPSHOT_CREATE_HALT = 1 << 3,        /* end the guest afterwards */
    VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY = 1 << 4,   /* disks without memory */
    VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT = 1 << 5,   /* use overlay files that exist */
    VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE = 1 << 6,     /* freeze the file systems by the guest's agent */
    VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC = 1 << 7,      /* all disks or none */
    VIR_DOMAIN_SNAPSHOT_CREATE_LIVE = 1 << 8,        /* while the guest runs */
    VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE = 1 << 9     /* validate the XML against the schema */
};
enum {
    VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING = 1 << 0,    /* run after revert */
    VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED = 1 << 1,     /* paused after revert */
    VIR_DOMAIN_SNAPSHOT_REVERT_FORCE = 1 << 2,      /* allow risky reverts */
    VIR_DOMAIN_SNAPSHOT_REVERT_RESET_NVRAM = 1 << 3 /* UEFI variables from their template */
};
enum {
    VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN = 1 << 0,      /* also delete children */
    VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY = 1 << 1, /* delete just metadata */
    VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY = 1 << 2  /* delete just children */
};
#endif

#ifndef VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT
/** The snapshot is of the moment of the call; the guest runs on while its memory is being written. */
# define VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT (1 << 10)
#endif

/**
 * Error codes that this library gives, under libvirt's own names and numbers (virErrorNumber,
 * virErrorDomain). A program that also uses libvirt must include <libvirt/virterror.h> first, and
 * has them from there.
 */
#ifndef LIBVIRT_VIRTERROR_H
enum {
    VIR_ERR_OK = 0,
    VIR_ERR_INTERNAL_ERROR = 1,           /* a reply or a file that makes no sense, a defect of ours */
    VIR_ERR_NO_CONNECT = 5,               /* no connection to the libvirt daemon */
    VIR_ERR_INVALID_DOMAIN = 7,           /* a virDomainPtr that is none, or of another driver than libvirt's QEMU */
    VIR_ERR_INVALID_ARG = 8,              /* a bad pointer, an unknown flag, flags that exclude each other */
    VIR_ERR_OPERATION_FAILED = 9,         /* QEMU refused or failed; the message has its reason */
    VIR_ERR_XML_ERROR = 27,               /* XML with a value that cannot be */
    VIR_ERR_OPERATION_DENIED = 29,        /* the connection is read-only */
    VIR_ERR_XML_DETAIL = 35,              /* XML that is not well-formed, a name that may not be */
    VIR_ERR_SYSTEM_ERROR = 38,            /* a system call failed; the message has its errno's text */
    VIR_ERR_RPC = 39,                     /* the connection to the libvirt daemon failed */
    VIR_ERR_NO_DOMAIN = 42,               /* the domain is gone */
    VIR_ERR_OPERATION_INVALID = 55,       /* not in this state: a guest that is busy, a name that exists */
    VIR_ERR_CONFIG_UNSUPPORTED = 67,      /* a disk, a file or a device with which it cannot be done */
    VIR_ERR_OPERATION_TIMEOUT = 68,       /* a deadline passed, and everything was undone */
    VIR_ERR_INVALID_DOMAIN_SNAPSHOT = 71, /* a snapshot whose metadata or memory image is damaged */
    VIR_ERR_NO_DOMAIN_SNAPSHOT = 72,      /* no snapshot of that name */
    VIR_ERR_ARGUMENT_UNSUPPORTED = 74,    /* this QEMU or this host has no background snapshots */
    VIR_ERR_SNAPSHOT_REVERT_RISKY = 77,   /* an image is not as it was: VIR_DOMAIN_SNAPSHOT_REVERT_FORCE */
    VIR_ERR_OPERATION_ABORTED = 78,       /* cancelled by instantsnap_snapshot_cancel() or _job_cancel(), all undone */
    VIR_ERR_AGENT_UNRESPONSIVE = 86,      /* the guest's agent does not answer */
    VIR_ERR_XML_INVALID_SCHEMA = 92,      /* XML that is not what libvirt's schema says (VALIDATE) */
    VIR_ERR_ACCESS_DENIED = 88,           /* the daemon's access rules forbid it; or others can write to the state directory */
    VIR_ERR_OPERATION_UNSUPPORTED = 84    /* allowed, but this way in cannot do it */
};
enum { VIR_FROM_QEMU = 10 };
#endif

/** A guest, opened by one of the instantsnap_open_ functions, closed by instantsnap_close(). */
typedef struct instantsnap_guest instantsnap_guest;
/** A snapshot, as qemuSnapshotCreateXML() returns it for a guest of ours; freed by instantsnap_snapshot_free(). */
typedef struct instantsnap_snapshot instantsnap_snapshot;
/** A snapshot that is being taken, started by instantsnap_snapshot_create_start(); freed by instantsnap_job_free(). */
typedef struct instantsnap_job instantsnap_job;
/** What a QEMU that is to continue a snapshot must be started with; freed by instantsnap_revert_plan_free(). */
typedef struct instantsnap_revert_plan instantsnap_revert_plan;

/** Why the last failed call of this thread failed. */
typedef struct instantsnap_error {
    int code;            /* virErrorNumber: one of VIR_ERR_* */
    int domain;          /* virErrorDomain: VIR_FROM_QEMU */
    const char *message; /* never NULL; names the step, the object and what to do */
} instantsnap_error;

/**
 * What the last snapshot of a guest took. Durations are microseconds; 0 where a phase was not
 * reached. The phases follow each other without gaps, so that their sum is `total_us`.
 */
typedef struct instantsnap_stats {
    size_t size;            /* set by the caller: sizeof(instantsnap_stats) */
    uint64_t validate_us;   /* flags, XML, connecting, the guest's state and abilities; the guest runs */
    uint64_t plan_us;       /* disks, names, the domain's XML; the guest runs */
    uint64_t prepare_us;    /* overlays created, memory image and pipe opened, capability set; the guest runs */
    uint64_t pause_us;      /* vCPUs being stopped */
    uint64_t switch_us;     /* disks to their overlays, one transaction, and the storage hook; the guest is paused */
    uint64_t arm_us;        /* until write tracking is armed and the guest runs again (plain: until it is saved) */
    uint64_t drain_us;      /* memory flows into the image; the guest runs (0 for a plain snapshot) */
    uint64_t finish_us;     /* image completed and synced to disk, metadata recorded; the guest runs */
    uint64_t undo_us;       /* putting everything back, after a failure */
    uint64_t total_us;      /* the whole call */
    uint64_t instant_us;    /* from the call's entry to the instant: from then on the caller may change the guest */
    uint64_t guest_paused_us;      /* the pause as the guest had it, also where it failed; 0 when it was paused already */
    uint64_t memory_image_bytes;   /* size of the memory image */
    uint32_t pause_from_events;    /* 1: guest_paused_us is by QEMU's own STOP and RESUME time stamps;
                                      0: by this process's clock around the commands, thus an upper bound */
    uint32_t disks;                /* disks switched to an overlay */
    uint64_t setup_us;             /* how long QEMU set the background snapshot up (it touches all memory), to whole ms */
    uint64_t lost_pause_us;        /* for how long lost tries paused the guest, all in all, besides guest_paused_us */
    uint32_t lost_tries;           /* tries to stop the guest just in time that came too late: see
                                      instantsnap_set_overlap_tries() */
    uint32_t overlapped;           /* 1: the guest ran while QEMU touched its memory; 0: it was stopped first */
} instantsnap_stats;

/** The phases of a snapshot, in their order; each is described at its time in instantsnap_stats. */
typedef enum instantsnap_phase {
    INSTANTSNAP_PHASE_VALIDATE = 0,
    INSTANTSNAP_PHASE_PLAN = 1,
    INSTANTSNAP_PHASE_PREPARE = 2,
    INSTANTSNAP_PHASE_PAUSE = 3,
    INSTANTSNAP_PHASE_SWITCH = 4,
    INSTANTSNAP_PHASE_ARM = 5,
    INSTANTSNAP_PHASE_DRAIN = 6,
    INSTANTSNAP_PHASE_FINISH = 7,
    INSTANTSNAP_PHASE_UNDO = 8,   /* after a failure or a cancel */
    INSTANTSNAP_PHASE_ENDED = 9   /* complete, or failed and undone */
} instantsnap_phase;

/**
 * What happens to a snapshot that is being taken. Each of the first three comes at most once, in
 * this order; PROGRESS any number of times after INSTANT; then exactly one of COMPLETE and FAILED,
 * the last. FAILED comes when everything has been undone, and from whichever phase. A guest that
 * was paused already has no PAUSED. A plain snapshot's memory is saved by the time of its INSTANT:
 * its PROGRESS comes before that. So it is with a paused guest where QEMU cannot do it otherwise. A
 * call that is refused at once, for a pointer, for its options or because the handle is busy, has
 * no events.
 */
typedef enum instantsnap_event_type {
    INSTANTSNAP_EVENT_PAUSED = 1,   /* the vCPUs have stopped */
    INSTANTSNAP_EVENT_SWITCHED = 2, /* the disks are on their overlays */
    INSTANTSNAP_EVENT_INSTANT = 3,  /* memory and disks are held; the guest, if it ran, runs again, and may be changed */
    INSTANTSNAP_EVENT_PROGRESS = 4, /* memory flows into the image */
    INSTANTSNAP_EVENT_COMPLETE = 5, /* the snapshot is complete and on disk */
    INSTANTSNAP_EVENT_FAILED = 6    /* it failed or was cancelled, and everything is undone */
} instantsnap_event_type;

/** An event. Fields that say nothing of its type are 0. */
typedef struct instantsnap_event {
    size_t size;               /* where the caller provides the structure: set by him, sizeof(instantsnap_event) */
    uint32_t type;             /* instantsnap_event_type */
    int32_t error_code;        /* FAILED: virErrorNumber */
    uint64_t time_us;          /* when it happened: CLOCK_MONOTONIC */
    uint64_t paused_us;        /* for how long the guest has been paused so far: all of its pause from INSTANT on, by QEMU's own
                                  time stamps where it gives them; before that by this process's clock, an upper bound */
    uint64_t bytes_done;       /* size of the memory image so far */
    uint64_t bytes_total;      /* what it is expected to become, at most, before the devices' state, which comes last and is
                                  small; pages of zeros take no room; 0: not known */
    uint64_t bytes_per_second; /* PROGRESS: since the last one, or since the instant */
    uint64_t pages_left;       /* pages of guest memory that QEMU has not saved yet */
} instantsnap_event;

/** Where a job is. */
typedef struct instantsnap_job_info {
    size_t size;               /* set by the caller: sizeof(instantsnap_job_info) */
    uint32_t phase;            /* instantsnap_phase */
    uint32_t instant;          /* 1: the instant has passed */
    uint64_t elapsed_us;       /* since the call, until now or until the end */
    uint64_t paused_us;        /* for how long the guest has been paused so far; as in instantsnap_event */
    uint64_t bytes_done;       /* these four as in instantsnap_event; up to date as of the last progress interval */
    uint64_t bytes_total;
    uint64_t bytes_per_second;
    uint64_t pages_left;
} instantsnap_job_info;

/**
 * Is told of an event. The event is borrowed for the call. Called on the thread that takes the
 * snapshot: that of instantsnap_snapshot_create(), or the job's own, where every signal is blocked.
 * One call at a time for one snapshot; no lock of the library is held, so any function of it may be
 * called, with the exception that instantsnap_job_wait() for the same job would wait for itself.
 * PAUSED and SWITCHED are inside the pause: the guest stands still until the callback returns, and
 * the pause limit does not interrupt it.
 *
 * The last call, with COMPLETE or FAILED, comes before instantsnap_snapshot_create() returns, or,
 * for a job, before instantsnap_job_wait() returns 1 and instantsnap_job_next_event() gives that
 * event: from then on `opaque` is the caller's again. In that call instantsnap_job_get_result() and
 * the like tell of the end already.
 */
typedef void (*instantsnap_event_callback)(const instantsnap_event *event, void *opaque);

enum {
    /** instantsnap_snapshot_create_start() returns at once, before anything is done, and not at the instant. */
    INSTANTSNAP_CREATE_AT_ONCE = 1 << 0
};

/** How a snapshot is taken; all zeros but `size` is the default. */
typedef struct instantsnap_create_options {
    size_t size;                         /* set by the caller: sizeof(instantsnap_create_options) */
    instantsnap_event_callback callback; /* is told of the events; NULL: nobody */
    void *opaque;                        /* handed to the callback */
    uint32_t progress_interval_ms;       /* time between two PROGRESS events, milliseconds; 0: the default, 500. QEMU is
                                            asked that often; without callback, instantsnap_snapshot_create() does not ask */
    uint32_t flags;                      /* INSTANTSNAP_CREATE_*; unknown bits are VIR_ERR_INVALID_ARG */
} instantsnap_create_options;

/** A disk that is left to a storage hook. The strings are borrowed for the call. */
typedef struct instantsnap_storage_disk {
    size_t size;         /* sizeof(instantsnap_storage_disk), as the library knows it */
    const char *name;    /* the disk's name: `vda`, a qdev id, a drive alias or a node name */
    const char *source;  /* its image or device, as QEMU (for a domain of libvirt: its XML) has it: a path as a rule */
    const char *format;  /* the format of that: "raw", "qcow2" */
} instantsnap_storage_disk;

/** What a storage hook is called for. Everything in it is borrowed for the call. */
typedef struct instantsnap_storage_call {
    size_t size;           /* sizeof(instantsnap_storage_call), as the library knows it */
    const char *snapshot;  /* the snapshot's name */
    const instantsnap_storage_disk *const *disks; /* the disks with snapshot='manual', `disk_count` of them */
    size_t disk_count;     /* 1 or more */
    uint64_t paused_us;    /* for how long the guest has been paused so far; 0 where it was paused already */
    uint64_t deadline_us;  /* `snapshot`: how long it may take; else 0 */
} instantsnap_storage_call;

/**
 * The caller's storage: snapshots the disks that QEMU does not (LVM, Ceph, ZFS, a SAN), at the
 * instant of memory and of the other disks. What is not said of a callback here is said at
 * instantsnap_set_storage_hook(). No lock of the library is held in them, so any function of it may
 * be called, with the exception that to wait for the same snapshot's job (or for another operation
 * on the same guest) is to wait for oneself. Every signal is blocked in the library's own threads.
 */
typedef struct instantsnap_storage_hook {
    size_t size;   /* set by the caller: sizeof(instantsnap_storage_hook) */
    void *opaque;  /* handed to the callbacks */
    /**
     * Snapshots the storage of all disks of the call, the guest standing still. They are flushed:
     * by QEMU, and those that QEMU was told not to flush (`cache=unsafe`) by the library, right
     * before this call and within its time. Where the library cannot open one of those the snapshot
     * is refused (VIR_ERR_CONFIG_UNSUPPORTED). Returns 0 when that is done, or anything else with
     * nothing left of it: the snapshot fails with VIR_ERR_OPERATION_FAILED, and the message has the
     * number. On a thread of its own.
     */
    int (*snapshot)(const instantsnap_storage_call *call, void *opaque);
    /**
     * Removes what `snapshot` has made: called once, with the same call, for each `snapshot` that
     * returned 0 (in time or not) where the snapshot of the guest fails. The guest runs again. On
     * the thread that takes the snapshot, before FAILED is told. And when
     * instantsnap_snapshot_delete() has deleted the snapshot, on the thread of that call. NULL:
     * nothing is done.
     */
    void (*undo)(const instantsnap_storage_call *call, void *opaque);
    /**
     * For instantsnap_snapshot_prepare_revert_hooked(): names what a new QEMU is to use for each
     * disk, in the format that disk had: what `snapshot` has made, or rather a writable copy or
     * clone of it, for the continued guest writes to it. `files` has room for one string a disk,
     * all NULL at first: each is to be set to a string of malloc(), strdup() or the like, which the
     * library frees with free(), also after a failure. Returns 0, or anything else with nothing
     * left behind. On the thread of that call. NULL: nothing with such disks can be brought back by
     * this hook.
     */
    int (*revert)(const instantsnap_storage_call *call, char **files, void *opaque);
    uint32_t deadline_ms; /* how long `snapshot` may take, milliseconds; 0: as long as the pause may (pause limit) */
    uint32_t reserved;    /* 0 */
} instantsnap_storage_hook;

/** One disk of a revert plan. The strings are borrowed from the plan. */
typedef struct instantsnap_revert_disk {
    size_t size;         /* set by the caller: sizeof(instantsnap_revert_disk) */
    const char *name;    /* the disk's name in the snapshot: `vda`, a qdev id, a drive alias or a node name */
    const char *file;    /* absolute path of the image that this disk must use: fresh, this plan's own; what a storage
                            hook has named, as it is */
    const char *format;  /* its format: "qcow2"; "raw" for UEFI variables where the original's are raw; with a storage hook
                            that of the original */
    const char *backing_file; /* the snapshot's image beneath it, never to be written again; NULL for UEFI variables, and for
                            what a storage hook has named */
} instantsnap_revert_disk;

/** The library's version, "MAJOR.MINOR.PATCH". Static; never NULL. */
const char *instantsnap_version(void);

/**
 * Why the last failed call of this thread failed: like errno, it is only set by calls that fail.
 * Never NULL: before the first failure the code is VIR_ERR_OK and the message empty. Borrowed:
 * valid until this thread's next call of a function of this library other than this one.
 */
const instantsnap_error *instantsnap_last_error(void);

/** Frees a string that this library returned as `char *`. NULL is fine. */
void instantsnap_free_string(char *string);

/** Frees a list that instantsnap_snapshot_list() returned, with its strings. NULL is fine. */
void instantsnap_free_string_list(char **strings);

/**
 * Opens a guest by its QMP socket: the caller itself has started QEMU.
 *
 * @qmp_socket  path of a Unix socket on which QEMU (6.0 or later) serves QMP: `-qmp unix:PATH,server=on,wait=off`. QEMU
 *              serves one client a socket at a time, so give this library a socket of its own. It is connected to here
 *              (to find errors early), and again for each operation; between operations it is free.
 * @domain_xml  the guest's libvirt `<domain>` XML, or NULL. With it disks are named by their target (`vda`), and memory
 *              images hold it, with the disks' files as they are at the instant. Disks are matched by `<alias>`, else by
 *              the `<source>` file, else by a qdev id or drive name equal to the target.
 * @state_dir   an existing directory for the metadata of this guest's snapshots (one guest, one directory): a
 *              `<domainsnapshot>` file each, and memory images whose place the snapshot's XML leaves open. Snapshots
 *              are taken, deleted and brought back only where it belongs to this user or to root, and no other user may
 *              write to it (the owner's private group may, and anyone where it is sticky, like /tmp): what its records
 *              name is merged and removed with the caller's rights. Elsewhere these calls fail with
 *              VIR_ERR_ACCESS_DENIED; listing and reading work in any directory.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_XML_DETAIL or VIR_ERR_XML_ERROR (domain_xml), VIR_ERR_SYSTEM_ERROR (socket or directory),
 * VIR_ERR_OPERATION_TIMEOUT (another client has the socket), VIR_ERR_OPERATION_FAILED (not a QMP
 * socket), VIR_ERR_CONFIG_UNSUPPORTED (QEMU older than 6.0). Blocks for a few milliseconds, at most
 * 5 seconds.
 */
instantsnap_guest *instantsnap_open_qmp(const char *qmp_socket, const char *domain_xml, const char *state_dir);

struct _virDomain; /* libvirt's: `virDomainPtr` is a pointer to it */

/**
 * Opens a domain of a stock libvirt: any daemon of libvirt 8.2 or later on this machine, as it is.
 *
 * @domain  a `virDomainPtr` of a connection to libvirt's QEMU driver: `qemu:///system`, `qemu:///session`, `qemu:///embed` or
 *          `qemu+unix:///...`. A reference of its own is taken, to the connection too; the caller may free his.
 *
 * Snapshots are made through libvirt and recorded in it: instantsnap_snapshot_list() and the like
 * tell of all snapshots that libvirt has of the domain, whoever took them. What is different from a
 * guest of instantsnap_open_qmp():
 *
 * - `<memory snapshot='external' file='...'/>` must be given.
 * - A snapshot of a paused domain is libvirt's own, without INSTANT; it takes as long as that does.
 * - The domain is marked as tainted (`custom-monitor`), since QEMU is told things past libvirt.
 * - Reverting: qemuSnapshotRevert() of instantsnap-libvirt.h. Deleting is as by
 *   qemuSnapshotDelete(), which says what is done.
 * - The caller must be able to create files beside the disk images, as root, or as the user of a
 *   session.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_INVALID_DOMAIN, VIR_ERR_OPERATION_UNSUPPORTED (libvirt is absent or older; a remote
 * connection; another driver).
 */
instantsnap_guest *instantsnap_open_libvirt(struct _virDomain *domain);

/**
 * Closes a guest. NULL is fine. The guest itself is left as it is. An operation that is under way
 * in another thread ends first as it would have; this call does not wait for it.
 */
void instantsnap_close(instantsnap_guest *guest);

/**
 * Bounds the time for which a snapshot may pause the guest: when it passes before the instant, the
 * guest resumes, everything is undone, and the call fails with VIR_ERR_OPERATION_TIMEOUT. A plain
 * snapshot pauses the guest for as long as its memory takes to be written; there the limit is for
 * the steps before that.
 *
 * @milliseconds  1 or more; the default is 30000. Applies to calls that begin later.
 */
int instantsnap_set_pause_limit(instantsnap_guest *guest, unsigned int milliseconds);

/**
 * Bounds how hard a snapshot tries to keep the guest's memory size out of the pause. Before a
 * background snapshot is armed, QEMU touches all of the guest's memory. With QEMU 10.0 or later
 * that is begun while the guest runs, and the guest is stopped shortly before it is done, as far as
 * can be foretold. A stop that comes too late is noticed before anything else is done: the guest
 * runs on, and it is tried again. After as many lost tries as this the guest is stopped first,
 * which takes longer and is always right. Lost tries count towards the pause limit.
 *
 * @tries  how many may be lost; 0: the guest is always stopped first. The default is 3. Applies to calls that begin later.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_set_overlap_tries(instantsnap_guest *guest, unsigned int tries);

/**
 * Sets who snapshots the disks that have snapshot='manual', in the snapshot's XML or, unless that
 * says otherwise, in the domain's. Without a hook a snapshot with such disks is
 * VIR_ERR_OPERATION_UNSUPPORTED, before anything is touched.
 *
 * hook->snapshot is called once, for all such disks, inside the pause, when the other disks have
 * been switched. The guest waits for it, and no longer than hook->deadline_ms and the pause limit:
 * when that passes, or the snapshot is cancelled, the guest resumes, everything is undone at once,
 * and the snapshot fails with VIR_ERR_OPERATION_TIMEOUT (VIR_ERR_OPERATION_ABORTED). It fails when
 * the callback has returned (the guest running meanwhile) and hook->undo was called, if that is
 * due. A process that is killed in the callback leaves a guest that runs, as in any other phase,
 * and calls no undo.
 *
 * The disks are recorded with snapshot='manual'. For a domain of libvirt such a snapshot takes
 * VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA (else VIR_ERR_OPERATION_UNSUPPORTED: libvirt's own revert
 * would put old memory beside the disk as it is by then), the domain must run, and a snapshot
 * without INSTANT is libvirt's own, which calls nobody.
 *
 * @hook  copied; NULL: none, as at first. Applies to calls that begin later. `opaque` must be good until the hook was replaced or
 *        the guest closed, and every operation that began before that has ended.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (hook->snapshot is NULL, `reserved` is not 0).
 */
int instantsnap_set_storage_hook(instantsnap_guest *guest, const instantsnap_storage_hook *hook);

/**
 * Takes a full snapshot: memory and disks.
 *
 * @xml    libvirt's `<domainsnapshot>`. `<domainsnapshot/>` is enough: the name is then the time in seconds, every
 *         writable disk gets an overlay beside it by libvirt's rule (`disk.qcow2`: `disk.NAME`), memory goes to
 *         `STATE_DIR/NAME.mem`. Disks in the XML are named by target, qdev id, drive alias, node name or the path of
 *         their image. Read-only and empty drives are left out; UEFI variables
 *         (pflash) are copied to `MEMORY_IMAGE.DRIVE.nvram`. Disks with snapshot='no' are left out, those with
 *         snapshot='manual' are left to the hook of instantsnap_set_storage_hook().
 *
 *         The overlay of a disk whose image is no file (a block device; network storage) must be named.
 *         An overlay that is named (`<source file='...'/>`, or `<source dev='...'/>` with type='block') is a new file, or, by
 *         libvirt's rule, a file that is there and empty, or a block device: these are formatted, and what was on the
 *         device is lost. A file with content is never overwritten, nor is anything that is in use, or is an image of the guest
 *         or of one of its recorded snapshots. If the snapshot is undone, the empty file is empty again, and the device stays,
 *         without an overlay on it. With REUSE_EXT overlays are the caller's own qcow2 images (`qemu-img create -f qcow2 -F
 *         FORMAT -b IMAGE OVERLAY`): on the disk's image, of the disk's size, and empty; an undo leaves them as they are by then.
 *         A delete removes each overlay that is a file, and takes the qcow2 header off a device.
 * @flags  VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT for an instant snapshot; 0 for a plain one,
 *         through which the guest is paused throughout. See the table above.
 * @name   where to store the snapshot's name, for instantsnap_free_string(); may be NULL.
 *
 * Blocks until the snapshot is complete and on disk. The guest is paused meanwhile as little as can
 * be: see instantsnap_get_stats(). A guest that is paused already stays paused; QEMU before 10.0
 * saves such a guest once only, until it has run again. Returns 0, or -1 with everything as it was
 * before the call: VIR_ERR_INVALID_ARG (flags), VIR_ERR_XML_DETAIL and VIR_ERR_XML_ERROR (xml),
 * VIR_ERR_OPERATION_UNSUPPORTED (allowed, not built), VIR_ERR_ARGUMENT_UNSUPPORTED (no background
 * snapshots: the message says why and what to do), VIR_ERR_OPERATION_INVALID (busy, a block job on
 * a disk, wrong state, name exists), VIR_ERR_CONFIG_UNSUPPORTED (a disk, file or device that stands
 * in the way), VIR_ERR_SYSTEM_ERROR (files), VIR_ERR_OPERATION_FAILED (QEMU's reason is in the
 * message), VIR_ERR_OPERATION_TIMEOUT, VIR_ERR_OPERATION_ABORTED. Where something could not be put
 * back, the message ends with what is left and how to mend it; the code of a snapshot that was
 * cancelled is VIR_ERR_OPERATION_FAILED then.
 */
int instantsnap_snapshot_create_xml(instantsnap_guest *guest, const char *xml, unsigned int flags, char **name);

/**
 * The same with events: as instantsnap_snapshot_create_xml(), and the callback of *options is told
 * meanwhile, on this thread.
 *
 * @options  NULL: the defaults. INSTANTSNAP_CREATE_AT_ONCE is VIR_ERR_INVALID_ARG here.
 */
int instantsnap_snapshot_create(instantsnap_guest *guest, const char *xml, unsigned int flags,
                                const instantsnap_create_options *options, char **name);

/**
 * Starts to take a full snapshot, and returns at the instant: the guest may be changed at once,
 * while its memory is still being written by a thread of the library's. Arguments, and errors up to
 * the instant, are those of instantsnap_snapshot_create_xml().
 *
 * With INSTANTSNAP_CREATE_AT_ONCE it returns as soon as the thread has been started, without
 * waiting for anything. Then an error in a pointer or in *options is this call's still, and so is
 * VIR_ERR_OPERATION_INVALID where a snapshot is being taken through the same handle; all others are
 * the job's: for event loops.
 *
 * Two jobs on one guest: the second fails with VIR_ERR_OPERATION_INVALID, and touches nothing. The
 * guest may be closed while the job is at work. instantsnap_snapshot_cancel() and
 * instantsnap_get_stats() are of a job's snapshot too.
 *
 * A plain snapshot's instant is when its memory has been saved; so is that of a paused guest where
 * QEMU cannot do it otherwise.
 *
 * Returns the job, for instantsnap_job_free(), or NULL with everything as it was before the call.
 */
instantsnap_job *instantsnap_snapshot_create_start(instantsnap_guest *guest, const char *xml, unsigned int flags,
                                                   const instantsnap_create_options *options);

/**
 * Waits until a job has ended.
 *
 * @timeout_ms  milliseconds; 0: does not wait; negative: without end.
 *
 * Returns 1 when it has ended, completely or by an error: instantsnap_job_get_result() says which;
 * 0 when the time has passed; -1: VIR_ERR_INVALID_ARG. As for all functions of a job,
 * VIR_ERR_OPERATION_INVALID in a forked child.
 */
int instantsnap_job_wait(instantsnap_job *job, int timeout_ms);

/**
 * A file descriptor for poll() and epoll: readable as long as instantsnap_job_next_event() has an
 * event to give. It is the job's, valid until instantsnap_job_free(), and must not be read, written
 * or closed. Take it out of an epoll set before that: the job may go on, and with it what epoll
 * watches. Edge-triggered epoll hears of every event. Returns it, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_get_fd(instantsnap_job *job);

/**
 * Takes the oldest event that was not taken yet. Does not block. The last one is COMPLETE or
 * FAILED. PROGRESS events that nobody takes replace each other. Independent of a callback, which is
 * told of every event too.
 *
 * Fills *event (set event->size first), and returns 1; or 0 when there is none now; or -1:
 * VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_next_event(instantsnap_job *job, instantsnap_event *event);

/** Fills *info (set info->size first). Does not block. Returns 0, or -1: VIR_ERR_INVALID_ARG. */
int instantsnap_job_get_info(instantsnap_job *job, instantsnap_job_info *info);

/**
 * What became of a job. Returns 0 when the snapshot is complete. Returns -1 when it failed, and
 * sets the last error to why, as instantsnap_snapshot_create_xml() would have; or
 * VIR_ERR_OPERATION_INVALID when it has not ended yet, VIR_ERR_INVALID_ARG. Does not block.
 */
int instantsnap_job_get_result(instantsnap_job *job);

/** The snapshot's name, once a job is complete; for instantsnap_free_string(). NULL: the error of instantsnap_job_get_result(). */
char *instantsnap_job_get_name(instantsnap_job *job);

/**
 * The snapshot's `<domainsnapshot>` XML, once a job is complete; for instantsnap_free_string(). It
 * is what was recorded when it was completed, and of one that is not recorded (NO_METADATA) what
 * would have been: for a domain of libvirt that holds the domain's XML as it is in the memory
 * image, passwords included. Does not block. NULL: the error of instantsnap_job_get_result().
 */
char *instantsnap_job_get_xml(instantsnap_job *job);

/**
 * Fills *stats (set stats->size first) once a job has ended. Returns 0, or -1:
 * VIR_ERR_OPERATION_INVALID (not yet), VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_get_stats(instantsnap_job *job, instantsnap_stats *stats);

/**
 * Cancels a job in whatever phase it is, as instantsnap_snapshot_cancel() does. Returns 0 at once;
 * the job ends when everything is undone, by VIR_ERR_OPERATION_ABORTED, unless it was complete
 * already; by VIR_ERR_OPERATION_FAILED, whose message says what is left, where something could not
 * be undone. -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_cancel(instantsnap_job *job);

/**
 * Frees a job. One that has not ended goes on, and its callback is still told, until it has: to end
 * it, cancel it first. The guest may have been closed before. An epoll set that has its descriptor
 * must be rid of it before. Does not block. NULL is fine.
 */
void instantsnap_job_free(instantsnap_job *job);

/**
 * Cancels the snapshot that another thread is taking of this guest, in whatever phase it is: that
 * call undoes everything and fails with VIR_ERR_OPERATION_ABORTED, unless it was complete already.
 * With QEMU before 10.0, whose background snapshots cannot be cancelled safely, the undo takes as
 * long as memory still takes to be read; the guest runs. Returns 0 at once, without waiting for it,
 * or -1 with VIR_ERR_OPERATION_INVALID when there is none.
 */
int instantsnap_snapshot_cancel(instantsnap_guest *guest);

/**
 * Fills *stats for the last snapshot taken, or tried, of this guest through this handle. Set
 * stats->size first. Returns 0, or -1: VIR_ERR_INVALID_ARG, VIR_ERR_OPERATION_INVALID (none yet).
 */
int instantsnap_get_stats(instantsnap_guest *guest, instantsnap_stats *stats);

/**
 * The names of the guest's recorded snapshots, oldest first.
 *
 * @names  where to store the NULL-terminated list, for instantsnap_free_string_list(); may be NULL, to count only.
 *
 * Returns how many there are, or -1: VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Reads
 * files only.
 */
int instantsnap_snapshot_list(instantsnap_guest *guest, char ***names);

/**
 * The `<domainsnapshot>` XML of a recorded snapshot: name, description, state, parent, creation
 * time, memory, disks with the files really used, domain. Returns it for instantsnap_free_string(),
 * or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Reads
 * files only.
 */
char *instantsnap_snapshot_get_xml(instantsnap_guest *guest, const char *name);

/**
 * The name of the current snapshot: the one last taken or loaded, the parent of the next. Returns
 * it for instantsnap_free_string(), or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT when there is none. Reads
 * files only.
 */
char *instantsnap_snapshot_current(instantsnap_guest *guest);

/**
 * Brings a snapshot back, first step: makes a fresh overlay on each of its disk images (and a
 * private copy of its UEFI variables), and says what to start QEMU with. The snapshot stays as it
 * is, so this can be done any number of times, also while the original guest runs on. Needs
 * `qemu-img`.
 *
 * Then start QEMU with the machine of the original (same machine type, CPU, memory size and
 * devices), each disk on the file the plan names, and `-incoming defer`; then call
 * instantsnap_snapshot_load().
 *
 * @state_dir  the state directory with which the snapshot was taken.
 * @name       the snapshot.
 * @directory  where the fresh images are made; NULL: beside each of the snapshot's images, which must be files then (else
 *             VIR_ERR_CONFIG_UNSUPPORTED). They are the caller's from now on: they hold what the continued guest writes.
 *
 * Returns the plan, or NULL with nothing left behind: VIR_ERR_NO_DOMAIN_SNAPSHOT,
 * VIR_ERR_INVALID_DOMAIN_SNAPSHOT (an image is missing; the memory image is incomplete, cut off or
 * damaged), VIR_ERR_ACCESS_DENIED (other users can write to
 * @state_dir), VIR_ERR_SYSTEM_ERROR, VIR_ERR_OPERATION_TIMEOUT (a server that an image below is on does not answer),
 * VIR_ERR_OPERATION_FAILED. Blocks for some 10 ms a disk, where a server does not answer for 30 s.
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert(const char *state_dir, const char *name,
                                                             const char *directory);

/**
 * The same for a snapshot with disks that were left to a storage hook: hook->revert says what these
 * are to use, and the plan's last disks are what it says. (Without a hook such a snapshot is
 * VIR_ERR_OPERATION_UNSUPPORTED, for it would put old memory beside a disk that has gone on.) No
 * overlay is put on top of them: the continued guest writes to them.
 *
 * @hook  `size`, `opaque` and `revert` are needed; NULL: as instantsnap_snapshot_prepare_revert(). Called on this thread, once,
 *        when everything else has succeeded, with no limit to its time.
 *
 * Returns the plan, or NULL: as instantsnap_snapshot_prepare_revert(); VIR_ERR_OPERATION_FAILED,
 * too, where the hook fails. instantsnap_snapshot_load() cannot look into the storage: of these
 * disks it checks that they are there.
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert_hooked(const char *state_dir, const char *name,
                                                                    const char *directory,
                                                                    const instantsnap_storage_hook *hook);

/** How many disks the plan has; 0 for a pointer that is not a plan. */
size_t instantsnap_revert_plan_disk_count(const instantsnap_revert_plan *plan);

/** Fills *disk with disk number `index`, from 0. Set disk->size first. Returns 0, or -1: VIR_ERR_INVALID_ARG. */
int instantsnap_revert_plan_get_disk(const instantsnap_revert_plan *plan, size_t index, instantsnap_revert_disk *disk);

/** Absolute path of the memory image; borrowed from the plan. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_revert_plan_memory_file(const instantsnap_revert_plan *plan);

/**
 * The `<domain>` XML of the snapshot, its disks on the snapshot's images; borrowed from the plan.
 * Where the guest was opened without one, a short one made of what QEMU tells. NULL:
 * VIR_ERR_INVALID_ARG.
 */
const char *instantsnap_revert_plan_domain_xml(const instantsnap_revert_plan *plan);

/** Frees a plan. The images it names stay. NULL is fine. */
void instantsnap_revert_plan_free(instantsnap_revert_plan *plan);

/**
 * Brings a snapshot back, second step: feeds its memory to a QEMU started as the plan says, with
 * `-incoming defer`.
 *
 * @guest  that QEMU, opened with the same state directory.
 * @name   the snapshot.
 * @flags  0: runs if the guest ran at the instant, else stays paused. VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING or
 *         VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED, not both: as asked. VIR_DOMAIN_SNAPSHOT_REVERT_FORCE: images that are not as they
 *         were are taken all the same.
 *
 * The snapshot becomes the current one. Before QEMU is given a byte, each of its disks is compared
 * with the snapshot's: a missing disk, a disk on another image, a disk that would write to the
 * snapshot's own image, and another machine type than the snapshot's are
 * VIR_ERR_CONFIG_UNSUPPORTED. An image that was written or replaced since the snapshot froze it
 * (its inode, its size or its time of modification is another) would be newer than the memory:
 * VIR_ERR_SNAPSHOT_REVERT_RISKY, unless FORCE says that its content is the same, as that of a copy
 * is. Blocks until memory is loaded and, where asked, the guest runs. Returns 0, or -1:
 * VIR_ERR_INVALID_ARG, VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_INVALID_DOMAIN_SNAPSHOT (the memory
 * image is incomplete, cut off or damaged), VIR_ERR_ACCESS_DENIED (other users can write to the
 * state directory), VIR_ERR_OPERATION_INVALID (QEMU was not started with `-incoming defer`, or is
 * busy), VIR_ERR_OPERATION_FAILED (QEMU's reason). After a failure during the load that QEMU is of
 * no more use: end it, and start it anew. VIR_DOMAIN_SNAPSHOT_REVERT_RESET_NVRAM is not built:
 * VIR_ERR_OPERATION_UNSUPPORTED.
 */
int instantsnap_snapshot_load(instantsnap_guest *guest, const char *name, unsigned int flags);

/**
 * Deletes a snapshot. The guest loses nothing and is not paused: what it has written since the
 * snapshot is merged into the images below, which its disks are on again afterwards. The snapshot's
 * overlays, its memory image, its copies of UEFI variables and its metadata go; its parent becomes
 * the current snapshot where it was current itself.
 *
 * @guest  the guest, running or paused, with its disks on the snapshot's overlays. Where disks were left to a storage hook it must
 *         have one: `undo` is called last.
 * @name   the snapshot.
 * @flags  0: the snapshot, which must have no children. VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY: nothing but the metadata; all
 *         files stay as they are, children become children of the parent, and QEMU is not asked.
 *         VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN and _CHILDREN_ONLY, which exclude each other: of a snapshot without children the
 *         former is as 0, and the latter does nothing.
 *
 * Blocks until all is merged, which takes as long as it takes to write what the guest has written
 * since; it cannot be cancelled. Of dirty bitmaps, those that were added since the snapshot go with
 * its overlays.
 *
 * What was made by instantsnap_snapshot_prepare_revert() of this snapshot stands on the images that
 * are merged into, and is of no use afterwards. While a QEMU has it open, QEMU refuses the merge,
 * and nothing is changed. The same holds for images that the user himself has put on top of the
 * snapshot's.
 *
 * A guest that is not on the snapshot's overlays, because it was brought back to this snapshot or
 * to an older one, has nothing to be merged: its disks stay on the images that they are on, and the
 * overlays are removed with what the guest that was left had written there. An overlay that any
 * QEMU has open, or on whose content another recorded snapshot stands, is never removed.
 *
 * Everything is checked before anything is changed. From the first merge on the snapshot cannot be
 * reverted to any more, since its images take in what is younger; its memory image is called
 * `….deleting` from then on, and reverting says why it cannot be. As long as not all disks can be
 * switched back, none is. When the call fails after that, or its caller is killed, the guest goes
 * on, the metadata stays, and deleting the snapshot again does the rest; the message says on which
 * image each disk is. (Should QEMU itself end meanwhile, start it with those.)
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (flags), VIR_ERR_NO_DOMAIN_SNAPSHOT,
 * VIR_ERR_OPERATION_UNSUPPORTED (it has children; no hook), VIR_ERR_OPERATION_INVALID (the guest is
 * busy, another block job is under way, a disk's images are not as they were recorded, or something
 * stands on them: the message names it and says what to do), VIR_ERR_CONFIG_UNSUPPORTED (a filter
 * on a disk), VIR_ERR_INVALID_DOMAIN_SNAPSHOT (damaged metadata), VIR_ERR_SYSTEM_ERROR,
 * VIR_ERR_OPERATION_FAILED (QEMU's reason, or that of `qemu-img`, which looks at the images of the
 * other snapshots), VIR_ERR_OPERATION_TIMEOUT (no progress for a minute). For a domain of
 * instantsnap_open_libvirt() it is qemuSnapshotDelete(), with children and all.
 */
int instantsnap_snapshot_delete(instantsnap_guest *guest, const char *name, unsigned int flags);

/** The name of a snapshot; borrowed from it. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_snapshot_get_name(const instantsnap_snapshot *snapshot);

/** Frees a snapshot handle; the snapshot itself stays. NULL is fine. */
void instantsnap_snapshot_free(instantsnap_snapshot *snapshot);

/**
 * The driver's way in: for a program that owns QEMU's monitor, its locks and its event loop: a
 * driver like libvirt's, or a daemon that starts QEMU itself. It gives a table of callbacks, and
 * the library does with them what it does by a socket in instantsnap_open_qmp(). c-tests/daemon.c
 * is a whole program.
 *
 * Threads. Callbacks are made on the thread that called the library, or, for a job, on the job's
 * own thread, where every signal is blocked. For one operation there is one at a time, and of two
 * operations on one domain (one `opaque`, or one QEMU process) the second is refused; operations on
 * different domains, each with its own `opaque`, run side by side, and so do their callbacks. No
 * lock of the library is held during a callback: it may call any function, of other guests too, but
 * an operation that it begins on the same domain is refused as busy, and it must not wait for its
 * own.
 *
 * The driver's lock. With `lock` and `unlock`, every other callback is made with that lock held,
 * and it is not held at any other time: not while memory drains, nor between two callbacks.
 * qemuSnapshotCreateXML(), qemuSnapshotRevert() and qemuSnapshotDelete() are called with it held,
 * as libvirt's driver does, drop it at once and return with it held; all functions of this header
 * are called without it. The driver keeps the domain object itself alive for as long as the
 * operation.
 *
 * What callbacks return. 0 (or a pointer) is success, -1 (or NULL) failure;
 * instantsnap_driver_set_reason() gives the error's text. Strings that they return are the
 * library's, which frees them with free(). A callback that fails fails the operation, and
 * everything is undone as far as the callbacks let it: `resume`, or else `monitor` for `cont`, is
 * tried again for five minutes where it must be. Callbacks have `timeout_ms` and should come back
 * by then; nothing interrupts one that does not, but once it has come back the operation goes on as
 * if it had not answered. The drain is not waited for inside a callback.
 *
 * When the process is killed in the pause, its guest is resumed only if `guard_socket` is there.
 */
typedef enum instantsnap_driver_state {
    INSTANTSNAP_DRIVER_RUNNING = 1,
    INSTANTSNAP_DRIVER_PAUSED = 2,
    INSTANTSNAP_DRIVER_SHUTOFF = 3  /* there is no QEMU */
} instantsnap_driver_state;

/** A disk and the overlay that it is switched to. The strings are borrowed for the call. */
typedef struct instantsnap_driver_disk {
    size_t size;              /* sizeof(instantsnap_driver_disk) */
    const char *name;         /* `vda`, as in the domain's XML */
    const char *node;         /* the block node that the disk is on before the switch */
    const char *overlay_node; /* the overlay's node, which is there already (blockdev-add) */
    const char *overlay;      /* the overlay's file, absolute */
} instantsnap_driver_disk;

/** What a driver does. It is copied; all zeros but `size` and what is required is the default. */
typedef struct instantsnap_driver_ops {
    size_t size; /* set by the caller: sizeof(instantsnap_driver_ops) */

    /* Required. */

    /** Runs one QMP command: `command` is `{"execute": ..., "arguments": ...}` without an id; `fds` go with it (SCM_RIGHTS), stay the
     * library's, and are 0 or 1. Puts QEMU's reply into `*reply`: `{"return": ...}` or `{"error":
     * ...}`. */
    int (*monitor)(void *opaque, const char *command, const int *fds, size_t fd_count, unsigned int timeout_ms, char **reply);
    /** instantsnap_driver_state, or -1. */
    int (*state)(void *opaque);
    /** libvirt's `<domain>` as the domain is now. */
    char *(*domain_xml)(void *opaque);

    /* One of the two: where snapshots are recorded. */

    /** The domain's state directory, as in instantsnap_open_qmp(). */
    char *(*state_dir)(void *opaque);
    /** Records a complete snapshot, as the current one, by its `<domainsnapshot>`; with it come `forget`, and `snapshot_xml`, which
     * is NULL for a name that there is not; and, optional, `current_snapshot`, NULL where there is
     * none. Such snapshots are not listed or brought back by the library, and memory needs a file
     * in the snapshot's XML. */
    int (*record)(void *opaque, const char *name, const char *xml);
    int (*forget)(void *opaque, const char *name);
    char *(*snapshot_xml)(void *opaque, const char *name);
    char *(*current_snapshot)(void *opaque);

    /* Optional. Where it is NULL, it is done over the monitor, or not at all. */

    /** Stops, and starts, the vCPUs; returns when they have. */
    int (*pause)(void *opaque, unsigned int timeout_ms);
    int (*resume)(void *opaque, unsigned int timeout_ms);
    /** Switches all disks, or none (`transaction` of `blockdev-snapshot`), in the pause. `count` is 1 or more. A driver that does it
     * carries dirty bitmaps over itself; over the monitor, that is done. */
    int (*switch_disks)(void *opaque, const instantsnap_driver_disk *disks, size_t count, unsigned int timeout_ms);
    /** Is told, in an undo, that the disks are off these overlays again. */
    void (*disks_merged)(void *opaque, const instantsnap_driver_disk *disks, size_t count);
    /** Around every operation; what `begin_job` refuses fails with VIR_ERR_OPERATION_INVALID. */
    int (*begin_job)(void *opaque);
    void (*end_job)(void *opaque);
    /** Both or none; the two that the lock is not held for already. */
    void (*lock)(void *opaque);
    void (*unlock)(void *opaque);
    /** The path of a QMP socket of this QEMU that nobody else uses, for the watchdog process; NULL: there is none. */
    char *(*guard_socket)(void *opaque);
    /** For the qemuSnapshot functions: is told of the error with which one fails, as virReportError() would be. */
    void (*report_error)(void *opaque, int code, int domain, const char *message);
    /** The driver's own snapshot object for a name, which qemuSnapshotCreateXML() returns (`domain` is what that was given); without
     * it an instantsnap_snapshot is returned. NULL fails the call, though the snapshot is complete
     * and recorded. */
    void *(*make_snapshot)(void *opaque, void *domain, const char *name);
    /** The name of such an object. */
    char *(*snapshot_name)(void *opaque, void *snapshot);
    /** qemuSnapshotRevert(): ends QEMU, and starts another that waits with `-incoming defer`, on the plan's disks. The plan is borrowed
     * for the call. Without it reverting is VIR_ERR_OPERATION_UNSUPPORTED. */
    int (*restart)(void *opaque, const instantsnap_revert_plan *plan);
    /** For the qemuSnapshot functions: as by instantsnap_set_storage_hook(), with `vm` in its `opaque`'s place. It is copied with the
     * table, and called without the driver's lock. */
    const instantsnap_storage_hook *storage_hook;
} instantsnap_driver_ops;

/**
 * Makes a driver this process's own: from now on qemuSnapshotCreateXML(), qemuSnapshotRevert() and
 * qemuSnapshotDelete() with a `vm` that is neither NULL nor a guest of this library go to it,
 * whatever their flags, with `vm` as `opaque`.
 *
 * @ops  copied; NULL: there is no driver any more. Operations under way end by the one that they have begun with.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (what is required is not there), VIR_ERR_OPERATION_INVALID
 * (there is one). Does not block.
 */
int instantsnap_register_driver(const instantsnap_driver_ops *ops);

/**
 * Opens a domain by a driver's callbacks. All functions for guests of instantsnap_open_qmp() are
 * for this one too; jobs among them, which is how a daemon with one thread takes snapshots.
 *
 * @ops     copied.
 * @opaque  handed to the callbacks; one for each domain. It has to be valid until the guest is closed and its operations have ended.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_SYSTEM_ERROR (state directory), VIR_ERR_OPERATION_FAILED (`state_dir` failed). The domain
 * need not run yet. Calls `state_dir`, and blocks for as long as that.
 */
instantsnap_guest *instantsnap_open_driver(const instantsnap_driver_ops *ops, void *opaque);

/**
 * Says why a callback is about to fail: in a callback, on its thread. The text is copied, and
 * becomes part of the error. NULL is fine.
 */
void instantsnap_driver_set_reason(const char *reason);

/**
 * Passes an event of QEMU's on, JSON as QEMU sent it. None is needed: with STOP and RESUME the
 * pause is told by QEMU's own time stamps (`pause_from_events` of instantsnap_stats). Any thread
 * may call it, at any time; what belongs to no open domain, or is no event, is passed over. Does
 * not block.
 */
void instantsnap_driver_event(void *opaque, const char *event);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_H */
