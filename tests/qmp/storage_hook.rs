// SPDX-License-Identifier: LGPL-2.1-or-later

//! The caller's storage hook snapshots disks that QEMU does not, inside the pause: at the instant
//! of memory and of the other disks, in bounded time, and with undo.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::backend::open_guest;
use common::jobs::Listener;
use common::virt::OpenedDomain;
use common::{
    ALL_SECTORS, At, Handle, INSTANTLY, Opened, assert_error, assert_untouched, files_below,
    first_tick, machine, run, unwritten,
};
use instantsnap::engine::{
    Answer, EarlyStart, Phase, RevertOptions, RevertPlan, StorageCall, StorageHook, prepare_revert,
    prepare_revert_with,
};
use instantsnap::error::Code;
use instantsnap::model::ManualDisk;
use instantsnap::model::flags::{NO_METADATA, revert};
use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Format, Gate, Guest, Machine, skip, test};
use serde_json::json;
use tempfile::TempDir;

const MS: Duration = Duration::from_millis(1);

/// A directory on a file system that copies files by reflink, where this machine can create one,
/// else any directory.
struct Volume {
    directory: TempDir,
    reflinks: bool,
}

impl Volume {
    fn new() -> Volume {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let mount = directory.path().join("mount");
        std::fs::create_dir(&mount).unwrap();
        std::fs::File::create(&image).and_then(|image| image.set_len(512 << 20)).unwrap();
        let works =
            |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = ["mkfs.xfs", "mkfs.btrfs"]
            .iter()
            .any(|mkfs| works(Command::new(mkfs).arg("-q").arg(&image)));
        let reflinks =
            made && works(Command::new("mount").args(["-o", "loop"]).args([&image, &mount]));
        eprintln!(
            "copies {}",
            if reflinks {
                "by reflink"
            } else {
                "byte by byte (no mkfs.xfs or mkfs.btrfs, or no mount)"
            }
        );
        Volume { directory, reflinks }
    }

    fn raw_disk(&self, name: &str) -> PathBuf {
        let file = self.directory.path().join("mount").join(format!("{name}.raw"));
        make_image(&file, Format::Raw, None);
        file
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.reflinks {
            let _ = Command::new("umount").arg(self.directory.path().join("mount")).status();
        }
    }
}

/// Storage that snapshots a disk by copying its file, to `FILE.SNAPSHOT`.
struct Storage {
    before: Box<dyn Fn() -> Answer<()> + Send + Sync>,
    reflinks: bool,
    deadline: Option<Duration>,
    calls: Mutex<Vec<StorageCall>>,
    undone: Mutex<Vec<StorageCall>>,
}

impl Storage {
    /// A storage that calls `before` before it copies.
    fn new(before: impl Fn() -> Answer<()> + Send + Sync + 'static) -> Storage {
        let (calls, undone) = (Mutex::default(), Mutex::default());
        Storage { before: Box::new(before), reflinks: false, deadline: None, calls, undone }
    }

    fn copying() -> Storage {
        Storage::new(|| Ok(()))
    }

    fn copying_on(volume: &Volume) -> Storage {
        Storage { reflinks: volume.reflinks, ..Storage::copying() }
    }

    fn within(self, deadline: Duration) -> Storage {
        Storage { deadline: Some(deadline), ..self }
    }

    /// Installs it as the guest's hook.
    fn install(self, handle: &Handle) -> Arc<Storage> {
        let storage = Arc::new(self);
        handle.set_storage_hook(Some(storage.clone()));
        storage
    }

    fn calls(&self) -> Vec<StorageCall> {
        self.calls.lock().unwrap().clone()
    }

    /// The names of the snapshots that the library has asked it to undo.
    fn undone(&self) -> Vec<String> {
        self.undone.lock().unwrap().iter().map(|call| call.snapshot.clone()).collect()
    }

