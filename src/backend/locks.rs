// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds out which processes have an image open, by the byte-range locks that QEMU takes on it.
//!
//! QEMU locks one byte for each permission that it uses, and one for each that it does not share,
//! unless it runs with `locking=off`.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys::{self, IMAGE_LOCKS};

/// The byte that a process locks if it writes the image.
const WRITES: Range<i64> = 101..102;

/// How often the kernel's list is read at most.
const ATTEMPTS: usize = 50;

/// Whether a process other than this one has the image open as QEMU opens it.
pub fn is_in_use(image: &Path) -> bool {
    has_lock(image, IMAGE_LOCKS)
}

/// Whether a process other than this one writes to the image.
pub fn is_written(image: &Path) -> bool {
    has_lock(image, WRITES)
}

/// Whether a process other than this QEMU, which has the image open itself, has it open too. False
/// if the kernel does not report it: QEMU itself then refuses to write to the image.
///
/// The kernel writes its list of locks a page at a time. If the locks of other guests change in
/// between, it can list one twice; and this QEMU's own locks can change before they are read. So a
/// holder that cannot be seen among the processes counts only if the list shows it in each of
/// several attempts.
pub fn is_in_use_besides(image: &Path, qemu: u32) -> bool {
    is_locked_by_another(image, qemu) || (0..ATTEMPTS).all(|_| list_shows_another(image, qemu))
}

/// Whether a process other than this QEMU has locks on the image, of those that can be inspected.
fn is_locked_by_another(image: &Path, qemu: u32) -> bool {
    let (Ok(metadata), Ok(processes)) = (image.metadata(), std::fs::read_dir("/proc")) else {
        return false;
    };
    let id = (metadata.dev(), metadata.ino());
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != qemu)
        .any(|pid| locks_of(pid, id).is_some_and(|locks| !locks.is_empty()))
}

fn list_shows_another(image: &Path, qemu: u32) -> bool {
    let (Ok(metadata), Ok(all)) = (image.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return false;
    };
    let Some(own) = locks_of(qemu, (metadata.dev(), metadata.ino())) else { return false };
    // The kernel identifies the file by numbers that can differ from those of `stat`, so they are
    // read from QEMU's own locks.
    let Some(file) = own.first().and_then(|line| file_of(line)).map(str::to_owned) else {
        return is_in_use(image);
    };
    let of_file = |line: &&str| file_of(line) == Some(&file) && !line.contains("->");
    all.lines().filter(of_file).count() > own.len()
}

/// The process of a domain's QEMU: libvirt gives it the UUID on its command line.
pub fn qemu_of_domain(uuid: &str) -> Option<u32> {
    let option = format!("-uuid\0{uuid}\0");
    let contains =
        |text: &[u8]| text.windows(option.len()).any(|window| window == option.as_bytes());
    std::fs::read_dir("/proc").ok()?.find_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        contains(&std::fs::read(format!("/proc/{pid}/cmdline")).ok()?).then_some(pid)
    })
}

fn has_lock(image: &Path, bytes: Range<i64>) -> bool {
    sys::open_file(image).is_ok_and(|file: File| sys::is_locked(&file, bytes))
}

/// The locks that a process has on a file, in the kernel's text form.
fn locks_of(pid: u32, id: (u64, u64)) -> Option<Vec<String>> {
    let mut locks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        let fd = entry.ok()?;
        let is_it = fd.path().metadata().is_ok_and(|file| (file.dev(), file.ino()) == id);
        if !is_it {
            continue;
        }
        let number = fd.file_name();
        let info =
            std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy()))
                .ok()?;
        locks.extend(info.lines().filter_map(|line| line.strip_prefix("lock:")).map(str::to_owned));
    }
    Some(locks)
}

/// `MAJOR:MINOR:INODE` of `1: OFDLCK  ADVISORY  READ  -1 fe:00:131 100 100`.
fn file_of(line: &str) -> Option<&str> {
    line.split_whitespace().find(|word| word.matches(':').count() == 2)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn lock(file: &File, byte: i64) {
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: an open file and a whole flock.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, 0);
    }

    #[test]
    fn locks_of_others_are_told_from_those_of_one_process() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (path, itself) = (image.path(), std::process::id());
        assert!(!is_in_use(path) && !is_in_use_besides(path, itself));
        let first = File::open(path).unwrap();
        lock(&first, 100);
        assert!(is_in_use(path) && !is_written(path) && !is_in_use_besides(path, itself));
        lock(&first, 101);
        assert!(is_written(path));
        // A child has a copy of the descriptor; with the original closed it is the only holder.
        let mut child =
            std::process::Command::new("sleep").arg("100").stdin(first).spawn().unwrap();
        let second = File::open(path).unwrap();
        lock(&second, 100);
        assert!(is_in_use_besides(path, itself) && is_in_use_besides(path, child.id()));
        drop(second);
        assert!(!is_in_use_besides(path, child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_in_use(path));
    }

    /// Other guests take and release locks while the list is read.
    #[test]
    fn locks_that_change_meanwhile_are_nobodys_on_this_image() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let own = File::open(image.path()).unwrap();
        (100..104).for_each(|byte| lock(&own, byte));
        // A separate process holds them: children of other tests would have copies of our
        // descriptors.
        let mut holder =
            std::process::Command::new("sleep").arg("1000").stdin(own).spawn().unwrap();
        while is_locked_by_another(image.path(), holder.id()) {
            std::thread::yield_now();
        }
        let others: Vec<_> = (0..8).map(|_| tempfile::tempfile().unwrap()).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for other in &others {
                        let opened = File::open(format!("/proc/self/fd/{}", other.as_raw_fd()));
                        (0..40).for_each(|n| lock(opened.as_ref().unwrap(), 2 * n));
                        // Other guests do so occasionally.
                        std::thread::sleep(std::time::Duration::from_millis(2));
                    }
                }
            });
            let attempts = 300;
            let wrong =
                (0..attempts).filter(|_| list_shows_another(image.path(), holder.id())).count();
            eprintln!("{wrong} of {attempts} attempts are wrong");
            let in_use = (0..attempts).any(|_| is_in_use_besides(image.path(), holder.id()));
            stop.store(true, Ordering::Relaxed);
            holder.kill().unwrap();
            holder.wait().unwrap();
            assert!(!in_use);
        });
    }
}
