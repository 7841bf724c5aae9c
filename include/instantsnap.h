/* SPDX-License-Identifier: LGPL-2.1-or-later */
/**
 * instantsnap.h: full snapshots of running QEMU guests, memory and disks, taken at the moment of
 * the call.
 *
 * The shortest useful program:
 *
 *     instantsnap_guest *guest = instantsnap_open_qmp("/run/vm/qmp.sock", NULL,
 *                                                     "/var/lib/vm/snapshots");
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
 * - Errors. A function that returns `int` returns 0 or more on success and -1 on failure. A
 *   function that returns a pointer returns NULL on failure. instantsnap_last_error() then gives
 *   the reason, with one of libvirt's error codes.
 * - Strings are NUL-terminated UTF-8. The library does not keep the strings that it is given; they
 *   stay the caller's. A `char *` that the library returns belongs to the caller, who frees it with
 *   instantsnap_free_string(). A `const char *` is borrowed: it is valid as long as the object that
 *   it was read from.
 * - Pointers. NULL where a value is required, a closed handle and a handle that the library did not
 *   create are VIR_ERR_INVALID_ARG errors, never a crash. A function that returns nothing leaves
 *   the error in instantsnap_last_error().
 * - Threads. Any thread may call any function; several threads may use one handle at the same time.
 *   Two operations that change the same guest do not wait for each other: the second fails at once
 *   with VIR_ERR_OPERATION_INVALID, also if the first belongs to another process (of the same
 *   network namespace).
 * - Units. All times and durations are microseconds of CLOCK_MONOTONIC, unless a name ends in
 *   `_ms`. All sizes are bytes.
 * - Structures that the caller provides start with `size`. The caller sets it to sizeof the
 *   structure before the call, so that a later version can add fields without breaking the ABI. If
 *   the structure is longer than this version knows, the library fills the rest with zeros. If it
 *   is too short, the call fails with VIR_ERR_INVALID_ARG. In a structure that the caller fills
 *   (options), fields that this version does not know must be zeros; else the call fails with
 *   VIR_ERR_INVALID_ARG.
 * - Signals and file descriptors. The library's threads block every signal. Every descriptor that
 *   the library opens is close-on-exec. The library neither installs signal handlers nor changes
 *   the umask or the working directory.
 * - pthread_cancel(). A thread is not cancelled while it is in the library or in a callback: it is
 *   cancelled at its next cancellation point after the call. A callback must not leave by
 *   pthread_exit() or longjmp().
 * - Processes. For the time of a snapshot the library starts one process in its own session, the
 *   watchdog: the program instantsnap-watchdog, or a fork of the caller if that program cannot be
 *   started. The program writes the guest's memory to its image, so that a caller that is stopped
 *   (SIGSTOP, a debugger) does not stop its guest. If the caller is stopped inside the pause, the
 *   watchdog resumes the guest one second after the pause limit, and the call fails when the caller
 *   goes on, unless QEMU had armed write tracking before. If the caller is killed during the
 *   snapshot, the watchdog resumes the guest, reads QEMU's memory stream to its end (QEMU 7.2 would
 *   freeze the guest otherwise), restores the migration settings, merges the overlays (except those
 *   that a driver's disks were switched to) and removes what the library made for the snapshot. An
 *   overlay that it cannot merge stays in use; the watchdog reports it to the machine's log
 *   (/dev/log). A watchdog that is killed is replaced by another one, which goes on where it was;
 *   if it was writing a sparse or zstd memory image, the snapshot fails. The watchdog raises no
 *   SIGCHLD, and no wait() of the caller returns it. It is in the caller's cgroup: if the whole
 *   cgroup is ended (by the end of a container, or systemd's KillMode=control-group), the watchdog
 *   ends too. INSTANTSNAP_WATCHDOG_CGROUP in the environment names the directory of another cgroup
 *   (v2), which the program enters; a fork does not. INSTANTSNAP_MEMORY_LAZY starts two processes of the
 *   same program in the same way, which serve a guest's memory, and end when all of it is in, or
 *   when QEMU ends.
 *
 *   The library runs `qemu-img` for instantsnap_snapshot_prepare_revert() and
 *   instantsnap_snapshot_delete(), and when QEMU itself ends during a snapshot. The build fixes
 *   where programs are; INSTANTSNAP_QEMU_IMG, INSTANTSNAP_VIRSH and INSTANTSNAP_XMLLINT in the
 *   environment name others, by absolute paths. A program that the build did not find is looked for
 *   in PATH. A process with more rights than its user (setuid, file capabilities) ignores these
 *   variables, and looks in /usr/bin, /bin, /usr/sbin and /sbin instead of PATH. Programs get a
 *   clean environment, without the caller's LD_PRELOAD and without INSTANTSNAP_ variables. They
 *   raise no SIGCHLD either, and no wait() of the caller returns them, so a caller may ignore
 *   SIGCHLD. If the library cannot learn how a program ended, it counts as failed.
 *
 *   A process that exits while a job is running leaves its guest as a killed process does: first
 *   wait for the job, or cancel it.
 * - fork(). A child has copies of the handles and none of the library's threads. The jobs stay the
 *   parent's: in the child every instantsnap_job_ function fails at once with
 *   VIR_ERR_OPERATION_INVALID and changes nothing. A guest handle through which the parent is
 *   taking a snapshot stays busy in the child for good; the child opens the guest again. As with
 *   malloc(), a child of a multi-threaded process that does not exec is safe only if no other
 *   thread was in the library at the time of the fork. Such a child keeps nothing of a snapshot
 *   alive: not the guest, not QEMU's monitor, not a name; and it does not delay the snapshot's end.
 * - dlclose(). The library stays loaded (it is linked with `-z nodelete`), its threads go on, and
 *   handles stay valid.
 * - POSIX record locks (fcntl F_SETLK). The caller loses its record locks on disk images, because
 *   the library opens and closes the images that it flushes and copies: the kernel drops a
 *   process's record locks on a file whenever the process closes that file.
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
 * <libvirt/libvirt.h> first, and gets the flags from there.
 *
 * | flag        | bit | rules                                          | by QMP          |
 * |-------------|-----|------------------------------------------------|-----------------|
 * | REDEFINE    | 0   | not with NO_METADATA, HALT, LIVE, INSTANT      | not implemented |
 * | CURRENT     | 1   | only with REDEFINE                             | not implemented |
 * | NO_METADATA | 2   | nothing is recorded in the state directory     | yes             |
 * | HALT        | 3   | the guest is ended when its memory is on disk  | yes             |
 * | DISK_ONLY   | 4   | not with INSTANT                               | not implemented |
 * | REUSE_EXT   | 5   | the overlays exist                             | yes             |
 * | QUIESCE     | 6   | only with DISK_ONLY                            | not implemented |
 * | ATOMIC      | 7   | every snapshot is atomic                       | yes             |
 * | LIVE        | 8   | active guest, external memory                  | with INSTANT    |
 * | VALIDATE    | 9   | the XML is checked against libvirt's schema    | not implemented |
 * | INSTANT     | 10  | only with LIVE; not with DISK_ONLY, REDEFINE   | yes             |
 *
 * A broken rule or an unknown bit is VIR_ERR_INVALID_ARG. A flag that is allowed but not
 * implemented is VIR_ERR_OPERATION_UNSUPPORTED, and the message names it. The library checks the
 * flags before it changes anything.
 *
 * For a domain of libvirt (instantsnap_open_libvirt()), a call without INSTANT is libvirt's own,
 * with all of libvirt's flags. With INSTANT, VALIDATE is supported too; it needs libvirt's schema
 * and xmllint.
 */
