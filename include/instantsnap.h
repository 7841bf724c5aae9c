/* SPDX-License-Identifier: LGPL-2.1-or-later */
/**
 * instantsnap.h: full snapshots of running QEMU guests, memory and disks, taken at the moment of the call.
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
 * - Errors. A function that returns `int` returns 0 or more on success and -1 on failure; one that returns a
 *   pointer returns NULL on failure. instantsnap_last_error() then says why, with libvirt's error codes.
 * - Strings are NUL-terminated UTF-8. Arguments stay the caller's and are not kept. A `char *` that the library
 *   returns is the caller's, to be given back with instantsnap_free_string(). A `const char *` is borrowed: it
 *   lives as long as the object it was read from.
 * - Pointers. NULL where a value is required, a closed handle and a handle that is not ours are
 *   VIR_ERR_INVALID_ARG errors, never a crash. Functions without a result leave them as the last error.
 * - Threads. Every function may be called from any thread, also on one handle from several threads at once. Two
 *   operations that change the same guest do not wait for each other: the second fails at once with
 *   VIR_ERR_OPERATION_INVALID, also where it is another process's (of the same network namespace).
 * - Time. All durations are microseconds of CLOCK_MONOTONIC, all sizes are bytes.
 * - Structures that the caller provides start with `size`, to be set to sizeof the structure before the call, so
 *   that a later version can add fields without breaking the ABI: a size that this version knows nothing of is filled
 *   up with zeros, one too small is VIR_ERR_INVALID_ARG.
 * - Signals and file descriptors. Threads of the library block every signal; every descriptor it opens is
 *   close-on-exec. It neither installs signal handlers nor changes the umask or the working directory.
 * - Processes. A snapshot forks one process of its own session, the guard, which ends with the call. Should the caller
 *   be killed before that, the guard resumes the guest, takes QEMU's memory stream to its end (QEMU 7.2 would freeze
 *   the guest otherwise) and puts the migration settings back. The overlays stay in use then, and the memory image is
 *   marked incomplete. The guard raises no SIGCHLD, and no wait() of the caller's sees it. It is in the caller's cgroup:
 *   what ends all of that (a container's end, systemd's KillMode=control-group) ends it too. `qemu-img` is run for
 *   instantsnap_snapshot_prepare_revert(), and where QEMU itself ends during a snapshot.
 * - POSIX record locks (fcntl F_SETLK) that the caller holds on disk images are lost, as a process loses them whenever it
 *   closes a file: the library opens and closes the images that it flushes and copies.
 */
#ifndef INSTANTSNAP_H
#define INSTANTSNAP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * Flags, under libvirt's own names. A program that also uses libvirt must include <libvirt/libvirt.h> first, and has
 * them from there.
 *
 * | flag        | bit | rules                                                     | by QMP       |
 * |-------------|-----|-----------------------------------------------------------|--------------|
 * | REDEFINE    | 0   | not with NO_METADATA, HALT, LIVE, INSTANT                 | not built    |
 * | CURRENT     | 1   | only with REDEFINE                                        | not built    |
 * | NO_METADATA | 2   | nothing is recorded in the state directory                | yes          |
 * | HALT        | 3   | the guest is ended when its memory is on disk             | yes          |
 * | DISK_ONLY   | 4   | not with INSTANT                                          | not built    |
 * | REUSE_EXT   | 5   | the overlay files exist                                   | not built    |
 * | QUIESCE     | 6   | only with DISK_ONLY                                       | not built    |
 * | ATOMIC      | 7   | always so                                                 | yes          |
 * | LIVE        | 8   | active guest, external memory                             | with INSTANT |
 * | VALIDATE    | 9   | XML against libvirt's schema                              | not built    |
 * | INSTANT     | 10  | only with LIVE; not with DISK_ONLY, REDEFINE              | yes          |
 *
 * A broken rule or an unknown bit is VIR_ERR_INVALID_ARG; a flag that is allowed but not built yet is
 * VIR_ERR_OPERATION_UNSUPPORTED, and the message names it. Flags are checked before anything is touched.
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
 * Error codes that this library gives, under libvirt's own names and numbers (virErrorNumber, virErrorDomain).
 * A program that also uses libvirt must include <libvirt/virterror.h> first, and has them from there.
 */
