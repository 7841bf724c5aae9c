// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU is killed in the middle of a snapshot. Nothing of the snapshot is left, and the guest's
//! images are sound and have everything that the guest wrote.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use common::{At, INSTANTLY, Opened, QEMU_IMG, named, qemu_img_stand_in, through_proxy};
use instantsnap::engine::Phase;
use instantsnap::error::{Code, Error};
use instantsnap_testkit::{Binary, Disk, Fault, Format, Guest, Machine, test};
use serde_json::json;

/// These match `tests/guest/tick.c`.
const SECTOR: usize = 512;
const FIXED_SECTOR: usize = 8;
const ROTATION: u32 = 64;
const ROTATION_START: usize = 1024;
const ROTATION_STRIDE: usize = 128;

/// What a tick guest has written to a disk.
pub struct Content {
    fixed: u32,
    rotating: Vec<u32>,
}

impl Content {
    /// Reads the disk, and asserts that each sector is whole.
    #[track_caller]
    pub fn read(disk: &Disk, index: u32) -> Content {
        let raw = disk.file.with_extension("read");
        common::run(
            "qemu-img",
            &[
                "convert",
                "-f",
                disk.format.name(),
                "-O",
                "raw",
                disk.file.to_str().unwrap(),
                raw.to_str().unwrap(),
            ],
        );
        let bytes = std::fs::read(&raw).unwrap();
        std::fs::remove_file(&raw).unwrap();
        let number = |sector: usize| {
            let word = |word: usize| {
                let at = sector * SECTOR + word * 4;
                u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
            };
            assert_eq!(word(0), word(SECTOR / 4 - 1), "disk {index}, sector {sector} is torn");
            // A sector that was never written does not have the disk's number.
            assert!(
                word(1) == index || word(0) == 0,
                "disk {index}, sector {sector} is not its own"
            );
            word(0)
        };
        let rotating = (0..ROTATION as usize).map(|n| number(ROTATION_START + n * ROTATION_STRIDE));
        Content { fixed: number(FIXED_SECTOR), rotating: rotating.collect() }
    }

    /// Asserts that the disk is as the guest had written it when it printed `tick`, without later
    /// writes.
    #[track_caller]
    pub fn assert_at(&self, tick: u32) {
        assert!(
            (tick..=tick + 1).contains(&self.fixed),
            "{} is on the disk, {tick} was said last",
            self.fixed
        );
        for (n, &has) in self.rotating.iter().enumerate() {
            // The last number that belongs to this sector, up to the one in the fixed sector, which
            // the guest writes first.
            let n = n as u32;
            let last = if n > self.fixed { 0 } else { self.fixed - (self.fixed - n) % ROTATION };
            let before = last.saturating_sub(ROTATION);
            let right = has == last || last == self.fixed && has == before;
            assert!(right, "sector {n} has {has} want {last}, {} is in the fixed one", self.fixed);
        }
    }
}

/// The files below the guest's directory.
fn files(opened: &Opened) -> Vec<PathBuf> {
    common::files_below(opened.guest.directory())
}

/// Socket files outlive a killed QEMU, so the files are compared with those before the snapshot.
#[track_caller]
fn assert_nothing_left(opened: &Opened, before: &[PathBuf]) {
    assert_eq!(files(opened), before);
    assert_eq!(opened.handle.store().unwrap().list().unwrap(), []);
    for disk in opened.guest.disks() {
        if disk.format == Format::Qcow2 {
            let info =
                common::run("qemu-img", &["info", "--output=json", disk.file.to_str().unwrap()]);
            assert!(!info.contains("backing-filename"), "{info}");
            // Leaked clusters (exit status 3) do no harm: QEMU could not finish.
            let check =
                Command::new("qemu-img").args(["check", "-q"]).arg(&disk.file).status().unwrap();
            assert!([Some(0), Some(3)].contains(&check.code()), "{check}");
        }
    }
}

/// Starts the same machine again on the images as they are.
pub fn start_cold(binary: &'static Binary, guest: &Guest) {
    let disks = guest.disks().iter();
    let machine =
        disks.fold(Machine::new(binary), |machine, disk| machine.disk_on(&disk.file, disk.format));
    machine.start().wait_ticks(3);
}

fn start(binary: &'static Binary) -> Opened {
    Opened::start(&common::machine(binary, 2))
}

/// Data that QEMU has not passed to the kernel is lost when QEMU is killed, and on a qcow2 image
/// that can be much. QEMU has passed on all of it once it has stopped the guest.
pub fn stop(guest: &Guest) -> u32 {
    guest.control().execute("stop", json!({})).unwrap();
    guest.serial().tick.unwrap()
}

