// SPDX-License-Identifier: LGPL-2.1-or-later

//! A snapshot that fails leaves everything as it was, and its error names the cause.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    At, INSTANTLY, Opened, Trace, assert_error, assert_untouched, machine, named, through_proxy,
};
use instantsnap::engine::Phase;
use instantsnap::error::Code;
use instantsnap::image::Format as ImageFormat;
use instantsnap_testkit::{
    Attach, Binary, Client, DEADLINE, Fault, Format, Machine, Proxy, skip, test, wait_for,
};
use rustix::process::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A `<domainsnapshot>` with these files.
fn with_files(name: &str, memory: Option<&Path>, overlays: &[(&str, &Path)]) -> String {
    let memory = memory.map_or(String::new(), |file| {
        format!("<memory snapshot='external' file='{}'/>", file.display())
    });
    let disk = |(disk, file): &(&str, &Path)| {
        format!(
            "<disk name='{disk}' snapshot='external'><source file='{}'/></disk>",
            file.display()
        )
    };
    let disks: String = overlays.iter().map(disk).collect();
    format!("<domainsnapshot><name>{name}</name>{memory}<disks>{disks}</disks></domainsnapshot>")
}

/// A small file system that is unmounted when this is dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// Mounts it. Skips the test where this process may not mount.
    fn mount(options: &str) -> Tmpfs {
        let directory = tempfile::Builder::new().prefix("instantsnap-tmpfs-").tempdir().unwrap();
        let run = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(directory.path())
            .output();
        match run {
            Ok(run) if run.status.success() => Tmpfs(directory),
            other => skip(format!("no file system can be mounted here ({other:?})")),
        }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    #[track_caller]
    fn assert_empty(&self) {
        let entries: Vec<_> =
            self.0.path().read_dir().unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(entries.is_empty(), "{entries:?}");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A lazy unmount works while a QEMU still uses it.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn run(client: &mut Client, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
}

#[test]
fn existing_snapshot_name_is_refused() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        opened.snapshot("taken").unwrap();
        for flags in [INSTANTLY, 0] {
            opened.assert_fails(
                &named("taken"),
                flags,
                Code::OperationInvalid,
                &["'taken' already exists"],
            );
        }
        opened.assert_well();
        // The existing snapshot is not harmed.
        opened.restore_clone("taken");
    }
}

#[test]
fn existing_files_are_refused_and_not_touched() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let directory = opened.guest.directory().to_owned();
        let write = |path: &Path| std::fs::write(path, "a user's file").unwrap();
        let read = |path: &Path| std::fs::read(path).unwrap();

        // The overlay of the second disk exists, so that the library must remove the first disk's.
        let overlay = directory.join("disk-1.taken");
        write(&overlay);
        let parts = ["already exists", overlay.to_str().unwrap(), "'vd1'"];
        for flags in [INSTANTLY, 0] {
            opened.assert_fails(&named("taken"), flags, Code::ConfigUnsupported, &parts);
        }
        let elsewhere = directory.join("elsewhere");
        write(&elsewhere);
        let xml = with_files("s", None, &[("vd1", &elsewhere)]);
        let parts = ["already exists", elsewhere.to_str().unwrap(), "'vd1'"];
        opened.assert_fails(&xml, INSTANTLY, Code::ConfigUnsupported, &parts);

        let memory = opened.state_dir().join("taken-memory.mem");
        write(&memory);
        let parts = ["memory snapshot file", "already exists", memory.to_str().unwrap()];
        for flags in [INSTANTLY, 0] {
            opened.assert_fails(&named("taken-memory"), flags, Code::ConfigUnsupported, &parts);
        }
        // A dangling symbolic link counts as a file too.
        let link = directory.join("link");
        std::os::unix::fs::symlink(directory.join("nowhere"), &link).unwrap();
        let xml = with_files("s", Some(&link), &[]);
        opened.assert_fails(
            &xml,
            INSTANTLY,
            Code::ConfigUnsupported,
            &["already exists", link.to_str().unwrap()],
        );
        let xml = with_files("s", None, &[("vd0", &link)]);
        opened.assert_fails(
            &xml,
            INSTANTLY,
            Code::ConfigUnsupported,
            &["already exists", link.to_str().unwrap()],
        );
        assert!(!directory.join("nowhere").exists());

        for file in [&overlay, &elsewhere, &memory] {
            assert_eq!(read(file), b"a user's file");
        }
        opened.assert_well();
    }
}