#ifndef LIBVIRT_VIRTERROR_H
enum {
    VIR_ERR_OK = 0,
    VIR_ERR_INTERNAL_ERROR = 1,           /* a reply or a file that makes no sense, a defect of ours */
    VIR_ERR_INVALID_ARG = 8,              /* a bad pointer, an unknown flag, flags that exclude each other */
    VIR_ERR_OPERATION_FAILED = 9,         /* QEMU refused or failed; the message has its reason */
    VIR_ERR_XML_ERROR = 27,               /* XML with a value that cannot be */
    VIR_ERR_XML_DETAIL = 35,              /* XML that is not well-formed, a name that may not be */
    VIR_ERR_SYSTEM_ERROR = 38,            /* a system call failed; the message has its errno's text */
    VIR_ERR_OPERATION_INVALID = 55,       /* not in this state: a guest that is busy, a name that exists */
    VIR_ERR_CONFIG_UNSUPPORTED = 67,      /* a disk, a file or a device with which it cannot be done */
    VIR_ERR_OPERATION_TIMEOUT = 68,       /* a deadline passed, and everything was undone */
    VIR_ERR_INVALID_DOMAIN_SNAPSHOT = 71, /* a snapshot whose metadata or memory image is damaged */
    VIR_ERR_NO_DOMAIN_SNAPSHOT = 72,      /* no snapshot of that name */
    VIR_ERR_ARGUMENT_UNSUPPORTED = 74,    /* this QEMU or this host has no background snapshots */
    VIR_ERR_OPERATION_ABORTED = 78,       /* cancelled by instantsnap_snapshot_cancel() */
    VIR_ERR_OPERATION_UNSUPPORTED = 84    /* allowed, but this way in cannot do it */
};
enum { VIR_FROM_QEMU = 10 };
#endif

/** A guest, opened by one of the instantsnap_open_ functions, closed by instantsnap_close(). */
typedef struct instantsnap_guest instantsnap_guest;
/** A snapshot, as qemuSnapshotCreateXML() returns it for a guest of ours; freed by instantsnap_snapshot_free(). */
typedef struct instantsnap_snapshot instantsnap_snapshot;
/** What a QEMU that is to continue a snapshot must be started with; freed by instantsnap_revert_plan_free(). */
typedef struct instantsnap_revert_plan instantsnap_revert_plan;

/** Why the last failed call of this thread failed. */
typedef struct instantsnap_error {
    int code;            /* virErrorNumber: one of VIR_ERR_* */
    int domain;          /* virErrorDomain: VIR_FROM_QEMU */
    const char *message; /* never NULL; names the step, the object and what to do */
} instantsnap_error;

/**
 * What the last snapshot of a guest took. Durations are microseconds; 0 where a phase was not reached. The phases
 * follow each other without gaps, so that their sum is `total_us`.
 */