fn assert_says_that_qemu_has_gone(error: &Error) {
    assert_eq!(error.code, Code::OperationFailed, "{error}");
    // The second message is that of a driver's callback.
    let said = [
        "lost the connection to QEMU",
        "the driver's callback failed: QEMU has closed its monitor",
    ];
    assert!(said.iter().any(|said| error.message.contains(said)), "{error}");
    assert!(!error.message.contains("must not be removed"), "{error}");
}

/// Kills QEMU at the start of a phase.
fn killed_in(phase: Phase, flags: u32) {
    for binary in Binary::some() {
        let opened = start(binary);
        let before = files(&opened);
        let mut killed = false;
        let mut observer = At(|now| {
            if now == phase {
                opened.guest.kill();
                killed = true;
            }
        });
        let error =
            opened.handle.create(&named("s"), flags, &mut observer).expect_err("QEMU was killed");
        eprintln!("{} {phase:?}: {error}", binary.name);
        assert!(killed);
        assert_says_that_qemu_has_gone(&error);
        assert_nothing_left(&opened, &before);
        // QEMU passes a write to a raw image on at once.
        let content = Content::read(&opened.guest.disks()[0], 0);
        if ![Phase::Drain, Phase::Finish].contains(&phase) {
            content.assert_at(opened.guest.serial().tick.unwrap());
        }
        Content::read(&opened.guest.disks()[1], 1);
        start_cold(binary, &opened.guest);
    }
}

#[test]
fn qemu_killed_while_overlays_are_prepared() {
    killed_in(Phase::Prepare, INSTANTLY);
}

#[test]
fn qemu_killed_before_the_pause() {
    killed_in(Phase::Pause, INSTANTLY);
}

#[test]
fn qemu_killed_before_the_switch() {
    killed_in(Phase::Switch, INSTANTLY);
}

#[test]
fn qemu_killed_between_the_switch_and_the_instant() {
    killed_in(Phase::Arm, INSTANTLY);
}

#[test]
fn qemu_killed_before_a_non_live_snapshot_is_saved() {
    killed_in(Phase::Arm, 0);
}

#[test]
fn qemu_killed_in_the_drain() {
    killed_in(Phase::Drain, INSTANTLY);
}

#[test]
fn qemu_killed_in_the_finish_phase() {
    killed_in(Phase::Finish, INSTANTLY);
}

/// What the guest has written since the instant is in its overlays. It is the guest's data, and
/// must be in its images afterwards.
#[test]
fn guest_writes_since_the_instant_are_merged_when_qemu_is_killed() {
    for phase in [Phase::Drain, Phase::Finish] {
        for binary in Binary::some() {
            let opened = start(binary);
            let before = files(&opened);
            let mut ticks = BTreeMap::new();
            let mut observer = At(|now| {
                if now == Phase::Arm {
                    ticks.insert("instant", opened.guest.serial().tick.unwrap());
                }
                if now == phase {
                    // By then the guest has written nearly every sector.
                    opened.guest.wait_ticks(60);
                    ticks.insert("killed", stop(&opened.guest));
                    opened.guest.kill();
                }
            });
            let error = opened
                .handle
                .create(&named("s"), INSTANTLY, &mut observer)
                .expect_err("QEMU was killed");
            assert_says_that_qemu_has_gone(&error);
            assert_nothing_left(&opened, &before);
            assert!(ticks["killed"] >= ticks["instant"] + 60);
            for (index, disk) in opened.guest.disks().iter().enumerate() {
                Content::read(disk, index as u32).assert_at(ticks["killed"]);
            }
            start_cold(binary, &opened.guest);
        }
    }
}

/// Kills QEMU after it has executed a command and before it replies.
fn killed_after(command: &str, flags: u32) {
    for binary in Binary::some() {
        let (opened, proxy) = through_proxy(&common::machine(binary, 2));
        let before = files(&opened);
        proxy.rule(command, 1, Fault::KillAfter(opened.guest.pid()));
        let error = opened.create(&named("s"), flags).expect_err("QEMU was killed");
        eprintln!("{} {command}: {error}", binary.name);
        assert_eq!(proxy.rules_left(), 0);
        assert_says_that_qemu_has_gone(&error);
        assert_nothing_left(&opened, &before);
        let content = Content::read(&opened.guest.disks()[0], 0);
        if command != "migrate" {
            content.assert_at(opened.guest.serial().tick.unwrap());
        }
        Content::read(&opened.guest.disks()[1], 1);
        start_cold(binary, &opened.guest);
    }
}

#[test]
fn qemu_killed_after_blockdev_create() {
    killed_after("blockdev-create", INSTANTLY);
}

#[test]
fn qemu_killed_after_stop() {
    killed_after("stop", INSTANTLY);
}

#[test]
fn qemu_killed_after_the_switch() {
    killed_after("transaction", INSTANTLY);
}

#[test]
fn qemu_killed_after_migrate() {
    killed_after("migrate", INSTANTLY);
    killed_after("migrate", 0);
}