    fn copy(&self, from: &str, to: &str) {
        run("cp", &[if self.reflinks { "--reflink=always" } else { "--sparse=always" }, from, to]);
    }
}

fn copy_of(disk: &ManualDisk, snapshot: &str) -> String {
    format!("{}.{snapshot}", disk.source)
}

impl StorageHook for Storage {
    fn snapshot(&self, call: &StorageCall) -> Answer<()> {
        self.calls.lock().unwrap().push(call.clone());
        (self.before)()?;
        call.disks.iter().for_each(|disk| self.copy(&disk.source, &copy_of(disk, &call.snapshot)));
        Ok(())
    }

    fn undo(&self, call: &StorageCall) {
        self.undone.lock().unwrap().push(call.clone());
        call.disks
            .iter()
            .for_each(|disk| std::fs::remove_file(copy_of(disk, &call.snapshot)).unwrap());
    }

    /// Copies the copy, so that the snapshot can be reverted to again.
    fn revert(&self, call: &StorageCall) -> Answer<Vec<PathBuf>> {
        (self.before)()?;
        let clone = |disk: &ManualDisk| {
            let copy = copy_of(disk, &call.snapshot);
            let clone = (0..)
                .map(|n| format!("{copy}.{n}"))
                .find(|clone| !Path::new(clone).exists())
                .unwrap();
            self.copy(&copy, &clone);
            PathBuf::from(clone)
        };
        Ok(call.disks.iter().map(clone).collect())
    }

    fn deadline(&self) -> Option<Duration> {
        self.deadline
    }
}

/// A request in which QEMU snapshots `vd0`, and the hook the raw disk `vd1`.
fn request(name: &str) -> String {
    format!(
        "<domainsnapshot><name>{name}</name><disks><disk name='vd1' \
         snapshot='manual'/></disks></domainsnapshot>"
    )
}

fn two_disks(binary: &'static Binary) -> Machine {
    Machine::new(binary).disk(Format::Qcow2).disk(Format::Raw)
}

/// The images of a plan, in the order of the machine's disks.
fn images(plan: &RevertPlan) -> Vec<(PathBuf, Format)> {
    let format = |format: &str| if format == "raw" { Format::Raw } else { Format::Qcow2 };
    let mut disks: Vec<_> = plan.disks.iter().collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    disks.iter().map(|disk| (disk.file.clone(), format(&disk.format))).collect()
}

fn start_clone(opened: &Opened, images: &[(PathBuf, Format)]) -> Opened {
    let guest = opened.guest.machine().for_revert(images).start();
    let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
    Opened { handle, guest }
}

fn prepare(opened: &Opened, name: &str, storage: &Storage) -> RevertPlan {
    let options = RevertOptions { hook: Some(storage), ..RevertOptions::default() };
    prepare_revert_with(&opened.state_dir(), name, options).unwrap()
}

/// Restores a snapshot on the images that the hook names. The clone checks every page and every
/// disk within one tick, so memory and disks are of one instant if it counts on. Returns the
/// clone's first number.
fn restore_clone(opened: &Opened, name: &str, storage: &Storage) -> u32 {
    let plan = prepare(opened, name, storage);
    let clone = start_clone(opened, &images(&plan));
    clone
        .handle
        .load(name, revert::RUNNING)
        .unwrap_or_else(|error| clone.guest.fail(&error.message));
    clone.guest.wait_ticks(5);
    first_tick(&clone.guest)
}

