//! The command on a directory that stands for /, and on a libvirtd of the test's own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use instantsnap_testkit::{Daemon, Mode};
use tempfile::TempDir;

/// A system, as far as the command looks at it, with a library that is fit for a daemon.
struct System {
    root: TempDir,
    library: PathBuf,
}

/// The library under test: cargo has put it where it has put this program.
fn built() -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name("libinstantsnap.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

impl System {
    /// None where we are not root, to whom the library has to belong.
    fn new() -> Option<System> {
        if !rustix_is_root() {
            eprintln!("skipped: not root");
            return None;
        }
        let root = tempfile::Builder::new().prefix("instantsnap-").tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let library = root.path().join("libinstantsnap.so.0");
        fs::copy(built(), &library).unwrap();
        fs::set_permissions(&library, fs::Permissions::from_mode(0o755)).unwrap();
        Some(System { root, library })
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instantsnap"));
        command.arg("daemon").args(words).arg("--root").arg(self.root.path()).output().unwrap()
    }

    fn enable(&self, more: &[&str]) -> Output {
        self.run(&[&["enable", "--library", self.library.to_str().unwrap()], more].concat())
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn drop_in(&self, unit: &str) -> PathBuf {
        self.root.path().join(format!("etc/systemd/system/{unit}.service.d/instantsnap.conf"))
    }
}

fn rustix_is_root() -> bool {
    fs::read_to_string("/proc/self/status").unwrap().lines().any(|line| line.starts_with("Uid:\t0\t0"))
}

#[track_caller]
fn ok(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(output: &Output, part: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(part), "{output:?}");
}

#[test]
fn what_is_enabled_is_written_as_a_drop_in_and_removed_when_it_is_disabled() {
    let Some(system) = System::new() else { return };
    let said = ok(system.enable(&["--unit", "virtqemud", "--upgrade-live", "--max-snapshots", "4"]));
    assert!(said.contains("next start"), "{said}");
    let file = system.drop_in("virtqemud");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(&format!("Environment=\"LD_PRELOAD={}\"\n", system.library.display())), "{text}");
    assert!(text.contains("INSTANTSNAP_UPGRADE_LIVE=1\n") && text.contains("INSTANTSNAP_MAX_SNAPSHOTS=4\n"), "{text}");
    // Once more, and otherwise: the last word counts.
    ok(system.enable(&["--unit", "virtqemud"]));
    assert!(!fs::read_to_string(&file).unwrap().contains("UPGRADE"));
    assert!(!system.drop_in("libvirtd").exists());

    ok(system.run(&["disable", "--unit", "virtqemud"]));
    assert!(!file.parent().unwrap().exists());
    assert!(ok(system.run(&["disable", "--unit", "virtqemud"])).contains("is not to be started"));
}

#[test]
fn what_the_unit_preloads_already_stays_and_what_would_override_us_is_told() {
    let Some(system) = System::new() else { return };
    system.write(
        "usr/lib/systemd/system/libvirtd.service",
        "[Service]\nEnvironmentFile=-/etc/default/libvirtd\nEnvironment=LD_PRELOAD=/usr/lib/old.so\n",
    );
    system.write(
        "etc/systemd/system/libvirtd.service.d/own.conf",
        "[Service]\nEnvironment='LD_PRELOAD=/usr/lib/own.so'\n",
    );
    for _ in 0..2 {
        ok(system.enable(&[]));
        let text = fs::read_to_string(system.drop_in("libvirtd")).unwrap();
        let wanted = format!("LD_PRELOAD=/usr/lib/own.so:{}\"\n", system.library.display());
        assert!(text.contains(&wanted), "{text}");
    }
    ok(system.run(&["disable"]));
    assert!(system.root.path().join("etc/systemd/system/libvirtd.service.d/own.conf").exists());

    system.write("etc/default/libvirtd", "LD_PRELOAD=/usr/lib/other.so\n");
    fails(&system.enable(&[]), "etc/default/libvirtd sets LD_PRELOAD");
    assert!(!system.drop_in("libvirtd").exists());
}

#[test]
fn a_library_that_is_none_or_that_others_can_change_is_refused() {
    let Some(system) = System::new() else { return };
    let with = |library: &Path| system.run(&["enable", "--library", library.to_str().unwrap()]);
    fails(&with(Path::new("libinstantsnap.so")), "absolute path");
    fails(&with(Path::new("/nowhere/libinstantsnap.so")), "No such file");
    fails(&with(Path::new("/etc/passwd")), "is not a libinstantsnap");
    fails(&with(Path::new("/bin/true")), "is not a libinstantsnap");
    fs::set_permissions(&system.library, fs::Permissions::from_mode(0o777)).unwrap();
    fails(&system.enable(&[]), "does not belong to root alone");
    fs::set_permissions(&system.library, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(&system.library, Some(65534), None).unwrap();
    fails(&system.enable(&[]), "does not belong to root alone");
    assert!(!system.drop_in("libvirtd").exists());
}

#[test]
fn status_tells_a_daemon_that_has_the_library_from_one_that_has_not() {
    let Some(system) = System::new() else { return };
    let status = |daemon: &Daemon| system.run(&["status", "--pid", &daemon.pid().to_string()]);
    let with = Daemon::preloaded(Mode::Session, &[&system.library], &[]).unwrap();
    let without = Daemon::session();
    // It is there, but not to be there at the next start.
    assert_eq!(status(&with).status.code(), Some(3));
    ok(system.enable(&[]));
    let said = ok(status(&with));
    let wanted = format!("has {}, version {}", system.library.display(), env!("CARGO_PKG_VERSION"));
    assert!(said.lines().any(|line| line.ends_with(&wanted)), "{said}");
    let output = status(&without);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("does not have it: restart it"));
    // An upgrade has put another file there.
    fs::copy(&system.library, system.root.path().join("new")).unwrap();
    fs::rename(system.root.path().join("new"), &system.library).unwrap();
    assert!(ok(status(&with)).contains("was replaced since"));
    fails(&system.run(&["status", "--pid", "4294967295"]), "cannot look into process");
}
