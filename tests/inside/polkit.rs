// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's fine-grained permissions inside the daemon: a client that may take snapshots may take
//! instant ones, and gets no further permission. Only a client that may change the domain can have
//! the library touch the files that a snapshot's record names.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::inside::{CREATE, INSTANT, Subject, answer, library};
use common::machine;
use instantsnap_testkit::compile::workspace;
use instantsnap_testkit::{Binary, Daemon, Mode, missing_package, test};
use tempfile::TempDir;

/// Neither root's user id nor QEMU's.
const CLIENT: u32 = 65534;
const ACCESS_DENIED: i64 = 88;

/// A private system bus with a stand-in for polkitd.
struct Bus {
    directory: TempDir,
    children: Vec<Child>,
}

impl Drop for Bus {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Bus {
    /// Skips the test where the programs for it are not installed.
    fn start() -> Bus {
        let gi = Command::new("/usr/bin/python3")
            .args(["-c", "import gi"])
            .stderr(Stdio::null())
            .status();
        if !Path::new("/usr/bin/dbus-daemon").exists() || !gi.is_ok_and(|status| status.success()) {
            missing_package("dbus-daemon or python3-gi is not installed");
        }
        let directory = tempfile::Builder::new().prefix("instantsnap-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut bus = Bus { directory, children: Vec::new() };
        let conf = format!(
            "<busconfig><type>custom</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy \
             context='default'><allow own='*'/><allow send_destination='*'/><allow \
             receive_sender='*'/><allow user='*'/></policy></busconfig>",
            bus.file("socket").display()
        );
        std::fs::write(bus.file("bus.conf"), conf).unwrap();
        std::fs::write(bus.file("asked"), "").unwrap();
        bus.allow(&[]);
        let mut daemon = Command::new("/usr/bin/dbus-daemon");
        daemon
            .arg("--nofork")
            .arg("--print-address")
            .arg(format!("--config-file={}", bus.file("bus.conf").display()));
        bus.spawn(daemon);
        let mut polkit = Command::new("/usr/bin/python3");
        polkit
            .arg(workspace().join("tests/inside/polkit.py"))
            .args([bus.file("allowed"), bus.file("asked")]);
        polkit.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address());
        bus.spawn(polkit);
        bus
    }

    /// Starts a program, and waits until it reports that it is ready.
    fn spawn(&mut self, mut command: Command) {
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.children.push(child);
        assert!(!line.is_empty(), "{command:?} is not ready");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.file("socket").display())
    }

    /// From now on a client may do these actions.
    fn allow(&self, more: &[&str]) {
        let always = [
            "connect.getattr",
            "connect.read",
            "connect.search-domains",
            "domain.getattr",
            "domain.read",
        ];
        std::fs::write(self.file("allowed"), [&always, more].concat().join("\n")).unwrap();
    }

    /// The actions that polkit was asked to allow the client since the last call.
    fn actions_asked_of_client(&self) -> Vec<String> {
        let asked = std::fs::read_to_string(self.file("asked")).unwrap();
        std::fs::write(self.file("asked"), "").unwrap();
        let of_client = asked
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("{CLIENT} org.libvirt.api.")));
        of_client.map(str::to_owned).collect()
    }
}

#[test]
fn snapshot_permission_suffices_for_instant_and_grants_nothing_more() {
    let bus = Bus::start();
    let variables = [("DBUS_SYSTEM_BUS_ADDRESS", bus.address())];
    let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
    let conf = "access_drivers = [ \"polkit\" ]\n";
    let Some(daemon) = Daemon::configured(Mode::System, &[&library()], &variables, conf) else {
        return;
    };
    let subject = Subject::start(&machine(&Binary::under_libvirt()[0], 1), &daemon);
    let client = |script: &str, args: &[&str]| {
        let plain = subject.client(script, args);
        let mut command = Command::new("/usr/bin/setpriv");
        command.args([
            "--clear-groups",
            &format!("--reuid={CLIENT}"),
            &format!("--regid={CLIENT}"),
        ]);
        command.arg(plain.get_program()).args(plain.get_args()).env_clear();
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        answer(command.stdin(Stdio::null()).output().unwrap())
    };
    let snapshot = |name: &str| client(CREATE, &[&subject.xml(name), &INSTANT.to_string()]);
    let call = |call: &str| client(&format!("attempt(lambda: str(domain.{call}))"), &[]);

    let refused = snapshot("denied").unwrap_err();
    assert_eq!(refused.code, ACCESS_DENIED, "{refused:?}");
    assert!(!subject.memory("denied").exists());
    bus.actions_asked_of_client();

    bus.allow(&["domain.snapshot"]);
    assert_eq!(snapshot("allowed"), Ok("allowed".into()));
    let asked = bus.actions_asked_of_client();
    assert!(asked.contains(&"domain.snapshot yes".to_owned()), "{asked:?}");
    assert!(asked.iter().all(|line| line.ends_with(" yes")), "{asked:?}");
    subject.guest.wait_ticks(3);

    // A thread of the daemon that has just taken a snapshot keeps no privilege either.
    for refused in
        [call("suspend()"), call("destroy()"), call("XMLDesc(1)"), call("setMemory(1024)")]
    {
        assert_eq!(
            refused.as_ref().map_err(|refused| refused.code),
            Err(ACCESS_DENIED),
            "{refused:?}"
        );
    }

    // A record that names a file of root's. A client that may take snapshots can write such a
    // record.
    let victim = daemon.directory().join("victim");
    std::fs::write(&victim, "root's").unwrap();
    let record = subject.guest.virsh("snapshot-dumpxml", &["allowed"]);
    let record =
        record.replace(subject.memory("allowed").to_str().unwrap(), victim.to_str().unwrap());
    let record = record.replacen("<name>allowed</name>", "<name>hostile</name>", 1);
    let redefine = "attempt(lambda: domain.snapshotCreateXML(sys.argv[3], 1).getName())";
    assert_eq!(client(redefine, &[&record]), Ok("hostile".into()));
    let revert = "revertToSnapshot(domain.snapshotLookupByName('allowed'))";
    let delete = "snapshotLookupByName('hostile').delete(0)";
    bus.actions_asked_of_client();
    // The library leaves this revert to libvirt, which before 9.9 does not support it.
    let reverted = call(revert);
    let refused =
        reverted.as_ref().is_err_and(|refused| refused.message.contains("not supported yet"));
    assert!(refused || Daemon::version() >= (9, 9, 0) && reverted.is_ok(), "{reverted:?}");
    assert!(bus.actions_asked_of_client().contains(&"domain.write no".to_owned()));
    subject.guest.wait_ticks(3);

    bus.allow(&["domain.snapshot", "domain.write"]);
    assert_eq!(call(revert), Ok("0".into()));
    assert_eq!(call(delete), Ok("0".into()));
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "root's");
    assert_eq!(call("snapshotLookupByName('allowed').delete(0)"), Ok("0".into()));
    assert!(!subject.memory("allowed").exists());
    bus.allow(&[]);
    assert_eq!(snapshot("again").unwrap_err().code, ACCESS_DENIED);
    subject.guest.wait_ticks(3);
}
