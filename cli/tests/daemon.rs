// SPDX-License-Identifier: LGPL-2.1-or-later

//! The command on a directory that stands for /, and on a private libvirtd.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use instantsnap_testkit::{Daemon, Mode};
use tempfile::TempDir;

/// The library's path within a [`System`].
const LIBRARY: &str = "/usr/local/lib/libinstantsnap-preload.so";
/// The library that an earlier version preloaded into a daemon.
const FORMER: &str = "/usr/local/lib/libinstantsnap.so.0";

/// Neither root's user id nor a daemon's.
const OTHER_USER: u32 = 65534;

/// A root directory for the command, with a library that a daemon may load.
struct System {
    root: TempDir,
}

/// The path of the library under test, which cargo puts beside this program.
fn library_path() -> PathBuf {
    built_path("libinstantsnap_preload.so")
}

fn built_path(name: &str) -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name(name);
    assert!(library.exists(), "{} is not there", library.display());
    library
}

impl System {
    /// Returns `None` where this process is not root, to whom the library has to belong.
    fn new() -> Option<System> {
        if !is_root() {
            eprintln!("skipped: not root");
            return None;
        }
        let root = tempfile::Builder::new().prefix("instantsnap-").tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let system = System { root };
        system.copy(&library_path(), LIBRARY);
        Some(system)
    }

    /// The path outside the root directory.
    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/')).components().collect()
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instantsnap"));
        command.arg("daemon").args(words).arg("--root").arg(self.root.path()).output().unwrap()
    }

    fn enable(&self, more: &[&str]) -> Output {
        self.run(&[&["enable"], more].concat())
    }

    fn make_directory(&self, path: &str) {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(self.path(path)).unwrap();
    }

    fn make_parent(&self, path: &str) {
        self.make_directory(Path::new(path).parent().unwrap().to_str().unwrap());
    }

    fn copy(&self, file: &Path, path: &str) {
        self.make_parent(path);
        fs::copy(file, self.path(path)).unwrap();
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn write(&self, path: &str, text: &str) {
        self.make_parent(path);
        fs::write(self.path(path), text).unwrap();
    }

    fn link(&self, target: &str, path: &str) {
        self.make_parent(path);
        symlink(target, self.path(path)).unwrap();
    }

    /// Asserts that `enable` refuses a library if this path has another owner or mode, names the
    /// command that mends it, and accepts the library otherwise.
    #[track_caller]
    fn assert_must_belong_to_root(&self, path: &str, library: &str) {
        let enable = || self.enable(&["--library", library]);
        let path = self.path(path);
        let named = path.display();
        let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_succeeds(enable());
        let before = fs::read(self.drop_in("libvirtd")).unwrap();
        for mode in [0o775, 0o757] {
            set_mode(mode);
            assert_fails(&enable(), &format!("{named} does not belong to root alone"));
            assert_fails(&enable(), &format!(": chmod go-w {named}, or"));
        }
        set_mode(0o755);
        chown(&path, Some(OTHER_USER), None).unwrap();
        assert_fails(&enable(), &format!("{named} does not belong to root alone"));
        assert_fails(&enable(), &format!(": chown root {named}, or"));
        set_mode(0o775);
        assert_fails(&enable(), &format!(": chown root {named} && chmod go-w {named}, or"));
        chown(&path, Some(0), None).unwrap();
        set_mode(0o755);
        assert_eq!(fs::read(self.drop_in("libvirtd")).unwrap(), before);
        assert_succeeds(enable());
    }

    fn drop_in(&self, unit: &str) -> PathBuf {
        self.path(&format!("etc/systemd/system/{unit}.service.d/instantsnap.conf"))
    }
}

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .any(|line| line.starts_with("Uid:\t0\t0"))
}

#[track_caller]
fn assert_succeeds(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_fails(output: &Output, part: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(part), "{output:?}");
}

