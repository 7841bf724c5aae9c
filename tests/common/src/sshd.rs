// SPDX-License-Identifier: LGPL-2.1-or-later

//! A private ssh server, whose clients ignore the user's ssh settings.

use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use instantsnap_testkit::{DEADLINE, Daemon, missing_package, skip, wait_for};

use crate::run;

const SERVER: &str = "/usr/sbin/sshd";

/// It ends when this is dropped, or with the test's thread.
pub struct Sshd {
    child: Child,
    directory: PathBuf,
    port: u16,
}

impl Sshd {
    /// Starts a server for clients of this daemon. Skips the test where that is not possible: root
    /// logs in, so this process must be root.
    pub fn start(daemon: &Daemon) -> Sshd {
        let namespaces =
            Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
        if !rustix::process::geteuid().is_root() || !namespaces.is_ok_and(|status| status.success())
        {
            skip("not root, or no mount namespaces");
        }
        if !Path::new(SERVER).exists() {
            missing_package("openssh-server");
        }
        let directory = daemon.directory().join("ssh");
        std::fs::create_dir(&directory).unwrap();
        let file = |name: &str| directory.join(name).display().to_string();
        for key in ["host", "key"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &file(key)]);
        }
        // Another process may take the port before the server does. Then the server ends, and the
        // test fails with that reason.
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let server = [
            format!("ListenAddress 127.0.0.1:{port}"),
            format!("HostKey {}", file("host")),
            format!("AuthorizedKeysFile {}", file("key.pub")),
            "AuthenticationMethods publickey\nPermitRootLogin yes\nStrictModes no\nUsePAM \
             no\nPidFile none\nLogLevel FATAL\n"
                .into(),
        ];
        std::fs::write(file("server.conf"), server.join("\n")).unwrap();
        let host = std::fs::read_to_string(file("host.pub")).unwrap();
        std::fs::write(file("known_hosts"), format!("[127.0.0.1]:{port} {host}")).unwrap();
        let client = format!(
            "UserKnownHostsFile {}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking \
             yes\nIdentityAgent none\nIdentitiesOnly yes\n",
            file("known_hosts")
        );
        std::fs::write(file("client.conf"), client).unwrap();
        std::fs::write(
            file("ssh"),
            format!("#!/bin/sh\nexec ssh -F '{}' \"$@\"\n", file("client.conf")),
        )
        .unwrap();
        std::fs::set_permissions(file("ssh"), Permissions::from_mode(0o755)).unwrap();
        // The server needs a directory that only the system's service creates, and libvirt's helper
        // looks for the socket of root's daemon. Both are in a private /run.
        let start = format!(
            "mount -t tmpfs run /run && mkdir -m 755 /run/sshd /run/libvirt && ln -s \"$1\" \
             /run/libvirt/libvirt-sock && exec {SERVER} -D -e -f \"$2\""
        );
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", &start, "sh"]);
        command.arg(daemon.socket()).arg(file("server.conf")).stdin(Stdio::null());
        let mut sshd = Sshd { child: command.spawn().unwrap(), directory, port };
        wait_for(DEADLINE, || {
            assert_eq!(sshd.child.try_wait().unwrap(), None, "it has ended");
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        })
        .expect("it does not answer");
        sshd
    }

    /// The URI of the session daemon, with more parameters.
    pub fn uri(&self, more: &str) -> String {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let port = self.port;
        format!(
            "qemu+ssh://root@127.0.0.1:{port}/session?command={}&keyfile={}&{more}",
            file("ssh"),
            file("key")
        )
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