#[test]
fn error_names_a_missing_directory() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let file = opened.guest.directory().join("no-such-directory/file");
        let parts = ["No such file or directory", file.to_str().unwrap()];
        for flags in [INSTANTLY, 0] {
            opened.assert_fails(
                &with_files("s", Some(&file), &[]),
                flags,
                Code::SystemError,
                &parts,
            );
            opened.assert_fails(
                &with_files("s", None, &[("vd1", &file)]),
                flags,
                Code::SystemError,
                &parts,
            );
        }
        opened.assert_well();
    }
}

#[test]
fn error_names_a_path_that_is_not_writable() {
    // Root can write everywhere but on a read-only file system.
    let tmpfs = geteuid().is_root().then(|| Tmpfs::mount("ro"));
    let sealed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(sealed.path(), std::fs::Permissions::from_mode(0o500)).unwrap();
    let file = match &tmpfs {
        Some(tmpfs) => tmpfs.path("file"),
        None => sealed.path().join("file"),
    };
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let parts = [
            file.to_str().unwrap(),
            if tmpfs.is_some() { "Read-only file system" } else { "ermission denied" },
        ];
        opened.assert_fails(
            &with_files("s", Some(&file), &[]),
            INSTANTLY,
            Code::SystemError,
            &parts,
        );
        opened.assert_fails(
            &with_files("s", None, &[("vd1", &file)]),
            INSTANTLY,
            Code::SystemError,
            &parts,
        );
        opened.assert_well();
    }
}

/// The guest has run on its overlays for a while when the memory image fills the file system. What
/// the guest wrote is merged into its images while it runs.
#[test]
fn memory_image_that_fills_the_file_system_is_undone() {
    let tmpfs = Tmpfs::mount("size=4m");
    let memory = tmpfs.path("memory");
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2).append("dense=16"));
        for flags in [INSTANTLY, 0] {
            let mut at_drain = None;
            let mut observer = At(|phase| {
                if phase == Phase::Drain {
                    at_drain = Some(opened.guest.wait_ticks(5));
                }
            });
            let parts = ["No space left on device", memory.to_str().unwrap()];
            let xml = with_files("s", Some(&memory), &[]);
            opened.assert_fails_observed(&xml, flags, &mut observer, Code::SystemError, &parts);
            // A non-live snapshot does not reach the drain.
            assert_eq!(at_drain.is_some(), flags == INSTANTLY);
            opened.guest.wait_ticks(common::ALL_SECTORS);
            tmpfs.assert_empty();
        }
        opened.assert_well();
    }
}

/// There is no room even for the header of the image.
#[test]
fn error_names_a_full_file_system() {
    let tmpfs = Tmpfs::mount("size=4k");
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let memory = tmpfs.path("memory");
        let parts = ["No space left on device", memory.to_str().unwrap()];
        opened.assert_fails(
            &with_files("s", Some(&memory), &[]),
            INSTANTLY,
            Code::SystemError,
            &parts,
        );
        // QEMU itself formats the overlay.
        let overlay = tmpfs.path("overlay");
        let parts = ["No space left on device", overlay.to_str().unwrap(), "'vd1'"];
        opened.assert_fails(
            &with_files("s", None, &[("vd1", &overlay)]),
            INSTANTLY,
            Code::OperationFailed,
            &parts,
        );
        tmpfs.assert_empty();
        opened.assert_well();
    }
}

