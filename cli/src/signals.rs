// SPDX-License-Identifier: LGPL-2.1-or-later

//! The signals by which a user ends a command: they are noticed, and the command decides.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::failure::{Failure, Result};
use crate::output;

/// The signals, from now on noticed instead of obeyed.
pub struct Signals {
    streams: Vec<(i32, UnixStream)>,
}

impl Signals {
    /// Begins to notice the signals. What this process was started to ignore (by nohup, or in the
    /// background of a script) stays ignored.
    pub fn notice() -> Result<Signals> {
        let failed = |error| Failure::Other(format!("cannot handle signals: {error}"));
        let ignored = ignored();
        let mut streams = Vec::new();
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&n| ignored >> (n - 1) & 1 == 0)
        {
            let (read, write) = UnixStream::pair().map_err(failed)?;
            read.set_nonblocking(true).map_err(failed)?;
            pipe::register(signal, write).map_err(failed)?;
            streams.push((signal, read));
        }
        Ok(Signals { streams })
    }

    /// Waits until a signal has come, or one of these descriptors is readable.
    pub fn wait(&self, others: &[BorrowedFd]) {
        let streams = self.streams.iter().map(|(_, stream)| stream.as_fd());
        let all: Vec<BorrowedFd> = streams.chain(others.iter().copied()).collect();
        let mut all: Vec<PollFd> =
            all.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // An interrupted call is repeated by the caller, who looks again.
        let _ = poll(&mut all, None);
    }

    /// A signal that has come and was not taken yet.
    pub fn take(&self) -> Option<i32> {
        let has_come = |(_, stream): &&(i32, UnixStream)| {
            let mut stream: &UnixStream = stream;
            matches!(stream.read(&mut [0; 64]), Ok(1..))
        };
        self.streams.iter().find(has_come).map(|(signal, _)| *signal)
    }
}

/// The signals that this process ignores, a bit for each.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Does something that must not end halfway. A signal is answered by a message only.
pub fn uninterrupted<T: Send>(what: &str, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let signals = Signals::notice()?;
    let (read, write) = UnixStream::pair()
        .map_err(|error| Failure::Other(format!("cannot make a pipe: {error}")))?;
    thread::scope(|scope| {
        let running = scope.spawn(move || {
            // Its end makes `read` readable.
            let _write = write;
            action()
        });
        while !running.is_finished() {
            signals.wait(&[read.as_fd()]);
            if signals.take().is_some() && !running.is_finished() {
                output::warn(&format!("{what} cannot be interrupted safely: wait for its end"));
            }
        }
        running.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}
