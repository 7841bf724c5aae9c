// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks of the host.

use std::fs;

use super::report::Report;
use super::userfaultfd::{self, Access, DEVICE, Subject};
use crate::engine::program;
use crate::libvirt::Connect;
use crate::tool;

/// The first Linux whose userfaultfd protects pages from being written.
const PROTECTS: (u64, u64) = (5, 7);
/// The first Linux that does so for shared memory, too.
const PROTECTS_SHARED: (u64, u64) = (5, 19);
/// The users that QEMU has under libvirt: of Debian and Ubuntu, of Fedora and others.
const LIBVIRTS_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];
/// The oldest libvirt that is supported.
const OLDEST_LIBVIRT: (u64, u64, u64) = (8, 2, 0);

/// The kernel's version.
pub fn kernel(report: &mut Report) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let check = "kernel";
    match leading_numbers(&release) {
        Some(version) if version < PROTECTS => report.fail(
            check,
            release,
            "its userfaultfd cannot protect pages from being written",
            "use Linux 5.7 or later",
        ),
        Some(version) if version < PROTECTS_SHARED => report.warn(
            check,
            release,
            "guests with shared memory (memfd) cannot be snapshotted instantly",
            "use Linux 5.19 or later for those",
        ),
        Some(_) => report.pass(check, release, "userfaultfd protects pages from being written"),
        None => report.skip(check, release, "the version is not known"),
    }
}

fn leading_numbers(release: &str) -> Option<(u64, u64)> {
    let mut numbers = release.split(['.', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether QEMU may use userfaultfd, if it is run by this user, or by libvirt.
pub fn users(report: &mut Report) {
    match Subject::of_process("self") {
        Some(subject) => {
            let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
            let name = name_of(&passwd, subject.user);
            permission(report, &name, &subject, None);
            for user in LIBVIRTS_USERS.into_iter().filter(|user| *user != name) {
                if let Some(subject) = Subject::of_user(&passwd, user) {
                    permission(report, user, &subject, None);
                }
            }
        }
        None => report.skip("userfaultfd", "", "/proc does not say which rights a process has"),
    }
}

/// Whether a QEMU may use userfaultfd. `user`: the name of its user.
pub fn permission(report: &mut Report, user: &str, subject: &Subject, version: Option<(u64, u64)>) {
    let check = "userfaultfd";
    let object = format!("user {user}");
    match userfaultfd::access(subject, version) {
        Access::Privileged => report.pass(check, object, "allowed, by CAP_SYS_PTRACE"),
        Access::Sysctl => {
            report.pass(check, object, "allowed to everyone (vm.unprivileged_userfaultfd=1)");
        }
        Access::Unrestricted => report.pass(check, object, "allowed to everyone by this kernel"),
        Access::Device => report.pass(check, object, format!("allowed, by {DEVICE}")),
        Access::No { device: true } => report.fail(
            check,
            object,
            "QEMU may not protect the guest's memory: background snapshots are refused",
            format!(
                "setfacl -m u:{user}:rw {DEVICE} (QEMU 8.0 and later; under libvirt also add it to \
                 cgroup_device_acl in qemu.conf), or, for all users of this host, sysctl -w \
                 vm.unprivileged_userfaultfd=1"
            ),
        ),
        Access::No { device: false } => report.fail(
            check,
            object,
            "QEMU may not protect the guest's memory: background snapshots are refused",
            "sysctl -w vm.unprivileged_userfaultfd=1",
        ),
    }
}

/// The name of a user, or its number.
pub fn name_of(passwd: &str, user: u32) -> String {
    let number = user.to_string();
    let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&number));
    line.and_then(|line| line.split(':').next()).map_or(number.clone(), str::to_owned)
}

/// The programs that the library runs.
pub fn programs(report: &mut Report) {
    if program::exists() {
        report.pass("watchdog", "instantsnap-watchdog", "found");
    } else {
        report.warn(
            "watchdog",
            "instantsnap-watchdog",
            "not found: a fork of the caller takes its place, which costs memory, and does not \
             move the guest's memory while the caller is stopped",
            "install it beside the library, in libexec/instantsnap, or name its file by \
             INSTANTSNAP_WATCHDOG",
        );
    }
    match tool::find("qemu-img") {
        Some(path) => report.pass("qemu-img", path.display().to_string(), "found"),
        None => report.fail(
            "qemu-img",
            "",
            "not found: snapshots cannot be deleted or reverted to",
            "install qemu-utils (qemu-img), or name it by INSTANTSNAP_QEMU_IMG",
        ),
    }
}

/// The version of the system's libvirt daemon. A daemon of a session is not asked, because the
/// question would start one.
pub fn libvirt(report: &mut Report) {
    let check = "libvirt";
    let uri = "qemu:///system";
    // Guests by QMP and by drivers do not need libvirt.
    let connect = match Connect::open_read_only(uri) {
        Ok(Ok(connect)) => connect,
        Ok(Err(error)) => return report.skip(check, uri, error.message),
        Err(error) => return report.skip(check, "", error.message),
    };
    match connect.version() {
        Ok(version) => {
            let (major, minor, release) = version;
            let found = format!("version {major}.{minor}.{release}");
            if version < OLDEST_LIBVIRT {
                report.fail(check, uri, found, "use libvirt 8.2 or later");
            } else {
                report.pass(check, uri, found);
            }
        }
        Err(error) => report.skip(check, uri, error.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_begins_with_two_numbers() {
        assert_eq!(leading_numbers("6.1.0-28-cloud-amd64"), Some((6, 1)));
        assert_eq!(leading_numbers("5.7-rc1"), Some((5, 7)));
        assert_eq!(leading_numbers("unknown"), None);
    }

    #[test]
    fn a_user_without_a_name_has_a_number() {
        let passwd = "root:x:0:0::/:/bin/sh\nqemu:x:107:107::/:/bin/false\n";
        assert_eq!(name_of(passwd, 107), "qemu");
        assert_eq!(name_of(passwd, 7), "7");
    }
}