/// The file system has room for some of the image: the disk is full in the middle of the drain.
#[test]
fn image_of_any_format_that_fills_its_file_system_is_undone_and_the_guest_runs_on() {
    let tmpfs = Tmpfs::mount("size=200k");
    let memory = tmpfs.path("memory");
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        for format in ["raw", "zstd", "sparse"] {
            let before = opened.trace();
            let result = opened.handle.create_as(
                ImageFormat::named(format),
                &with_files("s", Some(&memory), &[]),
                INSTANTLY,
                &mut (),
            );
            let error = result.map(drop).expect_err(format);
            assert_eq!(error.code, Code::SystemError, "{format}: {error}");
            for part in ["No space left on device", memory.to_str().unwrap()] {
                assert!(error.message.contains(part), "{format}: {error}");
            }
            tmpfs.assert_empty();
            opened.guest.wait_ticks(3);
            assert_untouched(&opened, &before);
        }
        opened.assert_well();
    }
}

/// The memory image and the overlay fill one file system, and QEMU stops the guest at a write that
/// finds no space. The guest must run again.
#[test]
fn guest_stopped_by_a_full_overlay_runs_again() {
    let tmpfs = Tmpfs::mount("size=2m");
    let (memory, overlay) = (tmpfs.path("memory"), tmpfs.path("overlay"));
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2).append("dense=16"));
        let mut stopped = false;
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                let mut control = opened.guest.control();
                let status = |control: &mut Client| {
                    run(control, "query-status", json!({}))["status"].clone()
                };
                stopped = wait_for(DEADLINE, || (status(&mut control) == "io-error").then_some(()))
                    .is_some();
            }
        });
        let xml = with_files("s", Some(&memory), &[("vd0", &overlay)]);
        let parts = ["No space left on device", memory.to_str().unwrap()];
        opened.assert_fails_observed(&xml, INSTANTLY, &mut observer, Code::SystemError, &parts);
        assert!(stopped, "the guest must have run into the full file system");
        tmpfs.assert_empty();
        opened.assert_well();
    }
}

/// The same where memory is on another file system, and is saved completely: the guest could not
/// continue on its overlay.
#[test]
fn snapshot_fails_when_its_overlay_is_full() {
    let tmpfs = Tmpfs::mount("size=400k");
    let overlay = tmpfs.path("overlay");
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2));
        let mut observer = At(|phase| {
            if phase == Phase::Drain {
                let mut control = opened.guest.control();
                wait_for(DEADLINE, || {
                    (run(&mut control, "query-status", json!({}))["status"] == "io-error")
                        .then_some(())
                })
                .unwrap_or_else(|| opened.guest.fail("the overlay has room enough"));
            }
        });
        let xml = with_files("s", None, &[("vd0", &overlay)]);
        opened.assert_fails_observed(
            &xml,
            INSTANTLY,
            &mut observer,
            Code::OperationFailed,
            &["io-error", "full"],
        );
        tmpfs.assert_empty();
        opened.assert_well();
    }
}

#[test]
fn device_that_cannot_be_migrated_is_refused_with_qemus_reason() {
    let shared = tempfile::tempdir().unwrap();
    let fat = format!("if=none,id=fat,format=raw,file=fat:rw:{}", shared.path().display());
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1).arg("-drive").arg(&fat));
        for flags in [INSTANTLY, 0] {
            let parts =
                ["memory cannot be saved", "vvfat (rw) format", "does not support live migration"];
            opened.assert_fails(&named("s"), flags, Code::ConfigUnsupported, &parts);
        }
        opened.guest.wait_ticks(common::ALL_SECTORS);
    }
}

#[test]
fn qemu_without_userfaultfd_supports_non_live_snapshots_only() {
    let allowed =
        std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let device_open = Path::new("/dev/userfaultfd")
        .metadata()
        .is_ok_and(|it| it.permissions().mode() & 0o006 != 0);
    if !geteuid().is_root() || allowed.trim() != "0" || device_open {
        skip("needs root, vm.unprivileged_userfaultfd=0 and a /dev/userfaultfd of root's");
    }
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2).run_as(65534));
        let parts = ["userfaultfd", "sysctl vm.unprivileged_userfaultfd=1", "/dev/userfaultfd"];
        opened.assert_fails(&named("s"), INSTANTLY, Code::ArgumentUnsupported, &parts);
        opened.create(&named("plain"), 0).unwrap();
        opened.guest.wait_ticks(common::ALL_SECTORS);
        opened.restore_clone("plain");
    }
}

