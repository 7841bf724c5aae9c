//! The library on a domain of a private libvirtd, and a snapshot brought back and checked.

use std::path::PathBuf;
use std::sync::Arc;

use instantsnap::engine::{Handle, Observer};
use instantsnap::error::{Code, Error};
use instantsnap::guest::LibvirtConnector;
use instantsnap::libvirt::{Connect, Domain, Snapshot};
use instantsnap_testkit::{Daemon, Fingerprint, Guest, Machine, domain_fingerprint};

use super::{INSTANTLY, assert_says, files_below};

/// A domain of the kit, opened by the library.
pub struct OpenedDomain {
    pub handle: Handle,
    pub connector: Arc<LibvirtConnector>,
    pub guest: Guest,
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
        OpenedDomain { handle: Handle::open_libvirt(Arc::clone(&connector)), connector, guest }
    }

    /// Where the memory of a snapshot goes.
    pub fn memory_file(&self, name: &str) -> PathBuf {
        self.guest.directory().join(format!("{name}.mem"))
    }

    /// `<domainsnapshot>` with a name, a memory image, and more.
    pub fn xml(&self, name: &str, more: &str) -> String {
        format!(
            "<domainsnapshot><name>{name}</name><memory snapshot='external' file='{}'/>{more}</domainsnapshot>",
            self.memory_file(name).display()
        )
    }

    /// Takes an instant snapshot.
    pub fn snapshot(&self, name: &str) -> Result<String, Error> {
        self.snapshot_observed(name, &mut ())
    }

    /// The same with an observer: what it does in a phase's beginning happens then.
    pub fn snapshot_observed(&self, name: &str, observer: &mut dyn Observer) -> Result<String, Error> {
        self.handle.create(&self.xml(name, ""), INSTANTLY, observer)
    }

    /// Brings a snapshot back in another daemon, by `virsh restore`, and checks that memory, disks and serial line are of
    /// one moment: the clone verifies every page and every disk within one tick, so it must tick on.
    pub fn bring_back(&self, name: &str) -> Guest {
        let clone = self.guest.daemon().another().restore(&self.guest, &self.memory_file(name));
        clone.wait_ticks(5);
        clone
    }

    /// A snapshot as libvirt has it.
    pub fn find(&self, name: &str) -> Option<Snapshot> {
        domain(&self.guest).find(name).unwrap()
    }

    /// What a failure must leave as it is: domain, QEMU, its files, the directory's content.
    pub fn trace(&self) -> DomainTrace {
        DomainTrace {
            domain: domain_fingerprint(&self.guest),
            open_files: self.guest.open_files().into_iter().collect(),
            files: files_below(self.guest.directory()),
        }
    }

    /// Takes a snapshot that must fail, with this code and all of these in its message, and asserts that nothing is left of it.
    #[track_caller]
    pub fn assert_fails(
        &self,
        xml: &str,
        flags: u32,
        observer: &mut dyn Observer,
        code: Code,
        parts: &[&str],
    ) -> Error {
        let before = self.trace();
        let error = self.handle.create(xml, flags, observer).expect_err("this must fail");
        assert_says(&error, code, parts);
        self.assert_untouched(&before);
        error
    }

    /// Asserts that nothing is left of a failed attempt. What QEMU closes a moment later is waited for.
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

/// libvirt's object of a guest's domain, through a connection of its own.
pub fn domain(guest: &Guest) -> Domain {
    let uuid = guest.virsh("domuuid", &[]);
    let connect = Connect::open(&guest.daemon().uri()).unwrap().unwrap();
    connect.domain(uuid.trim()).unwrap()
}
