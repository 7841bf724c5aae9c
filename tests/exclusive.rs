//! A guest is held for one operation, and let go: also where a process is forked at the wrong moment.

mod common;

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use common::{At, INSTANTLY, Opened, machine, named};
use instantsnap::engine::Phase;
use instantsnap_testkit::Binary;

#[test]
fn a_child_that_another_thread_forks_during_a_snapshot_does_not_keep_the_guest_busy() {
    for binary in Binary::all() {
        let opened = Opened::start(&machine(binary, 1));
        let mut child = None;
        let mut observer = At(|phase| {
            if phase != Phase::Drain {
                return;
            }
            let (mut forked, mut tell) = std::io::pipe().unwrap();
            child = Some(std::thread::spawn(move || {
                let mut command = Command::new("true");
                // Between fork and exec it holds whatever was open, for a while yet.
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
