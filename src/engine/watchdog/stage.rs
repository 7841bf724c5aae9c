// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the caller and the watchdog tell each other by the lifeline.

/// The caller says: the watchdog is not needed any more.
pub const DISMISSED: u8 = b'Q';
/// The caller says: it has begun to undo the snapshot.
pub const UNDOING: u8 = b'U';
/// The caller says: in its undo, it has resumed the guest.
pub const RESUMED: u8 = b'G';
/// The watchdog says: the limit of the pause has passed, and it resumes the guest.
pub const RESUMING: u8 = b'l';
/// The watchdog says: that has failed so far.
pub const NOT_RESUMED: u8 = b'n';
/// The watchdog says: it is ready, and has its own descriptors only.
pub const READY: u8 = b'r';

/// How far a snapshot has come, as far as its guest is concerned. The caller enters a stage before
/// it tries the step that the stage stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing has happened to the guest.
    #[default]
    Prepared = b'-',
    /// A migration has begun, and sets up while the guest runs, with its disks on their images.
    Begun = b'B',
    /// The same, and the library pauses the guest. It may be too late for that. Then the guest must
    /// not be resumed before QEMU has armed write tracking: QEMU would overlook the resume, or wait
    /// for a pause that has ended.
    Racing = b'R',
    /// The guest, which ran, is paused.
    Paused = b'P',
    /// The same, and its disks may be on their overlays.
    Switching = b'S',
    /// The same, and a migration has begun.
    Migrating = b'M',
    /// A migration has begun, and the guest runs again, or its user had paused it and it stays
    /// paused.
    Draining = b'D',
    /// The stream has ended, and QEMU's settings are back: from here on other clients may save or
    /// migrate the guest.
    Finishing = b'F',
    /// All is done and on disk, and the snapshot is being recorded.
    Committing = b'C',
}

impl Stage {
    /// Whether the library has paused the guest, and so has to resume it.
    pub fn is_paused(self) -> bool {
        matches!(self, Stage::Racing | Stage::Paused | Stage::Switching | Stage::Migrating)
    }

    /// Whether QEMU's stream must be read to its end.
    pub fn is_migrating(self) -> bool {
        matches!(self, Stage::Begun | Stage::Racing | Stage::Migrating | Stage::Draining)
    }

    /// Whether the disks may be on their overlays.
    pub fn is_switched(self) -> bool {
        matches!(
            self,
            Stage::Switching
                | Stage::Migrating
                | Stage::Draining
                | Stage::Finishing
                | Stage::Committing
        )
    }

    /// Whether QEMU's settings were put back, so that other clients may change them again.
    pub fn is_restored(self) -> bool {
        matches!(self, Stage::Finishing | Stage::Committing)
    }

    /// The stage that this byte reports; `None` if it reports none.
    pub fn from_byte(byte: u8) -> Option<Stage> {
        use Stage::{
            Begun, Committing, Draining, Finishing, Migrating, Paused, Prepared, Racing, Switching,
        };
        [Prepared, Begun, Racing, Paused, Switching, Migrating, Draining, Finishing, Committing]
            .into_iter()
            .find(|stage| *stage as u8 == byte)
    }
}
