// SPDX-License-Identifier: LGPL-2.1-or-later

//! A revert whose guest runs at once, and whose memory follows.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::backend::{by_socket_only, open, open_guest};
use common::{INSTANTLY, Opened, assert_error, assert_says, first_tick, machine, named};
use instantsnap::engine::{RevertOptions, prepare_revert, prepare_revert_with};
use instantsnap::error::Code;
use instantsnap::image::Format;
use instantsnap::model::Memory;
use instantsnap::model::flags::revert;
use instantsnap_testkit::program::process;
use instantsnap_testkit::{
    Binary, DEADLINE, Fingerprint, Format as DiskFormat, fingerprint, process, test, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A guest that has some MiB of data, and writes into each of these pages in each round.
fn restless(binary: &'static Binary, disks: usize) -> Opened {
    Opened::start(&machine(binary, disks).append("dense=8"))
}

/// Takes a snapshot with a sparse image.
fn snapshot(opened: &Opened, name: &str) {
    opened.handle.create_as(Some(Format::Sparse), &named(name), INSTANTLY, &mut ()).unwrap();
}

/// Starts a clone, and loads it lazily.
fn load(opened: &Opened, name: &str, flags: u32, bandwidth: Option<u64>) -> Opened {
    let clone = opened.start_clone(name);
    let loaded = clone.handle.load_lazily(name, flags, bandwidth);
    let loaded = loaded.unwrap_or_else(|error| clone.guest.fail(&error.message));
    assert_eq!(loaded.memory, Memory::Lazy);
    clone
}

/// The word by which the page servers of a guest are known, from QEMU's own record of them.
fn token(clone: &Opened) -> String {
    let parameters = clone.guest.control().execute("query-migrate-parameters", json!({})).unwrap();
    let record = parameters["tls-hostname"].as_str().unwrap().strip_prefix("instantsnap: ");
    let record: Value = serde_json::from_str(record.expect("there is a record")).unwrap();
    record["lazy"]["token"].as_str().unwrap().to_owned()
}

/// The page server and its spare.
fn servers(token: &str) -> Vec<Pid> {
    let is_it = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(token))
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_it).filter_map(|pid| Pid::from_raw(pid as i32)).collect()
}

/// Waits until both of them are there, and returns them: first the one that was started first.
fn both(token: &str) -> [Pid; 2] {
    wait_for(DEADLINE, || servers(token).try_into().ok()).expect("a page server has a spare")
}

fn settings(clone: &Opened) -> [Value; 2] {
    let Fingerprint(found) = fingerprint(&mut clone.guest.control());
    [found["capabilities"].clone(), found["parameters"].clone()]
}

/// Waits until all is in, and checks that nothing is left of the load.
fn settle(clone: &Opened, token: &str, before: &[Value; 2]) {
    assert!(clone.handle.wait_memory(Some(DEADLINE)).unwrap(), "all memory comes");
    assert_eq!(settings(clone), *before, "the settings are as they were found");
    assert_eq!(servers(token), []);
    let progress = clone.handle.memory_progress().unwrap();
    assert!(!progress.is_coming);
}

fn status(clone: &Opened) -> String {
    let migration = clone.guest.control().execute("query-migrate", json!({})).unwrap();
    migration["status"].as_str().unwrap_or_default().to_owned()
}

/// The guest's memory.
fn memory(clone: &Opened) -> Vec<u8> {
    let file = clone.guest.directory().join("memory");
    let size = u64::from(clone.guest.machine().memory_mib()) << 20;
    let save = json!({ "val": 0, "size": size, "filename": file });
    clone.guest.control().execute("pmemsave", save).unwrap();
    std::fs::read(file).unwrap()
}

#[test]
fn guest_counts_on_from_the_instant_and_nothing_is_left_when_all_is_in() {
    for binary in Binary::any() {
        let opened = restless(binary, 2);
        let before = opened.guest.wait_ticks(1);
        snapshot(&opened, "s");
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        // QEMU's socket pair and its monitor's clients come and go.
        let files = || clone.guest.open_files().into_iter().filter(|(name, _)| name.contains('/'));
        let open_files: Vec<_> = files().collect();
        // It is slow enough that the guest is seen to run before all is in.
        let loaded = clone.handle.load_lazily("s", 0, Some(8 << 20)).unwrap();
        assert!(loaded.running);
        let token = token(&clone);
        clone.guest.wait_ticks(0);
        assert!(clone.handle.memory_progress().unwrap().is_coming);
        assert!(first_tick(&clone.guest) >= before);
        settle(&clone, &token, &found);
        assert_eq!(status(&clone), "completed");
        assert_eq!(files().collect::<Vec<_>>(), open_files);
        clone.guest.wait_ticks(3);
        // The clone is a guest like any other: it can be snapshotted, and that be reverted to.
        snapshot(&clone_of(&opened, clone), "t");
        let second = load(&opened, "t", 0, None);
        second.guest.wait_ticks(3);
        assert!(second.handle.wait_memory(Some(DEADLINE)).unwrap());
        second.guest.wait_ticks(3);
    }
}

