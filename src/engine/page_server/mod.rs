// SPDX-License-Identifier: LGPL-2.1-or-later

//! The page server: a process that serves the pages of a memory image to a QEMU whose guest runs
//! already. It outlives its caller.
//!
//! It is the program `instantsnap-watchdog` too. The library starts it, as it starts a watchdog,
//! before QEMU is changed, and gives it one end of a socket pair, whose other end QEMU has. From
//! then on it needs nobody: it has the image, and marks it as in use. It ends when all memory is in
//! and QEMU has its settings back, or when QEMU ends.
//!
//! It has a spare: a fork of itself that waits for its end. If one of the two is killed, the other
//! goes on, and makes a new spare. If both are killed, QEMU waits (`postcopy-paused`), and so does
//! whatever in the guest needs a page that is missing. The library's next call on this guest starts
//! a new one ([`arrival`]).

pub mod arrival;
mod description;
mod process;
mod server;
mod task;

pub use self::process::run;
pub use self::server::PageServer;
pub use self::task::{MOST_FIRST, Task};