#[test]
fn hook_copies_are_of_the_instant_of_memory_and_the_other_disks() {
    let volume = Volume::new();
    for binary in Binary::any() {
        let disk = volume.raw_disk(&binary.name);
        let opened = Opened::start(
            &Machine::new(binary).disk(Format::Qcow2).disk_on(&disk, Format::Raw).append("dense=8"),
        );
        let storage = Storage::copying_on(&volume).install(&opened.handle);
        assert_eq!(opened.create(&request("s"), INSTANTLY).unwrap(), "s");
        let after = opened.guest.serial().tick.unwrap();

        let call = storage.calls().remove(0);
        let source = disk.display().to_string();
        let vd1 = ManualDisk { name: "vd1".into(), source: source.clone(), format: "raw".into() };
        assert_eq!((call.snapshot.as_str(), &call.disks[..]), ("s", &[vd1][..]));
        let stats = opened.handle.stats().unwrap();
        assert!(
            call.paused > Duration::ZERO && call.paused < stats.paused.unwrap().0,
            "{call:?} {stats:?}"
        );
        assert!(call.left > Duration::ZERO && call.left < Duration::from_secs(30), "{call:?}");
        assert_eq!(stats.disks, 1);

        // QEMU stays on the image of `vd1`, and uses an overlay for the other disk.
        assert_eq!(opened.active_image("vd1"), source);
        assert_ne!(opened.active_image("vd0"), opened.guest.disks()[0].file.display().to_string());
        let record = opened.record("s");
        assert_eq!(
            record.manual,
            [ManualDisk { name: "vd1".into(), source, format: "raw".into() }]
        );
        assert_eq!(record.disks.len(), 1);
        assert!(
            opened
                .handle
                .snapshot_list()
                .xml("s")
                .unwrap()
                .contains("<disk name=\"vd1\" snapshot=\"manual\"")
        );

        opened.guest.wait_ticks(5);
        let first = restore_clone(&opened, "s", &storage);
        assert!(first <= after + 2, "{first}, and taken at {after}");
        assert_eq!(restore_clone(&opened, "s", &storage), first, "again");

        // The guest notices a mismatch: here with the same memory and the disk's present content.
        opened.guest.control().execute("stop", json!({})).unwrap();
        let plan = prepare(&opened, "s", &storage);
        let images = images(&plan);
        storage.copy(&disk.display().to_string(), images[1].0.to_str().unwrap());
        let clone = start_clone(&opened, &images);
        clone.handle.load("s", 0).unwrap();
        let trouble = clone
            .guest
            .try_ticks(ALL_SECTORS, DEADLINE)
            .expect_err("memory is older than the disk");
        assert!(trouble.starts_with("TORN disk 1 "), "{trouble}");
    }
}

#[test]
fn hook_copies_are_of_the_instant_with_early_start() {
    for binary in Binary::all().iter().filter(|binary| binary.version >= (10, 0, 0)) {
        let opened = Opened::start(&two_disks(binary).append("dense=8").long_setup(20 * MS));
        opened.handle.set_early_start(EarlyStart { tries: 3, stop_after: Some(5 * MS) });
        let storage = Storage::copying().install(&opened.handle);
        opened.create(&request("s"), INSTANTLY).unwrap();
        assert!(opened.handle.stats().unwrap().started_early);
        opened.guest.wait_ticks(3);
        restore_clone(&opened, "s", &storage);
        snapshot_with_late_hook(&opened, Storage::copying());
    }
}

#[test]
fn hook_copies_are_of_the_instant_for_non_live_and_paused_guests() {
    for binary in Binary::any() {
        let opened = Opened::start(&two_disks(binary));
        let storage = Storage::copying().install(&opened.handle);
        opened.create(&request("plain"), 0).unwrap();
        opened.guest.wait_ticks(3);
        restore_clone(&opened, "plain", &storage);

        opened.guest.control().execute("stop", json!({})).unwrap();
        opened.create(&request("paused"), INSTANTLY).unwrap();
        assert_eq!(storage.calls()[1].paused, Duration::ZERO);
        opened.guest.control().execute("cont", json!({})).unwrap();
        restore_clone(&opened, "paused", &storage);
    }
    let opened = Opened::start(&Machine::new(&Binary::all()[0]).disk(Format::Raw));
    let storage = Storage::copying().install(&opened.handle);
    opened.create(&request("s").replace("vd1", "vd0"), INSTANTLY).unwrap();
    assert_eq!(opened.handle.stats().unwrap().disks, 0);
    opened.guest.wait_ticks(3);
    restore_clone(&opened, "s", &storage);
}