typedef struct instantsnap_stats {
    size_t size;            /* set by the caller: sizeof(instantsnap_stats) */
    uint64_t validate_us;   /* flags, XML, connecting, the guest's state and abilities; the guest runs */
    uint64_t plan_us;       /* disks, names, the domain's XML; the guest runs */
    uint64_t prepare_us;    /* overlays created, memory image and pipe opened, capability set; the guest runs */
    uint64_t pause_us;      /* vCPUs being stopped */
    uint64_t switch_us;     /* disks to their overlays, one transaction; the guest is paused */
    uint64_t arm_us;        /* until write tracking is armed and the guest runs again (plain: until it is saved) */
    uint64_t drain_us;      /* memory flows into the image; the guest runs (0 for a plain snapshot) */
    uint64_t finish_us;     /* image completed and synced to disk, metadata recorded; the guest runs */
    uint64_t undo_us;       /* putting everything back, after a failure */
    uint64_t total_us;      /* the whole call */
    uint64_t instant_us;    /* from the call's entry to the instant: from then on the caller may change the guest */
    uint64_t guest_paused_us;      /* the pause as the guest had it; 0 when it was paused already */
    uint64_t memory_image_bytes;   /* size of the memory image */
    uint32_t pause_from_events;    /* 1: guest_paused_us is by QEMU's own STOP and RESUME time stamps;
                                      0: by this process's clock around the commands, thus an upper bound */
    uint32_t disks;                /* disks switched to an overlay */
} instantsnap_stats;

/** One disk of a revert plan. The strings are borrowed from the plan. */
typedef struct instantsnap_revert_disk {
    size_t size;         /* set by the caller: sizeof(instantsnap_revert_disk) */
    const char *name;    /* the disk's name in the snapshot: `vda`, a qdev id, a drive alias or a node name */
    const char *file;    /* absolute path of the image that this disk must use: fresh, this plan's own */
    const char *format;  /* its format: "qcow2"; "raw" for UEFI variables where the original's are raw */
    const char *backing_file; /* the snapshot's image beneath it, never to be written again; NULL for UEFI variables */
} instantsnap_revert_disk;

/** The library's version, "MAJOR.MINOR.PATCH". Static; never NULL. */
const char *instantsnap_version(void);

/**
 * Why the last failed call of this thread failed: like errno, it is only set by calls that fail. Never NULL: before
 * the first failure the code is VIR_ERR_OK and the message empty. Borrowed: valid until this thread's next call of a
 * function of this library other than this one.
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
 *              `<domainsnapshot>` file each, and memory images whose place the snapshot's XML leaves open.
 *
 * Returns the guest, to be closed with instantsnap_close(), or NULL: VIR_ERR_INVALID_ARG, VIR_ERR_XML_DETAIL or
 * VIR_ERR_XML_ERROR (domain_xml), VIR_ERR_SYSTEM_ERROR (socket or directory), VIR_ERR_OPERATION_TIMEOUT (another client
 * has the socket), VIR_ERR_OPERATION_FAILED (not a QMP socket), VIR_ERR_CONFIG_UNSUPPORTED (QEMU older than 6.0).
 * Blocks for a few milliseconds, at most 5 seconds.
 */
instantsnap_guest *instantsnap_open_qmp(const char *qmp_socket, const char *domain_xml, const char *state_dir);

/**
 * Closes a guest. NULL is fine. The guest itself is left as it is. An operation that is under way in another thread
 * ends first as it would have; this call does not wait for it.
 */
void instantsnap_close(instantsnap_guest *guest);

/**
 * Bounds the time for which a snapshot may pause the guest: when it passes before the instant, the guest resumes,
 * everything is undone, and the call fails with VIR_ERR_OPERATION_TIMEOUT. A plain snapshot pauses the guest for as long
 * as its memory takes to be written; there the limit is for the steps before that.
 *
 * @milliseconds  1 or more; the default is 30000. Applies to calls that begin later.
 */
int instantsnap_set_pause_limit(instantsnap_guest *guest, unsigned int milliseconds);

