// SPDX-License-Identifier: LGPL-2.1-or-later

//! Whether a process may use userfaultfd for faults of the kernel, as a background snapshot must.
//!
//! The kernel allows it to a process with CAP_SYS_PTRACE in the first user namespace, to all if
//! `vm.unprivileged_userfaultfd` is 1, and to everyone who can open /dev/userfaultfd for reading
//! and writing (Linux 6.1 and later), which QEMU does from 8.0 on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The bit of CAP_SYS_PTRACE in a set of capabilities.
const CAP_SYS_PTRACE: u64 = 1 << 19;
/// The first QEMU that opens the device.
const OPENS_DEVICE: (u64, u64) = (8, 0);
/// The sysctl's file.
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
/// The device.
pub const DEVICE: &str = "/dev/userfaultfd";

/// A process, or the user that a process will have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pub user: u32,
    groups: BTreeSet<u32>,
    /// It has CAP_SYS_PTRACE, as far as the kernel counts it.
    privileged: bool,
    /// Where the process sees the device.
    device: PathBuf,
}

impl Subject {
    /// A running process. `None` if /proc does not tell.
    pub fn of_process(process: &str) -> Option<Subject> {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let all_users = fs::read_to_string(format!("/proc/{process}/uid_map"))
            .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]));
        let mut subject = Subject::parse(&status)?;
        subject.privileged &= all_users;
        let own = PathBuf::from(format!("/proc/{process}/root{DEVICE}"));
        subject.device = if own.exists() { own } else { DEVICE.into() };
        Some(subject)
    }

    fn parse(status: &str) -> Option<Subject> {
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let ids = |name: &str| -> Option<Vec<u32>> {
            field(name)?.split_ascii_whitespace().map(|id| id.parse().ok()).collect()
        };
        // Real, effective, saved and file system id.
        let user = *ids("Uid")?.get(1)?;
        let groups = ids("Groups")?.into_iter().chain(ids("Gid")?.get(1).copied()).collect();
        let capabilities = u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?;
        let privileged = capabilities & CAP_SYS_PTRACE != 0;
        Some(Subject { user, groups, privileged, device: DEVICE.into() })
    }

    /// The user of this name with its own group, without capabilities.
    pub fn of_user(passwd: &str, name: &str) -> Option<Subject> {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2).map(|id| id.parse().ok());
        let (user, group) = (ids.next()??, ids.next()??);
        Some(Subject { user, groups: [group].into(), privileged: false, device: DEVICE.into() })
    }
}

/// How a process may use userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Privileged,
    Sysctl,
    Device,
    /// The kernel has no such restriction, because it is older than the sysctl.
    Unrestricted,
    /// It may not. The flag says whether the host has the device.
    No {
        device: bool,
    },
}

/// Finds out how this subject may use userfaultfd. `version` is QEMU's, if it is known.
pub fn access(subject: &Subject, version: Option<(u64, u64)>) -> Access {
    let sysctl = fs::read_to_string(SYSCTL).ok();
    let device = Permissions::read(&subject.device);
    decide(subject, version, sysctl.as_deref(), device.as_ref())
}

fn decide(
    subject: &Subject,
    version: Option<(u64, u64)>,
    sysctl: Option<&str>,
    device: Option<&Permissions>,
) -> Access {
    if subject.privileged {
        return Access::Privileged;
    }
    match sysctl.map(str::trim) {
        None => return Access::Unrestricted,
        Some("1") => return Access::Sysctl,
        Some(_) => {}
    }
    let opens = version.is_none_or(|version| version >= OPENS_DEVICE);
    match device {
        Some(device) if opens && device.allow(subject) => Access::Device,
        _ => Access::No { device: device.is_some() && opens },
    }
}

/// Who may open a file for reading and writing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Permissions {
    owner: u32,
    group: u32,
    mode: u32,
    /// The entries of its access control list: tag, permissions, id.
    list: Vec<(u16, u16, u32)>,
}

/// Reading and writing.
const READ_WRITE: u16 = 0o6;

impl Permissions {
    fn read(file: &Path) -> Option<Permissions> {
        let metadata = fs::metadata(file).ok()?;
        let mut content = [0; 1024];
        let length =
            rustix::fs::getxattr(file, "system.posix_acl_access", &mut content[..]).unwrap_or(0);
        // A version, then the entries, little-endian.
        let entries = content[..length].get(4..).unwrap_or_default().chunks_exact(8);
        let list = entries.map(|entry| {
            let short = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            (short(0), short(2), id)
        });
        Some(Permissions {
            owner: metadata.uid(),
            group: metadata.gid(),
            mode: metadata.mode(),
            list: list.collect(),
        })
    }

