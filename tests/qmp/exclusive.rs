// SPDX-License-Identifier: LGPL-2.1-or-later

//! A guest is locked for one operation and unlocked after it, even where another thread forks a
//! child during the operation that does not call exec.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use common::backend::open_guest;
use common::{At, INSTANTLY, Opened, machine, named, through_proxy};
use instantsnap::engine::Phase;
use instantsnap_testkit::{Binary, DEADLINE, test};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A forked child of this process, which inherits the open descriptors and keeps them until the
/// test ends.
struct Forked(Pid);

impl Forked {
    fn new() -> Forked {
        // SAFETY: the child makes system calls only.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            },
            pid => Forked(Pid::from_raw(pid).expect("it was forked")),
        }
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
        let _ = waitpid(Some(self.0), WaitOptions::empty());
    }
}

#[test]
fn forked_children_without_exec_do_not_keep_the_guest_locked() {
    for binary in Binary::some() {
        let (opened, proxy) = through_proxy(&machine(binary, 1));
        let mut children = Vec::new();
        // At this time this process has QEMU's end of the pipe open.
        let passing = proxy.hold("getfd", 1);
        let (opened, children) = std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| {
                let mut observer = At(|phase| {
                    if [Phase::Prepare, Phase::Drain].contains(&phase) {
                        children.push(Forked::new());
                    }
                });
                opened.handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
                (opened, children)
            });
            assert!(passing.wait_arrived(DEADLINE));
            let child = Forked::new();
            passing.release();
            let (opened, mut children) = snapshot.join().unwrap();
            children.push(child);
            (opened, children)
        });
        assert_eq!(children.len(), 3);
        // Snapshots by the same handle and by another one go through: neither finds the guest busy
        // or waits for the children, even when it is cancelled.
        opened.snapshot("t").unwrap();
        let state_dir = opened.state_dir();
        let another = open_guest(&opened.guest, &opened.guest.qmp(), None, &state_dir).unwrap();
        another.create(&named("u"), INSTANTLY, &mut ()).unwrap();
        another
            .create(
                &named("v"),
                INSTANTLY,
                &mut At(|phase| {
                    if phase == Phase::Drain {
                        another.cancel().unwrap()
                    }
                }),
            )
            .unwrap_err();
        drop(children);
        opened.restore_clone("s");
        opened.restore_clone("u");
    }
}

#[test]
fn child_forked_by_another_thread_does_not_keep_the_guest_busy() {
    for binary in Binary::some() {
        let opened = Opened::start(&machine(binary, 1));
        let mut child = None;
        let mut observer = At(|phase| {
            if phase != Phase::Drain {
                return;
            }
            let (mut forked, mut tell) = std::io::pipe().unwrap();
            child = Some(std::thread::spawn(move || {
                let mut command = Command::new("true");
                // Between fork and exec the child keeps the inherited descriptors open for a while.
                let linger = move || {
                    tell.write_all(b"x")?;
                    std::thread::sleep(Duration::from_millis(500));
                    Ok(())
                };
                // SAFETY: writes to a pipe and sleeps: system calls only.
                unsafe { command.pre_exec(linger) };
                command.status().unwrap()
            }));
            forked.read_exact(&mut [0]).unwrap();
        });
        opened.handle.create(&named("s"), INSTANTLY, &mut observer).unwrap();
        opened.snapshot("t").unwrap();
        assert!(child.unwrap().join().unwrap().success());
    }
}
