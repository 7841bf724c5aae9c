// SPDX-License-Identifier: LGPL-2.1-or-later

//! A page server, as the library sees it that starts it.

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use super::description::Description;
use super::task::{BEGIN, LOADED, OWN, READY, STANDARD, Task};
use crate::engine::program::{Role, command_line};
use crate::error::{Code, Error, Result, fail};
use crate::migration::post_copy::Numbers;
use crate::sys::{self, wait_ready};

/// How long the library waits until a new page server is ready. It reads which pages are in the
/// image.
const READY_MS: c_int = 30_000;
/// How long QEMU may take to load the devices.
const LOADED_MS: c_int = 120_000;
/// The longest reason that a page server gives.
const LONGEST_REASON: u64 = 4096;

/// A page server that has not begun. Dropping it ends it.
#[derive(Debug)]
pub struct PageServer {
    lifeline: UnixStream,
    process: Option<sys::Child>,
}

impl PageServer {
    /// Starts the process. Returns QEMU's end of the socket too.
    pub fn start(task: &Task) -> Result<(PageServer, OwnedFd)> {
        let system = |error: io::Error| Error::system("cannot start the page server", error);
        let Some(command_line) = command_line(Role::PageServer, Some(task.token)) else {
            fail!(
                OperationUnsupported,
                "memory cannot follow: the program instantsnap-watchdog, which serves it, is not \
                 installed beside the library, or this process must not start it. Load all of the \
                 memory first"
            );
        };
        let pair =
            || socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (lifeline, its_lifeline) = pair().map_err(|error| system(error.into()))?;
        let (socket, qemus) = pair().map_err(|error| system(error.into()))?;
        let numbers = Numbers::new().map_err(system)?;
        let described = describe(task).map_err(system)?;
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let null = null.map_err(|error| system(error.into()))?;
        let Some(memory) = numbers.memory() else {
            fail!(OperationUnsupported, "memory cannot follow: the kernel gives no shared memory")
        };
        let own: [BorrowedFd; OWN] = [
            its_lifeline.as_fd(),
            described.as_fd(),
            task.image.file.as_fd(),
            socket.as_fd(),
            memory,
        ];
        let mut fds = [null.as_raw_fd(); STANDARD + OWN];
        fds[STANDARD..].iter_mut().zip(own).for_each(|(place, fd)| *place = fd.as_raw_fd());
        // The new process has copies of all descriptors of this process until it is the program.
        let process = sys::while_forking(|| sys::Child::start(&command_line, fds));
        let process = process.map_err(system)?;
        drop((its_lifeline, socket));
        let ready = wait_ready([Some(&lifeline), None], READY_MS);
        let mut server = PageServer { lifeline: lifeline.into(), process: Some(process) };
        if !ready {
            fail!(OperationTimeout, "the page server does not begin in time");
        }
        server.expect(READY)?;
        Ok((server, qemus))
    }

    /// Lets it begin: QEMU has its end of the socket. Returns when QEMU has loaded the devices.
    pub fn begin(&mut self) -> Result<()> {
        let begun = send(&self.lifeline, &[BEGIN], SendFlags::NOSIGNAL);
        begun.map_err(|error| Error::system("cannot tell the page server", error))?;
        let lifeline = self.lifeline.as_fd().try_clone_to_owned();
        let lifeline =
            lifeline.map_err(|error| Error::system("cannot duplicate a descriptor", error))?;
        if !wait_ready([Some(&lifeline), None], LOADED_MS) {
            fail!(OperationTimeout, "QEMU does not load the devices in time");
        }
        self.expect(LOADED)
    }

    /// Leaves it to itself.
    pub fn leave(mut self) {
        if let Some(process) = self.process.take() {
            process.leave();
        }
    }

    /// Reads this byte, or the reason that comes in its place.
    fn expect(&mut self, expected: u8) -> Result<()> {
        let failed = |reason: &str| {
            Err(Error::new(Code::OperationFailed, format!("the page server has failed: {reason}")))
        };
        let mut byte = [0];
        match self.lifeline.read(&mut byte) {
            Ok(1) if byte[0] == expected => return Ok(()),
            Ok(1) => {}
            _ => return failed("it has ended"),
        }
        let mut reason = byte.to_vec();
        let _ = (&self.lifeline).take(LONGEST_REASON).read_to_end(&mut reason);
        failed(&String::from_utf8_lossy(&reason))
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }
}

fn describe(task: &Task) -> io::Result<OwnedFd> {
    let words = serde_json::to_vec(&Description::new(task))?;
    let told = File::from(memfd_create(c"instantsnap", MemfdFlags::CLOEXEC)?);
    // The program shares the file's position. A write at an offset leaves the position at the
    // beginning.
    told.write_all_at(&words, 0)?;
    Ok(told.into())
}