#[test]
fn qemu_without_background_snapshots_is_refused() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        proxy.rule(
            "query-migrate-capabilities",
            1,
            Fault::EditReply(Box::new(|mut reply| {
                let list = reply["return"].as_array_mut().unwrap();
                list.retain(|capability| capability["capability"] != "background-snapshot");
                reply
            })),
        );
        let parts = ["'background-snapshot'", "not supported by this QEMU"];
        opened.assert_fails(&named("s"), INSTANTLY, Code::ArgumentUnsupported, &parts);
        assert_eq!(proxy.rules_left(), 0);
        opened.assert_well();
    }
}

#[test]
fn snapshot_is_refused_during_another_migration() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 1));
        let before = opened.trace();
        // A destination that accepts the connection and reads nothing.
        let destination = opened.guest.directory().join("destination.sock");
        let listener = std::os::unix::net::UnixListener::bind(&destination).unwrap();
        let status =
            || run(&mut opened.guest.control(), "query-migrate", json!({}))["status"].clone();
        run(
            &mut opened.guest.control(),
            "migrate",
            json!({ "uri": format!("unix:{}", destination.display()) }),
        );
        let (accepted, _) = listener.accept().unwrap();
        wait_for(DEADLINE, || (status() == "active").then_some(())).unwrap();
        for flags in [INSTANTLY, 0] {
            let parts = ["migration of the guest is in progress"];
            opened.assert_fails(&named("s"), flags, Code::OperationInvalid, &parts);
            assert_eq!(status(), "active");
        }
        drop((accepted, listener));
        run(&mut opened.guest.control(), "migrate_cancel", json!({}));
        wait_for(DEADLINE, || ["cancelled", "failed"].contains(&status().as_str()?).then_some(()))
            .unwrap();
        std::fs::remove_file(&destination).unwrap();
        assert_untouched(&opened, &before);
        opened.assert_well();
    }
}

/// Sets the capabilities that this QEMU accepts, one after the other, and returns their names.
fn set_capabilities(client: &mut Client, names: &[String]) -> Vec<String> {
    let set = |name: &&String| {
        let capability = json!([{ "capability": name, "state": true }]);
        client.execute("migrate-set-capabilities", json!({ "capabilities": capability })).is_ok()
    };
    names.iter().filter(set).cloned().collect()
}

fn unset_capabilities(client: &mut Client, names: &[String]) {
    let list: Vec<_> =
        names.iter().map(|name| json!({ "capability": name, "state": false })).collect();
    run(client, "migrate-set-capabilities", json!({ "capabilities": list }));
}

/// Takes snapshots that fail and snapshots that succeed, and asserts that neither changes QEMU's
/// settings.
fn assert_settings_survive(opened: &Opened, proxy: &Proxy, name: &str) {
    let settings = |trace: &Trace| {
        let part = |part| trace.qemu.0[part].clone();
        (part("capabilities"), part("parameters"), part("status"))
    };
    let before = opened.trace();
    for flags in [INSTANTLY, 0] {
        for command in ["migrate", "transaction"] {
            proxy.rule(command, 1, Fault::fail("not today"));
            opened.assert_fails(&named("s"), flags, Code::OperationFailed, &["not today"]);
            assert_eq!(proxy.rules_left(), 0);
        }
        let name = format!("{name}-{flags}");
        opened.create(&named(&name), flags).unwrap();
        assert_eq!(settings(&before), settings(&opened.trace()));
        opened.guest.wait_ticks(3);
        opened.restore_clone(&name);
    }
}