#[test]
fn enable_writes_a_drop_in_and_disable_removes_it() {
    let Some(system) = System::new() else { return };
    let said = assert_succeeds(system.enable(&[
        "--unit",
        "virtqemud",
        "--upgrade-live",
        "--max-snapshots",
        "4",
    ]));
    assert!(said.contains("next start"), "{said}");
    let file = system.drop_in("virtqemud");
    let text = fs::read_to_string(&file).unwrap();
    // The path is that within the root directory.
    assert!(text.contains(&format!("Environment=\"LD_PRELOAD={LIBRARY}\"\n")), "{text}");
    assert!(
        text.contains("INSTANTSNAP_UPGRADE_LIVE=1\n")
            && text.contains("INSTANTSNAP_MAX_SNAPSHOTS=4\n"),
        "{text}"
    );
    // The options of the last `enable` count.
    assert_succeeds(system.enable(&["--unit", "virtqemud"]));
    assert!(!fs::read_to_string(&file).unwrap().contains("UPGRADE"));
    assert!(!system.drop_in("libvirtd").exists());

    assert_succeeds(system.run(&["disable", "--unit", "virtqemud"]));
    assert!(!file.parent().unwrap().exists());
    assert!(
        assert_succeeds(system.run(&["disable", "--unit", "virtqemud"]))
            .contains("is not to be started")
    );
}

#[test]
fn enable_keeps_libraries_that_the_unit_already_preloads() {
    let Some(system) = System::new() else { return };
    let assert_preloads = |others: &str| {
        // The second time the command's own file is among the unit's files.
        for _ in 0..2 {
            assert_succeeds(system.enable(&[]));
            let text = fs::read_to_string(system.drop_in("libvirtd")).unwrap();
            assert!(text.contains(&format!("\"LD_PRELOAD={others}{LIBRARY}\"\n")), "{text}");
        }
    };
    system.write(
        "usr/lib/systemd/system/libvirtd.service",
        "[Service]\nEnvironmentFile=-/etc/default/libvirtd\nEnvironment=LD_PRELOAD=/usr/lib/old.so\n",
    );
    assert_preloads("/usr/lib/old.so:");
    let drop_in = |text: &str, path: &str| system.write(path, &format!("[Service]\n{text}\n"));
    drop_in(
        "Environment='LD_PRELOAD=/usr/lib/own.so'",
        "usr/lib/systemd/system/libvirtd.service.d/b.conf",
    );
    assert_preloads("/usr/lib/own.so:");
    // Files are ordered by name. Of files with one name, the one in the first directory counts.
    drop_in(
        "Environment='LD_PRELOAD=/usr/lib/first.so'",
        "etc/systemd/system/libvirtd.service.d/a.conf",
    );
    drop_in("Environment='LD_PRELOAD=/usr/lib/all.so'", "etc/systemd/system/service.d/b.conf");
    assert_preloads("/usr/lib/own.so:");
    drop_in("", "run/systemd/system/libvirtd.service.d/b.conf");
    assert_preloads("/usr/lib/first.so:");
    drop_in("Environment=", "etc/systemd/system/libvirtd.service.d/b.conf");
    assert_preloads("");
    // An empty environment has nothing to keep, and a missing file sets nothing.
    drop_in(
        "EnvironmentFile=-/nowhere\nUnsetEnvironment=LD_LIBRARY_PATH",
        "etc/systemd/system/service.d/z.conf",
    );
    assert_preloads("");

    assert_succeeds(system.run(&["disable"]));
    assert!(system.path("etc/systemd/system/libvirtd.service.d/a.conf").exists());
}