#[test]
fn domain_xml_can_select_the_hook_and_the_request_overrides_it() {
    let guest = two_disks(&Binary::all()[0]).start();
    guest.wait_ticks(2);
    let source = guest.disks()[1].file.display().to_string();
    let xml = format!(
        "<domain><name>d</name><devices><disk snapshot='manual'><source file='{source}'/><target \
         dev='vdb'/></disk></devices></domain>"
    );
    let opened = Opened::with_domain(guest, &xml);
    let storage = Storage::copying().install(&opened.handle);
    opened.snapshot("s").unwrap();
    assert_eq!(storage.calls()[0].disks[0].name, "vdb");
    assert_eq!(opened.record("s").manual[0].source, source);
    opened.create(&request("t").replace("manual", "external"), INSTANTLY).unwrap();
    assert_eq!(storage.calls().len(), 1);
    assert_eq!((opened.record("t").disks.len(), opened.record("t").manual.len()), (2, 0));
}

#[test]
fn manual_disk_without_a_hook_is_refused_before_anything_is_touched() {
    let opened = Opened::start(&two_disks(&Binary::all()[0]));
    for flags in [INSTANTLY, INSTANTLY | NO_METADATA, 0] {
        let parts = ["'vd1'", "snapshot='manual'", "instantsnap_set_storage_hook()"];
        opened.assert_fails(&request("s"), flags, Code::OperationUnsupported, &parts);
    }
    // A hook that was removed is not called.
    let storage = Storage::copying().install(&opened.handle);
    opened.handle.set_storage_hook(None);
    opened.assert_fails(&request("s"), INSTANTLY, Code::OperationUnsupported, &["'vd1'"]);
    assert!(storage.calls().is_empty());
}

#[test]
fn failing_hook_fails_the_snapshot_and_is_not_asked_to_undo() {
    for binary in Binary::any() {
        let opened = Opened::start(&two_disks(binary));
        let storage = Storage::new(|| Err("the pool is full".into())).install(&opened.handle);
        for flags in [INSTANTLY, 0] {
            let parts = ["storage hook", "'vd1'", "'s'", "the pool is full"];
            opened.assert_fails(&request("s"), flags, Code::OperationFailed, &parts);
        }
        assert_eq!(storage.calls().len(), 2);
        assert!(storage.undone().is_empty());
        Storage::new(|| panic!("a defect of the hook's")).install(&opened.handle);
        opened.assert_fails(
            &request("s"),
            INSTANTLY,
            Code::OperationFailed,
            &["storage hook", "panicked"],
        );
    }
}

/// Takes a snapshot with a hook that returns only after the guest has been resumed. Returns the
/// storage with its calls.
#[track_caller]
fn snapshot_with_late_hook(opened: &Opened, storage: Storage) -> Arc<Storage> {
    let (gate, Storage { before, .. }) = (Gate::default(), storage);
    let held = gate.clone();
    let storage = Storage::new(move || {
        held.pass();
        before()
    });
    let storage = storage.within(100 * MS).install(&opened.handle);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            assert!(gate.wait_arrived(DEADLINE));
            let runs = opened.guest.try_ticks(3, DEADLINE);
            let undone = storage.undone();
            gate.release();
            assert!(runs.is_ok() && undone.is_empty(), "{runs:?} {undone:?}");
        });
        let parts = ["storage hook", "longer than 100 ms", "'vd1'", "'late'"];
        opened.assert_fails(&request("late"), INSTANTLY, Code::OperationTimeout, &parts);
        watcher.join().unwrap();
    });
    storage
}