/// Kills QEMU in the drain, after the guest has written to its overlays, and calls `before_merge`.
fn fail_to_merge(opened: &Opened, mut before_merge: impl FnMut()) -> (Error, u32) {
    let mut tick = 0;
    let mut observer = At(|phase| {
        if phase == Phase::Drain {
            opened.guest.wait_ticks(60);
            tick = stop(&opened.guest);
            opened.guest.kill();
            before_merge();
        }
    });
    let error =
        opened.handle.create(&named("s"), INSTANTLY, &mut observer).expect_err("QEMU was killed");
    (error, tick)
}

#[test]
fn killed_merge_keeps_the_overlays_when_the_caller_ignores_sigchld() {
    let stand_in = tempfile::tempdir().unwrap();
    let script = "#!/bin/sh\n[ \"$1\" = commit ] && kill -9 $$\nexec /usr/bin/qemu-img \"$@\"\n";
    let qemu_img = qemu_img_stand_in(stand_in.path(), script);
    for binary in Binary::some() {
        let opened = start(binary);
        // SAFETY: this process runs this test only. The harness's threads wait, and the library's
        // threads do not read the environment meanwhile. The process waits for no child of its own
        // while SIGCHLD is ignored.
        let (error, tick) = fail_to_merge(&opened, || unsafe {
            std::env::set_var(QEMU_IMG, &qemu_img);
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        });
        // SAFETY: as above.
        unsafe {
            std::env::remove_var(QEMU_IMG);
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        }
        for part in ["must not be removed", "SIGKILL"] {
            assert!(error.message.contains(part), "{part}: {error}");
        }
        for (index, disk) in opened.guest.disks().iter().enumerate() {
            let overlay = opened.guest.directory().join(format!("disk-{index}.s"));
            common::run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
            Content::read(disk, index as u32).assert_at(tick);
        }
    }
}

#[test]
fn merged_overlay_that_another_qemu_has_opened_is_not_removed() {
    let binary = &Binary::any()[0];
    let opened = start(binary);
    let stand_in = tempfile::tempdir().unwrap();
    let overlay = |index: usize| opened.guest.directory().join(format!("disk-{index}.s"));
    // The script continues when qemu-nbd has the image open.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = commit ] || exec /usr/bin/qemu-img \"$@\"\n/usr/bin/qemu-img \"$@\" \
         || exit\n[ -e {0}/pid ] || qemu-nbd -f qcow2 -t -k {0}/nbd --fork --pid-file={0}/pid {1} \
         </dev/null >{0}/said 2>&1\n",
        stand_in.path().display(),
        overlay(0).display()
    );
    let qemu_img = qemu_img_stand_in(stand_in.path(), &script);
    // SAFETY: this process runs this test only. The harness's threads wait, and the library's
    // threads do not read the environment.
    let (error, tick) =
        fail_to_merge(&opened, || unsafe { std::env::set_var(QEMU_IMG, &qemu_img) });
    // SAFETY: as above.
    unsafe { std::env::remove_var(QEMU_IMG) };
    let server = std::fs::read_to_string(stand_in.path().join("pid")).expect("the other QEMU");
    assert_eq!(overlay(0).exists().then(|| overlay(1).exists()), Some(false));
    common::run("kill", &[server.trim()]);
    assert!(
        error.message.contains(&format!("another QEMU has the overlay '{}'", overlay(0).display())),
        "{error}"
    );
    for (index, disk) in opened.guest.disks().iter().enumerate() {
        Content::read(disk, index as u32).assert_at(tick);
    }
}

#[test]
fn overlays_are_kept_and_named_where_qemu_img_is_missing() {
    for binary in Binary::some() {
        let opened = start(binary);
        // SAFETY: this process runs this test only. The harness's threads wait, and the library's
        // threads do not read the environment.
        let (error, tick) =
            fail_to_merge(&opened, || unsafe { std::env::set_var(QEMU_IMG, "/nonexistent") });
        // SAFETY: as above.
        unsafe { std::env::remove_var(QEMU_IMG) };
        eprintln!("{error}");
        let directory = opened.guest.directory();
        let overlays = [directory.join("disk-0.s"), directory.join("disk-1.s")];
        for overlay in &overlays {
            assert!(error.message.contains(overlay.to_str().unwrap()), "{error}");
            assert!(overlay.exists());
        }
        for part in
            ["lost the connection", "qemu-img commit", "must not be removed", "install qemu-utils"]
        {
            assert!(error.message.contains(part), "{part}: {error}");
        }
        assert!(!opened.state_dir().join("s.mem").exists());
        assert_eq!(opened.handle.store().unwrap().list().unwrap(), []);
        // The commands that the message recommends work.
        for (index, (overlay, disk)) in overlays.iter().zip(opened.guest.disks()).enumerate() {
            common::run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
            Content::read(disk, index as u32).assert_at(tick);
        }
        start_cold(binary, &opened.guest);
    }
}