/**
 * Takes a full snapshot: memory and disks.
 *
 * @xml    libvirt's `<domainsnapshot>`. `<domainsnapshot/>` is enough: the name is then the time in seconds, every
 *         writable disk gets an overlay beside it by libvirt's rule (`disk.qcow2`: `disk.NAME`), memory goes to
 *         `STATE_DIR/NAME.mem`. Disks in the XML are named by target, qdev id, drive alias, node name or the path of
 *         their image. Files that exist are never overwritten. Read-only and empty drives are left out; UEFI variables
 *         (pflash) are copied to `MEMORY_IMAGE.DRIVE.nvram`.
 * @flags  VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT for an instant snapshot; 0 for a plain one,
 *         through which the guest is paused throughout. See the table above.
 * @name   where to store the snapshot's name, for instantsnap_free_string(); may be NULL.
 *
 * Blocks until the snapshot is complete and on disk. The guest is paused meanwhile as little as can be: see
 * instantsnap_get_stats(). A guest that is paused already stays paused; QEMU before 10.0 saves such a guest once only,
 * until it has run again. Returns 0, or -1 with everything as it was before the call: VIR_ERR_INVALID_ARG (flags),
 * VIR_ERR_XML_DETAIL and VIR_ERR_XML_ERROR (xml), VIR_ERR_OPERATION_UNSUPPORTED (allowed, not built),
 * VIR_ERR_ARGUMENT_UNSUPPORTED (no background snapshots: the message says why and what to do), VIR_ERR_OPERATION_INVALID
 * (busy, wrong state, name exists), VIR_ERR_CONFIG_UNSUPPORTED (a disk, file or device that stands in the way),
 * VIR_ERR_SYSTEM_ERROR (files), VIR_ERR_OPERATION_FAILED (QEMU's reason is in the message), VIR_ERR_OPERATION_TIMEOUT,
 * VIR_ERR_OPERATION_ABORTED. Where something could not be put back, the message ends with what is left and how to
 * mend it.
 */
int instantsnap_snapshot_create_xml(instantsnap_guest *guest, const char *xml, unsigned int flags, char **name);

/**
 * Cancels the snapshot that another thread is taking of this guest, in whatever phase it is: that call undoes everything
 * and fails with VIR_ERR_OPERATION_ABORTED, unless it was complete already. With QEMU before 10.0, whose background
 * snapshots cannot be cancelled safely, the undo takes as long as memory still takes to be read; the guest runs. Returns 0 at once, without waiting for it, or
 * -1 with VIR_ERR_OPERATION_INVALID when there is none.
 */
int instantsnap_snapshot_cancel(instantsnap_guest *guest);

/**
 * Fills *stats for the last snapshot taken, or tried, of this guest through this handle. Set stats->size first. Returns 0,
 * or -1: VIR_ERR_INVALID_ARG, VIR_ERR_OPERATION_INVALID (none yet).
 */
int instantsnap_get_stats(instantsnap_guest *guest, instantsnap_stats *stats);

/**
 * The names of the guest's recorded snapshots, oldest first.
 *
 * @names  where to store the NULL-terminated list, for instantsnap_free_string_list(); may be NULL, to count only.
 *
 * Returns how many there are, or -1: VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Reads files only.
 */
int instantsnap_snapshot_list(instantsnap_guest *guest, char ***names);

/**
 * The `<domainsnapshot>` XML of a recorded snapshot: name, description, state, parent, creation time, memory, disks with the
 * files really used, domain. Returns it for instantsnap_free_string(), or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT,
 * VIR_ERR_SYSTEM_ERROR, VIR_ERR_INVALID_DOMAIN_SNAPSHOT. Reads files only.
 */
char *instantsnap_snapshot_get_xml(instantsnap_guest *guest, const char *name);

/**
 * The name of the current snapshot: the one last taken or loaded, the parent of the next. Returns it for
 * instantsnap_free_string(), or NULL: VIR_ERR_NO_DOMAIN_SNAPSHOT when there is none. Reads files only.
 */
char *instantsnap_snapshot_current(instantsnap_guest *guest);