#[test]
fn late_hook_does_not_extend_the_pause_and_is_undone_when_it_returns() {
    for binary in Binary::any() {
        let opened = Opened::start(&two_disks(binary));
        assert_eq!(snapshot_with_late_hook(&opened, Storage::copying()).undone(), ["late"]);
        // A hook that was late and failed has nothing to undo.
        assert!(
            snapshot_with_late_hook(&opened, Storage::new(|| Err("no".into()))).undone().is_empty()
        );
        let paused = opened.handle.stats().unwrap().paused.unwrap().0;
        assert!(paused >= 100 * MS, "{paused:?}");
        opened.guest.wait_ticks(ALL_SECTORS);
    }
}

#[test]
fn pause_limit_applies_to_a_hook_with_a_longer_deadline() {
    let opened = Opened::start(&two_disks(&Binary::all()[0]));
    opened.handle.set_pause_limit(2000 * MS);
    let gate = Gate::default();
    let held = gate.clone();
    let passing = move || {
        held.pass();
        Ok(())
    };
    let storage = Storage::new(passing).within(DEADLINE).install(&opened.handle);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(gate.wait_arrived(DEADLINE));
            let runs = opened.guest.try_ticks(3, DEADLINE);
            gate.release();
            runs.unwrap();
        });
        opened.assert_fails(
            &request("s"),
            INSTANTLY,
            Code::OperationTimeout,
            &["storage hook", "'vd1'"],
        );
    });
    assert!(storage.calls()[0].left <= 2000 * MS);
    assert_eq!(storage.undone(), ["s"]);
}

#[test]
fn job_can_be_cancelled_while_the_hook_runs() {
    for binary in Binary::any() {
        let opened = Opened::start(&two_disks(binary));
        let gate = Gate::default();
        let held = gate.clone();
        let passing = move || {
            held.pass();
            Ok(())
        };
        let storage = Storage::new(passing).install(&opened.handle);
        let before = opened.trace();
        let job = opened.start_at_once(&request("s"), INSTANTLY, Listener::default());
        assert!(gate.wait_arrived(DEADLINE));
        assert_eq!(job.info().phase, Some(Phase::Switch));
        job.cancel();
        let runs = opened.guest.try_ticks(3, DEADLINE);
        let ended = job.wait(Some(Duration::ZERO));
        gate.release();
        assert!(runs.is_ok() && !ended, "{runs:?}");
        assert!(job.wait(None));
        assert_error(job.result(), Code::OperationAborted, "cancelled");
        assert_eq!(storage.undone(), ["s"]);
        assert_untouched(&opened, &before);
    }
}

#[test]
fn hook_undo_runs_once_when_a_later_phase_fails() {
    for binary in Binary::any() {
        let opened = Opened::start(&two_disks(binary));
        for phase in [Phase::Arm, Phase::Drain, Phase::Finish] {
            let storage = Storage::copying().install(&opened.handle);
            let mut observer = At(|now| {
                if now == phase {
                    assert_eq!(storage.calls().len(), 1);
                    opened.handle.cancel().unwrap();
                }
            });
            opened.assert_fails_observed(
                &request("s"),
                INSTANTLY,
                &mut observer,
                Code::OperationAborted,
                &[],
            );
            assert_eq!(storage.undone(), ["s"], "{phase:?}");
        }
        // The library does not ask to undo a completed snapshot, nor one that failed before the
        // hook was called.
        let storage = Storage::copying().install(&opened.handle);
        opened.create(&request("s"), INSTANTLY).unwrap();
        opened.assert_fails(&request("s"), INSTANTLY, Code::OperationInvalid, &["'s'"]);
        assert_eq!((storage.calls().len(), storage.undone().len()), (1, 0));
    }
}

