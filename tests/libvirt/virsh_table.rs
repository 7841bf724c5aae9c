// SPDX-License-Identifier: LGPL-2.1-or-later

//! One table of what virsh and a snapshot report when virsh is used on the domain during the
//! snapshot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::virt::OpenedDomain;
use instantsnap::engine::{Event, EventKind, Observer, Phase};
use instantsnap::error::Code;
use instantsnap::libvirt::Domain;
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{
    Binary, DEADLINE, Daemon, Format, Machine, only_when_thorough, skip, test, wait_for,
};
use serde_json::{Value, json};

use Code::{ConfigUnsupported, OperationFailed, OperationTimeout, SystemError};
use When::{Draining, Paused, Prepared, Saved, Switched};

/// When virsh is run, from its start to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Everything is prepared, and the guest still runs.
    Prepared,
    /// The guest is paused, and its disks are still on their images.
    Paused,
    /// The guest is paused, its disks are on the overlays, and write tracking is not armed yet.
    Switched,
    /// The guest runs again, and its memory is being saved.
    Draining,
    /// The memory is saved, and QEMU still has the snapshot's settings.
    Saved,
}

impl When {
    fn phase(self) -> Phase {
        match self {
            Prepared => Phase::Pause,
            Paused => Phase::Switch,
            Switched => Phase::Arm,
            Draining => Phase::Drain,
            Saved => Phase::Finish,
        }
    }
}

