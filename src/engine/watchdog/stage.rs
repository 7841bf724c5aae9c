// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the watchdog is told by its lifeline, and says.

/// All is well: the watchdog is not needed any more.
pub const DISMISSED: u8 = b'Q';
/// The caller has begun to undo the snapshot.
pub const UNDOING: u8 = b'U';
/// What the watchdog says: the limit of the pause has passed, and it resumes the guest.
pub const RESUMING: u8 = b'l';
/// The watchdog has its own descriptors only.
pub const READY: u8 = b'r';

/// How far a snapshot has come, as far as its guest is concerned. Entered before what it stands for
/// is tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing has happened to the guest.
    #[default]
    Prepared = b'-',
    /// A migration has begun, and sets up while the guest runs, its disks on their images.
    Begun = b'B',
    /// The same, and the guest is being paused. It may be too late for that: then it must not be
    /// resumed before QEMU has armed. QEMU would overlook it, or wait for a pause that is no more.
    Racing = b'R',
    /// The guest, which ran, is paused.
    Paused = b'P',
    /// Its disks may be on their overlays.
    Switching = b'S',
    /// The same, and a migration has begun.
    Migrating = b'M',
    /// A migration has begun, and the guest runs again, or was paused by its user and stays so.
    Draining = b'D',
    /// The stream has ended and QEMU's settings are back: from here on others may save or migrate
    /// the guest.
    Finishing = b'F',
    /// All is done and on disk, and the snapshot is being recorded.
    Committing = b'C',
}

impl Stage {
    /// The guest is ours to resume.
    pub fn is_paused(self) -> bool {
        matches!(self, Stage::Racing | Stage::Paused | Stage::Switching | Stage::Migrating)
    }

    /// QEMU's stream must be read to its end.
    pub fn is_migrating(self) -> bool {
        matches!(self, Stage::Begun | Stage::Racing | Stage::Migrating | Stage::Draining)
    }

    /// The disks may be on their overlays.
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

    /// The settings were put back: they are others' to change again.
    pub fn is_restored(self) -> bool {
        matches!(self, Stage::Finishing | Stage::Committing)
    }

    /// As it was told.
    pub fn from_byte(byte: u8) -> Option<Stage> {
        use Stage::{
            Begun, Committing, Draining, Finishing, Migrating, Paused, Prepared, Racing, Switching,
        };
        [Prepared, Begun, Racing, Paused, Switching, Migrating, Draining, Finishing, Committing]
            .into_iter()
            .find(|stage| *stage as u8 == byte)
    }
}