#[test]
fn delete_asks_the_hook_to_remove_its_disk_snapshots() {
    let binary = &Binary::any()[0];
    let opened = Opened::start(&two_disks(binary));
    let storage = Storage::copying().install(&opened.handle);
    opened.handle.create(&request("s"), INSTANTLY, &mut ()).unwrap();
    opened.handle.set_storage_hook(None);
    let error =
        opened.handle.delete("s", 0).expect_err("nobody could remove what was made of the disk");
    assert_eq!(error.code, Code::OperationUnsupported, "{error}");
    assert!(error.message.contains("storage hook"), "{error}");
    opened.handle.set_storage_hook(Some(storage.clone()));
    assert!(storage.undone().is_empty());
    opened.handle.delete("s", 0).unwrap();
    assert_eq!(storage.undone(), ["s"]);
    opened.guest.wait_ticks(3);
    assert!(opened.handle.snapshot_list().names().unwrap().is_empty());
    opened.assert_well();
}

#[test]
fn prepare_revert_refuses_a_manual_disk_without_an_image_from_the_hook() {
    let opened = Opened::start(&two_disks(&Binary::all()[0]));
    let storage = Storage::copying().install(&opened.handle);
    opened.create(&request("s"), INSTANTLY).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let hooked = |hook: Option<&dyn StorageHook>| {
        let options =
            RevertOptions { directory: Some(directory.path()), hook, ..RevertOptions::default() };
        prepare_revert_with(&opened.state_dir(), "s", options)
    };
    let before = files_below(opened.guest.directory());
    let plain = prepare_revert(&opened.state_dir(), "s", Some(directory.path()));
    assert_error(plain, Code::OperationUnsupported, "'vd1'");
    assert_error(hooked(None), Code::OperationUnsupported, "'vd1'");
    assert_error(
        hooked(Some(&Storage::new(|| Err("it is gone".into())))),
        Code::OperationFailed,
        "it is gone",
    );
    assert_error(hooked(Some(&ImagelessHook)), Code::OperationFailed, "named 0 images");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(files_below(opened.guest.directory()), before);

    let plan = hooked(Some(&*storage)).unwrap();
    let (vd0, vd1) = (&plan.disks[0], &plan.disks[1]);
    assert_eq!((vd0.name.as_str(), vd0.format.as_str()), ("vd0", "qcow2"));
    assert_eq!((vd1.name.as_str(), vd1.format.as_str(), &vd1.backing_file), ("vd1", "raw", &None));
    assert_eq!(vd1.file, Path::new(&format!("{}.s.0", opened.guest.disks()[1].file.display())));
    // The image cannot be loaded without that disk.
    let one = machine(&Binary::all()[0], 1).for_revert(&images(&plan)[..1]).start();
    let clone = Handle::open_qmp(&one.qmp(), None, &opened.state_dir()).unwrap();
    assert_error(clone.load("s", 0), Code::ConfigUnsupported, "no disk 'vd1'");
}

/// A hook that names no image.
struct ImagelessHook;

impl StorageHook for ImagelessHook {
    fn snapshot(&self, _: &StorageCall) -> Answer<()> {
        unreachable!("it is for reverting")
    }

    fn revert(&self, _: &StorageCall) -> Answer<Vec<PathBuf>> {
        Ok(Vec::new())
    }
}

/// A domain whose `vdb` libvirt does not snapshot.
fn domain(daemon: &Daemon) -> OpenedDomain {
    let machine = two_disks(&Binary::all()[0]).disk_attributes("snapshot='manual'");
    OpenedDomain::start(&machine, daemon)
}

/// Rebases the clone's overlay of `vdb` onto the hook's copy.
fn on_copy(xml: String, copy: &str) -> String {
    let overlay = xml
        .split('\'')
        .find(|word| word.ends_with("/overlay-vdb.qcow2"))
        .expect("an overlay of vdb");
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", copy, overlay]);
    xml
}