#[test]
fn enable_names_an_overriding_file_and_writes_nothing() {
    let Some(system) = System::new() else { return };
    system.write("etc/default/libvirtd", " LD_PRELOAD =/usr/lib/other.so\n");
    // Each setting with its error message, and whether it also counts in a file before the
    // command's.
    let ways = [
        ("Environment=LD_PRELOAD=/usr/lib/own.so", "sets LD_PRELOAD", false),
        ("Environment=A=b \\\n  'LD_PRELOAD='", "sets LD_PRELOAD", false),
        ("Environment=\nEnvironment=A=b", "empties the environment", false),
        ("EnvironmentFile=-/etc/default/libvirtd", "sets LD_PRELOAD", true),
        ("UnsetEnvironment=A LD_PRELOAD", "unsets LD_PRELOAD", true),
    ];
    let try_with = |file: &str, (line, said, always): (&str, &str, bool), is_after: bool| {
        system.write(file, &format!("[Service]\n{line}\n"));
        let output = system.enable(&[]);
        if is_after || always {
            let named = if line.contains("File") { "etc/default/libvirtd" } else { file };
            assert_fails(&output, &format!("{} {said}", system.path(named).display()));
            assert!(!system.drop_in("libvirtd").exists());
        } else {
            assert_succeeds(output);
            assert_succeeds(system.run(&["disable"]));
        }
        fs::remove_file(system.path(file)).unwrap();
    };
    for way in ways {
        for (name, is_after) in
            [("zz-own.conf", true), ("instantsnap.conf.conf", true), ("a.conf", false)]
        {
            try_with(&format!("etc/systemd/system/libvirtd.service.d/{name}"), way, is_after);
        }
    }
    for directory in ["lib", "usr/lib", "usr/local/lib", "run", "etc"] {
        for kind in ["libvirtd.service.d", "service.d"] {
            try_with(&format!("{directory}/systemd/system/{kind}/zz-own.conf"), ways[0], true);
        }
    }
    // Settings that are reset, and files that another file of the name replaces, have no effect.
    let all = ways.map(|(line, ..)| line).join("\n");
    system
        .write("usr/lib/systemd/system/libvirtd.service.d/zz.conf", &format!("[Service]\n{all}\n"));
    assert_fails(&system.enable(&[]), "LD_PRELOAD");
    system.link("/dev/null", "etc/systemd/system/libvirtd.service.d/zz.conf");
    assert_succeeds(system.enable(&[]));
    let taken_back = "[Service]\nEnvironmentFile=/etc/default/libvirtd\nUnsetEnvironment=LD_PRELOAD\n\
                      EnvironmentFile=\nUnsetEnvironment=\n";
    system.write("etc/systemd/system/libvirtd.service.d/zzz.conf", taken_back);
    assert_succeeds(system.enable(&[]));
}

#[test]
fn enable_refuses_files_that_are_not_the_library() {
    let Some(system) = System::new() else { return };
    let with = |library: &str| system.enable(&["--library", library]);
    assert_fails(&with("libinstantsnap.so"), "absolute path");
    // The file exists, but not within the root directory.
    assert_fails(&with("/bin/true"), "No such file");
    assert_fails(&with(system.path(LIBRARY).to_str().unwrap()), "No such file");
    system.copy(Path::new("/bin/true"), "/bin/true");
    assert_fails(&with("/bin/true"), "is not a libinstantsnap-preload.so");
    fs::remove_file(system.path(LIBRARY)).unwrap();
    assert_fails(&system.enable(&[]), "is not installed");
    assert!(!system.drop_in("libvirtd").exists());
}

#[test]
fn library_and_its_parent_directories_must_belong_to_root_alone() {
    let Some(system) = System::new() else { return };
    for path in [LIBRARY, "/usr/local/lib", "/usr/local", "/usr", "/"] {
        system.assert_must_belong_to_root(path, LIBRARY);
    }
    // Only a file's owner can replace it in a directory with the sticky bit. The command refuses it
    // nevertheless, and does not advise to change its mode.
    fs::set_permissions(system.path("/usr/local"), fs::Permissions::from_mode(0o1777)).unwrap();
    let output = system.enable(&[]);
    assert_fails(
        &output,
        &format!("{} does not belong to root alone", system.path("/usr/local").display()),
    );
    assert!(!String::from_utf8_lossy(&output.stderr).contains("chmod"), "{output:?}");
}