/**
 * Brings a snapshot back, first step: makes a fresh overlay on each of its disk images (and a private copy of its UEFI
 * variables), and says what to start QEMU with. The snapshot stays as it is, so this can be done any number of times, also
 * while the original guest runs on. Needs `qemu-img`.
 *
 * Then start QEMU with the machine of the original (same machine type, CPU, memory size and devices), each disk on the
 * file the plan names, and `-incoming defer`; then call instantsnap_snapshot_load().
 *
 * @state_dir  the state directory with which the snapshot was taken.
 * @name       the snapshot.
 * @directory  where the fresh images are made; NULL: beside each of the snapshot's images, which must be files then (else
 *             VIR_ERR_CONFIG_UNSUPPORTED). They are the caller's from now on: they hold what the continued guest writes.
 *
 * Returns the plan, or NULL with nothing left behind: VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_INVALID_DOMAIN_SNAPSHOT (an image
 * is missing, memory incomplete), VIR_ERR_SYSTEM_ERROR, VIR_ERR_OPERATION_FAILED. Blocks for some 10 ms a disk.
 */
instantsnap_revert_plan *instantsnap_snapshot_prepare_revert(const char *state_dir, const char *name,
                                                             const char *directory);

/** How many disks the plan has; 0 for a pointer that is not a plan. */
size_t instantsnap_revert_plan_disk_count(const instantsnap_revert_plan *plan);

/** Fills *disk with disk number `index`, from 0. Set disk->size first. Returns 0, or -1: VIR_ERR_INVALID_ARG. */
int instantsnap_revert_plan_get_disk(const instantsnap_revert_plan *plan, size_t index, instantsnap_revert_disk *disk);

/** Absolute path of the memory image; borrowed from the plan. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_revert_plan_memory_file(const instantsnap_revert_plan *plan);

/**
 * The `<domain>` XML of the snapshot, its disks on the snapshot's images; borrowed from the plan. Where the guest was
 * opened without one, a short one made of what QEMU tells. NULL: VIR_ERR_INVALID_ARG.
 */
const char *instantsnap_revert_plan_domain_xml(const instantsnap_revert_plan *plan);

/** Frees a plan. The images it names stay. NULL is fine. */
void instantsnap_revert_plan_free(instantsnap_revert_plan *plan);

/**
 * Brings a snapshot back, second step: feeds its memory to a QEMU started as the plan says, with `-incoming defer`.
 *
 * @guest  that QEMU, opened with the same state directory.
 * @name   the snapshot.
 * @flags  0: runs if the guest ran at the instant, else stays paused. VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING or
 *         VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED, not both: as asked.
 *
 * The snapshot becomes the current one. Before QEMU is given a byte, each of its disks is compared with the snapshot's: a
 * missing disk, a disk on another image, and a disk that would write to the snapshot's own image are
 * VIR_ERR_CONFIG_UNSUPPORTED. Blocks until memory is loaded and, where asked, the guest runs. Returns 0, or -1:
 * VIR_ERR_INVALID_ARG, VIR_ERR_NO_DOMAIN_SNAPSHOT, VIR_ERR_INVALID_DOMAIN_SNAPSHOT, VIR_ERR_OPERATION_INVALID (QEMU was not
 * started with `-incoming defer`, or is busy), VIR_ERR_OPERATION_FAILED (QEMU's reason). After a failure during the load that
 * QEMU is of no more use: end it, and start it anew. VIR_DOMAIN_SNAPSHOT_REVERT_FORCE and _RESET_NVRAM are not built:
 * VIR_ERR_OPERATION_UNSUPPORTED.
 */
int instantsnap_snapshot_load(instantsnap_guest *guest, const char *name, unsigned int flags);

/** The name of a snapshot; borrowed from it. NULL: VIR_ERR_INVALID_ARG. */
const char *instantsnap_snapshot_get_name(const instantsnap_snapshot *snapshot);

/** Frees a snapshot handle; the snapshot itself stays. NULL is fine. */
void instantsnap_snapshot_free(instantsnap_snapshot *snapshot);

#ifdef __cplusplus
}
#endif

#endif /* INSTANTSNAP_H */
