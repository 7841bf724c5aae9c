//! Whether QEMU could write an image again once it has let go of it.
//!
//! It has its disks' images open, and goes on writing to them whatever becomes of their permissions. After the switch it opens
//! them for reading only; to merge an overlay back, it has to open the image below once more for writing. A snapshot that could
//! not be undone is better not begun.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Guest;
use crate::error::{Result, fail};
use crate::snapshot::DiskPlan;

/// May write whatever the mode says.
const CAP_DAC_OVERRIDE: u64 = 1 << 1;

/// Whose rights a process has when it opens a file.
#[derive(Debug, PartialEq, Eq)]
struct Credentials {
    user: u32,
    groups: Vec<u32>,
    capabilities: u64,
}

/// Refuses a disk whose image QEMU could not open for writing again, as far as that can be told.
pub fn check(guest: &dyn Guest, disks: &[DiskPlan]) -> Result<()> {
    let Some((pid, credentials)) = guest.pid().and_then(|pid| Some((pid, Credentials::of(pid)?))) else {
        return Ok(());
    };
    for drive in disks.iter().map(|disk| &disk.drive).filter(|drive| drive.file.starts_with('/')) {
        // As QEMU sees it, which can be in a mount namespace.
        let path = format!("/proc/{pid}/root{}", drive.file);
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        let given = guest.is_given_images() && metadata.mode() & 0o200 != 0;
        if credentials.may_write(&metadata) || given || has_acl(Path::new(&path)) {
            continue;
        }
        fail!(
            ConfigUnsupported,
            "QEMU (process {pid}, user {}) has the image '{}' of disk '{}' open, but may not open it for writing any more (its \
             mode is {:o}): if the snapshot had to be undone, what the guest has written could not be merged back; make it \
             writable for that user, or leave the disk out (snapshot='no')",
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
        // Real, effective, saved, and the one that files are opened with.
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

/// Its mode is not all that counts.
fn has_acl(path: &Path) -> bool {
    let mut value = [0_u8; 1];
    !matches!(
        rustix::fs::getxattr(path, c"system.posix_acl_access", &mut value),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP)
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn owner_group_and_capability_decide_in_the_kernels_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let owner = file.as_file().metadata().unwrap();
        let as_user = |user, groups: &[u32], capabilities| Credentials { user, groups: groups.to_vec(), capabilities };
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