#[test]
fn directories_behind_symbolic_links_must_belong_to_root_alone() {
    let Some(system) = System::new() else { return };
    // /usr/lib -> /opt/lib, /opt/lib/libinstantsnap-preload.so -> ../../srv/current/lib.so,
    // /srv/current -> 1
    system.copy(&library_path(), "/srv/1/lib.so");
    system.link("1", "/srv/current");
    system.link("/opt/lib", "/usr/lib");
    system.link("../../srv/current/lib.so", "/opt/lib/libinstantsnap-preload.so");
    let library = "/usr/lib/libinstantsnap-preload.so";
    for path in ["/usr", "/opt", "/opt/lib", "/srv", "/srv/1", "/srv/1/lib.so"] {
        system.assert_must_belong_to_root(path, library);
    }
    let text = fs::read_to_string(system.drop_in("libvirtd")).unwrap();
    assert!(text.contains(&format!("LD_PRELOAD={library}\"")), "{text}");
    // Symbolic links stay within the root directory, and loops are detected.
    system.link("../../../../../../../../srv/1/lib.so", "/opt/up.so");
    assert_succeeds(system.enable(&["--library", "/opt/up.so"]));
    system.link("again.so", "/opt/again.so");
    assert_fails(&system.enable(&["--library", "/opt/again.so"]), "too many symbolic links");
}

/// Other people can have made an image, and its links are those of its own system.
#[test]
fn symbolic_links_of_an_image_do_not_leave_it() {
    const PLACE: &str = "/etc/systemd/system/libvirtd.service.d";
    let Some(system) = System::new() else { return };
    let host = tempfile::tempdir().unwrap();
    let outside = |name: &str| host.path().join(name).to_str().unwrap().to_owned();
    let untouched = "[Service]\nEnvironment=LD_PRELOAD=/usr/lib/hosts.so\n";
    for name in ["instantsnap.conf", "elsewhere", "environment"] {
        fs::write(outside(name), untouched).unwrap();
    }
    let assert_untouched = || {
        let mut names: Vec<_> =
            fs::read_dir(host.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["elsewhere", "environment", "instantsnap.conf"]);
        assert!(
            names
                .iter()
                .all(|name| fs::read_to_string(host.path().join(name)).unwrap() == untouched)
        );
    };
    // The directory of the drop-ins, by an absolute link and by a relative one.
    let up = "../".repeat(20);
    for target in [outside(""), format!("{up}{}", outside(""))] {
        system.link(&target, PLACE);
        assert_fails(
            &system.enable(&[]),
            "libvirtd.service.d is a symbolic link that leads nowhere in that system",
        );
        assert_succeeds(system.run(&["disable"]));
        let said = system.run(&["status", "--pid", "1"]);
        assert!(
            String::from_utf8_lossy(&said.stdout).contains("is not to be started with"),
            "{said:?}"
        );
        assert_untouched();
        fs::remove_file(system.path(PLACE)).unwrap();
    }
    // The files in that directory, and the files that the unit names.
    for name in ["instantsnap.conf", "instantsnap.conf.new"] {
        system.link(&outside("elsewhere"), &format!("{PLACE}/{name}"));
    }
    system.link(&outside("elsewhere"), &format!("{PLACE}/zz.conf"));
    system.link(&outside("elsewhere"), "/usr/lib/systemd/system/libvirtd.service");
    system.link(&outside("environment"), "/etc/default/libvirtd");
    let named = "[Service]\nEnvironmentFile=/etc/default/libvirtd\n";
    system.write(&format!("{PLACE}/own.conf"), named);
    assert_succeeds(system.enable(&[]));
    let text = fs::read_to_string(system.drop_in("libvirtd")).unwrap();
    assert!(text.contains(&format!("\"LD_PRELOAD={LIBRARY}\"\n")), "{text}");
    assert!(!system.drop_in("libvirtd").is_symlink());
    assert_untouched();
    assert_succeeds(system.run(&["disable"]));
    assert_untouched();
    // Links that stay within the root directory are followed there.
    fs::remove_dir_all(system.path(PLACE)).unwrap();
    system.make_directory("/srv/drop-ins");
    system.link("/srv/drop-ins", PLACE);
    assert_succeeds(system.enable(&[]));
    assert!(system.path("/srv/drop-ins/instantsnap.conf").exists());
    assert_succeeds(system.run(&["disable"]));
    assert!(!system.path("/srv/drop-ins/instantsnap.conf").exists());
    // A library outside the root directory is not found.
    fs::copy(library_path(), outside("library.so")).unwrap();
    system.link(&outside("library.so"), "/usr/lib/outside.so");
    assert_fails(&system.enable(&["--library", "/usr/lib/outside.so"]), "No such file");
}

