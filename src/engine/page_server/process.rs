// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the page server's process does.

use std::convert::Infallible;
use std::ffi::c_int;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendFlags, send};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::description::Description;
use super::task::{BEGIN, LOADED, OWN, READY, STANDARD};
use crate::backend::qmp;
use crate::deadline::Deadline;
use crate::engine::program::{begin, cgroup};
use crate::image::PageSource;
use crate::machine_log::Message;
use crate::migration::Settings;
use crate::migration::post_copy::{Numbers, Outcome, Source};
use crate::sys::{self, wait_ready};

/// How long the settings are tried to be put back, while another client has the monitor.
const SETTLE: Duration = Duration::from_secs(30);

/// Runs the page server. It returns only an error: another version of the library has started it,
/// or it cannot do its task.
///
/// # Safety
/// Nothing in this process owns a descriptor beyond the first three, and it has one thread.
pub unsafe fn run() -> Result<Infallible, &'static str> {
    // SAFETY: as above.
    let Some(own) = (unsafe { sys::inherited::<OWN>(STANDARD as c_int) }) else {
        return Err("descriptors are missing");
    };
    let [lifeline, description, image, socket, numbers] = own;
    begin();
    match set_up(description, image, socket, numbers) {
        Err(why) => {
            let _ = send(&lifeline, why.as_bytes(), SendFlags::NOSIGNAL);
            Err("the page server cannot begin")
        }
        Ok((description, source)) => serve(lifeline, &description, source),
    }
}

fn set_up(
    description: OwnedFd,
    image: OwnedFd,
    socket: OwnedFd,
    numbers: OwnedFd,
) -> Result<(Description, Source), String> {
    let mut text = Vec::new();
    let mut description: Description = File::from(description)
        .read_to_end(&mut text)
        .ok()
        .and_then(|_| serde_json::from_slice(&text).ok())
        .filter(Description::is_current)
        .ok_or("another version of libinstantsnap has started this program")?;
    if let Some(cgroup) = &description.cgroup {
        cgroup::enter(&cgroup.0).map_err(|error| format!("it cannot enter its cgroup: {error}"))?;
    }
    let pages = PageSource::open(File::from(image), description.offset)
        .map_err(|what| format!("the memory image {what}"))?;
    let numbers = Numbers::open(numbers).map_err(|error| error.to_string())?;
    let first = std::mem::take(&mut description.first);
    let source = Source::new(pages, socket, numbers, description.bandwidth, first)
        .map_err(|error| error.to_string())?;
    Ok((description, source))
}

fn serve(lifeline: OwnedFd, description: &Description, mut source: Source) -> ! {
    let say = |what: &[u8]| {
        let _ = send(&lifeline, what, SendFlags::NOSIGNAL);
    };
    say(&[READY]);
    let mut byte = [0];
    let told = rustix::io::retry_on_intr(|| rustix::io::read(&lifeline, &mut byte));
    if told != Ok(1) || byte[0] != BEGIN {
        // The caller has given up, or has ended.
        sys::exit_now();
    }
    match source.begin(description.start()) {
        Ok(Outcome::Loaded) => {}
        Ok(_) => {
            say(b"QEMU has closed the connection");
            sys::exit_now();
        }
        Err(why) => {
            say(why.as_bytes());
            sys::exit_now();
        }
    }
    source.push();
    // The spare has no lifeline: it is for this process to report.
    let monitor = description.monitor.as_ref().map(|monitor| &*monitor.0);
    let spare = keep_spare(&mut source, monitor);
    say(&[LOADED]);
    drop(lifeline);
    go_on(source, monitor, spare)
}

/// Serves to the end. The spare takes over if this process is killed.
fn go_on(mut source: Source, monitor: Option<&Path>, mut spare: Option<sys::Child>) -> ! {
    loop {
        match source.serve(spare.as_ref().map(sys::Child::ended)) {
            Ok(Outcome::Watched) => {
                spare = keep_spare(&mut source, monitor);
            }
            Ok(Outcome::Loaded) => {}
            Ok(Outcome::Complete) => {
                end(&source, true, spare);
                monitor.iter().for_each(|monitor| settle(monitor));
                sys::exit_now();
            }
            // QEMU has ended; or it has found something wrong, and waits.
            Ok(Outcome::Lost) => break,
            Err(why) => {
                let text = format!("a guest waits for memory of its snapshot: {why}");
                Message::error(&text).send();
                break;
            }
        }
    }
    end(&source, false, spare);
    sys::exit_now()
}

/// Ends the spare: nothing is left that could be lost.
fn end(source: &Source, is_complete: bool, spare: Option<sys::Child>) {
    source.set_over(is_complete);
    spare.into_iter().for_each(sys::Child::kill);
}

/// Forks a spare. `None` if no process can be started: then there is none.
fn keep_spare(source: &mut Source, monitor: Option<&Path>) -> Option<sys::Child> {
    let this = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
    // SAFETY: this process has one thread, so that its fork can do all that it can do.
    unsafe { sys::Child::fork(|| be_spare(source, monitor, &this)) }.ok()
}

/// Waits for the end of the process that serves, and goes on in its place.
fn be_spare(source: &mut Source, monitor: Option<&Path>, server: &OwnedFd) -> ! {
    wait_ready([Some(server), None], -1);
    if source.is_over() || source.take_over().is_err() {
        sys::exit_now();
    }
    // This process has a copy of the source, and the one that had the original has ended.
    // SAFETY: the original is never used or dropped again, because this function does not return.
    let mut own = unsafe { std::ptr::read(source) };
    let spare = keep_spare(&mut own, monitor);
    go_on(own, monitor, spare)
}

/// Puts QEMU's settings back: it has said that all is in. If that cannot be done now, the library's
/// next call on the guest does it.
fn settle(monitor: &Path) {
    let deadline = Deadline::after(SETTLE);
    while deadline.left().is_some() {
        if let Ok(mut held) = qmp::hold(monitor, None, None)
            && Settings::recover_arrived(&mut *held).is_ok()
        {
            // It is held until this process ends. So the next holder finds nothing of this
            // process any more.
            std::mem::forget(held);
            return;
        }
        if !monitor.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