struct Row {
    virsh: &'static str,
    when: When,
    /// The result of virsh; `Err` has a part of its message.
    virsh_result: Result<(), &'static str>,
    /// The result of the snapshot; `Err` has its code and a part of its message.
    snapshot: Result<(), (Code, &'static str)>,
    /// The domain's state afterwards, and the image that its disk is on.
    after: (&'static str, &'static str),
}

const OK: Result<(), &str> = Ok(());
const LOCKED: Result<(), &str> = Err("instantsnap: a snapshot of this guest is being taken");
/// The snapshot succeeds and can be restored.
const TAKEN: Result<(), (Code, &str)> = Ok(());
const RESUMED: Result<(), (Code, &str)> = Err((OperationFailed, "has resumed the guest"));
const RESET: Result<(), (Code, &str)> = Err((OperationFailed, "the guest was reset in the pause"));
const WRITTEN: Result<(), (Code, &str)> =
    Err((OperationFailed, "disk 'vda' was written to in the pause"));
const ENDED: Result<(), (Code, &str)> = Err((OperationFailed, "domain is not running"));
const ENDED_ONCE: Result<(), (Code, &str)> = Err((OperationFailed, "QEMU has ended meanwhile"));
const ANEW: Result<(), (Code, &str)> =
    Err((OperationFailed, "has ended while its snapshot was being taken"));
const REBUILT: Result<(), (Code, &str)> =
    Err((OperationFailed, "another client has changed the images of disk 'vda'"));
const BUSY: Result<(), (Code, &str)> = Err((OperationFailed, "already in active block job"));
const UNKNOWN: Result<(), (Code, &str)> =
    Err((ConfigUnsupported, "cannot switch the domain's disks"));
const GONE: Result<(), (Code, &str)> = Err((OperationFailed, "(scsi-hd) was detached"));
const RESIZED: Result<(), (Code, &str)> = Err((OperationFailed, "resized disk 'vda'"));
const ATTACHED: Result<(), (Code, &str)> = Err((OperationFailed, "was attached by another client"));
const UNNAMED: Result<(), (Code, &str)> = Err((SystemError, "missing existing file for disk vdc"));
const LATE: Result<(), (Code, &str)> =
    Err((OperationTimeout, "another client's job on the domain"));
const MERGED: Result<(), (Code, &str)> =
    Err((OperationFailed, "another client has begun to merge"));

const fn row(
    virsh: &'static str,
    when: When,
    virsh_result: Result<(), &'static str>,
    snapshot: Result<(), (Code, &'static str)>,
    after: (&'static str, &'static str),
) -> Row {
    Row { virsh, when, virsh_result, snapshot, after }
}

/// The table is the same for every QEMU. `IMAGE` is the disk's image before the snapshot, `BASE`
/// the image below it, `OVERLAY` the snapshot's overlay, and `THEIRS` another client's overlay.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    // The first row, because libvirt does not migrate a domain that has snapshots.
    row("migrate",  Prepared, Err("Background-snapshot is not compatible"), TAKEN, ("running", "OVERLAY")),

    row("dominfo",  Paused,   OK, TAKEN, ("running", "OVERLAY")),
    row("dominfo",  Draining, OK, TAKEN, ("running", "OVERLAY")),
    row("domstats", Paused,   OK, TAKEN, ("running", "OVERLAY")),
    row("domstats", Draining, OK, TAKEN, ("running", "OVERLAY")),

    // libvirt does nothing for a domain that is paused already, and the library cannot see the
    // request, so the guest is resumed.
    row("suspend",  Paused,   OK, TAKEN, ("running", "OVERLAY")),
    row("suspend",  Switched, OK, TAKEN, ("running", "OVERLAY")),
    // Here a client has paused the running guest, and it stays paused.
    row("suspend",  Draining, OK, TAKEN, ("paused", "OVERLAY")),

    // The guest would run while the snapshot expects it paused, and its memory would be newer than
    // its disks.
    row("resume",   Paused,   OK, RESUMED, ("running", "IMAGE")),
    row("resume",   Switched, OK, RESUMED, ("running", "IMAGE")),
    row("resume",   Draining, Err("domain is already running"), TAKEN, ("running", "OVERLAY")),
    // QEMU would call abort() where it had to capture such a guest.
    row("reset",    Paused,   OK, RESET, ("running", "IMAGE")),
    row("reset",    Switched, OK, RESET, ("running", "IMAGE")),
    // It does no harm before the switch: the snapshot is of the later moment.
    row("resume; suspend", Paused,   OK, TAKEN, ("running", "OVERLAY")),
    row("resume; suspend", Switched, OK, WRITTEN, ("running", "IMAGE")),

    // The lock keeps QEMU from beginning another migration.
    row("save",     Prepared, LOCKED, TAKEN, ("running", "OVERLAY")),
    row("live snapshot", Prepared, LOCKED, TAKEN, ("running", "OVERLAY")),
    row("save",     Paused,   LOCKED, TAKEN, ("running", "OVERLAY")),
    row("save",     Switched, LOCKED, TAKEN, ("running", "OVERLAY")),
    // libvirt pauses the guest for the save, and resumes it when the save fails.
    row("save",     Draining, Err("There's a migration process in progress"), TAKEN, ("running", "OVERLAY")),
    row("dump",     Paused,   LOCKED, TAKEN, ("running", "OVERLAY")),
    row("dump",     Switched, LOCKED, TAKEN, ("running", "OVERLAY")),
    // Until the capability is off it would be a background snapshot. The lock is lifted after that.
    row("save",     Saved,    LOCKED, TAKEN, ("running", "OVERLAY")),
    row("dump",     Saved,    LOCKED, TAKEN, ("running", "OVERLAY")),
    row("dump",     Draining, Err("There's a migration process in progress"), TAKEN, ("running", "OVERLAY")),

    row("destroy",  Paused,   OK, ANEW, ("shut off", "IMAGE")),
    row("destroy",  Switched, OK, ENDED, ("shut off", "IMAGE")),
    row("destroy",  Draining, OK, ENDED, ("shut off", "IMAGE")),
    // libvirt pauses a new QEMU, or switches its disks, in place of the first.
    row("destroy; start", Prepared, OK, ANEW, ("running", "IMAGE")),
    row("destroy; start", Paused,   OK, ANEW, ("running", "IMAGE")),
    row("destroy; start", Switched, OK, ENDED_ONCE, ("running", "IMAGE")),

    // The merge goes down to the lowest image, which destroys the snapshot's images.
    row("blockcommit --active --pivot", Paused,   OK, REBUILT, ("running", "BASE")),
    row("blockcommit --active --pivot", Switched, OK, REBUILT, ("running", "BASE")),
    row("blockcommit --active --pivot", Draining, OK, REBUILT, ("running", "BASE")),
    row("blockcommit --active --shallow", Paused,   OK, BUSY,   ("running", "IMAGE")),
    // Another client's merge that waits for its last step excludes other merges: the overlay stays
    // for that client.
    row("blockcommit --active --shallow", Draining, OK, MERGED, ("running", "OVERLAY")),

    // Below the library's overlay: the images of the snapshot are not the planned ones.
    row("snapshot", Paused,   OK, REBUILT, ("running", "THEIRS")),
    // On top of the library's overlay: a child snapshot.
    row("snapshot", Switched, OK, TAKEN, ("running", "THEIRS")),
    row("snapshot", Draining, OK, TAKEN, ("running", "THEIRS")),

    // The overlay was created with the old size.
    row("blockresize 24M", Paused,   OK, RESIZED, ("running", "IMAGE")),
    row("blockresize 28M", Switched, OK, RESIZED, ("running", "IMAGE")),
    row("blockresize 32M", Draining, OK, TAKEN, ("running", "OVERLAY")),

    // The device would be in the memory image, and not in the domain's XML.
    row("attach-device", Paused,   OK, ATTACHED, ("running", "IMAGE")),
    row("attach-device", Switched, OK, ATTACHED, ("running", "IMAGE")),
    row("attach-device", Draining, Err("device_add not allowed while migrating"), TAKEN, ("running", "OVERLAY")),
    // libvirt requires an overlay for it, too.
    row("attach-disk", Paused,   OK, UNNAMED, ("running", "IMAGE")),
    row("attach-disk", Switched, OK, ATTACHED, ("running", "IMAGE")),

    // The switch waits for the end of the job, and the pause ends at its limit.
    row("backup-begin", Paused,   OK, LATE, ("running", "IMAGE")),
    row("blockcopy", Paused,   OK, BUSY, ("running", "IMAGE")),

    row("detach-disk", Paused,   OK, UNKNOWN, ("running", "IMAGE")),
    row("detach-disk", Switched, OK, GONE, ("running", "IMAGE")),
    row("detach-disk", Draining, Err("device_del not allowed while migrating"), TAKEN, ("running", "OVERLAY")),
];

/// Runs virsh in a phase of a snapshot. For the drain, the bandwidth is lowered so that the drain
/// does not end meanwhile.
struct VirshObserver<'a> {
    domain: &'a OpenedDomain,
    /// It is faster than virsh.
    monitor: Domain,
    /// Another daemon.
    clones: &'a Daemon,
    row: &'a Row,
    bandwidth: Value,
    said: Option<Result<(), String>>,
}

