// SPDX-License-Identifier: LGPL-2.1-or-later

//! The maker of a snapshot: the process that changed QEMU's settings for it, as recorded beside
//! them, and whether that snapshot has ended.
//!
//! The lock that a process has on a guest is a name in one network namespace, and contains QEMU's
//! process number in one PID namespace. So a process that has the lock in the same two namespaces
//! as the maker has proof that the maker has ended. In other namespaces, those of another container
//! for example, the maker and its watchdog are looked for among the processes. If they run, or
//! cannot be seen, the snapshot may still be under way.

use std::fs;

use serde_json::{Value, json};

use crate::procfs::{self, Stat};

/// The PID namespace of the host, from which all processes are seen: PROC_PID_INIT_INO of the
/// kernel.
const ALL_PROCESSES: &str = "pid:[4026531836]";

/// The note of this process and its watchdog, by which another process finds out whether they still
/// run.
pub fn note(watchdog: Option<u32>) -> Value {
    let Namespaces { boot, pid, net } = Namespaces::own();
    let processes = [Some(std::process::id()), watchdog];
    let started =
        |pid: u32| Some(json!({ "pid": pid, "started": Process::read(&pid.to_string())?.started }));
    let processes: Vec<_> = processes.into_iter().flatten().filter_map(started).collect();
    json!({ "boot": boot, "pid-namespace": pid, "network-namespace": net, "processes": processes })
}

/// Describes the snapshot of a note's maker if it may still be under way; none where the maker has
/// ended. The caller has the lock on the guest.
pub fn snapshot_under_way(note: &Value) -> Option<String> {
    snapshot_under_way_seen_from(note, &Namespaces::own())
}

fn snapshot_under_way_seen_from(note: &Value, here: &Namespaces) -> Option<String> {
    let text = |name: &str| note[name].as_str().unwrap_or_default();
    // An earlier version's note names no processes.
    let processes = note["processes"].as_array()?;
    let (boot, pid, net) = (text("boot"), text("pid-namespace"), text("network-namespace"));
    let same_pids = boot == here.boot && pid == here.pid;
    if same_pids && net == here.net {
        return None;
    }
    if boot != here.boot || !(same_pids || here.pid == ALL_PROCESSES) {
        return Some(format!(
            "of another container ({pid}), whose processes cannot be seen from here"
        ));
    }
    let Some(seen) = Process::all() else {
        return Some(format!(
            "of another network namespace ({net}), and /proc does not show all processes here"
        ));
    };
    let is_running = |process: &&Value| {
        seen.iter()
            .any(|seen| process["pid"] == seen.innermost_pid && process["started"] == seen.started)
    };
    let process = processes.iter().find(is_running)?;
    Some(format!(
        "of another network namespace ({net}), whose process {} (in {pid}) is running",
        process["pid"]
    ))
}

/// The boot and the namespaces in which process numbers and lock names are valid.
struct Namespaces {
    boot: String,
    pid: String,
    net: String,
}

impl Namespaces {
    /// Those of this process.
    fn own() -> Namespaces {
        let [pid, net] = ["pid", "net"].map(procfs::namespace);
        Namespaces { boot: procfs::boot(), pid, net }
    }
}

struct Process {
    /// Its number in its own namespace.
    innermost_pid: u32,
    /// When it was started, in ticks since the host's boot. Together with the number it is unique.
    started: u64,
}

impl Process {
    fn read(entry: &str) -> Option<Process> {
        let started = Stat::start_if_alive(entry)?;
        let status = fs::read_to_string(format!("/proc/{entry}/status")).ok()?;
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        Some(Process {
            innermost_pid: pids.split_ascii_whitespace().next_back()?.parse().ok()?,
            started,
        })
    }

    /// All processes; none where /proc hides some (`hidepid`), which hides process 1 too.
    fn all() -> Option<Vec<Process>> {
        Process::read("1")?;
        let entries = fs::read_dir("/proc").ok()?.flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let numbers = numbers.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        Some(numbers.filter_map(|number| Process::read(&number)).collect())
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::WaitIdOptions;

    use super::*;

    #[test]
    fn a_maker_is_known_to_have_ended_where_the_guest_is_held_in_its_namespaces() {
        assert_eq!(snapshot_under_way(&note(None)), None);
        assert_eq!(snapshot_under_way(&json!(null)), None);
    }

    #[test]
    fn a_maker_of_another_network_namespace_is_looked_for_and_one_that_cannot_be_seen_is_not_taken_for_dead()
     {
        let here = Namespaces::own();
        let from_namespaces = |net: &str, pid: &str, note: &Value| {
            let mut note = note.clone();
            (note["network-namespace"], note["pid-namespace"]) = (net.into(), pid.into());
            snapshot_under_way_seen_from(&note, &here)
        };
        let mut watchdog = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut noted = note(Some(watchdog.id()));
        let alive = from_namespaces("net:[1]", &here.pid, &noted).unwrap();
        assert!(alive.contains(&format!("process {}", std::process::id())), "{alive}");
        // The watchdog outlives its maker.
        noted["processes"].as_array_mut().unwrap().remove(0);
        assert!(
            from_namespaces("net:[1]", &here.pid, &noted)
                .unwrap()
                .contains(&format!("process {}", watchdog.id()))
        );
        watchdog.kill().unwrap();
        let pid = rustix::process::Pid::from_child(&watchdog);
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).unwrap();
        assert_eq!(from_namespaces("net:[1]", &here.pid, &noted), None, "it is a zombie");
        watchdog.wait().unwrap();
        let from_within = Namespaces { pid: "pid:[2]".into(), ..Namespaces::own() };
        let unseen = snapshot_under_way_seen_from(&noted, &from_within).unwrap();
        assert!(unseen.contains("cannot be seen"), "{unseen}");
    }
}
