// SPDX-License-Identifier: LGPL-2.1-or-later

//! The library on a domain of a private libvirtd, and restored snapshots that are checked.
//!
//! With the other backend (`backend.rs`) the library is in that daemon, and the tests call only
//! libvirt's stock functions. The assertions are the same.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use instantsnap::backend::LibvirtConnector;
use instantsnap::engine::{self, Observer, Phase};
use instantsnap::error::{Code, Error};
use instantsnap::libvirt::{Connect, Domain, Snapshot};
use instantsnap::model::flags::{DeleteFlags, RevertFlags};
use instantsnap_testkit::{
    DEADLINE, Daemon, Fingerprint, Guest, Machine, Mode, domain_fingerprint, missing_package,
    wait_for,
};
use tempfile::TempDir;

use super::backend::by_daemon;
use super::inside::{has_mapped, library};
use super::{At, Handle, INSTANTLY, assert_says, files_below, first_tick};

/// A session daemon for the backend of this run.
pub fn session() -> Daemon {
    if by_daemon() { super::inside::session(&[]) } else { Daemon::session() }
}

/// A system daemon for the backend of this run, where that is possible.
pub fn system() -> Option<Daemon> {
    if by_daemon() { Daemon::preloaded(Mode::System, &[&library()], &[]) } else { Daemon::system() }
}

/// A session daemon, and a system daemon where that is possible.
pub fn daemons() -> Vec<Daemon> {
    [Some(session()), system()].into_iter().flatten().collect()
}

/// A daemon in which clones run, one after the other.
pub struct Clones(pub Daemon);

impl Clones {
    /// Another daemon like this one.
    pub fn of(daemon: &Daemon) -> Clones {
        Clones(daemon.another())
    }

    /// Restores a memory image, and lets the clone count. Returns the first number that it prints.
    #[track_caller]
    pub fn check(&self, original: &Guest, image: &Path) -> u32 {
        self.check_resumed(original, image, |_| ())
    }

    /// The same with a function that resumes the clone.
    #[track_caller]
    pub fn check_resumed(
        &self,
        original: &Guest,
        image: &Path,
        resume: impl FnOnce(&Guest),
    ) -> u32 {
        let clone = self.0.restore(original, image);
        resume(&clone);
        clone.wait_ticks(5);
        let first = first_tick(&clone);
        self.end(clone);
        first
    }

    /// Ends a clone, and waits until the daemon has dropped it.
    pub fn end(&self, clone: Guest) {
        let name = clone.name().to_owned();
        drop(clone);
        let gone =
            wait_for(DEADLINE, || self.0.try_virsh(&["domstate", &name]).is_err().then_some(()));
        gone.unwrap_or_else(|| panic!("{name} does not go"));
    }
}

/// A directory that QEMU may use.
pub fn directory_for(daemon: &Daemon) -> TempDir {
    let guests = daemon.directory().join("guests");
    let directory = tempfile::Builder::new().prefix("d-").tempdir_in(guests).unwrap();
    std::os::unix::fs::chown(directory.path(), Some(daemon.user()), Some(daemon.user())).unwrap();
    directory
}

/// Makes the daemon load one more of libvirt's drivers. Skips the test where the driver is not
/// installed.
pub fn with_driver(daemon: &Daemon, driver: &str) {
    let installed = Path::new("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver").join(driver);
    if !installed.exists() {
        missing_package(&format!("no {driver}"));
    }
    let link = daemon.directory().join("drivers").join(driver);
    std::os::unix::fs::symlink(installed, link).unwrap();
    daemon.kill();
    daemon.start_again();
}

/// A domain of the kit that the library has opened.
pub struct OpenedDomain {
    pub handle: Handle,
    pub guest: Guest,
    /// The domain for libvirt's stock functions, where the library is in the daemon.
    plain: Option<Domain>,
    taken: Mutex<Option<Snapshot>>,
}

impl OpenedDomain {
    /// Starts a machine, waits until it counts, and opens it.
    pub fn start(machine: &Machine, daemon: &Daemon) -> OpenedDomain {
        let guest = machine.start_under(daemon);
        guest.wait_ticks(2);
        OpenedDomain::open(guest)
    }

    /// Opens a guest.
    pub fn open(guest: Guest) -> OpenedDomain {
        let connector = Arc::new(LibvirtConnector::open(domain(&guest)).unwrap());
        let has_library = by_daemon() && has_mapped(guest.daemon().pid(), &library());
        let (plain, taken) = (has_library.then(|| domain(&guest)), Mutex::default());
        OpenedDomain { handle: Handle::open_libvirt(connector), guest, plain, taken }
    }

    /// The memory image of a snapshot.
    pub fn memory_file(&self, name: &str) -> PathBuf {
        self.guest.directory().join(format!("{name}.mem"))
    }

