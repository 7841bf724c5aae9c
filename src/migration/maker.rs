// SPDX-License-Identifier: LGPL-2.1-or-later

//! Who has changed QEMU's settings for a snapshot, as it is noted beside them: whether that
//! snapshot has ended.
//!
//! A guest is held by a name that one network namespace knows, made of QEMU's process number, which
//! is that of one PID namespace. So a process that holds the guest in the same two namespaces has
//! proof that the maker of the note has ended. Between others, containers for example, the
//! processes are looked for: the maker, and its watchdog. Where they cannot be seen, or are there,
//! it is not known whether the snapshot is still being taken.

use std::fs;

use serde_json::{Value, json};

/// The PID namespace of the host, from which all processes are seen: PROC_PID_INIT_INO of the
/// kernel.
const ALL_PROCESSES: &str = "pid:[4026531836]";

/// Notes this process, and its watchdog.
pub fn note(watchdog: Option<u32>) -> Value {
    let Place { boot, pid, net } = Place::here();
    let processes = [Some(std::process::id()), watchdog];
    let started =
        |pid: u32| Some(json!({ "pid": pid, "started": Process::read(&pid.to_string())?.started }));
    let processes: Vec<_> = processes.into_iter().flatten().filter_map(started).collect();
    json!({ "boot": boot, "pid-namespace": pid, "network-namespace": net, "processes": processes })
}

/// Why the maker of a note, which this process does not find among those that hold the guest, may
/// be at work; none where it has ended.
pub fn at_work(note: &Value) -> Option<String> {
    at_work_seen_from(note, &Place::here())
}

fn at_work_seen_from(note: &Value, here: &Place) -> Option<String> {
    let text = |name: &str| note[name].as_str().unwrap_or_default();
    // One without it is of an earlier version.
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
    let is_there = |process: &&Value| {
        seen.iter()
            .any(|seen| process["pid"] == seen.innermost_pid && process["started"] == seen.started)
    };
    let process = processes.iter().find(is_there)?;
    Some(format!(
        "of another network namespace ({net}), whose process {} (in {pid}) is there",
        process["pid"]
    ))
}

/// What says of which processes and of which names one speaks.
struct Place {
    boot: String,
    pid: String,
    net: String,
}

impl Place {
    fn here() -> Place {
        let namespace = |kind: &str| {
            let link = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
            link.to_string_lossy().into_owned()
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Place { boot: boot.trim().into(), pid: namespace("pid"), net: namespace("net") }
    }
}

/// A process.
struct Process {
    /// Its number in its own namespace.
    innermost_pid: u32,
    /// When it was started, in ticks since the host was: with the number that is unique.
    started: u64,
}

impl Process {
    fn read(entry: &str) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{entry}/stat")).ok()?;
        // The fields after the command, which is in parentheses and can hold anything; the start
        // time is field 22.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        // One that has ended, and that nobody has waited for yet, does nothing any more.
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok().filter(|_| state != "Z")?;
        let status = fs::read_to_string(format!("/proc/{entry}/status")).ok()?;
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        Some(Process {
            innermost_pid: pids.split_ascii_whitespace().next_back()?.parse().ok()?,
            started,
        })
    }

    /// All that there are; none where some are hidden (`hidepid`), the first among them.
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
        assert_eq!(at_work(&note(None)), None);
        assert_eq!(at_work(&json!(null)), None);
    }

    #[test]
    fn a_maker_of_another_network_namespace_is_looked_for_and_one_that_cannot_be_seen_is_not_taken_for_dead()
     {
        let here = Place::here();
        let of = |net: &str, pid: &str, note: &Value| {
            let mut note = note.clone();
            (note["network-namespace"], note["pid-namespace"]) = (net.into(), pid.into());
            at_work_seen_from(&note, &here)
        };
        let mut watchdog = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut noted = note(Some(watchdog.id()));
        let alive = of("net:[1]", &here.pid, &noted).unwrap();
        assert!(alive.contains(&format!("process {}", std::process::id())), "{alive}");
        // The watchdog outlives its maker.
        noted["processes"].as_array_mut().unwrap().remove(0);
        assert!(
            of("net:[1]", &here.pid, &noted)
                .unwrap()
                .contains(&format!("process {}", watchdog.id()))
        );
        watchdog.kill().unwrap();
        let pid = rustix::process::Pid::from_child(&watchdog);
        let ends = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), ends).unwrap();
        assert_eq!(of("net:[1]", &here.pid, &noted), None, "its status was not taken yet");
        watchdog.wait().unwrap();
        let from_within = Place { pid: "pid:[2]".into(), ..Place::here() };
        let unseen = at_work_seen_from(&noted, &from_within).unwrap();
        assert!(unseen.contains("cannot be seen"), "{unseen}");
    }
}
