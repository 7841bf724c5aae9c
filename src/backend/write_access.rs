// SPDX-License-Identifier: LGPL-2.1-or-later

//! The write check: whether QEMU could open an image for writing again after the switch.
//!
//! QEMU has its disks' images open, and goes on writing to them even if their permissions change.
//! After the switch it has them open for reading only. To merge an overlay back, it must open the
//! image below for writing again. A snapshot that could not be undone is refused.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;

use super::guest::Guest;
use crate::error::{Result, fail};
use crate::model::DiskPlan;

/// The capability that permits writing whatever the mode says.
const CAP_DAC_OVERRIDE: u64 = 1 << 1;

/// The rights of a process when it opens a file.
#[derive(Debug, PartialEq, Eq)]
struct Credentials {
    user: u32,
    groups: Vec<u32>,
    capabilities: u64,
}

/// Refuses a disk whose image QEMU could not open for writing again, as far as that is known.
pub fn check(guest: &dyn Guest, disks: &[DiskPlan]) -> Result<()> {
    let Some((pid, credentials)) = guest.pid().and_then(|pid| Some((pid, Credentials::of(pid)?)))
    else {
        return Ok(());
    };
    for drive in disks.iter().map(|disk| &disk.drive).filter(|drive| drive.file.starts_with('/')) {
        // QEMU can be in its own mount namespace.
        let path = format!("/proc/{pid}/root{}", drive.file);
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        let Some(rules) = Rules::of(Path::new(&path)) else { continue };
        let given = guest.capabilities().gives_write_access && metadata.mode() & 0o200 != 0;
        if credentials.may_write(&metadata) || given || has_acl(Path::new(&path), rules) {
            continue;
        }
        fail!(
            ConfigUnsupported,
            "QEMU (process {pid}, user {}) has the image '{}' of disk '{}' open, but may not open \
             it for writing any more (its mode is {:o}): if the snapshot had to be undone, what \
             the guest has written could not be merged back; make it writable for that user, or \
             leave the disk out (snapshot='no')",
            credentials.user,
            drive.file,
            drive.name(),
            metadata.mode() & 0o7777
        );
    }
    Ok(())
}

impl Credentials {
    fn of(pid: u32) -> Option<Credentials> {
        Credentials::parse(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Credentials> {
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let numbers = |name: &str| -> Option<Vec<u32>> {
            line(name)?.split_whitespace().map(|number| number.parse().ok()).collect()
        };
        // The real, effective, saved and file system ids. The last one counts when a file is
        // opened.
        let (user, group) = (*numbers("Uid:")?.get(3)?, *numbers("Gid:")?.get(3)?);
        let groups = [numbers("Groups:").unwrap_or_default(), vec![group]].concat();
        let capabilities = u64::from_str_radix(line("CapEff:")?.trim(), 16).ok()?;
        Some(Credentials { user, groups, capabilities })
    }

    fn may_write(&self, file: &std::fs::Metadata) -> bool {
        let bit = if file.uid() == self.user {
            0o200
        } else if self.groups.contains(&file.gid()) {
            0o020
        } else {
            0o002
        };
        self.capabilities & CAP_DAC_OVERRIDE != 0 || file.mode() & bit != 0
    }
}

/// The rules by which a file system grants access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    /// The mode, and POSIX access control lists.
    Posix,
    /// The mode, POSIX access control lists, and perhaps others.
    PosixAndOthers,
}

impl Rules {
    /// `None` if a server or a program grants access, whatever the mode is.
    fn of(path: &Path) -> Option<Rules> {
        // A type wider than 32 bits can be sign-extended.
        rustix::fs::statfs(path).ok().and_then(|found| Rules::of_type(found.f_type as u32))
    }

    fn of_type(magic: u32) -> Option<Rules> {
        const FUSE: u32 = 0x6573_5546;
        const SMB: u32 = 0x517b;
        const CIFS: u32 = 0xff53_4d42;
        const SMB2: u32 = 0xfe53_4d42;
        const NINE_P: u32 = 0x0102_1997;
        const NFS: u32 = 0x6969;
        const EXT4: u32 = 0xef53;
        const XFS: u32 = 0x5846_5342;
        const BTRFS: u32 = 0x9123_683e;
        const TMPFS: u32 = 0x0102_1994;
        match magic {
            FUSE | SMB | CIFS | SMB2 | NINE_P | NFS => None,
            EXT4 | XFS | BTRFS | TMPFS => Some(Rules::Posix),
            _ => Some(Rules::PosixAndOthers),
        }
    }
}

/// Whether access may depend on more than the mode.
fn has_acl(path: &Path, rules: Rules) -> bool {
    let mut value = [0_u8; 1];
    match rustix::fs::getxattr(path, c"system.posix_acl_access", &mut value) {
        Err(Errno::NODATA) => false,
        Err(Errno::OPNOTSUPP) => rules != Rules::Posix,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn where_a_server_or_a_program_decides_the_mode_is_not_looked_at() {
        let [fuse, smb, cifs, smb2, nine_p, nfs] =
            [0x6573_5546, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x6969];
        for magic in [fuse, smb, cifs, smb2, nine_p, nfs] {
            assert_eq!(Rules::of_type(magic), None, "{magic:x}");
        }
        assert_eq!(Rules::of_type(0xef53), Some(Rules::Posix));
        let overlayfs = 0x794c_7630;
        assert_eq!(Rules::of_type(overlayfs), Some(Rules::PosixAndOthers));
        assert_eq!(Rules::of(Path::new("/proc/self/no such file")), None);
    }

    #[test]
    fn owner_group_and_capability_decide_in_the_kernels_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let owner = file.as_file().metadata().unwrap();
        let as_user = |user, groups: &[u32], capabilities| Credentials {
            user,
            groups: groups.to_vec(),
            capabilities,
        };
        let may = |who: &Credentials, mode| {
            file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
            who.may_write(&file.as_file().metadata().unwrap())
        };
        let (uid, gid) = (owner.uid(), owner.gid());
        assert!(may(&as_user(uid, &[gid], 0), 0o644));
        assert!(!may(&as_user(uid, &[gid], 0), 0o466), "the owner's bit is the one that counts");
        assert!(may(&as_user(uid + 1, &[gid], 0), 0o660));
        assert!(!may(&as_user(uid + 1, &[gid], 0), 0o646));
        assert!(may(&as_user(uid + 1, &[gid + 1], 0), 0o646));
        assert!(may(&as_user(uid + 1, &[gid + 1], CAP_DAC_OVERRIDE), 0o444));
        let status = "Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapEff:\t00000000000000c2\n";
        assert_eq!(Credentials::parse(status), Some(as_user(4, &[9, 10, 8], 0xc2)));
    }
}