#[test]
fn snapshot_works_with_any_migration_settings_and_keeps_them() {
    for binary in Binary::any() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let mut control = opened.guest.control();
        let parameters = run(&mut control, "query-migrate-parameters", json!({}));
        let odd = json!({
            "max-bandwidth": 1 << 20,
            "downtime-limit": 17,
            "multifd-channels": 5,
            "xbzrle-cache-size": 1 << 20,
            "cpu-throttle-initial": 33,
            "max-postcopy-bandwidth": 12345,
            "announce-rounds": 2,
            "tls-creds": "no-such-object",
            "tls-hostname": "nowhere",
            "mode": "cpr-reboot",
            "zero-page-detection": "none",
            "direct-io": true,
            "multifd-compression": "zlib",
        });
        let known =
            odd.as_object().unwrap().iter().filter(|(name, _)| parameters.get(*name).is_some());
        let odd: serde_json::Map<_, _> =
            known.map(|(name, value)| (name.clone(), value.clone())).collect();
        run(&mut control, "migrate-set-parameters", Value::Object(odd));

        let capabilities = run(&mut control, "query-migrate-capabilities", json!({}));
        let capabilities = capabilities.as_array().unwrap().iter();
        let names: Vec<_> =
            capabilities.map(|it| it["capability"].as_str().unwrap().to_owned()).collect();
        let some = |wanted: &[&str]| {
            names.iter().filter(|it| wanted.contains(&&***it)).cloned().collect::<Vec<_>>()
        };
        let others: Vec<_> =
            names.iter().filter(|name| *name != "background-snapshot").cloned().collect();
        let reversed: Vec<_> = others.iter().rev().cloned().collect();
        let sets = [
            // Capabilities that exclude each other are in one of these two sets.
            others,
            reversed,
            some(&["multifd", "return-path", "events", "zero-copy-send"]),
            some(&["postcopy-ram", "postcopy-preempt", "release-ram", "pause-before-switchover"]),
            // Another client left it on.
            some(&["background-snapshot"]),
        ];
        drop(control);
        for (index, set) in sets.iter().enumerate() {
            let set = set_capabilities(&mut opened.guest.control(), set);
            eprintln!("{}: {set:?}", binary.name);
            assert!(!set.is_empty());
            assert_settings_survive(&opened, &proxy, &format!("set-{index}"));
            unset_capabilities(&mut opened.guest.control(), &set);
        }
        opened.guest.wait_ticks(common::ALL_SECTORS);
    }
}

/// Mistakes of the caller about the disks are found before anything is touched.
#[test]
fn request_that_does_not_match_the_guests_disks_is_refused() {
    for binary in Binary::any() {
        let opened = Opened::start(&machine(binary, 2).attach(Attach::Blockdev));
        let directory = opened.guest.directory().to_owned();
        let same = directory.join("same");
        let both = with_files("s", None, &[("vd0", &same), ("vd1", &same)]);
        let parts = ["'vd0'", "'vd1'", same.to_str().unwrap()];
        opened.assert_fails(&both, INSTANTLY, Code::ConfigUnsupported, &parts);
        let memory = with_files("s", Some(&same), &[("vd1", &same)]);
        let parts = ["'vd1'", "memory", same.to_str().unwrap()];
        opened.assert_fails(&memory, INSTANTLY, Code::ConfigUnsupported, &parts);
        let unknown = with_files("s", None, &[("vd9", &same)]);
        opened.assert_fails(&unknown, INSTANTLY, Code::ConfigUnsupported, &["'vd9'", "vd0", "vd1"]);
        opened.assert_well();
    }
}

#[test]
fn error_names_a_missing_state_directory() {
    let binary = &Binary::all()[0];
    let opened = Opened::start(&Machine::new(binary).disk(Format::Raw));
    let (state, away) = (opened.state_dir(), opened.guest.directory().join("away"));
    std::fs::rename(&state, &away).unwrap();
    let before = opened.trace();
    assert_error(opened.snapshot("s"), Code::SystemError, state.to_str().unwrap());
    assert_untouched(&opened, &before);
    std::fs::rename(&away, &state).unwrap();
    opened.assert_well();
}