    /// The kernel's rule: the owner; else the user's entry; else any entry of its groups; else all
    /// others. The mask limits all but the first and the last.
    fn allow(&self, subject: &Subject) -> bool {
        const USER: u16 = 0x02;
        const GROUP_OWNER: u16 = 0x04;
        const GROUP: u16 = 0x08;
        const MASK: u16 = 0x10;
        let has = |permissions: u16| permissions & READ_WRITE == READ_WRITE;
        let of_mode = |shift: u32| (self.mode >> shift & 0o7) as u16;
        if subject.user == self.owner {
            return has(of_mode(6));
        }
        let mask = self.list.iter().find(|(tag, ..)| *tag == MASK).map_or(!0, |entry| entry.1);
        let named = self.list.iter().find(|(tag, _, id)| *tag == USER && *id == subject.user);
        if let Some((_, permissions, _)) = named {
            return has(permissions & mask);
        }
        let is_member = |group: u32| subject.groups.contains(&group);
        // Without a list, the middle of the mode is that of the group.
        let by_mode = self.list.is_empty().then(|| (GROUP_OWNER, of_mode(3), 0));
        let entries = self.list.iter().copied().chain(by_mode);
        let of_groups: Vec<u16> = entries
            .filter(|(tag, _, id)| match *tag {
                GROUP_OWNER => is_member(self.group),
                GROUP => is_member(*id),
                _ => false,
            })
            .map(|(_, permissions, _)| permissions & mask)
            .collect();
        if of_groups.is_empty() { has(of_mode(0)) } else { of_groups.into_iter().any(has) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tqemu\nUid:\t64055\t64055\t64055\t64055\n\
                          Gid:\t103\t103\t103\t103\nGroups:\t64055 7 \nCapEff:\t0000000000000000\n";

    fn subject() -> Subject {
        Subject::parse(STATUS).unwrap()
    }

    fn device(mode: u32, list: &[(u16, u16, u32)]) -> Permissions {
        Permissions { owner: 0, group: 0, mode, list: list.to_vec() }
    }

    #[test]
    fn a_status_of_proc_gives_user_groups_and_capabilities() {
        let found = subject();
        assert_eq!((found.user, found.privileged), (64055, false));
        assert_eq!(found.groups, [7, 103, 64055].into());
        let root = Subject::parse(&STATUS.replace("0000000000000000", "000001ffffffffff")).unwrap();
        assert!(root.privileged);
        assert_eq!(Subject::parse("Name:\tqemu\n"), None);
    }

    #[test]
    fn a_user_of_passwd_has_its_ids_and_no_capability() {
        let passwd = "root:x:0:0::/:/bin/sh\nlibvirt-qemu:x:64055:103:Libvirt:/var:/usr/sbin/x\n";
        let found = Subject::of_user(passwd, "libvirt-qemu").unwrap();
        assert_eq!((found.user, found.groups), (64055, [103].into()));
        assert_eq!(Subject::of_user(passwd, "libvirt"), None);
    }

    #[test]
    fn each_way_to_userfaultfd_is_found() {
        let subject = subject();
        let privileged = Subject { privileged: true, ..subject.clone() };
        let closed = device(0o600, &[]);
        let decided = |subject, version, sysctl, device| decide(subject, version, sysctl, device);
        assert_eq!(decided(&privileged, None, Some("0\n"), None), Access::Privileged);
        assert_eq!(decided(&subject, None, Some("1\n"), None), Access::Sysctl);
        assert_eq!(decided(&subject, None, None, None), Access::Unrestricted);
        let open = device(0o666, &[]);
        assert_eq!(decided(&subject, Some((8, 0)), Some("0"), Some(&open)), Access::Device);
        // An older QEMU does not open the device.
        let refused = Access::No { device: false };
        assert_eq!(decided(&subject, Some((7, 2)), Some("0"), Some(&open)), refused);
        assert_eq!(decided(&subject, None, Some("0"), None), refused);
        let has_device = Access::No { device: true };
        assert_eq!(decided(&subject, None, Some("0"), Some(&closed)), has_device);
    }

    #[test]
    fn an_access_control_list_counts_as_in_the_kernel() {
        let subject = subject();
        let entries = |user: u16, mask: u16| {
            [(1, 6, !0), (2, user, 64055), (4, 0, !0), (16, mask, !0), (32, 0, !0)]
        };
        assert!(device(0o660, &entries(6, 6)).allow(&subject));
        assert!(!device(0o660, &entries(6, 4)).allow(&subject));
        assert!(!device(0o660, &entries(4, 6)).allow(&subject));
        // The entry of the user itself counts, not the one of its group.
        let both = [(2, 4, 64055), (8, 6, 103), (16, 6, !0)];
        assert!(!device(0o666, &both).allow(&subject));
        assert!(device(0o660, &[(8, 6, 103), (16, 6, !0)]).allow(&subject));
        assert!(device(0o666, &[]).allow(&subject));
        assert!(!device(0o660, &[]).allow(&subject));
        assert!(Permissions { group: 103, ..device(0o660, &[]) }.allow(&subject));
        assert!(Permissions { owner: 64055, ..device(0o600, &[]) }.allow(&subject));
    }
}
