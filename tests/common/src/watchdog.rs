// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds and kills the watchdog of a process that takes a snapshot.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The watchdog of a process: it has a descriptor of that process, to see its end.
pub fn watchdog_of(pid: u32) -> Option<u32> {
    let name = |process: u32| std::fs::read_to_string(format!("/proc/{process}/comm"));
    let watches = |process: u32| {
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fdinfo")).ok()?.flatten();
        let infos = descriptors.filter_map(|info| std::fs::read_to_string(info.path()).ok());
        let mut lines = infos.flat_map(|info| info.lines().map(str::to_owned).collect::<Vec<_>>());
        lines.find(|line| *line == format!("Pid:\t{pid}"))
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let mut processes = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.find(|process| {
        name(*process).is_ok_and(|name| name == "instantsnap\n") && watches(*process).is_some()
    })
}

/// Kills the watchdog of a process, and waits for its end. Returns its process id.
pub fn kill_watchdog_of(caller: u32) -> u32 {
    let pid = watchdog_of(caller).expect("there is a watchdog");
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_send_signal(&process, Signal::KILL).unwrap();
    // All of its threads have ended.
    let ended = PollFd::new(&process, PollFlags::IN);
    poll(&mut [ended], None).unwrap();
    pid
}

/// The name of the program that a process runs.
pub fn program_of(pid: u32) -> String {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    program.file_name().unwrap().to_str().unwrap().into()
}