fn source(guest: &Guest, target: &str) -> String {
    let list = guest.virsh("domblklist", &[]);
    let line = list.lines().find(|line| line.trim().starts_with(target)).expect("the disk");
    line.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn hook_snapshots_disks_of_a_libvirt_domain() {
    let daemon = Daemon::session();
    let opened = domain(&daemon);
    let storage = Storage::copying().install(&opened.handle);
    opened.handle.create(&opened.xml("s", ""), INSTANTLY | NO_METADATA, &mut ()).unwrap();
    let disk = storage.calls()[0].disks[0].clone();
    assert_eq!(
        (disk.name.as_str(), disk.source.as_str()),
        ("vdb", source(&opened.guest, "vdb").as_str())
    );
    assert!(source(&opened.guest, "vda").ends_with(".s"));
    assert!(opened.find("s").is_none());
    opened.guest.wait_ticks(3);

    let copy = copy_of(&disk, "s");
    let clone =
        daemon.another().restore_edited(opened.guest.machine(), &opened.memory_file("s"), |xml| {
            on_copy(xml, &copy)
        });
    clone.wait_ticks(5);
    drop(clone);

    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            opened.handle.cancel().unwrap();
        }
    });
    let xml = opened.xml("t", "");
    opened.assert_fails_observed(
        &xml,
        INSTANTLY | NO_METADATA,
        &mut observer,
        Code::OperationAborted,
        &[],
    );
    assert_eq!(storage.undone(), ["t"]);
}

#[test]
fn domain_snapshot_that_libvirt_would_take_without_the_hook_is_refused() {
    let daemon = Daemon::session();
    let opened = domain(&daemon);
    let xml = opened.xml("s", "");
    let hook = ["'vdb'", "instantsnap_set_storage_hook()"];
    opened.assert_fails(&xml, INSTANTLY | NO_METADATA, Code::OperationUnsupported, &hook);
    let storage = Storage::copying().install(&opened.handle);
    let flag = ["'vdb'", "VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA"];
    opened.assert_fails(&xml, INSTANTLY, Code::OperationUnsupported, &flag);
    opened.guest.virsh("suspend", &[]);
    for flags in [INSTANTLY, INSTANTLY | NO_METADATA] {
        opened.assert_fails(&xml, flags, Code::OperationUnsupported, &["'vdb'", "paused"]);
    }
    opened.guest.virsh("resume", &[]);
    assert!(storage.calls().is_empty());
    // The request can ask for an external snapshot of that disk.
    let external = opened.xml("s", "<disks><disk name='vdb' snapshot='external'/></disks>");
    opened.handle.create(&external, INSTANTLY, &mut ()).unwrap();
    assert!(opened.find("s").is_some() && storage.calls().is_empty());
}

/// A storage snapshot would lack the data that is only in the host's page cache.
#[test]
fn disk_with_cache_unsafe_is_flushed_before_the_hook_is_called() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image").display().to_string();
    make_image(Path::new(&image), Format::Raw, None);
    let drive = format!("if=none,id=vd1,format=raw,cache=unsafe,file={image}");
    let machine = ["-drive", &drive, "-device", "virtio-blk-pci,id=vd1,drive=vd1"];
    let machine =
        machine.iter().fold(Machine::new(&Binary::all()[0]), |machine, arg| machine.arg(arg));
    let opened = Opened::start(&machine);
    let (left, file) = (Arc::new(Mutex::new(Vec::new())), image.clone());
    let look = {
        let left = Arc::clone(&left);
        move || {
            left.lock().unwrap().push(unwritten(&file));
            Ok(())
        }
    };
    Storage::new(look).install(&opened.handle);
    let mut before = None;
    let mut write = At(|phase| {
        if phase == Phase::Pause {
            // After the library's last flush.
            opened.guest.wait_ticks(3);
            before = unwritten(&image);
        }
    });
    opened.handle.create(&request("s"), INSTANTLY, &mut write).unwrap();
    match before {
        None => skip("this kernel does not tell what it has not written"),
        Some(0) => skip("on this file system, or by now, all of it is written"),
        Some(_) => assert_eq!(*left.lock().unwrap(), [Some(0)]),
    }
}