/// A clone, opened once more: the handle that has loaded it is not needed any more.
fn clone_of(opened: &Opened, clone: Opened) -> Opened {
    let Opened { handle, guest } = clone;
    drop(handle);
    let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
    Opened { handle, guest }
}

#[test]
fn paused_guest_has_all_of_its_memory_and_never_ran() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let whole = opened.start_clone("s");
        whole.handle.load_with("s", revert::PAUSED, Memory::Full).unwrap();
        // This QEMU was started without `-S`.
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        clone.handle.load_lazily("s", revert::PAUSED, None).unwrap();
        assert!(clone.handle.wait_memory(Some(DEADLINE)).unwrap());
        assert_eq!(settings(&clone), found);
        let (expected, loaded) = (memory(&whole), memory(&clone));
        let differs = |page: &usize| {
            let bytes = page * 4096..(page + 1) * 4096;
            expected[bytes.clone()] != loaded[bytes]
        };
        let pages: Vec<_> = (0..expected.len() / 4096).filter(differs).collect();
        assert!(pages.is_empty(), "these pages differ: {pages:?}");
        assert_eq!(clone.guest.serial().tick, None, "it ran");
        clone.guest.control().execute("cont", json!({})).unwrap();
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn page_server_that_is_killed_or_stopped_loses_nothing() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        clone.handle.load_lazily("s", 0, Some(8 << 20)).unwrap();
        let token = token(&clone);
        // One of the two is killed, at several points: the other goes on, and makes a new one.
        let mut kills = 0;
        let mut bytes = 0;
        while clone.handle.memory_progress().unwrap().is_coming {
            let Ok([first, second]) = <[Pid; 2]>::try_from(servers(&token)) else { continue };
            let _ = kill_process(if kills % 3 == 2 { second } else { first }, Signal::KILL);
            kills += 1;
            // The next one comes when some more is in.
            wait_for(DEADLINE, || {
                let progress = clone.handle.memory_progress().unwrap();
                let goes_on = progress.pages.bytes >= bytes + (1 << 20) || !progress.is_coming;
                goes_on.then(|| bytes = progress.pages.bytes)
            })
            .expect("it goes on");
        }
        assert!(kills >= 1, "{kills}");
        settle(&clone, &token, &found);
        clone.guest.wait_ticks(3);

        // A page server that is stopped makes the guest wait, and no more.
        let clone = load(&opened, "s", 0, Some(8 << 20));
        let token = self::token(&clone);
        let pair = both(&token);
        pair.iter().for_each(|pid| kill_process(*pid, Signal::STOP).unwrap());
        assert!(!clone.handle.wait_memory(Some(std::time::Duration::ZERO)).unwrap());
        pair.iter().for_each(|pid| kill_process(*pid, Signal::CONT).unwrap());
        settle(&clone, &token, &found);
        clone.guest.wait_ticks(3);
    }
}

#[test]
fn next_call_starts_another_page_server_where_both_processes_were_killed() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        // The guest is paused, so that it needs no page; a guest that runs can stop its QEMU.
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        clone.handle.load_lazily("s", revert::PAUSED, Some(1 << 20)).unwrap();
        let token = token(&clone);
        for _ in 0..2 {
            let pair = both(&token);
            for signal in [Signal::STOP, Signal::KILL] {
                pair.iter().for_each(|pid| kill_process(*pid, signal).unwrap());
            }
            wait_for(DEADLINE, || (status(&clone) == "postcopy-paused").then_some(()))
                .expect("QEMU waits");
            let refused = clone.handle.create(&named("t"), INSTANTLY, &mut ()).unwrap_err();
            assert_says(&refused, Code::OperationInvalid, &["still coming", "'s'"]);
        }
        settle(&clone, &token, &found);
        assert_same_memory(&opened, &clone);
        clone.guest.control().execute("cont", json!({})).unwrap();
        clone.guest.wait_ticks(3);
    }
}