#ifndef LIBVIRT_DOMAIN_SNAPSHOT_H
enum {
    VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE = 1 << 0,    /* restore or alter metadata */
    VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT = 1 << 1,     /* with REDEFINE, make the snapshot current */
    VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA = 1 << 2, /* take the snapshot, do not record it */
    VIR_DOMAIN_SNAPSHOT_CREATE_HALT = 1 << 3,        /* end the guest afterwards */
    VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY = 1 << 4,   /* disks without memory */
    VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT = 1 << 5,   /* use overlay files that exist */
    VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE = 1 << 6,     /* freeze file systems by the guest agent */
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
/**
 * The snapshot is of the moment of the call. The guest runs on while its memory is being written.
 */
# define VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT (1 << 10)
#endif

/**
 * Error codes that this library gives, under libvirt's own names and numbers (virErrorNumber,
 * virErrorDomain). A program that also uses libvirt must include <libvirt/virterror.h> first, and
 * gets the codes from there.
 */
#ifndef LIBVIRT_VIRTERROR_H
enum {
    VIR_ERR_OK = 0,
    /* A reply or a file that makes no sense, or a defect of this library. */
    VIR_ERR_INTERNAL_ERROR = 1,
    /* No connection to the libvirt daemon. */
    VIR_ERR_NO_CONNECT = 5,
    /* A virDomainPtr that is not valid, or that is of another driver than libvirt's QEMU driver. */
    VIR_ERR_INVALID_DOMAIN = 7,
    /* A bad pointer, an unknown flag, or flags that exclude each other. */
    VIR_ERR_INVALID_ARG = 8,
    /* QEMU refused or failed; the message has QEMU's reason. */
    VIR_ERR_OPERATION_FAILED = 9,
    /* XML with an impossible value. */
    VIR_ERR_XML_ERROR = 27,
    /* The connection is read-only. */
    VIR_ERR_OPERATION_DENIED = 29,
    /* XML that is not well-formed, or a name that is not allowed. */
    VIR_ERR_XML_DETAIL = 35,
    /* A system call failed; the message has its errno's text. */
    VIR_ERR_SYSTEM_ERROR = 38,
    /* The connection to the libvirt daemon failed. */
    VIR_ERR_RPC = 39,
    /* The domain does not exist any more. */
    VIR_ERR_NO_DOMAIN = 42,
    /* Not possible in this state: the guest is busy, the snapshot's name exists already. */
    VIR_ERR_OPERATION_INVALID = 55,
    /* A disk, a file or a device makes it impossible. */
    VIR_ERR_CONFIG_UNSUPPORTED = 67,
    /* A deadline passed, and everything was undone. */
    VIR_ERR_OPERATION_TIMEOUT = 68,
    /* A snapshot whose metadata or memory image is damaged. */
    VIR_ERR_INVALID_DOMAIN_SNAPSHOT = 71,
    /* There is no snapshot of that name. */
    VIR_ERR_NO_DOMAIN_SNAPSHOT = 72,
    /* This QEMU or this host has no background snapshots. */
    VIR_ERR_ARGUMENT_UNSUPPORTED = 74,
    /* An image has changed since the snapshot: see VIR_DOMAIN_SNAPSHOT_REVERT_FORCE. */
    VIR_ERR_SNAPSHOT_REVERT_RISKY = 77,
    /* instantsnap_snapshot_cancel() or instantsnap_job_cancel() was called, all is undone. */
    VIR_ERR_OPERATION_ABORTED = 78,
    /* The guest agent does not answer. */
    VIR_ERR_AGENT_UNRESPONSIVE = 86,
    /* XML that does not conform to libvirt's schema (VALIDATE). */
    VIR_ERR_XML_INVALID_SCHEMA = 92,
    /* The daemon's access rules forbid it, or other users can write to the state directory. */
    VIR_ERR_ACCESS_DENIED = 88,
    /* Allowed, but this backend does not support it. */
    VIR_ERR_OPERATION_UNSUPPORTED = 84
};
enum { VIR_FROM_QEMU = 10 };
#endif

/** A guest. An instantsnap_open_ function opens it, instantsnap_close() closes it. */
typedef struct instantsnap_guest instantsnap_guest;
/**
 * A snapshot that qemuSnapshotCreateXML() returned for a guest of this library.
 * instantsnap_snapshot_free() frees it.
 */
typedef struct instantsnap_snapshot instantsnap_snapshot;
/**
 * A snapshot that is being taken. instantsnap_snapshot_create_start() starts it,
 * instantsnap_job_free() frees it.
 */
typedef struct instantsnap_job instantsnap_job;
/**
 * What a QEMU that continues a snapshot must be started with. instantsnap_revert_plan_free() frees
 * it.
 */
typedef struct instantsnap_revert_plan instantsnap_revert_plan;

/** Why the last failed call of this thread failed. */
typedef struct instantsnap_error {
    int code;            /* virErrorNumber: one of VIR_ERR_* */
    int domain;          /* virErrorDomain: VIR_FROM_QEMU */
    const char *message; /* never NULL; names the step, the object and what to do */
} instantsnap_error;

/**
 * How long each phase of a guest's last snapshot took. Durations are microseconds; 0 if the phase
 * was not reached. The phases follow each other without gaps, so their sum is `total_us`.
 */
typedef struct instantsnap_stats {
    size_t size;                /* set by the caller: sizeof(instantsnap_stats) */
    /* Checks of flags, XML, the guest's state and QEMU's capabilities; connecting. Guest runs. */
    uint64_t validate_us;
    /* Disks, names, the domain's XML. The guest runs. */
    uint64_t plan_us;
    /* Overlays created, memory image and pipe opened, capability set. The guest runs. */
    uint64_t prepare_us;
    /* The vCPUs are being stopped. */
    uint64_t pause_us;
    /* Disks switched to their overlays in one transaction; storage hook. The guest is paused. */
    uint64_t switch_us;
    /* Until write tracking is armed and the guest runs again (non-live: until memory is saved). */
    uint64_t arm_us;
    /* Memory flows into the image. The guest runs. 0 for a non-live snapshot. */
    uint64_t drain_us;
    /* The image is completed and synced to disk, the metadata recorded. The guest runs. */
    uint64_t finish_us;
    /* Everything is undone, after a failure. */
    uint64_t undo_us;
    /* The whole call. */
    uint64_t total_us;
    /* From the call's entry to the instant: from then on the caller may change the guest. */
    uint64_t instant_us;
    /* The pause of the guest, also if the snapshot failed; 0 if the guest was paused already. */
    uint64_t guest_paused_us;
    uint64_t memory_image_bytes; /* size of the memory image; if it is not raw, its space */
    /*
     * 1: guest_paused_us is from the time stamps of QEMU's STOP and RESUME events.
     * 0: it is from this process's clock around the commands, thus an upper bound.
     */
    uint32_t pause_from_events;
    uint32_t disks;              /* number of disks that were switched to an overlay */
    /* How long QEMU set up the background snapshot (it touches all memory), in whole ms. */
    uint64_t setup_us;
    /* How long lost tries paused the guest, in sum; not part of guest_paused_us. */
    uint64_t lost_pause_us;
    /* Tries to stop the guest just in time that came too late: instantsnap_set_overlap_tries(). */
    uint32_t lost_tries;
    /* 1: the guest ran while QEMU touched its memory (early start); 0: it was stopped before. */
    uint32_t overlapped;
    /* What would have taken over if this process had been killed: an instantsnap_watchdog. */
    uint32_t watchdog;
    /*
     * The format of the memory image, an instantsnap_image_format; INSTANTSNAP_IMAGE_DEFAULT until
     * it is known. It is INSTANTSNAP_IMAGE_RAW although another was asked for if QEMU's stream has,
     * before its first page, what this version does not know.
     */
    uint32_t image_format;
} instantsnap_stats;

/** What the watchdog of a snapshot was: see "Processes" above. */
typedef enum instantsnap_watchdog {
    INSTANTSNAP_WATCHDOG_NONE = 0,   /* no process could be started, or none was needed yet */
    INSTANTSNAP_WATCHDOG_FORK = 1,   /* a fork: the program was not found, or could not be started */
    INSTANTSNAP_WATCHDOG_PROGRAM = 2 /* the program instantsnap-watchdog */
} instantsnap_watchdog;

/** The phases of a snapshot, in order. The fields of instantsnap_stats describe them. */
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
 * The events of a snapshot that is being taken. PAUSED, SWITCHED and INSTANT come in this order,
 * each at most once. PROGRESS comes any number of times after INSTANT. Exactly one of COMPLETE and
 * FAILED comes last. FAILED can come in any phase, once everything has been undone.
 *
 * If the guest was paused already, there is no PAUSED. The memory of a non-live snapshot is saved
 * before its INSTANT, so its PROGRESS comes before INSTANT. The same holds for a paused guest where
 * QEMU cannot do it otherwise. A call that is refused at once, because of a pointer, its options or
 * a busy handle, has no events.
 */
typedef enum instantsnap_event_type {
    INSTANTSNAP_EVENT_PAUSED = 1,   /* the vCPUs have stopped */
    INSTANTSNAP_EVENT_SWITCHED = 2, /* the disks are on their overlays */
    /* Memory and disks are held. The guest runs again, if it ran before, and may be changed. */
    INSTANTSNAP_EVENT_INSTANT = 3,
    INSTANTSNAP_EVENT_PROGRESS = 4, /* memory flows into the image */
    INSTANTSNAP_EVENT_COMPLETE = 5, /* the snapshot is complete and on disk */
    INSTANTSNAP_EVENT_FAILED = 6    /* it failed or was cancelled, and everything is undone */
} instantsnap_event_type;

/** An event. Fields that do not apply to its type are 0. */
typedef struct instantsnap_event {
    /* If the caller provides the structure: set by the caller, sizeof(instantsnap_event). */
    size_t size;
    uint32_t type;             /* instantsnap_event_type */
    int32_t error_code;        /* FAILED: virErrorNumber */
    uint64_t time_us;          /* when it happened: CLOCK_MONOTONIC */
    /*
     * How long the guest has been paused so far. From INSTANT on this is the whole pause, by QEMU's
     * own time stamps if QEMU gives them. Before, it is by this process's clock, an upper bound.
     */
    uint64_t paused_us;
    /*
     * Size of the memory image so far. Of a sparse or zstd one it is the size that a raw one would
     * have, at COMPLETE too: instantsnap_stats.memory_image_bytes has the space that it takes.
     */
    uint64_t bytes_done;
    /*
     * The expected size of the memory image, likewise, at most; 0: not known. The devices' state, which comes
     * last and is small, is not counted. Pages of zeros take no room.
     */
    uint64_t bytes_total;
    uint64_t bytes_per_second; /* PROGRESS: since the last PROGRESS, or since the instant */
    uint64_t pages_left;       /* pages of guest memory that QEMU has not saved yet */
} instantsnap_event;

/** The state of a job. */
typedef struct instantsnap_job_info {
    size_t size;               /* set by the caller: sizeof(instantsnap_job_info) */
    uint32_t phase;            /* instantsnap_phase */
    uint32_t instant;          /* 1: the instant has passed */
    uint64_t elapsed_us;       /* from the call until now, or until the job's end */
    uint64_t paused_us;        /* as in instantsnap_event */
    /* These four are as in instantsnap_event, as of the last progress interval. */
    uint64_t bytes_done;
    uint64_t bytes_total;
    uint64_t bytes_per_second;
    uint64_t pages_left;
} instantsnap_job_info;

/**
 * Receives an event. The event is borrowed for the call. The library calls this on the thread that
 * takes the snapshot: the caller's for instantsnap_snapshot_create(), the job's own for a job,
 * where every signal is blocked. The calls for one snapshot come one at a time. The library holds
 * no lock during the call, so the callback may call any function of the library, with one
 * exception: instantsnap_job_wait() for the same job would wait for itself. PAUSED and SWITCHED
 * come inside the pause: the guest is paused until the callback returns, and the pause limit does
 * not interrupt the callback.
 *
 * The last call, with COMPLETE or FAILED, comes before instantsnap_snapshot_create() returns. For a
 * job it comes before instantsnap_job_wait() returns 1 and before instantsnap_job_next_event()
 * gives that event. From then on the library does not use `opaque` any more. During that last call,
 * instantsnap_job_get_result() and similar functions already give the job's result.
 */
typedef void (*instantsnap_event_callback)(const instantsnap_event *event, void *opaque);

enum {
    /**
     * instantsnap_snapshot_create_start() returns at once, before anything is done, instead of at
     * the instant.
     */
    INSTANTSNAP_CREATE_AT_ONCE = 1 << 0
};

/** How a memory image holds the guest's memory. */
typedef enum instantsnap_image_format {
    /* For a domain of a stock libvirt raw, otherwise sparse. */
    INSTANTSNAP_IMAGE_DEFAULT = 0,
    INSTANTSNAP_IMAGE_RAW = 1,     /* QEMU's stream as it comes. Every libvirt reads it */
    /*
     * Each page at a place of its own, pages of zeros as holes of the file: libvirt's format
     * "sparse", which libvirt 11.2 and later restores (virDomainRestore; not its own
     * virDomainRevertToSnapshot). For a domain of an older libvirt, of a QEMU before 9.0, or with
     * persistent memory (NVDIMM, virtio-pmem), under libvirt: VIR_ERR_CONFIG_UNSUPPORTED.
     */
    INSTANTSNAP_IMAGE_SPARSE = 2,
    /*
     * QEMU's stream, compressed while it comes, on the processors of this machine (eight threads at
     * most): libvirt's format "zstd", which libvirt 10.4 and later restores, by the program zstd.
     * For a domain of an older libvirt, or if that program is not installed:
     * VIR_ERR_CONFIG_UNSUPPORTED. Up to 64 MiB of the stream wait for the compression; if there are
     * more, the guest waits as soon as it writes to a page that is not saved yet.
     */
    INSTANTSNAP_IMAGE_ZSTD = 3
} instantsnap_image_format;

/** How a snapshot is taken. All zeros except `size` is the default. */
typedef struct instantsnap_create_options {
    size_t size;                         /* set by the caller: sizeof(instantsnap_create_options) */
    instantsnap_event_callback callback; /* receives the events; NULL: no callback */
    void *opaque;                        /* passed to the callback */
    /*
     * Time between two PROGRESS events, in milliseconds; 0: the default, 500. The library asks QEMU
     * once in each interval; without callback, instantsnap_snapshot_create() does not ask.
     */
    uint32_t progress_interval_ms;
    uint32_t flags;                      /* INSTANTSNAP_CREATE_*; other bits: VIR_ERR_INVALID_ARG */
    /* An instantsnap_image_format; others: VIR_ERR_INVALID_ARG. */
    uint32_t image_format;
    /*
     * How thoroughly INSTANTSNAP_IMAGE_ZSTD compresses: from 1, the fastest, to 19, which needs up
     * to 100 MiB for each thread; 0: the default, 3. VIR_ERR_INVALID_ARG for other levels, and for
     * a level with another format.
     */
    uint32_t zstd_level;
} instantsnap_create_options;

/** A disk that is left to a storage hook. The strings are borrowed for the call. */
typedef struct instantsnap_storage_disk {
    size_t size;         /* sizeof(instantsnap_storage_disk), as the library knows it */
    const char *name;    /* the disk's name: `vda`, a qdev id, a drive alias or a node name */
    /*
     * The disk's image or device, usually a path: as QEMU names it; for a domain of libvirt, as the
     * domain's XML names it.
     */
    const char *source;
    const char *format;  /* the format of that: "raw", "qcow2" */
} instantsnap_storage_disk;

/** What a storage hook is called for. Everything in it is borrowed for the call. */
typedef struct instantsnap_storage_call {
    size_t size;           /* sizeof(instantsnap_storage_call), as the library knows it */
    const char *snapshot;  /* the snapshot's name */
    /* The disks with snapshot='manual'. */
    const instantsnap_storage_disk *const *disks;
    size_t disk_count;     /* the number of these disks, 1 or more */
    uint64_t paused_us;    /* how long the guest has been paused so far; 0: it was paused already */
    uint64_t deadline_us;  /* for `snapshot`: how long it may take; else 0 */
} instantsnap_storage_call;

/**
 * The callbacks by which the caller's storage (LVM, Ceph, ZFS, a SAN) snapshots the disks that QEMU
 * does not, at the same instant as memory and the other disks. instantsnap_set_storage_hook() says
 * when each is called. The library holds no lock during a callback, so a callback may call any
 * function of the library, with one exception: if it waited for the job of the same snapshot, or
 * for another operation on the same guest, it would wait for itself. On the library's own threads
 * every signal is blocked.
 */
typedef struct instantsnap_storage_hook {
    size_t size;   /* set by the caller: sizeof(instantsnap_storage_hook) */
    void *opaque;  /* passed to the callbacks */
    /**
     * Snapshots the storage of all disks of the call, while the guest is paused. The disks are
     * flushed before: by QEMU, or, if QEMU was told not to flush a disk (`cache=unsafe`), by the
     * library, right before this call and within its time. If the library cannot open such a disk,
     * it refuses the snapshot (VIR_ERR_CONFIG_UNSUPPORTED).
     *
     * Returns 0 on success. Any other value is a failure, and the callback must leave nothing
     * behind: the snapshot fails with VIR_ERR_OPERATION_FAILED, and the message has the number.
     * Called on a thread of its own.
     */
    int (*snapshot)(const instantsnap_storage_call *call, void *opaque);
    /**
     * Removes what `snapshot` has made. If the guest's snapshot fails, the library calls this once,
     * with the same call, for each `snapshot` that returned 0 (in time or not). The guest is
     * running again by then. This is on the thread that takes the snapshot, before FAILED. The
     * library also calls it when instantsnap_snapshot_delete() has deleted the snapshot, on the
     * thread of that call. NULL: nothing is done.
     */
    void (*undo)(const instantsnap_storage_call *call, void *opaque);
    /**
     * For instantsnap_snapshot_prepare_revert_hooked(): names the image that a new QEMU uses for
     * each disk, in the disk's format. The continued guest writes to it, so this is what `snapshot`
     * has made, or better a writable copy or clone of it. `files` has room for one string for each
     * disk, all NULL at first. The callback sets each to a string from malloc(), strdup() or the
     * like; the library frees them with free(), also after a failure. Returns 0 on success; any
     * other value is a failure, and the callback must leave nothing behind. Called on the thread of
     * that call. NULL: this hook cannot bring back snapshots with such disks.
     */
    int (*revert)(const instantsnap_storage_call *call, char **files, void *opaque);
    /* How long `snapshot` may take, in milliseconds; 0: as long as the pause may (pause limit). */
    uint32_t deadline_ms;
    uint32_t reserved;    /* 0 */
} instantsnap_storage_hook;

/** How the memory of a snapshot comes back. */
typedef enum instantsnap_memory {
    /*
     * MAP if QEMU was started with the snapshot's memory image mapped, else FULL. The load says
     * which it was (instantsnap_load_stats). The library never falls back from one way to another:
     * what is not possible is an error.
     */
    INSTANTSNAP_MEMORY_AUTO = 0,
    /* All of it is written to QEMU before the guest runs: seconds for each few GiB. */
    INSTANTSNAP_MEMORY_FULL = 1,
    /*
     * The load returns when the guest runs, or is paused as it is to be, and the memory follows: a
     * page when the guest needs it, and all others in between. For guests by a QMP socket or a
     * driver, with anonymous memory, from a sparse image (instantsnap_image_convert()); QEMU needs
     * permission to use userfaultfd, as for an instant snapshot. A process of the library serves
     * the memory, and ends with it; the caller is not needed any more. See
     * instantsnap_memory_get_progress().
     */
    INSTANTSNAP_MEMORY_LAZY = 2,
    /*
     * QEMU was started with the memory image as its RAM, in private mappings, so the guest runs
     * within milliseconds whatever its size; the kernel reads a page when the guest needs it, and
     * clones of one snapshot share what they do not write. Needs QEMU 8.2 or later, an image of
     * the format INSTANTSNAP_IMAGE_SPARSE, and, to see what QEMU has really mapped, that this
     * process may read /proc/PID/maps and /proc/PID/fd of QEMU: else VIR_ERR_CONFIG_UNSUPPORTED, or
     * VIR_ERR_SYSTEM_ERROR.
     *
     * The guest needs the image as long as it runs. While it does, instantsnap_snapshot_delete() of
     * the snapshot is refused. The file may be renamed, removed or replaced, but must
     * never be written or cut off: the library makes complete images of a state directory
     * read-only, and converts an image by replacing its file. An I/O error in the image ends QEMU
     * (SIGBUS). An instant snapshot of such a guest is refused (VIR_ERR_ARGUMENT_UNSUPPORTED)
     * unless the image is on tmpfs; a non-live one is not. docs/clones.md says what else clones
     * must know.
     */
    INSTANTSNAP_MEMORY_MAP = 3
} instantsnap_memory;

/** How a revert is prepared. All zeros except `size` is the default. */
typedef struct instantsnap_revert_options {
    size_t size;           /* set by the caller: sizeof(instantsnap_revert_options) */
    const char *directory; /* as in instantsnap_snapshot_prepare_revert() */
    /* As in instantsnap_snapshot_prepare_revert_hooked(). */
    const instantsnap_storage_hook *hook;
    /* An instantsnap_memory; others: VIR_ERR_INVALID_ARG. AUTO: as FULL. */
    uint32_t memory;
    uint32_t reserved;     /* 0 */
} instantsnap_revert_options;

/** How a snapshot is loaded. All zeros except `size` is the default. */
typedef struct instantsnap_load_options {
    size_t size;       /* set by the caller: sizeof(instantsnap_load_options) */
    uint32_t memory;   /* an instantsnap_memory; others: VIR_ERR_INVALID_ARG */
    uint32_t reserved; /* 0 */
    /*
     * For INSTANTSNAP_MEMORY_LAZY: how many bytes in a second come that the guest has not asked
     * for. 0: as many as can be. What the guest asks for is never slowed. For another memory it
     * must be 0: VIR_ERR_INVALID_ARG.
     */
    uint64_t bandwidth;
} instantsnap_load_options;

/** How far the memory of a guest is that was loaded with INSTANTSNAP_MEMORY_LAZY. */
typedef struct instantsnap_memory_progress {
    size_t size;          /* set by the caller: sizeof(instantsnap_memory_progress) */
    uint64_t bytes_in;    /* the bytes of pages that are not zero and are in; 0: not known */
    uint64_t bytes_total; /* all bytes of such pages; 0: not known, or nothing comes */
    uint32_t coming;      /* 1: memory is still to come; 0: all is in */
    uint32_t reserved;
} instantsnap_memory_progress;

/**
 * What a load did. Durations are microseconds; they follow each other without gaps, and `total_us`
 * is their sum.
 */
typedef struct instantsnap_load_stats {
    size_t size;        /* set by the caller: sizeof(instantsnap_load_stats) */
    uint64_t check_us;  /* checks, before QEMU is told to load */
    uint64_t load_us;   /* until QEMU has loaded the snapshot */
    uint64_t finish_us; /* until the guest runs, if it is to run, and the snapshot is current */
    uint64_t total_us;  /* the whole call */
    uint32_t memory;    /* how memory came: an instantsnap_memory, never INSTANTSNAP_MEMORY_AUTO */
    uint32_t running;   /* 1: the guest runs; 0: it is paused */
} instantsnap_load_stats;

/** One memory backend of a revert plan. The plan owns the strings. */
typedef struct instantsnap_memory_backend {
    size_t size;        /* set by the caller: sizeof(instantsnap_memory_backend) */
    const char *id;     /* the id that the backend must have: the name of the RAM block */
    const char *file;   /* absolute path of the memory image, which must never be written */
    uint64_t offset;    /* where the pages of this backend begin in the file */
    uint64_t length;    /* the size of the backend, bytes */
    const char *object; /* the whole argument of QEMU's `-object` for it */
} instantsnap_memory_backend;

/** One disk of a revert plan. The strings are borrowed from the plan. */
typedef struct instantsnap_revert_disk {
    size_t size;         /* set by the caller: sizeof(instantsnap_revert_disk) */
    /* The disk's name in the snapshot: `vda`, a qdev id, a drive alias or a node name. */
    const char *name;
    /*
     * Absolute path of the image that this disk must use. It is fresh and belongs to this plan
     * alone. If a storage hook has named the image, it is the hook's path, unchanged.
     */
    const char *file;
    /*
     * The image's format: "qcow2"; "raw" for UEFI variables whose original is raw; the original's
     * format if a storage hook has named the image.
     */
    const char *format;
    /*
     * The snapshot's image below it, which must never be written again. NULL for UEFI variables,
     * and for an image that a storage hook has named.
     */
    const char *backing_file;
} instantsnap_revert_disk;

/** The library's version, "MAJOR.MINOR.PATCH". Static; never NULL. */
const char *instantsnap_version(void);

/**
 * Why the last failed call of this thread failed. Like errno, only calls that fail set it. Never
 * NULL: before the first failure the code is VIR_ERR_OK and the message is empty. Borrowed: valid
 * until this thread next calls another function of this library.
 */
const instantsnap_error *instantsnap_last_error(void);

/** Frees a string that this library returned as `char *`. NULL is allowed. */
void instantsnap_free_string(char *string);

/** Frees a list that instantsnap_snapshot_list() returned, with its strings. NULL is allowed. */
void instantsnap_free_string_list(char **strings);

/**
 * Opens a guest by its QMP socket. The caller itself has started QEMU.
 *
 * @qmp_socket  path of a Unix socket on which QEMU (6.0 or later) serves QMP: `-qmp
 *              unix:PATH,server=on,wait=off`. QEMU serves one client on each socket at a time, so
 *              this library needs a socket of its own. This call connects to it (to find errors
 *              early), and so does each operation; between operations the socket is free.
 * @domain_xml  the guest's libvirt `<domain>` XML, or NULL. With it, disks are named by their
 *              target (`vda`), and memory images contain it, with the disks' files as they are at
 *              the instant. A disk is found by its `<alias>`, else by its `<source>` file, else by
 *              a qdev id or drive name that equals the target.
 * @state_dir   an existing directory for the metadata of this guest's snapshots (one directory for
 *              one guest): one `<domainsnapshot>` file for each, and memory images for which the
 *              snapshot's XML names no file. Snapshots are taken, deleted and brought back only if
 *              the directory belongs to this user or to root, and no other user can write to it
 *              (the owner's private group may, and everyone if the directory is sticky, like /tmp),
 *              because the library merges and removes the files that its records name, with the
 *              caller's rights. Else these calls fail with VIR_ERR_ACCESS_DENIED; listing and
 *              reading work in any directory.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_XML_DETAIL or VIR_ERR_XML_ERROR (domain_xml), VIR_ERR_SYSTEM_ERROR (socket or directory),
 * VIR_ERR_OPERATION_TIMEOUT (another client uses the socket), VIR_ERR_OPERATION_FAILED (not a QMP
 * socket), VIR_ERR_CONFIG_UNSUPPORTED (QEMU older than 6.0). Blocks for a few milliseconds, at most
 * 5 seconds.
 */
instantsnap_guest *instantsnap_open_qmp(const char *qmp_socket, const char *domain_xml,
                                        const char *state_dir);

struct _virDomain; /* libvirt's: `virDomainPtr` is a pointer to it */

/**
 * Opens a domain of a stock libvirt: any unpatched daemon of libvirt 8.2 or later on this machine.
 *
 * @domain  a `virDomainPtr` of a connection to libvirt's QEMU driver: `qemu:///system`,
 *          `qemu:///session`, `qemu:///embed` or `qemu+unix:///...`. The library takes its own
 *          reference to the domain and to the connection; the caller may free its own.
 *
 * The library takes snapshots through libvirt and records them in libvirt:
 * instantsnap_snapshot_list() and similar functions give all snapshots that libvirt has of the
 * domain, also those of other clients. The differences to a guest of instantsnap_open_qmp():
 *
 * - The snapshot's XML must have `<memory snapshot='external' file='...'/>`.
 * - If the domain is paused, libvirt itself takes the snapshot, without INSTANT; it takes as long
 *   as libvirt takes.
 * - libvirt marks the domain as tainted (`custom-monitor`), because the library sends commands to
 *   QEMU past libvirt.
 * - qemuSnapshotRevert() of instantsnap-libvirt.h reverts. Deleting is as by qemuSnapshotDelete(),
 *   which says what is done.
 * - The caller must be able to create files beside the disk images, as root or as the user of a
 *   session.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_INVALID_DOMAIN, VIR_ERR_OPERATION_UNSUPPORTED (libvirt is absent or older; a remote
 * connection; another driver).
 */
instantsnap_guest *instantsnap_open_libvirt(struct _virDomain *domain);

/**
 * Closes a guest handle. NULL is allowed. The guest itself stays as it is. An operation of another
 * thread on this handle goes on to its end; this call does not wait for it.
 */
void instantsnap_close(instantsnap_guest *guest);

/**
 * Limits how long a snapshot may pause the guest. If the limit passes before the instant, the guest
 * resumes, everything is undone, and the call fails with VIR_ERR_OPERATION_TIMEOUT. A non-live
 * snapshot pauses the guest until its memory is written; for it the limit applies to the steps
 * before that.
 *
 * @milliseconds  1 or more; the default is 30000. Applies to calls that begin later.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_set_pause_limit(instantsnap_guest *guest, unsigned int milliseconds);

/**
 * Limits how often a snapshot tries to keep the size of the guest's memory out of the pause (early
 * start). Before a background snapshot is armed, QEMU touches all of the guest's memory. With QEMU
 * 10.0 or later the library starts this while the guest runs, and stops the guest shortly before
 * the estimated end. If the stop comes too late, the library notices before it does anything else:
 * the guest runs on, and the library tries again. After this number of lost tries it stops the
 * guest first, which takes longer and always works. Lost tries count towards the pause limit.
 *
 * @tries  how many tries may be lost; 0: the guest is always stopped first. The default is 3.
 *         Applies to calls that begin later.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_set_overlap_tries(instantsnap_guest *guest, unsigned int tries);

/**
 * Says whether a snapshot is refused if no watchdog can be started for it. By default it is taken
 * without one, and instantsnap_stats.watchdog says so: then this process must not be killed during
 * the snapshot. A watchdog that cannot enter the cgroup that INSTANTSNAP_WATCHDOG_CGROUP names does
 * not count.
 *
 * @required  1: the snapshot fails with VIR_ERR_OPERATION_FAILED, and everything is undone; 0: the
 *            default. Applies to calls that begin later.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_set_watchdog_required(instantsnap_guest *guest, unsigned int required);

/**
 * Sets the callbacks that snapshot the disks with snapshot='manual'. The snapshot's XML says which
 * disks these are; for disks that it does not mention, the domain's XML does. Without a hook, a
 * snapshot with such disks fails with VIR_ERR_OPERATION_UNSUPPORTED before anything is changed.
 *
 * The library calls hook->snapshot once, for all such disks, inside the pause, after the other
 * disks have been switched. The guest waits for it, but no longer than hook->deadline_ms and the
 * pause limit. When that time passes, or the snapshot is cancelled, the guest resumes, everything
 * is undone at once, and the snapshot fails with VIR_ERR_OPERATION_TIMEOUT
 * (VIR_ERR_OPERATION_ABORTED). The failing call returns only after the callback has returned, while
 * the guest runs, and after hook->undo, if that is due. If the process is killed during the
 * callback, the guest runs on, as in any other phase, and `undo` is not called.
 *
 * The disks are recorded with snapshot='manual'. For a domain of libvirt such a snapshot needs
 * VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA, because libvirt's own revert would combine old memory
 * with the disk's later content; without it the call fails with VIR_ERR_OPERATION_UNSUPPORTED. The
 * domain must be running. A snapshot without INSTANT is libvirt's own, which calls no hook.
 *
 * @hook  copied; NULL: no hook, as at first. Applies to calls that begin later. `opaque` must stay
 *        valid until the hook has been replaced or the guest closed, and every operation that began
 *        before that has ended.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (hook->snapshot is NULL, `reserved` is not 0).
 */
int instantsnap_set_storage_hook(instantsnap_guest *guest, const instantsnap_storage_hook *hook);

/**
 * Takes a full snapshot: memory and disks.
 *
 * @xml    libvirt's `<domainsnapshot>`. `<domainsnapshot/>` is enough. Then the snapshot's name is
 *         the time in seconds, every writable disk gets an overlay beside its image, named by
 *         libvirt's rule (`disk.qcow2`: `disk.NAME`), and memory goes to `STATE_DIR/NAME.mem`. The
 *         XML names disks by target, qdev id, drive alias, node name or the path of their image.
 *         Read-only and empty drives are left out. UEFI variables (pflash) are copied to
 *         `MEMORY_IMAGE.DRIVE.nvram`. Disks with snapshot='no' are left out; disks with
 *         snapshot='manual' are left to the hook of instantsnap_set_storage_hook().
 *
 *         If a disk's image is not a file (a block device; network storage), the XML must name its
 *         overlay. An overlay that the XML names (`<source file='...'/>`, or `<source dev='...'/>`
 *         with type='block') is a new file, or, by libvirt's rule, an existing empty file or a
 *         block device. These are formatted, and the device's former content is lost. The library
 *         never overwrites a file with content, nor anything that is in use or is an image of the
 *         guest or of one of its recorded snapshots. If the snapshot is undone, the empty file is
 *         empty again, and the device stays, without an overlay on it.
 *
 *         With REUSE_EXT the overlays are the caller's own qcow2 images (`qemu-img create -f qcow2
 *         -F FORMAT -b IMAGE OVERLAY`). They must stand on the disk's image, have the disk's size,
 *         and be empty. An undo leaves them as they are by then. Deleting a snapshot removes each
 *         overlay that is a file, and takes the qcow2 header off a device.
 * @flags  VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT for an instant
 *         snapshot; 0 for a non-live one, which pauses the guest until it is saved. See the table
 *         above.
 * @name   where to store the snapshot's name, for instantsnap_free_string(); may be NULL.
 *
 * Blocks until the snapshot is complete and on disk. The guest is paused as briefly as possible:
 * see instantsnap_get_stats(). A guest that is paused already stays paused; QEMU before 10.0 can
 * save such a guest only once until it has run again.
 *
 * Returns 0, or -1 with everything as it was before the call: VIR_ERR_INVALID_ARG (flags),
 * VIR_ERR_XML_DETAIL and VIR_ERR_XML_ERROR (xml), VIR_ERR_OPERATION_UNSUPPORTED (allowed, but not
 * implemented), VIR_ERR_ARGUMENT_UNSUPPORTED (no background snapshots: the message says why and
 * what to do), VIR_ERR_OPERATION_INVALID (the guest is busy, a disk has a block job, the state is
 * wrong, the name exists), VIR_ERR_CONFIG_UNSUPPORTED (a disk, file or device prevents it),
 * VIR_ERR_SYSTEM_ERROR (files), VIR_ERR_OPERATION_FAILED (QEMU's reason is in the message),
 * VIR_ERR_OPERATION_TIMEOUT, VIR_ERR_OPERATION_ABORTED. If something could not be undone, the
 * message ends with what is left and how to mend it; a cancelled snapshot then fails with
 * VIR_ERR_OPERATION_FAILED.
 */
int instantsnap_snapshot_create_xml(instantsnap_guest *guest, const char *xml, unsigned int flags,
                                    char **name);

/**
 * Like instantsnap_snapshot_create_xml(), with events: meanwhile the library calls the callback of
 * *options, on this thread.
 *
 * @options  NULL: the defaults. INSTANTSNAP_CREATE_AT_ONCE is VIR_ERR_INVALID_ARG here.
 */
int instantsnap_snapshot_create(instantsnap_guest *guest, const char *xml, unsigned int flags,
                                const instantsnap_create_options *options, char **name);

/**
 * Starts a full snapshot and returns at the instant: the caller may change the guest at once, while
 * a thread of the library still writes the guest's memory. Arguments, and errors up to the instant,
 * are those of instantsnap_snapshot_create_xml().
 *
 * With INSTANTSNAP_CREATE_AT_ONCE, which is meant for event loops, it returns as soon as the thread
 * has been started, without waiting for anything. Then this call reports only an error in a pointer
 * or in *options, and VIR_ERR_OPERATION_INVALID if a snapshot is being taken through the same
 * handle. The job reports all other errors.
 *
 * If a guest already has a job, a second one fails with VIR_ERR_OPERATION_INVALID and changes
 * nothing. The guest may be closed while the job is running. instantsnap_snapshot_cancel() and
 * instantsnap_get_stats() apply to a job's snapshot too.
 *
 * The instant of a non-live snapshot is when its memory has been saved. The same holds for a paused
 * guest where QEMU cannot do it otherwise.
 *
 * Returns the job, for instantsnap_job_free(), or NULL with everything as it was before the call.
 */
instantsnap_job *instantsnap_snapshot_create_start(instantsnap_guest *guest, const char *xml,
                                                   unsigned int flags,
                                                   const instantsnap_create_options *options);

/**
 * Waits until a job has ended.
 *
 * @timeout_ms  milliseconds; 0: does not wait; negative: without limit.
 *
 * Returns 1 when the job has ended, with success or with an error: instantsnap_job_get_result()
 * says which. Returns 0 when the time has passed, or -1: VIR_ERR_INVALID_ARG. In a forked child
 * every function of a job, this one too, fails with VIR_ERR_OPERATION_INVALID.
 */
int instantsnap_job_wait(instantsnap_job *job, int timeout_ms);

/**
 * The job's file descriptor for poll() and epoll: readable while instantsnap_job_next_event() has
 * an event to give. It belongs to the job and is valid until instantsnap_job_free(). The caller
 * must not read, write or close it. Remove it from an epoll set before that call: the job may go
 * on, and epoll would watch its descriptor still. Edge-triggered epoll reports every event. Returns
 * the descriptor, or -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_get_fd(instantsnap_job *job);

/**
 * Takes the oldest event that was not taken yet. Does not block. The last event is COMPLETE or
 * FAILED. A new PROGRESS event replaces one that was not taken. A callback receives every event
 * too, independently of this function.
 *
 * Fills *event (set event->size first) and returns 1; or returns 0 if there is no event now, or -1:
 * VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_next_event(instantsnap_job *job, instantsnap_event *event);

/** Fills *info (set info->size first). Does not block. Returns 0, or -1: VIR_ERR_INVALID_ARG. */
int instantsnap_job_get_info(instantsnap_job *job, instantsnap_job_info *info);

/**
 * The result of a job. Returns 0 if the snapshot is complete. Returns -1 if it failed, and sets the
 * last error to the reason, as instantsnap_snapshot_create_xml() would. Also returns -1 if the job
 * has not ended yet: VIR_ERR_OPERATION_INVALID; or for a bad pointer: VIR_ERR_INVALID_ARG. Does not
 * block.
 */
int instantsnap_job_get_result(instantsnap_job *job);

/**
 * The name of a complete job's snapshot, for instantsnap_free_string(). NULL: the error of
 * instantsnap_job_get_result().
 */
char *instantsnap_job_get_name(instantsnap_job *job);

/**
 * The `<domainsnapshot>` XML of a complete job's snapshot, for instantsnap_free_string(). It is
 * what was recorded when the snapshot was completed; for one that is not recorded (NO_METADATA),
 * what would have been. For a domain of libvirt the latter contains the domain's XML as it is in
 * the memory image, including passwords. Does not block. NULL: the error of
 * instantsnap_job_get_result().
 */
char *instantsnap_job_get_xml(instantsnap_job *job);

/**
 * Fills *stats (set stats->size first) once a job has ended. Returns 0, or -1:
 * VIR_ERR_OPERATION_INVALID (it has not ended yet), VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_get_stats(instantsnap_job *job, instantsnap_stats *stats);

/**
 * Cancels a job in any phase, as instantsnap_snapshot_cancel() does. Returns 0 at once. The job
 * ends when everything is undone, with VIR_ERR_OPERATION_ABORTED, unless it was complete already.
 * If something could not be undone, it ends with VIR_ERR_OPERATION_FAILED, whose message says what
 * is left. Returns -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_job_cancel(instantsnap_job *job);

/**
 * Frees a job. A job that has not ended goes on, and its callback still receives events, until it
 * ends: to end it, cancel it before. The guest may have been closed before. An epoll set that
 * contains the job's descriptor must drop it before. Does not block. NULL is allowed.
 */
void instantsnap_job_free(instantsnap_job *job);

/**
 * Cancels the snapshot that another thread is taking of this guest, in any phase. That thread's
 * call undoes everything and fails with VIR_ERR_OPERATION_ABORTED, unless the snapshot was complete
 * already. Background snapshots of QEMU before 10.0 cannot be cancelled safely: there the undo
 * takes until the rest of the memory has been read, while the guest runs. Returns 0 at once,
 * without waiting for the undo, or -1 with VIR_ERR_OPERATION_INVALID if no snapshot is being taken.
 */
int instantsnap_snapshot_cancel(instantsnap_guest *guest);

/**
 * Fills *stats for the last snapshot of this guest, complete or failed, through this handle. Set
 * stats->size first. Returns 0, or -1: VIR_ERR_INVALID_ARG, VIR_ERR_OPERATION_INVALID (none yet).
 */
int instantsnap_get_stats(instantsnap_guest *guest, instantsnap_stats *stats);

/**
 * Lists the names of the guest's recorded snapshots, oldest first.
 *
 * @names  where to store the NULL-terminated list, for instantsnap_free_string_list(); may be NULL,
 *         to count only.
 *
 * Returns how many there are, or -1: VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Only
 * reads files.
 */
int instantsnap_snapshot_list(instantsnap_guest *guest, char ***names);

/**
 * The `<domainsnapshot>` XML of a recorded snapshot: name, description, state, parent, creation
 * time, memory, disks with the files really used, domain. Returns it for instantsnap_free_string(),
 * or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Only
 * reads files.
 */
char *instantsnap_snapshot_get_xml(instantsnap_guest *guest, const char *name);

/**
 * The name of the current snapshot: the one that was last taken or loaded, the parent of the next
 * one. Returns it for instantsnap_free_string(), or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT if there is
 * none. Only reads files.
 */
char *instantsnap_snapshot_current(instantsnap_guest *guest);

/**
 * Brings a snapshot back, first step: creates a fresh overlay on each of its disk images (and a
 * private copy of its UEFI variables), and says what to start QEMU with. The snapshot stays as it
 * is, so this can be done any number of times, also while the original guest runs on. Needs
 * `qemu-img`.
 *
 * Then start QEMU with the machine of the original (same machine type, CPU, memory size and
 * devices), each disk on the file that the plan names, and `-incoming defer`; then call
 * instantsnap_snapshot_load().
 *
 * @state_dir  the state directory with which the snapshot was taken.
 * @name       the snapshot.
 * @directory  where the fresh images are created; NULL: beside each of the snapshot's images, which
 *             must be files (else VIR_ERR_CONFIG_UNSUPPORTED). They belong to the caller from now
 *             on: the continued guest writes to them.
 *
 * Returns the plan, or NULL with nothing left behind: VIR_ERR_NO_DOMAIN_SNAPSHOT,
 * VIR_ERR_INVALID_DOMAIN_SNAPSHOT (an image is missing; the memory image is incomplete, cut off or
 * damaged), VIR_ERR_ACCESS_DENIED (other users can write to @state_dir), VIR_ERR_SYSTEM_ERROR,
 * VIR_ERR_OPERATION_TIMEOUT (an image below is on a server that does not answer),
 * VIR_ERR_OPERATION_INVALID (a snapshot was interrupted that uses the same files, or whose journal
 * cannot be read, and something is left of it: see instantsnap_recover()),
 * VIR_ERR_OPERATION_FAILED.
 * Blocks for some 10 ms for each disk; for 30 s if a server does not answer.
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert(
    const char *state_dir, const char *name, const char *directory);

/**
 * The same for a snapshot with disks that were left to a storage hook: hook->revert names the
 * images for these disks, which are the last disks of the plan. The library puts no overlay on top
 * of them: the continued guest writes to them. Without a hook such a snapshot fails with
 * VIR_ERR_OPERATION_UNSUPPORTED, because old memory would meet a disk that has changed since.
 *
 * @hook  must have `size`, `opaque` and `revert`; NULL: as instantsnap_snapshot_prepare_revert().
 *        Called once, on this thread, after everything else has succeeded, without a time limit.
 *
 * Returns the plan, or NULL: as instantsnap_snapshot_prepare_revert(), and VIR_ERR_OPERATION_FAILED
 * if the hook fails. instantsnap_snapshot_load() cannot look into the caller's storage: for these
 * disks it only checks that they exist.
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert_hooked(
    const char *state_dir, const char *name, const char *directory,
    const instantsnap_storage_hook *hook);

/**
 * Prepares a revert with options.
 *
 * @options  NULL: the default, as instantsnap_snapshot_prepare_revert() with @directory NULL.
 *
 * Returns the plan, or NULL: as instantsnap_snapshot_prepare_revert_hooked(), and
 * VIR_ERR_CONFIG_UNSUPPORTED for INSTANTSNAP_MEMORY_MAP and INSTANTSNAP_MEMORY_LAZY if the image is
 * not sparse: convert it first (instantsnap_image_convert()).
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert_with(
    const char *state_dir, const char *name, const instantsnap_revert_options *options);

/** How many disks the plan has; 0 for a pointer that is not a plan. */
size_t instantsnap_revert_plan_disk_count(const instantsnap_revert_plan *plan);

/**
 * Fills *disk with disk number `index`, from 0. Set disk->size first. Returns 0, or -1:
 * VIR_ERR_INVALID_ARG.
 */
int instantsnap_revert_plan_get_disk(const instantsnap_revert_plan *plan, size_t index,
                                     instantsnap_revert_disk *disk);

/**
 * A QEMU that is to load with INSTANTSNAP_MEMORY_MAP must have each memory backend of the plan: one
 * `-object` each, with `-machine memory-backend=ID` if there is one, or, for a guest with NUMA
 * nodes or memory devices, where the original has a backend of that id (`-numa node,memdev=ID`).
 * These are the blocks of the guest's RAM; ROMs and the memory of devices come from the library.
 *
 * Returns how many there are: 0 unless the plan was made with INSTANTSNAP_MEMORY_MAP, and for a
 * pointer that is not a plan.
 */
size_t instantsnap_revert_plan_memory_backend_count(const instantsnap_revert_plan *plan);

/**
 * Fills *backend with memory backend number `index`, from 0. Set backend->size first. Returns 0, or
 * -1: VIR_ERR_INVALID_ARG.
 */
int instantsnap_revert_plan_get_memory_backend(const instantsnap_revert_plan *plan, size_t index,
                                               instantsnap_memory_backend *backend);

/** Absolute path of the memory image; borrowed from the plan. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_revert_plan_memory_file(const instantsnap_revert_plan *plan);

/**
 * The `<domain>` XML of the snapshot, with its disks on the snapshot's images; borrowed from the
 * plan. If the guest was opened without one, this is a short one, made of what QEMU reports. NULL:
 * VIR_ERR_INVALID_ARG.
 */
const char *instantsnap_revert_plan_domain_xml(const instantsnap_revert_plan *plan);

/** Frees a plan. The images that it names stay. NULL is allowed. */
void instantsnap_revert_plan_free(instantsnap_revert_plan *plan);

/**
 * Brings a snapshot back, second step: feeds its memory to a QEMU that was started as the plan
 * says, with `-incoming defer`.
 *
 * @guest  that QEMU, opened with the same state directory.
 * @name   the snapshot.
 * @flags  0: the guest runs if it ran at the instant, else it stays paused.
 *         VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING or VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED, not both: it
 *         runs, or stays paused. VIR_DOMAIN_SNAPSHOT_REVERT_FORCE: images that have changed are
 *         accepted.
 *
 * The snapshot becomes the current one. Before the library sends memory to QEMU, it compares each
 * of QEMU's disks with the snapshot's. A missing disk, a disk on another image, a disk that would
 * write to the snapshot's own image, and a machine type other than the snapshot's are
 * VIR_ERR_CONFIG_UNSUPPORTED. An image that was written or replaced since the snapshot froze it
 * (its inode, size or modification time has changed) would be newer than the memory:
 * VIR_ERR_SNAPSHOT_REVERT_RISKY. FORCE tells the library that such an image's content is the same,
 * as it is for a copy.
 *
 * Blocks until memory is loaded and, where asked, the guest runs. Returns 0, or -1:
 * VIR_ERR_INVALID_ARG, VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_INVALID_DOMAIN_SNAPSHOT (the memory
 * image is incomplete, cut off or damaged), VIR_ERR_ACCESS_DENIED (other users can write to the
 * state directory), VIR_ERR_OPERATION_INVALID (QEMU was not started with `-incoming defer`, or is
 * busy), VIR_ERR_OPERATION_FAILED (QEMU's reason). After a failure during the load that QEMU cannot
 * be used any more: end it, and start it again. VIR_DOMAIN_SNAPSHOT_REVERT_RESET_NVRAM is not
 * implemented: VIR_ERR_OPERATION_UNSUPPORTED.
 */
int instantsnap_snapshot_load(instantsnap_guest *guest, const char *name, unsigned int flags);

/**
 * The same with options: how the memory comes back.
 *
 * @options  NULL: the default, INSTANTSNAP_MEMORY_AUTO, as instantsnap_snapshot_load().
 * @stats    filled on success (set stats->size first); may be NULL.
 *
 * With INSTANTSNAP_MEMORY_MAP, also where AUTO has chosen it, each memory backend of QEMU that has
 * the id of one of the image's blocks must be on that block, privately and for reading only. The
 * library asks QEMU for the backends' properties and the kernel for what QEMU's process has mapped,
 * and writes down in the state directory, before QEMU gets a byte, that this process needs the
 * image. With the other ways, a QEMU that has mapped the image is refused.
 *
 * Returns 0, or -1: as instantsnap_snapshot_load(), VIR_ERR_OPERATION_UNSUPPORTED if the program is
 * missing that serves memory for INSTANTSNAP_MEMORY_LAZY, VIR_ERR_ARGUMENT_UNSUPPORTED if QEMU must
 * not use userfaultfd for it, VIR_ERR_CONFIG_UNSUPPORTED for a QEMU or an image with which this way
 * is not possible (the message names the backend and the property; nothing was loaded), and
 * VIR_ERR_INVALID_DOMAIN_SNAPSHOT for an image with old content where a page is zero.
 */
int instantsnap_snapshot_load_with(instantsnap_guest *guest, const char *name, unsigned int flags,
                                   const instantsnap_load_options *options,
                                   instantsnap_load_stats *stats);

/**
 * Says how far the memory of a guest is that was loaded with INSTANTSNAP_MEMORY_LAZY, by this
 * process or another one. For all other guests nothing is to come.
 *
 * While memory is coming, snapshots and deletes of this guest are refused with
 * VIR_ERR_OPERATION_INVALID, and so is the delete of the snapshot that it comes from. Other clients
 * cannot migrate or save the guest. When all is in, the library puts QEMU's migration settings
 * back: at once, or, if another client has the monitor then, in its next call on this guest.
 *
 * If the process that serves the memory is killed, its spare goes on. If both are killed, the guest
 * waits at the next page that is missing, and this call, or any other that needs the guest, starts
 * another one. It fails if QEMU's main thread waits for such a page itself: then the guest must be
 * ended and reverted again. What it has done since the revert is lost; the snapshot never is.
 *
 * @guest     any guest that was opened.
 * @progress  set progress->size first.
 *
 * Blocks for some queries. Returns 0, or -1: VIR_ERR_INVALID_ARG, VIR_ERR_OPERATION_INVALID
 * (another operation is under way), VIR_ERR_OPERATION_FAILED, VIR_ERR_OPERATION_TIMEOUT.
 */
int instantsnap_memory_get_progress(instantsnap_guest *guest,
                                    instantsnap_memory_progress *progress);

/**
 * Waits until all memory of a guest is in that was loaded with INSTANTSNAP_MEMORY_LAZY. Then
 * everything is possible again, and no process of the library's is left.
 *
 * @guest       any guest that was opened.
 * @timeout_ms  how long to wait at most, in milliseconds; negative: without limit.
 *
 * Returns 1 if all memory is in, 0 if the time has passed, or -1: as
 * instantsnap_memory_get_progress().
 */
int instantsnap_memory_wait(instantsnap_guest *guest, int timeout_ms);

/**
 * Deletes a snapshot. The guest loses nothing and is not paused: the library merges what the guest
 * has written since the snapshot into the images below, and the guest's disks are on those images
 * again afterwards. The snapshot's overlays, its memory image, its copies of UEFI variables and its
 * metadata are removed. If it was the current snapshot, its parent becomes the current one.
 *
 * @guest  the guest, running or paused, with its disks on the snapshot's overlays. If disks were
 *         left to a storage hook, the guest must have a hook: its `undo` is called last.
 * @name   the snapshot.
 * @flags  0: deletes the snapshot, which must have no children.
 *         VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY: removes only the metadata. All files stay as
 *         they are, the snapshot's children become children of its parent, and QEMU is not asked.
 *         VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN and _CHILDREN_ONLY exclude each other. For a snapshot
 *         without children the former is as 0, and the latter does nothing.
 *
 * Blocks until all is merged, which takes as long as it takes to write what the guest has written
 * since the snapshot; it cannot be cancelled. Dirty bitmaps that were added since the snapshot are
 * lost with its overlays.
 *
 * The images that instantsnap_snapshot_prepare_revert() created for this snapshot stand on the
 * images that are merged into, so they cannot be used afterwards. While a QEMU has one of them
 * open, QEMU refuses the merge, and nothing is changed. The same holds for images that the user has
 * created on top of the snapshot's.
 *
 * If the guest is not on the snapshot's overlays, because it was brought back to this snapshot or
 * to an older one, there is nothing to merge. Its disks stay on the images that they are on, and
 * the overlays are removed with what the abandoned guest had written there. An overlay that any
 * QEMU has open, or that another recorded snapshot stands on, is never removed.
 *
 * While a guest runs that was loaded with INSTANTSNAP_MEMORY_MAP, and so needs the memory image,
 * the snapshot is not deleted: the message names the process.
 *
 * Everything is checked before anything is changed. From the first merge on, the snapshot cannot be
 * reverted to any more, because its images take in younger data: its memory image is then called
 * `….deleting`, and a revert gives that reason. The disks are switched back only once all of them
 * can be. If the call fails after that, or its caller is killed, the guest goes on, the metadata
 * stays, and deleting the snapshot again does the rest; the message says on which image each disk
 * is. (If QEMU itself ends meanwhile, start it with those.)
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (flags), VIR_ERR_NO_DOMAIN_SNAPSHOT,
 * VIR_ERR_OPERATION_UNSUPPORTED (it has children; no hook), VIR_ERR_OPERATION_INVALID (the guest is
 * busy, another block job is running, a disk's images are not as they were recorded, or something
 * stands on them: the message names it and says what to do), VIR_ERR_CONFIG_UNSUPPORTED (a filter
 * on a disk), VIR_ERR_INVALID_DOMAIN_SNAPSHOT (damaged metadata), VIR_ERR_SYSTEM_ERROR,
 * VIR_ERR_OPERATION_FAILED (the reason of QEMU, or of `qemu-img`, which examines the images of the
 * other snapshots), VIR_ERR_OPERATION_TIMEOUT (no progress for a minute). For a domain of
 * instantsnap_open_libvirt() this is qemuSnapshotDelete(), which also deletes children.
 */
int instantsnap_snapshot_delete(instantsnap_guest *guest, const char *name, unsigned int flags);

/**
 * What is in a memory image, as JSON. A later version can add members.
 *
 *     {"format": "sparse", "domain": "vm", "machine": "pc-q35-10.0", "was_running": true,
 *      "file_bytes": 1090584576, "disk_bytes": 411041792,
 *      "blocks": [{"name": "pc.ram", "bytes": 1073741824, "data_pages": 99840,
 *                  "zero_pages": 162304}],
 *      "notes": {"checksums": true, "index": false, "written_first": 512}}
 *
 * `domain` is the name in the image's domain XML and `machine` the machine type that QEMU has
 * noted; each is null if there is none. `disk_bytes` is the space that the file takes on its disk.
 * `blocks` are QEMU's memory blocks; a page has 4096 bytes. `notes` is what the file of notes
 * beside the image has (see instantsnap_image_index()); null if there is none of this image.
 *
 * @path  the memory image: complete, raw, zstd or sparse.
 *
 * Reads all of a raw or zstd image, and of a sparse one everything but the pages of blocks of 64 MiB
 * and more. The image can be damaged, or made to do harm: that is an error. Returns the text for
 * instantsnap_free_string(), or NULL: VIR_ERR_INVALID_ARG, VIR_ERR_INVALID_DOMAIN_SNAPSHOT (the
 * image is missing, incomplete, compressed by another program than zstd, cut off or damaged),
 * VIR_ERR_SYSTEM_ERROR.
 */
char *instantsnap_image_info(const char *path);

/**
 * Checks a memory image as instantsnap_image_info() does: its header, the structure of QEMU's
 * stream, that no part of it is missing, and, in a sparse image, that each memory block, its pages
 * and its list of pages are where they can be. A zstd image is decompressed to its end, with its own
 * checksums.
 *
 * If there is a file of notes with checksums beside the image (see instantsnap_image_index()), reads
 * all pages, and checks their content against these. If the file of notes is damaged, or is not of
 * this image, that is an error too. The state of the devices is not checked.
 *
 * Returns 0, or -1: as instantsnap_image_info(). The message says where the damage is.
 */
int instantsnap_image_verify(const char *path);

/**
 * Reads an image to its end, and writes down beside it, in the file of notes `PATH.pages`, what is
 * found out of its pages:
 *
 * - checksums, for instantsnap_image_verify();
 * - of a raw image, where each page is, so that single pages can be read in any order;
 * - of a raw or zstd image, which pages the guest wrote first after the instant, because QEMU has
 *   saved these first. This is a hint. Such a list that is there already is kept.
 *
 * A snapshot that is taken with a sparse or zstd image has this file from the beginning; nothing is
 * noted of a raw one before this call. That of a new snapshot has mode 0600 and the image's owner;
 * one that this call or instantsnap_image_convert() writes has the image's mode, and its owner
 * where this process may set it. It goes with the image when the snapshot is deleted, and
 * instantsnap_image_convert() keeps all of it but the places. libvirt does not know it: if the image
 * is removed by other means, remove it too. An image is whole without it.
 *
 * @path   the memory image: complete, raw, zstd or sparse. Its snapshot must not be deleted
 *         meanwhile.
 * @flags  0.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG, VIR_ERR_INVALID_DOMAIN_SNAPSHOT (as
 * instantsnap_image_info()), VIR_ERR_CONFIG_UNSUPPORTED (a raw image with pages that are filled
 * with one byte, which no QEMU that is known writes, or whose pages are in more than 40 million
 * places), VIR_ERR_SYSTEM_ERROR (another file has the name `PATH.pages`, for example).
 */
int instantsnap_image_index(const char *path, unsigned int flags);

/**
 * Converts a memory image, in place: its snapshot can be reverted to as before. The new image is
 * written to a hidden file beside the old one (`.NAME.….converting`), synced to disk, and takes the
 * old one's name only then; if the call fails, the old one stays. If its caller is killed, the
 * hidden file stays too, and may be removed. A sparse image takes no space for pages of zeros. A
 * QEMU that has mapped the old image (INSTANTSNAP_MEMORY_MAP) runs on with that.
 *
 * The image keeps its domain XML, libvirt's cookie, its mode and, if this process may set it, its
 * owner. So it does with what is noted of its pages (see instantsnap_image_index()). An image that
 * has the format already stays as it is. libvirt's own revert (libvirt 9.9 and later) reads raw
 * images, and with libvirt 10.4 and later zstd ones; qemuSnapshotRevert() also reverts to sparse
 * ones with libvirt 11.2 and later. It refuses what the libvirt at hand cannot restore.
 *
 * @path    the memory image: complete, raw, zstd or sparse. Its snapshot must not be deleted
 *          meanwhile.
 * @format  INSTANTSNAP_IMAGE_RAW, INSTANTSNAP_IMAGE_ZSTD (compressed at the default level) or
 *          INSTANTSNAP_IMAGE_SPARSE.
 * @flags   0.
 *
 * Blocks until all is written. Returns 0, or -1: VIR_ERR_INVALID_ARG,
 * VIR_ERR_INVALID_DOMAIN_SNAPSHOT (as instantsnap_image_info()), VIR_ERR_CONFIG_UNSUPPORTED (a
 * stream that this version does not know, to be made sparse), VIR_ERR_OPERATION_INVALID (the image was
 * replaced or removed meanwhile), VIR_ERR_SYSTEM_ERROR.
 */
int instantsnap_image_convert(const char *path, unsigned int format, unsigned int flags);

/**
 * Recovers a guest whose snapshot was interrupted: the process that took it and its watchdog were
 * both killed. A journal in the state directory (`.NAME.journal`) says what the snapshot was making
 * and how far it was. A snapshot that is proved to be complete is recorded. Any other is undone:
 * the guest runs again if the snapshot had paused it, QEMU's migration settings are restored, the
 * overlays are merged into the images below, and the snapshot's files are removed. What cannot be
 * proved (a file that has taken the place of the snapshot's, an image that was written since) is
 * left as it is, and named. So is the image below an overlay if another snapshot needs it, or if
 * another image in its directory stands on it: then the guest goes on with its overlay.
 *
 * instantsnap_snapshot_create_xml() and the like, instantsnap_snapshot_load() and
 * instantsnap_snapshot_delete() do the same first, if there is a journal of this guest, or one of
 * another guest of the state directory whose files they would use; and so do
 * instantsnap_snapshot_prepare_revert() and, for domains of libvirt, qemuSnapshotRevert() and
 * qemuSnapshotDelete(). They fail with VIR_ERR_OPERATION_INVALID, and change
 * nothing else, if something is left that has to be decided on. When that is settled, call this
 * function again, or remove the journal. What they recover is written to the machine's log.
 *
 * A snapshot that a storage hook may have made is named, and does not block: when you have looked
 * for it, remove the journal. A journal of another host, or of another guest, is named and left.
 *
 * If QEMU has ended too (the host has lost its power), and before the guest is started again:
 * instantsnap_recover_offline().
 *
 * The journal of a domain of libvirt is in a directory of the user who takes the snapshot:
 * `libvirt/.UUID.journal` below the directory that INSTANTSNAP_STATE_DIRECTORY in the environment
 * names, else below /var/lib/instantsnap for root and below `$XDG_STATE_HOME/instantsnap` (or
 * `~/.local/state/instantsnap`) for others. So call this function as that user. A directory that
 * cannot be created is an error only if the variable names it. The domain may be shut off. A
 * snapshot that is undone is removed from libvirt's list, and the definition of a domain that is
 * shut off is put back on its images. If another client has changed the disks' images since, they
 * are left.
 *
 * For a driver without a state directory, and where no journal could be kept, this function restores
 * only the migration settings that an interrupted snapshot has left in QEMU.
 *
 * @report  where to store what was found, for instantsnap_free_string(); may be NULL. It is JSON:
 *          an array with an object for each thing that was found, with the members
 *          - `snapshot`: the name of the snapshot, "" if it is not known;
 *          - `what`: "snapshot", "guest", "settings", "overlay", "memory", "firmware" (a copy of
 *            UEFI variables) or "storage" (a disk that was left to the storage hook);
 *          - `object`: a path, a name or a word;
 *          - `action`: "finished", "undone" or "left";
 *          - `why`: for people;
 *          - `blocks`: true if the guest's next operation is refused until this is settled.
 *          A later version may add members and words.
 *
 * Blocks until the overlays are merged. Returns how many things were found, 0 if no snapshot was
 * interrupted, or -1: VIR_ERR_OPERATION_INVALID (a snapshot is under way: its process, its watchdog
 * or a child that its process has forked is alive), VIR_ERR_ACCESS_DENIED, VIR_ERR_SYSTEM_ERROR,
 * VIR_ERR_OPERATION_FAILED (QEMU's reason is in the message). After a failure it can be called
 * again.
 */
int instantsnap_recover(instantsnap_guest *guest, char **report);

/**
 * Like instantsnap_recover(), for a guest whose QEMU has ended. The guest must not be started again
 * before: without what is in the overlays, its disks would lack its last writes. `qemu-img` merges
 * the overlays, if nothing has written to the images below since. Otherwise they are left. So they
 * are if the images are no regular files, and if a driver had opened the guest
 * (instantsnap_open_driver()): its record of the disks may name the overlays, and only the driver
 * can change that. If QEMU still runs, everything is left. A call that is interrupted can be
 * repeated. A domain of libvirt that is shut off is recovered by instantsnap_recover().
 *
 * @state_dir  the guest's state directory, as for instantsnap_open_qmp().
 * @report     as for instantsnap_recover().
 *
 * Returns what instantsnap_recover() returns.
 */
int instantsnap_recover_offline(const char *state_dir, char **report);

/**
 * Examines whether instant snapshots work, and says what to do where they do not. Changes nothing
 * (but libvirt marks a domain that is examined as tainted: instantsnap_open_libvirt()). The checks
 * are those that a snapshot makes itself, and some that QEMU makes in the middle of one. One that
 * cannot be made (a QEMU whose process cannot be seen, a libvirt that does not run) is skipped, and
 * the report says so.
 *
 * @guest   the guest to examine; NULL: this host, for QEMUs of this user and of libvirt. A guest
 *          that another operation holds is not examined: that is a finding.
 * @report  where to store the findings, for instantsnap_free_string(); may be NULL. It is JSON: an
 *          array with an object for each check, with the members
 *          - `check`: "kernel", "userfaultfd", "watchdog", "qemu-img", "libvirt", "guest", "qemu",
 *            "settings", "memory" (other processes that write it), "pages", "disk", "jobs", "room",
 *            "confinement" or "leftovers" (of snapshots that were interrupted);
 *          - `verdict`: "pass"; "warn", if snapshots work, but may fail in some case or could be
 *            better; "fail", if they do not work; or "skip";
 *          - `object`: the disk, user, path or version that was checked; "" if there is only one;
 *          - `message`: for people;
 *          - `remedy`: the command or the change that helps; "" if the message says it, or if
 *            nothing need be done.
 *          A later version may add checks and members.
 *
 * Blocks while QEMU answers, up to 30 seconds for each query. Returns how many checks failed, 0 if
 * none did, or -1: VIR_ERR_INVALID_ARG (a closed handle).
 */
int instantsnap_doctor(instantsnap_guest *guest, char **report);

/** The name of a snapshot; borrowed from it. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_snapshot_get_name(const instantsnap_snapshot *snapshot);

/** Frees a snapshot handle; the snapshot itself stays. NULL is allowed. */
void instantsnap_snapshot_free(instantsnap_snapshot *snapshot);

/**
 * The driver backend: for a program that owns QEMU's monitor, its locks and its event loop, such as
 * a driver like libvirt's or a daemon that starts QEMU itself. The program gives the library a
 * table of callbacks. With these the library does what it does by a socket in
 * instantsnap_open_qmp(). examples/daemon.c is a whole program.
 *
 * Threads. The library calls back on the thread that called it, or, for a job, on the job's own
 * thread, where every signal is blocked. The callbacks of one operation come one at a time. Of two
 * operations on one domain (one `opaque`, or one QEMU process) the second is refused. Operations on
 * different domains, each with its own `opaque`, run side by side, and so do their callbacks. The
 * library holds no lock of its own during a callback: the callback may call any function, also for
 * other guests. But an operation that it begins on the same domain is refused as busy, and it must
 * not wait for the operation that it was called for.
 *
 * The driver's lock. With `lock` and `unlock`, the library makes every other callback with that
 * lock held, and does not hold it at any other time: not while memory drains, nor between two
 * callbacks. qemuSnapshotCreateXML(), qemuSnapshotRevert() and qemuSnapshotDelete() are called with
 * the lock held, as libvirt's driver does; they drop it at once and return with it held. All
 * functions of this header are called without it. The driver keeps the domain object itself alive
 * for as long as the operation.
 *
 * Results of callbacks. 0 (or a pointer) is success, -1 (or NULL) is failure;
 * instantsnap_driver_set_reason() sets the error's text. The library owns the strings that
 * callbacks return, and frees them with free(). If a callback fails, the operation fails, and
 * everything is undone as far as the callbacks permit: where the guest must be resumed, the library
 * retries `resume`, or else `monitor` with `cont`, for five minutes. A callback gets `timeout_ms`
 * and should return within that time. Nothing interrupts one that does not, but once it has
 * returned, the operation goes on as if the callback had not answered. The library does not wait
 * for the drain inside a callback.
 *
 * If the process is killed in the pause, its guest is resumed only if `guard_socket` is set.
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
    const char *overlay_node; /* the overlay's node, which exists already (blockdev-add) */
    const char *overlay;      /* the overlay's file, absolute */
} instantsnap_driver_disk;

