// SPDX-License-Identifier: LGPL-2.1-or-later

//! A domain's disk that qemu-nbd serves.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use instantsnap_testkit::machine::make_image;
use instantsnap_testkit::{Binary, DEADLINE, Daemon, Format, Guest, Machine, wait_for};
use tempfile::TempDir;

use super::virt::OpenedDomain;

/// A server of an image, which ends when dropped. It serves one client at a time, which is
/// qemu-nbd's default.
pub struct Server(Child);

impl Server {
    /// Serves a raw image as `remote`.
    pub fn start(daemon: &Daemon, image: &Path, socket: &Path) -> Server {
        let mut serve = Command::new("qemu-nbd");
        serve
            .args(["-f", "raw", "-t", "-x", "remote", "-k"])
            .arg(socket)
            .arg(image)
            .stdin(Stdio::null());
        let server = Server(serve.spawn().unwrap());
        wait_for(DEADLINE, || socket.exists().then_some(())).expect("qemu-nbd does not listen");
        std::os::unix::fs::chown(socket, Some(daemon.user()), Some(daemon.user())).unwrap();
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A domain whose second disk, `vdb`, is on such a server.
pub struct NbdDomain {
    pub opened: OpenedDomain,
    pub directory: TempDir,
    daemon: Daemon,
    server: Option<Server>,
}

impl NbdDomain {
    pub fn start(daemon: &Daemon) -> NbdDomain {
        NbdDomain::start_with(daemon, "")
    }

    /// The same with additional XML in the disk's `<source>`.
    pub fn start_with(daemon: &Daemon, more: &'static str) -> NbdDomain {
        let directory = tempfile::Builder::new()
            .prefix("n-")
            .tempdir_in(daemon.directory().join("guests"))
            .unwrap();
        let image = directory.path().join("remote.img");
        make_image(&image, Format::Raw, None);
        for path in [directory.path(), &image] {
            std::os::unix::fs::chown(path, Some(daemon.user()), Some(daemon.user())).unwrap();
        }
        let socket = directory.path().join("nbd.sock");
        let server = Server::start(daemon, &image, &socket);
        let (file, source) =
            (format!("<source file='{}'/>", image.display()), source(&socket, more));
        let machine =
            Machine::new(&Binary::all()[0]).disk(Format::Qcow2).disk_on(&image, Format::Raw);
        let machine = machine.edit_xml(move |xml| {
            let at = xml.find(&file).expect("the disk's source");
            let (before, after) = xml.split_at(at);
            let (before, disk) = before.rsplit_once("<disk type='file'").expect("the disk");
            format!("{before}<disk type='network'{disk}{source}{}", &after[file.len()..])
        });
        let opened = OpenedDomain::start(&machine, daemon);
        NbdDomain { opened, directory, daemon: daemon.clone(), server: Some(server) }
    }

    pub fn guest(&self) -> &Guest {
        &self.opened.guest
    }

    pub fn overlay(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("vdb.{name}"))
    }

    /// The XML of a snapshot with an overlay of that name for the disk.
    pub fn xml(&self, name: &str) -> String {
        let overlay = self.overlay(name);
        let disk = format!(
            "<disk name='vdb' snapshot='external'><source file='{}'/></disk>",
            overlay.display()
        );
        self.opened.xml(name, &format!("<disks>{disk}</disks>"))
    }

    /// The backing file name of an overlay on the image.
    pub fn name(&self) -> String {
        format!("nbd+unix:///remote?socket={}", self.directory.path().join("nbd.sock").display())
    }

    /// Ends the server; `start_server` starts it again.
    pub fn stop_server(&mut self) {
        self.server = None;
        let _ = std::fs::remove_file(self.directory.path().join("nbd.sock"));
    }

    pub fn start_server(&mut self) {
        let path = |name: &str| self.directory.path().join(name);
        self.server = Some(Server::start(&self.daemon, &path("remote.img"), &path("nbd.sock")));
    }

    /// Asserts that the disk is on the server itself, now and after the next start.
    #[track_caller]
    pub fn assert_on_server(&self) {
        for which in [&[][..], &["--inactive"]] {
            let xml = self.guest().virsh("dumpxml", which);
            assert!(
                xml.contains("<disk type='network'")
                    && xml.contains("<source protocol='nbd' name='remote'"),
                "{xml}"
            );
        }
    }
}

fn source(socket: &Path, more: &str) -> String {
    let host = format!("<host transport='unix' socket='{}'/>", socket.display());
    format!("<source protocol='nbd' name='remote'>{host}{more}</source>")
}