/// Loads the same snapshot as a whole, and compares the memory.
fn assert_same_memory(opened: &Opened, clone: &Opened) {
    let whole = opened.start_clone("s");
    whole.handle.load_with("s", revert::PAUSED, Memory::Full).unwrap();
    assert!(memory(&whole) == memory(clone), "the memory is not that of the snapshot");
}

#[test]
fn refused_migration_of_another_client_does_not_hide_that_memory_is_coming() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let clone = opened.start_clone("s");
        // The rest comes at once when another page server is started.
        clone.handle.load_lazily("s", revert::PAUSED, Some(1 << 20)).unwrap();
        let token = token(&clone);
        let migrate = json!({ "uri": "exec:cat >/dev/null" });
        clone.guest.control().execute("migrate", migrate).unwrap_err();
        let refused = clone.handle.create(&named("t"), INSTANTLY, &mut ()).unwrap_err();
        assert_says(&refused, Code::OperationInvalid, &["still coming", "'s'"]);
        assert!(clone.handle.memory_progress().unwrap().is_coming);
        let pair = both(&token);
        for signal in [Signal::STOP, Signal::KILL] {
            pair.iter().for_each(|pid| kill_process(*pid, signal).unwrap());
        }
        wait_for(DEADLINE, || {
            let progress = clone.handle.memory_progress().ok()?;
            let is_in = progress.pages.total > 0 && progress.pages.bytes == progress.pages.total;
            (is_in || !progress.is_coming).then_some(())
        })
        .expect("the memory comes");
        assert_same_memory(&opened, &clone);
        // QEMU takes its settings back only when it has forgotten that migration.
        assert_eq!(self::token(&clone), token);
        clone.guest.kill();
    }
}

#[test]
fn settings_that_a_killed_load_has_left_are_not_taken_for_those_of_before() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        let before = json!({ "capabilities": [], "parameters": { "tls-hostname": "" } });
        let record = json!({ "tls-hostname": format!("instantsnap: {before}") });
        let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
        clone.guest.control().execute("migrate-set-parameters", record).unwrap();
        clone.guest.control().execute("migrate-set-capabilities", on).unwrap();
        clone.handle.load_lazily("s", revert::PAUSED, Some(8 << 20)).unwrap();
        let token = token(&clone);
        settle(&clone, &token, &found);
    }
}

#[test]
fn unreadable_part_of_the_image_is_named_and_comes_when_it_can_be_read() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let image = opened.record("s").memory_file;
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        clone.handle.load_lazily("s", revert::PAUSED, Some(8 << 20)).unwrap();
        let token = token(&clone);
        let bytes = std::fs::read(&image).unwrap();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        let middle = bytes.len() / 2;
        file.set_len(middle as u64).unwrap();
        // Several tries and page servers come before that, which takes long on a busy machine.
        let error = wait_for(4 * DEADLINE, || clone.handle.wait_memory(Some(DEADLINE)).err());
        let error = error.expect("the wait fails");
        assert_says(&error, Code::OperationFailed, &[&image, "'s'"]);
        assert!(!servers(&token).is_empty(), "it still serves what can be read");
        file.write_all_at(&bytes[middle..], middle as u64).unwrap();
        drop(file);
        wait_for(DEADLINE, || clone.handle.wait_memory(Some(DEADLINE)).ok()).expect("it comes");
        settle(&clone, &token, &found);
        assert_same_memory(&opened, &clone);
    }
}

/// The process of the next test. It loads a snapshot, and kills itself.
#[process]
fn child() {
    let path = |name| PathBuf::from(std::env::var_os(name).unwrap());
    let directory = path("INSTANTSNAP_TEST_DIRECTORY");
    let state = path("INSTANTSNAP_TEST_STATE");
    let handle = open(&directory, &directory.join("qmp.sock"), None, &state).unwrap();
    handle.load_lazily("s", 0, Some(8 << 20)).unwrap();
    kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
}

#[test]
fn killed_caller_is_not_needed_and_page_servers_end_with_qemu() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let clone = opened.start_clone("s");
        let found = settings(&clone);
        let status = process(module_path!(), "child")
            .env("INSTANTSNAP_TEST_DIRECTORY", clone.guest.directory())
            .env("INSTANTSNAP_TEST_STATE", opened.state_dir())
            .status()
            .unwrap();
        assert!(!status.success());
        let token = token(&clone);
        clone.guest.wait_ticks(3);
        settle(&clone, &token, &found);
        drop(clone);

        let clone = load(&opened, "s", 0, Some(1 << 20));
        let token = self::token(&clone);
        both(&token);
        clone.guest.kill();
        wait_for(DEADLINE, || servers(&token).is_empty().then_some(())).expect("they end");
        // The image is free again.
        drop(clone);
        opened.handle.delete("s", 0).unwrap();
    }
}