    /// A `<domainsnapshot>` with a name, a memory image, and more.
    pub fn xml(&self, name: &str, more: &str) -> String {
        format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' \
             file='{}'/>{more}</domainsnapshot>",
            self.memory_file(name).display()
        )
    }

    /// Takes an instant snapshot.
    pub fn snapshot(&self, name: &str) -> Result<String, Error> {
        self.create(&self.xml(name, ""), INSTANTLY)
    }

    /// Takes a snapshot. Returns its name.
    pub fn create(&self, xml: &str, flags: u32) -> Result<String, Error> {
        self.create_observed(xml, flags, &mut ())
    }

    /// Takes an instant snapshot with an observer, whose functions run at the start of phases.
    pub fn snapshot_observed(
        &self,
        name: &str,
        observer: &mut dyn Observer,
    ) -> Result<String, Error> {
        self.create_observed(&self.xml(name, ""), INSTANTLY, observer)
    }

    /// The same for a snapshot of any kind. A daemon reports no phases, so with that backend the
    /// observer is not called. A test that needs its observer calls `backend::by_client_only`.
    pub fn create_observed(
        &self,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
    ) -> Result<String, Error> {
        let (name, taken) = match &self.plain {
            Some(domain) => {
                let taken = domain.create_snapshot(xml, flags)?;
                (taken.name(), Some(taken))
            }
            None => {
                let created = self.handle.create_as(None, xml, flags, observer)?;
                (created.name, created.object)
            }
        };
        *self.taken.lock().unwrap() = taken;
        Ok(name)
    }

    /// Takes libvirt's object of the last snapshot.
    pub fn taken(&self) -> Option<Snapshot> {
        self.taken.lock().unwrap().take()
    }

    /// Reverts to a snapshot.
    pub fn revert(&self, name: &str, flags: u32) -> Result<(), Error> {
        let snapshot = self.find(name).expect("the snapshot");
        if self.plain.is_some() {
            Ok(snapshot.revert(flags)?)
        } else {
            engine::revert_managed(&snapshot, RevertFlags::parse(flags)?)
        }
    }

    /// Deletes a snapshot.
    pub fn delete(&self, name: &str, flags: u32) -> Result<(), Error> {
        let snapshot = self.find(name).expect("the snapshot");
        if self.plain.is_some() {
            Ok(snapshot.delete(flags)?)
        } else {
            engine::delete_managed(&snapshot, DeleteFlags::parse(flags)?)
        }
    }

    /// Restores a snapshot in another daemon by `virsh restore`, and checks that memory, disks and
    /// serial line are of one moment. The clone checks every page and every disk within one tick,
    /// so it must count on.
    pub fn restore_clone(&self, name: &str) -> Guest {
        let clone = self.guest.daemon().another().restore(&self.guest, &self.memory_file(name));
        clone.wait_ticks(5);
        clone
    }

    /// libvirt's object of a snapshot.
    pub fn find(&self, name: &str) -> Option<Snapshot> {
        domain(&self.guest).find(name).unwrap()
    }

    /// The state that a failure must not change: the domain, QEMU, the files that it has open, and
    /// the directory's content.
    pub fn trace(&self) -> DomainTrace {
        DomainTrace {
            domain: domain_fingerprint(&self.guest),
            open_files: self.guest.open_files().into_iter().collect(),
            files: files_below(self.guest.directory()),
        }
    }

    /// Takes a snapshot that must fail with this code and all of these parts in its message.
    /// Asserts that nothing is left of it.
    #[track_caller]
    pub fn assert_fails(&self, xml: &str, flags: u32, code: Code, parts: &[&str]) -> Error {
        self.assert_fails_observed(xml, flags, &mut (), code, parts)
    }

    /// The same with an observer; see [`OpenedDomain::create_observed`].
    #[track_caller]
    pub fn assert_fails_observed(
        &self,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
        code: Code,
        parts: &[&str],
    ) -> Error {
        let before = self.trace();
        let error = self.create_observed(xml, flags, observer).expect_err("this must fail");
        assert_says(&error, code, parts);
        self.assert_untouched(&before);
        error
    }

    /// Where this backend can cancel, cancels a snapshot in its drain after this many ticks, and
    /// asserts that nothing is left of it.
    #[track_caller]
    pub fn assert_cancelled_without_a_trace(&self, xml: &str, flags: u32, ticks: u32) {
        if self.plain.is_some() {
            return;
        }
        let mut cancel = At(|phase| {
            if phase == Phase::Drain {
                self.guest.wait_ticks(ticks);
                self.handle.cancel().unwrap();
            }
        });
        self.assert_fails_observed(xml, flags, &mut cancel, Code::OperationAborted, &[]);
    }

    /// Asserts that nothing is left of a failed attempt. Waits for what QEMU closes a moment later.
    #[track_caller]
    pub fn assert_untouched(&self, before: &DomainTrace) {
        let mut after = self.trace();
        let same = instantsnap_testkit::wait_for(std::time::Duration::from_secs(10), || {
            after = self.trace();
            (after == *before).then_some(())
        });
        if same.is_none() {
            panic!(
                "something is left:\n{}{:?}\n{:?}\n{:?}\n{:?}",
                before.domain.differences(&after.domain),
                before.open_files,
                after.open_files,
                before.files,
                after.files
            );
        }
    }
}

/// See [`OpenedDomain::trace`].
#[derive(Clone, Debug, PartialEq)]
pub struct DomainTrace {
    pub domain: Fingerprint,
    open_files: Vec<(String, usize)>,
    files: Vec<PathBuf>,
}

/// libvirt's object of a guest's domain, by a separate connection.
pub fn domain(guest: &Guest) -> Domain {
    let uuid = guest.virsh("domuuid", &[]);
    let connect = Connect::open(&guest.daemon().uri()).unwrap().unwrap();
    connect.domain(uuid.trim()).unwrap()
}
