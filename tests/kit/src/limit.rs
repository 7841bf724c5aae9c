//! A test that hangs is no reason for its program to hang: after ten minutes it says where, and
//! ends.

use std::process::{Command, id};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::thorough::is_thorough;

/// Sets the limit, in seconds.
pub const LIMIT: &str = "INSTANTSNAP_TEST_LIMIT";

/// The watch over this thread's test. It ends with the thread.
struct Watch {
    _ends: Sender<()>,
}

thread_local! {
    static WATCH: Watch = Watch::begin();
}

/// From the first guest of a test on it has so long.
pub fn begin() {
    WATCH.with(|_| ());
}

fn limit() -> Duration {
    let otherwise = if is_thorough() { 7200 } else { 600 };
    let wanted = std::env::var(LIMIT).map(|limit| limit.parse().expect("a number of seconds"));
    Duration::from_secs(wanted.unwrap_or(otherwise))
}

impl Watch {
    fn begin() -> Watch {
        let (ends, ended) = channel::<()>();
        let test = std::thread::current().name().unwrap_or("a thread of a test").to_owned();
        let limit = limit();
        std::thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                give_up(&test, limit);
            }
        });
        Watch { _ends: ends }
    }
}

/// Says what the threads do, as far as there is a debugger; and takes the children along, which are
/// QEMUs.
fn give_up(test: &str, limit: Duration) -> ! {
    eprintln!("{test} has not ended within {limit:?}: its program ends here");
    let own = id().to_string();
    let _ = Command::new("timeout")
        .args(["120", "gdb", "-p", &own, "-batch", "-ex", "thread apply all bt"])
        .status();
    for child in children() {
        let _ = kill_process(child, Signal::KILL);
    }
    std::process::abort();
}

fn children() -> Vec<Pid> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let of_task = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("children")).unwrap_or_default()
    };
    let all: String = tasks.map(of_task).collect();
    all.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}