impl VirshObserver<'_> {
    fn new<'a>(domain: &'a OpenedDomain, clones: &'a Daemon, row: &'a Row) -> VirshObserver<'a> {
        let monitor = common::virt::domain(&domain.guest);
        let mut observer =
            VirshObserver { domain, monitor, clones, row, bandwidth: Value::Null, said: None };
        observer.bandwidth =
            observer.ask("query-migrate-parameters", json!({}))["max-bandwidth"].take();
        observer
    }

    fn run(&self) -> Result<(), String> {
        let guest = &self.domain.guest;
        let (name, file) = (guest.name(), guest.directory().join("theirs"));
        let file = file.to_str().unwrap();
        let run = |args: &[&str]| guest.daemon().try_virsh(args).map(drop);
        match self.row.virsh {
            "resume; suspend" => {
                run(&["resume", name])?;
                // Until the guest has written.
                guest.wait_ticks(3);
                run(&["suspend", name])
            }
            "resume" if self.row.when != Draining => {
                run(&["resume", name])?;
                guest.wait_ticks(3);
                Ok(())
            }
            "destroy; start" => {
                run(&["destroy", name])?;
                run(&["start", name])
            }
            "save" | "dump" => run(&[self.row.virsh, name, file]),
            "snapshot" => run(&["snapshot-create-as", name, "theirs", "--disk-only"]),
            "live snapshot" => {
                run(&["snapshot-create-as", name, "theirs", "--live", "--memspec", file])
            }
            "migrate" => {
                run(&["migrate", "--live", "--unsafe", name, &self.clones.uri(), "tcp://127.0.0.1"])
            }
            "detach-disk" => run(&["detach-disk", name, "sda"]),
            "attach-device" => {
                std::fs::write(
                    file,
                    "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
                )
                .unwrap();
                run(&["attach-device", name, file])
            }
            "attach-disk" => {
                let (disk, target) = (
                    format!("{file}-{:?}", self.row.when),
                    if self.row.when == Paused { "vdc" } else { "vdd" },
                );
                make_image(Path::new(&disk), Format::Raw, None);
                guest.daemon().give(guest.directory());
                run(&["attach-disk", name, &disk, target, "--driver", "qemu", "--subdriver", "raw"])
            }
            "backup-begin" => {
                let backup = format!(
                    "<domainbackup mode='pull'><server transport='unix' \
                     socket='{file}.sock'/><disks><disk name='sda' backup='no'/><disk name='vda' \
                     type='file'><scratch file='{file}-scratch'/></disk></disks></domainbackup>"
                );
                let described = guest.directory().join("backup.xml");
                std::fs::write(&described, backup).unwrap();
                run(&["backup-begin", name, described.to_str().unwrap()])
            }
            "blockcopy" => {
                run(&["blockcopy", name, "vda", &format!("{file}-copy"), "--transient-job"])
            }
            resize if resize.starts_with("blockresize") => {
                run(&["blockresize", name, "vda", resize.split(' ').next_back().unwrap()])
            }
            commit if commit.starts_with("blockcommit") => {
                let options: Vec<_> = commit.split(' ').skip(1).collect();
                run(&[&["blockcommit", name, "vda", "--wait"][..], &options].concat())
            }
            command => run(&[command, name]),
        }
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        let command = json!({ "execute": command, "arguments": arguments }).to_string();
        let mut reply: Value =
            serde_json::from_str(&self.monitor.monitor_command(&command, None).unwrap()).unwrap();
        reply["return"].take()
    }

    fn set_bandwidth(&self, bandwidth: &Value) {
        self.ask("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }));
    }

    fn is_draining(&self) -> bool {
        self.ask("query-migrate", json!({}))["status"] == "active"
    }
}