/**
 * A driver's callbacks. The library copies the table. All zeros, except `size` and the required
 * callbacks, is the default.
 */
typedef struct instantsnap_driver_ops {
    size_t size; /* set by the caller: sizeof(instantsnap_driver_ops) */

    /* Required. */

    /**
     * Runs one QMP command. `command` is `{"execute": ..., "arguments": ...}` without an id. `fds`
     * has no or one descriptor, to be passed along (SCM_RIGHTS); it stays the library's. Stores
     * QEMU's reply in `*reply`: `{"return": ...}` or `{"error": ...}`.
     */
    int (*monitor)(void *opaque, const char *command, const int *fds, size_t fd_count,
                   unsigned int timeout_ms, char **reply);
    /** Returns an instantsnap_driver_state, or -1. */
    int (*state)(void *opaque);
    /** Returns libvirt's `<domain>` XML of the domain as it is now. */
    char *(*domain_xml)(void *opaque);

    /* Where snapshots are recorded: one of `state_dir` and `record` is required. */

    /** Returns the domain's state directory, as in instantsnap_open_qmp(). */
    char *(*state_dir)(void *opaque);
    /**
     * Records a complete snapshot, as the current one, by its `<domainsnapshot>` XML. It requires
     * `forget`, and `snapshot_xml`, which returns NULL for an unknown name. `current_snapshot` is
     * optional; it returns NULL if there is no current snapshot. The library does not list such
     * snapshots and does not bring them back, and their XML must name a file for the memory.
     */
    int (*record)(void *opaque, const char *name, const char *xml);
    int (*forget)(void *opaque, const char *name);
    char *(*snapshot_xml)(void *opaque, const char *name);
    char *(*current_snapshot)(void *opaque);

    /* Optional. If one is NULL, the library uses the monitor instead, or leaves the step out. */

    /** Stop and start the vCPUs. They return when the vCPUs have stopped or started. */
    int (*pause)(void *opaque, unsigned int timeout_ms);
    int (*resume)(void *opaque, unsigned int timeout_ms);
    /**
     * Switches all disks, or none, in the pause (`transaction` of `blockdev-snapshot`). `count` is
     * 1 or more. This callback must also carry dirty bitmaps over to the overlays; without this
     * callback, the library does that over the monitor.
     */
    int (*switch_disks)(void *opaque, const instantsnap_driver_disk *disks, size_t count,
                        unsigned int timeout_ms);
    /** Reports, during an undo, that the disks are off these overlays again. */
    void (*disks_merged)(void *opaque, const instantsnap_driver_disk *disks, size_t count);
    /**
     * Called at the begin and the end of every operation. If `begin_job` refuses, the operation
     * fails with VIR_ERR_OPERATION_INVALID.
     */
    int (*begin_job)(void *opaque);
    void (*end_job)(void *opaque);
    /** Take and drop the driver's lock; both or none. These two are called without the lock. */
    void (*lock)(void *opaque);
    void (*unlock)(void *opaque);
    /**
     * Returns the path of a QMP socket of this QEMU that no other client uses, for the watchdog
     * process; NULL: there is none.
     */
    char *(*guard_socket)(void *opaque);
    /**
     * For the qemuSnapshot functions: reports the error with which one of them fails, as
     * virReportError() would.
     */
    void (*report_error)(void *opaque, int code, int domain, const char *message);
    /**
     * Returns the driver's own snapshot object for a name, which qemuSnapshotCreateXML() then
     * returns. `domain` is the one that qemuSnapshotCreateXML() was given. Without this callback it
     * returns an instantsnap_snapshot. If this returns NULL, the call fails, though the snapshot is
     * complete and recorded.
     */
    void *(*make_snapshot)(void *opaque, void *domain, const char *name);
    /** Returns the name of such an object. */
    char *(*snapshot_name)(void *opaque, void *snapshot);
    /**
     * For qemuSnapshotRevert(): ends QEMU, and starts another on the plan's disks that waits with
     * `-incoming defer`. The plan is borrowed for the call. Without this callback a revert is
     * VIR_ERR_OPERATION_UNSUPPORTED.
     */
    int (*restart)(void *opaque, const instantsnap_revert_plan *plan);
    /**
     * For the qemuSnapshot functions: the storage hook, as by instantsnap_set_storage_hook(); its
     * callbacks get `vm` instead of its `opaque`. It is copied with the table, and called without
     * the driver's lock.
     */
    const instantsnap_storage_hook *storage_hook;
} instantsnap_driver_ops;

