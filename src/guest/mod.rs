//! Who runs the guest: the one thing in which the ways in differ.
//!
//! A [`Connector`] is a guest that was opened; it hands out a [`Guest`], exclusive to one operation, for as long as that
//! operation takes. The engine does everything else, over these two traits.

pub mod qmp;

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::error::Result;
use crate::monitor::commands::Status;
use crate::monitor::{Deadline, Execute};
use crate::snapshot::domain::{Domain, Machine};
use crate::snapshot::{DiskPlan, Drive, Store};

pub use qmp::QmpConnector;

/// Commands outside the pause get this long: QEMU may be busy, but then it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A guest that was opened.
pub trait Connector: Send + Sync {
    /// The flags that this way in has built.
    fn built_flags(&self) -> u32;

    /// Where its snapshots are recorded.
    fn store(&self) -> &Store;

    /// Its `<domain>` XML, where it is known.
    fn domain(&self) -> Option<&Domain>;

    /// Takes the guest for one operation. Another's operation on it is `OperationInvalid`.
    fn begin(&self) -> Result<Box<dyn Guest + '_>>;
}

/// Whether there is still somebody to talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// QEMU answers.
    Here,
    /// QEMU has ended.
    Gone,
    /// QEMU does not answer, and is not known to have ended.
    Silent,
}

/// A guest during one operation.
pub trait Guest: Execute {
    /// Its state.
    fn status(&mut self) -> Result<Status>;

    /// Its drives that have a medium and a device.
    fn drives(&mut self) -> Result<Vec<Drive>>;

    /// Itself, where no domain XML is known.
    fn machine(&mut self) -> Result<Machine>;

    /// Refuses a guest whose RAM another process writes: its pages would be saved younger than the instant.
    fn check_memory_is_its_own(&mut self) -> Result<()>;

    /// Whether a background snapshot leaves a paused guest paused.
    fn background_keeps_paused(&self) -> bool;

    /// Whether a background snapshot that is cancelled once it is armed leaves the guest's memory writable.
    fn background_can_be_cancelled(&self) -> bool;

    /// Creates the overlays, ready to be switched to. Files that exist are an error, and not touched.
    fn create_overlays(&mut self, disks: &[DiskPlan]) -> Result<()>;

    /// Stops the vCPUs.
    fn pause(&mut self, deadline: Deadline) -> Result<()>;

    /// Switches all disks to their overlays, or none.
    fn switch_disks(&mut self, deadline: Deadline) -> Result<()>;

    /// Starts the vCPUs, unless they run.
    fn resume(&mut self, deadline: Deadline) -> Result<()>;

    /// The last pause as the guest had it, by QEMU's own time stamps.
    fn last_pause(&mut self) -> Option<Duration>;

    /// Undoes the switch: what the guest wrote since is merged into the images, which are active again. Does nothing where
    /// nothing was switched, as far as QEMU knows.
    fn merge_disks(&mut self) -> Result<()>;

    /// Undoes the creation of overlays that are not in use.
    fn discard_overlays(&mut self) -> Result<()>;

    /// The same as the last two for a QEMU that has ended. `switched`: the disks may be on their overlays.
    fn merge_and_discard_offline(&mut self, switched: bool) -> Result<()>;

    /// The monitor's socket, where it is one that only this operation uses.
    fn monitor_socket(&self) -> Option<BorrowedFd<'_>>;

    /// Ends the guest.
    fn halt(&mut self) -> Result<()>;

    /// Whether QEMU is there; reconnects if the connection was lost.
    fn presence(&mut self) -> Presence;
}