impl Observer for VirshObserver<'_> {
    fn event(&mut self, event: &Event) {
        if event.kind == EventKind::Instant && self.row.when == Draining {
            self.set_bandwidth(&json!(1 << 20));
        }
    }

    fn phase(&mut self, phase: Phase) {
        if phase != self.row.when.phase() {
            return;
        }
        if self.row.when != Draining {
            self.said = Some(self.run());
            return;
        }
        if self.is_draining() {
            let said = self.run();
            // Where the drain had ended, virsh can have come too late, and the row is repeated.
            self.said = (!self.domain.guest.alive() || self.is_draining()).then_some(said);
        }
        if self.domain.guest.alive() {
            self.set_bandwidth(&self.bandwidth);
        }
    }
}

/// A machine with 96 MiB of memory, of which 48 are random and never written, and two disks. A
/// reset does not end QEMU. The first disk's image has a backing file, and the second disk can be
/// unplugged without the guest's cooperation.
fn machine(binary: &'static Binary, random: &Path, second: &Path) -> Machine {
    let loader = format!("loader,file={},addr=0x2000000,force-raw=on", random.display());
    let second = format!(
        "<controller type='scsi' model='virtio-scsi'/><disk type='file' device='disk'>\
         <driver name='qemu' type='raw'/><source file='{}'/><target dev='sda' bus='scsi'/></disk>",
        second.display()
    );
    let machine = Machine::new(binary)
        .memory(96)
        .disk(Format::Qcow2)
        .devices(&second)
        .arg("-device")
        .arg(&loader);
    machine.edit_xml(|xml| xml.replace("<on_reboot>destroy<", "<on_reboot>restart<"))
}

fn settings(domain: &OpenedDomain) -> [Value; 2] {
    let ask = |command| domain.guest.control().execute(command, json!({})).unwrap();
    let mut parameters = ask("query-migrate-parameters");
    // libvirt itself raises this limit for each save and dump, and leaves it raised.
    parameters.as_object_mut().unwrap().remove("max-bandwidth");
    [ask("query-migrate-capabilities"), parameters]
}

fn state(domain: &OpenedDomain) -> String {
    domain.guest.virsh("domstate", &[]).trim().to_owned()
}

/// The first disk's active image.
fn image(domain: &OpenedDomain) -> PathBuf {
    let list = domain.guest.virsh("domblklist", &[]);
    let file = list.lines().find_map(|line| line.trim().strip_prefix("vda")).expect("vda").trim();
    PathBuf::from(file)
}

struct Table<'a> {
    daemon: &'a Daemon,
    clones: &'a Daemon,
    domain: Option<OpenedDomain>,
    binary: &'static Binary,
    /// The directory of the second disks.
    directory: &'a Path,
    random: PathBuf,
    started: u32,
}