#[test]
fn status_distinguishes_daemons_with_and_without_the_library() {
    let Some(system) = System::new() else { return };
    let library = system.path(LIBRARY);
    let status = |daemon: &Daemon| system.run(&["status", "--pid", &daemon.pid().to_string()]);
    let with = Daemon::preloaded(Mode::Session, &[&library], &[]).unwrap();
    let without = Daemon::session();
    // The daemon has the library, but will not load it at its next start.
    assert_eq!(status(&with).status.code(), Some(3));
    assert_succeeds(system.enable(&[]));
    let said = assert_succeeds(status(&with));
    let wanted = format!("has {}, version {}", library.display(), env!("CARGO_PKG_VERSION"));
    assert!(said.lines().any(|line| line.ends_with(&wanted)), "{said}");
    let output = status(&without);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("does not have it: restart it"));
    // The daemon will not load the library at its next start.
    let other = "run/systemd/system/libvirtd.service.d/zz-own.conf";
    system.write(other, "[Service]\nEnvironment=LD_PRELOAD=\n");
    let output = status(&with);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let wanted = format!("that has no effect: {} sets LD_PRELOAD", system.path(other).display());
    assert!(String::from_utf8_lossy(&output.stdout).contains(&wanted), "{output:?}");
    fs::remove_file(system.path(other)).unwrap();
    // An upgrade has replaced the file.
    fs::copy(&library, system.path("new")).unwrap();
    fs::rename(system.path("new"), &library).unwrap();
    assert!(assert_succeeds(status(&with)).contains("was replaced since"));
    assert_fails(&system.run(&["status", "--pid", "4294967295"]), "cannot look into process");
}

#[test]
fn drop_in_of_an_earlier_version_is_recognised_and_replaced() {
    let Some(system) = System::new() else { return };
    let former = system.path(FORMER);
    system.copy(&built_path("libinstantsnap.so"), FORMER);
    let written = format!("[Service]\nEnvironment=\"LD_PRELOAD=/usr/lib/own.so:{FORMER}\"\n");
    let drop_in = "etc/systemd/system/libvirtd.service.d/instantsnap.conf";
    system.write(drop_in, &written);
    // A line that a user has written.
    let by_hand = "[Service]\nEnvironment=LD_PRELOAD=/usr/lib/own.so:/opt/libinstantsnap.so.0\n";
    system.write("etc/systemd/system/libvirtd.service.d/a.conf", by_hand);

    let daemon = Daemon::preloaded(Mode::Session, &[&former], &[]).unwrap();
    let output = system.run(&["status", "--pid", &daemon.pid().to_string()]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let what = "a daemon takes no instant snapshots any more";
    assert_eq!(said.matches(what).count(), 2, "{said}");
    assert!(said.contains(&format!("has {}", former.display())), "{said}");

    assert_fails(
        &system.enable(&["--library", FORMER]),
        "is the library for programs: a daemon needs",
    );
    assert_eq!(fs::read_to_string(system.drop_in("libvirtd")).unwrap(), written);
    assert_succeeds(system.enable(&[]));
    let text = fs::read_to_string(system.drop_in("libvirtd")).unwrap();
    assert!(text.contains(&format!("\"LD_PRELOAD=/usr/lib/own.so:{LIBRARY}\"\n")), "{text}");
    // The drop-in of an earlier version can be disabled, too.
    system.write(drop_in, &written);
    assert_succeeds(system.run(&["disable"]));
    assert!(!system.drop_in("libvirtd").exists());
}