/**
 * Registers a driver for this process. From now on qemuSnapshotCreateXML(), qemuSnapshotRevert()
 * and qemuSnapshotDelete() use it for every `vm` that is neither NULL nor a guest of this library,
 * whatever the flags, and pass `vm` as `opaque`.
 *
 * @ops  copied; NULL: unregisters the driver. Operations that have begun end with the driver that
 *       they began with.
 *
 * Returns 0, or -1: VIR_ERR_INVALID_ARG (a required callback is missing), VIR_ERR_OPERATION_INVALID
 * (a driver is registered already). Does not block.
 */
int instantsnap_register_driver(const instantsnap_driver_ops *ops);

/**
 * Opens a domain by a driver's callbacks. All functions for guests of instantsnap_open_qmp() work
 * for this one too. This includes jobs, by which a daemon with one thread takes snapshots.
 *
 * @ops     copied.
 * @opaque  passed to the callbacks; a different one for each domain. It must stay valid until the
 *          guest is closed and its operations have ended.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG,
 * VIR_ERR_SYSTEM_ERROR (state directory), VIR_ERR_OPERATION_FAILED (`state_dir` failed). The domain
 * need not run yet. Calls `state_dir`, and blocks for as long as that.
 */
instantsnap_guest *instantsnap_open_driver(const instantsnap_driver_ops *ops, void *opaque);

/**
 * Sets the reason why a callback is about to fail: call it in that callback, on its thread. The
 * text is copied, and becomes part of the error. NULL is allowed.
 */
void instantsnap_driver_set_reason(const char *reason);

/**
 * Passes on an event of QEMU: JSON as QEMU sent it. No event is required. With STOP and RESUME the
 * library measures the pause by QEMU's own time stamps (`pause_from_events` of instantsnap_stats).
 * Any thread may call this at any time. Text that is not an event, or is for a domain that is not
 * open, is ignored. Does not block.
 */
void instantsnap_driver_event(void *opaque, const char *event);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_H */