impl Table<'_> {
    /// Restores a memory image in another daemon, checks that the snapshot is of one moment, and
    /// waits until that daemon has dropped the domain.
    fn restore_clone(&self, domain: &OpenedDomain, image: &Path) {
        let clone = self.clones.restore(&domain.guest, image);
        if clone.virsh("domstate", &[]).trim() == "paused" {
            clone.virsh("resume", &[]);
        }
        clone.wait_ticks(5);
        drop(clone);
        wait_for(DEADLINE, || {
            self.clones.virsh(&["list", "--name"]).trim().is_empty().then_some(())
        })
        .expect("the clone is gone");
    }

    fn run(&mut self, number: usize, row: &Row) {
        let daemon = self.daemon;
        let kept = self.domain.take();
        let domain = kept.unwrap_or_else(|| {
            self.started += 1;
            let second = self.directory.join(format!("second-{}", self.started));
            std::fs::File::create(&second).unwrap().set_len(1 << 20).unwrap();
            daemon.give(self.directory);
            let domain = OpenedDomain::start(&machine(self.binary, &self.random, &second), daemon);
            domain.guest.virsh(
                "snapshot-create-as",
                &["base", "--disk-only", "--no-metadata", "--diskspec", "sda,snapshot=no"],
            );
            domain
        });
        let (base, before) = (domain.guest.disks()[0].file.clone(), image(&domain));
        let settings_before = settings(&domain);
        let name = format!("r{number}");
        let mut observer = VirshObserver::new(&domain, self.clones, row);
        if row.snapshot == LATE {
            domain.handle.set_pause_limit(Duration::from_secs(2));
        }
        let result = domain.snapshot_observed(&name, &mut observer);
        let Some(said) = observer.said else {
            eprintln!("{}: memory was saved too soon: once more, with another domain", row.virsh);
            drop(domain);
            return self.run(number, row);
        };
        eprintln!("{:?} {}: virsh {said:?}, snapshot {result:?}", row.when, row.virsh);

        match (&row.virsh_result, &said) {
            (Ok(()), Ok(())) => {}
            (Err(part), Err(said)) if said.contains(part) => {}
            _ => panic!("virsh says {said:?}, and should {:?}", row.virsh_result),
        }
        match (&row.snapshot, &result) {
            (Ok(()), Ok(_)) => {}
            (Err((code, part)), Err(error))
                if error.code == *code && error.message.contains(part) => {}
            _ => panic!("the snapshot: {result:?}, expected {:?}", row.snapshot),
        }
        let overlay = before.with_extension(&name);
        let (state_after, image_after) = row.after;
        assert_eq!(state(&domain), state_after);
        let expected = match image_after {
            "IMAGE" => &before,
            "OVERLAY" => &overlay,
            "BASE" => &base,
            _ => &base.with_extension("theirs"),
        };
        assert_eq!(image(&domain), *expected);
        assert_eq!(domain.find(&name).is_some(), result.is_ok(), "recorded");
        assert_eq!(domain.memory_file(&name).exists(), result.is_ok(), "memory image");
        assert_eq!(overlay.exists(), result.is_ok() || image_after == "OVERLAY", "overlay");
        match state_after {
            "running" => drop(domain.guest.wait_ticks(3)),
            "paused" => {
                domain.guest.virsh("resume", &[]);
                domain.guest.wait_ticks(3);
            }
            _ => {}
        }
        if domain.guest.alive() {
            assert_eq!(settings(&domain), settings_before);
        }
        if result.is_ok() {
            self.restore_clone(&domain, &domain.memory_file(&name));
        }
        if row.virsh == "save" && said.is_ok() {
            self.restore_clone(&domain, &domain.guest.directory().join("theirs"));
        }
        let whole = said.is_err()
            || !["detach-disk", "save", "dump", "snapshot", "backup-begin", "blockcopy"]
                .contains(&row.virsh);
        if whole
            && state_after == "running"
            && matches!(image_after, "IMAGE" | "OVERLAY")
            && !row.virsh.starts_with("blockcommit")
        {
            self.domain = Some(domain);
        }
    }
}

/// Goes through half of the table, so that two tests can share it.
fn check_half(binary: &'static Binary, half: usize) {
    let daemon = Daemon::session();
    let clones = daemon.another();
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(daemon.user()), None).unwrap();
    let random = directory.path().join("random");
    let mut source = std::io::Read::take(std::fs::File::open("/dev/urandom").unwrap(), 48 << 20);
    std::io::copy(&mut source, &mut std::fs::File::create(&random).unwrap()).unwrap();
    let mut table = Table {
        daemon: &daemon,
        clones: &clones,
        domain: None,
        binary,
        directory: directory.path(),
        random,
        started: 0,
    };
    for (number, row) in TABLE.iter().enumerate().filter(|(number, _)| number % 2 == half) {
        table.run(number, row);
    }
}

#[test(long)]
fn virsh_table_first_half_holds_with_the_system_qemu() {
    check_half(&Binary::all()[0], 0);
}

#[test(long)]
fn virsh_table_second_half_holds_with_the_system_qemu() {
    check_half(&Binary::all()[0], 1);
}

#[test(long)]
fn virsh_table_holds_with_a_newer_qemu() {
    only_when_thorough();
    match Binary::all().get(1) {
        Some(binary) => [0, 1].into_iter().for_each(|half| check_half(binary, half)),
        None => skip("there is one QEMU only"),
    }
}
