// SPDX-License-Identifier: LGPL-2.1-or-later

//! The descriptors that a watchdog has.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::task::Task;
use crate::image::Drain;
use crate::sys;

/// The highest number of descriptors that hold the guest for an operation.
const HELD: usize = 3;
/// The number of descriptors that a watchdog of either kind has.
pub const COMMON: usize = 5 + HELD;
/// The number of the program's descriptors before those: standard input, output and error.
const STANDARD: usize = 3;
/// The number of the program's descriptors after those: its description, and the drain's.
const MORE: usize = 1 + Drain::DESCRIPTORS;

/// The descriptors of a watchdog of either kind.
#[derive(Debug)]
pub struct Common {
    pub lifeline: OwnedFd,
    pub caller: OwnedFd,
    pub monitor: OwnedFd,
    pub pipe: OwnedFd,
    /// The descriptor that reserves the snapshot's name.
    pub reservation: OwnedFd,
    /// The descriptors that hold the guest: no other process begins an operation on it while the
    /// watchdog works.
    pub held: [OwnedFd; HELD],
}

impl From<[OwnedFd; COMMON]> for Common {
    fn from(all: [OwnedFd; COMMON]) -> Common {
        let [lifeline, caller, monitor, pipe, reservation, held @ ..] = all;
        Common { lifeline, caller, monitor, pipe, reservation, held }
    }
}

impl Common {
    /// Keeps these descriptors of a forked process, and closes all others. Returns `None` if one of
    /// them cannot be kept.
    pub fn keep(numbers: [c_int; COMMON]) -> Option<Common> {
        let kept = sys::keep_only(numbers)?;
        // SAFETY: they were just made, and nothing else in this process owns them.
        Some(Common::from(kept.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })))
    }
}

/// The numbers of these descriptors in the caller, in the order of [`Common`].
pub fn common(
    lifeline: &OwnedFd,
    caller: &OwnedFd,
    monitor: Option<BorrowedFd>,
    task: &Task,
) -> [c_int; COMMON] {
    let pipe = task.drain.pipe();
    // The pipe takes the place of descriptors that this snapshot does not have.
    let [held0, held1, held2] =
        std::array::from_fn(|place| task.held.get(place).copied().unwrap_or(pipe));
    let reservation = task.reservation.map_or(pipe, |reservation| reservation.held().as_fd());
    let monitor = monitor.unwrap_or(pipe);
    [lifeline.as_fd(), caller.as_fd(), monitor, pipe, reservation, held0, held1, held2]
        .map(|fd| fd.as_raw_fd())
}

/// The numbers of all the program's descriptors in the caller. `null` is /dev/null; `drain` has the
/// drain's descriptors.
pub fn all(
    null: &OwnedFd,
    common: [c_int; COMMON],
    description: &OwnedFd,
    drain: [BorrowedFd; Drain::DESCRIPTORS],
) -> [c_int; STANDARD + COMMON + MORE] {
    let more = [description.as_fd()].into_iter().chain(drain);
    let own = common.into_iter().chain(more.map(|fd| fd.as_raw_fd()));
    let mut all = [null.as_raw_fd(); _];
    all.iter_mut().skip(STANDARD).zip(own).for_each(|(place, fd)| *place = fd);
    all
}

/// The descriptors of the program.
#[derive(Debug)]
pub struct Inherited {
    pub common: Common,
    pub description: OwnedFd,
    pub drain: [OwnedFd; Drain::DESCRIPTORS],
}

impl Inherited {
    /// Takes the descriptors that the library has left for the program. Returns `None` if one of
    /// them is missing.
    ///
    /// # Safety
    /// Nothing in this process owns them.
    pub unsafe fn take() -> Option<Inherited> {
        const MORE_FROM: c_int = (STANDARD + COMMON) as c_int;
        // SAFETY: as above.
        let (common, more) = unsafe {
            (sys::inherited::<COMMON>(STANDARD as c_int)?, sys::inherited::<MORE>(MORE_FROM)?)
        };
        let [description, drain @ ..] = more;
        Some(Inherited { common: Common::from(common), description, drain })
    }
}