#[test]
fn nothing_else_begins_while_memory_is_coming() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let image = opened.record("s").memory_file;
        let clone = load(&opened, "s", 0, Some(1 << 20));
        let token = token(&clone);
        let before = clone.trace();
        let coming = ["still coming", "'s'", "instantsnap_memory_wait"];
        let refused = |error: instantsnap::error::Error| {
            assert_says(&error, Code::OperationInvalid, &coming);
        };
        refused(clone.handle.create(&named("t"), INSTANTLY, &mut ()).unwrap_err());
        refused(clone.handle.create(&named("t"), 0, &mut ()).unwrap_err());
        refused(clone.handle.recover().unwrap_err());
        refused(clone.handle.delete("s", 0).unwrap_err());
        assert_error(clone.handle.load("s", 0), Code::OperationInvalid, "-incoming defer");
        // The image that is being read stays as it is.
        assert_error(opened.handle.delete("s", 0), Code::OperationInvalid, "open");
        let convert = instantsnap::image::convert(Path::new(&image), Format::Raw);
        assert_error(convert, Code::OperationInvalid, &image);
        // Other clients cannot save a part of the memory.
        let migrate = json!({ "uri": "exec:cat >/dev/null" });
        clone.guest.control().execute("migrate", migrate).unwrap_err();
        assert_eq!(clone.trace().qemu, before.qemu);
        let found = clone.handle.examine();
        let settings = found.iter().find(|found| found.check == "settings").unwrap();
        assert!(settings.message.contains("still coming"), "{found:?}");
        // Without a limit it would be over: the rest is waited for.
        assert!(!servers(&token).is_empty());
        clone.guest.kill();
    }
}

#[test]
fn what_cannot_follow_is_refused_by_name_and_qemu_still_waits() {
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        opened.handle.create_as(Some(Format::Raw), &named("r"), INSTANTLY, &mut ()).unwrap();
        snapshot(&opened, "s");
        let clone = opened.start_clone("r");
        let before = clone.trace();
        for refused in [
            clone.handle.load_lazily("r", 0, None).map(drop),
            prepare_revert_with(
                &opened.state_dir(),
                "r",
                RevertOptions { memory: Memory::Lazy, ..RevertOptions::default() },
            )
            .map(drop),
        ] {
            let error = refused.unwrap_err();
            assert_says(&error, Code::ConfigUnsupported, &["'r'", "instantsnap_image_convert"]);
        }
        assert_eq!(clone.trace(), before);
        clone.handle.load("r", 0).unwrap();
        clone.guest.wait_ticks(2);

        // Memory that is a file could have an old content.
        let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
        let backend = format!(
            "memory-backend-file,id=pc.ram,size={}M,share=on,mem-path={}",
            opened.guest.machine().memory_mib(),
            opened.guest.directory().join("ram").display()
        );
        let machine = opened.guest.machine().for_revert(&disks).arg("-object").arg(&backend);
        let guest = machine.arg("-machine").arg("memory-backend=pc.ram").start();
        let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
        let clone = Opened { handle, guest };
        let before = clone.trace();
        let error = clone.handle.load_lazily("s", 0, None).unwrap_err();
        assert_says(&error, Code::ConfigUnsupported, &["'pc.ram'", "memory-backend-file"]);
        assert_eq!(clone.trace(), before);
        clone.handle.load("s", 0).unwrap();
        clone.guest.wait_ticks(2);
    }
}

#[test]
fn machine_that_differs_fails_with_the_reason_and_leaves_no_process() {
    by_socket_only();
    for binary in Binary::any() {
        let opened = restless(binary, 1);
        snapshot(&opened, "s");
        let plan = prepare_revert(&opened.state_dir(), "s", None).unwrap();
        let disks: Vec<_> =
            plan.disks.iter().map(|disk| (disk.file.clone(), DiskFormat::Qcow2)).collect();
        let guest = opened.guest.machine().for_revert(&disks).memory(32).start();
        let handle = open_guest(&guest, &guest.qmp(), None, &opened.state_dir()).unwrap();
        let error = handle.load_lazily("s", 0, None).unwrap_err();
        assert_eq!(error.code, Code::OperationFailed, "{error}");
        let said = if guest.alive() { "cannot load the memory image: " } else { "QEMU ended" };
        assert!(error.message.contains(said), "{error}");
        guest.kill();
        // The image is free.
        opened.handle.delete("s", 0).unwrap();
    }
}
