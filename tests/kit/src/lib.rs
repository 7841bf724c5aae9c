// SPDX-License-Identifier: LGPL-2.1-or-later

//! The foundation of the tests and benchmarks: real QEMUs, the tick guest, an independent QMP
//! client, and a monitor proxy that injects faults.
//!
//! The kit does not depend on the library under test. It observes QEMU by itself, so that a mistake
//! of the library cannot hide behind the same mistake in its tests. It is for tests only: where
//! something does not work, it panics with all known details.
//!
//! ```no_run
//! use instantsnap_testkit::{Binary, Format, Machine};
//!
//! for binary in Binary::all() {
//!     let guest = Machine::new(binary).disk(Format::Qcow2).start();
//!     guest.wait_ticks(3);
//! }
//! ```

pub mod binary;
pub mod by_hand;
pub mod compile;
pub mod daemon;
pub mod domain;
pub mod fingerprint;
pub mod guest;
pub mod kvm;
pub mod late_arm;
pub mod machine;
pub mod packages;
pub mod program;
pub mod proxy;
pub mod qmp;
mod restore;
pub mod run;
pub mod serial;
pub mod thorough;
pub mod wait;

pub use binary::Binary;
pub use daemon::{Daemon, Mode};
pub use fingerprint::{Fingerprint, domain_fingerprint, fingerprint};
pub use guest::{Disk, Guest};
pub use instantsnap_testkit_macros::{process, test};
pub use inventory;
pub use kvm::{kvm_runs, kvm_works, where_kvm_works};
pub use machine::{Accel, Attach, Format, Machine, MachineType};
pub use packages::missing_package;
pub use program::skip;
pub use proxy::{Fault, Gate, Proxy};
pub use qmp::{Client, Event};
pub use serial::Serial;
pub use thorough::{only_when_thorough, thorough};
pub use wait::{DEADLINE, wait_for};
