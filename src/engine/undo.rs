//! What a snapshot has changed so far, and putting it back.
//!
//! The guest comes first: it runs again before anything else is undone.

use std::path::PathBuf;
use std::time::Duration;

use super::guard::Guard;
use super::migration::{FD_NAME, Mode, Settings, Stream};
use super::reactivate::reactivate_disks;
use crate::error::{Error, Result};
use crate::guest::{Guest, PATIENCE, Presence};
use crate::image::MemoryImage;
use crate::monitor::{Deadline, commands};
use crate::sys;

/// A QEMU that hangs is asked to resume its guest for so long. There is nothing worse to leave behind than a guest that is
/// paused.
const STUBBORN: Duration = Duration::from_secs(300);

/// What a snapshot has changed, or may have: each is noted before it is tried.
#[derive(Debug, Default)]
pub struct Made {
    /// The memory image.
    pub image: Option<MemoryImage>,
    /// Other files of the snapshot.
    pub files: Vec<PathBuf>,
    /// Overlays.
    pub overlays: bool,
    /// Migration settings, and for which mode they were changed.
    pub settings: Option<(Settings, Mode)>,
    /// The pipe, passed to QEMU.
    pub stream: Option<Stream>,
    /// The guest ran, and is to run again.
    pub ran: bool,
    /// Who takes over should this process be killed.
    pub guard: Option<Guard>,
    /// The guest, which ran, is paused.
    pub paused: bool,
    /// The disks are on their overlays.
    pub switched: bool,
    /// A migration has begun.
    pub migrating: bool,
}

impl Made {
    /// Puts everything back. `cause` is why; what cannot be put back is added to it.
    pub fn undo(mut self, guest: &mut dyn Guest, cause: Error) -> Error {
        let mut left = Vec::new();
        let mut presence = guest.presence();
        if presence == Presence::Silent && self.paused {
            presence = insist(guest);
        }
        if presence == Presence::Here && self.undo_online(guest, &mut left) {
            presence = guest.presence();
        }
        match presence {
            Presence::Here => {}
            Presence::Gone => {
                // A QEMU that has ended takes its settings, its nodes and its migration with it.
                left.clear();
                if self.overlays {
                    let offline = guest.merge_and_discard_offline(self.switched && self.migrating);
                    left.extend(offline.err().map(|error| error.message));
                }
            }
            Presence::Silent => {
                if let (Some(stream), true) = (&self.stream, self.migrating) {
                    left.extend(stream.wait_given_up_silently().err().map(|error| error.message));
                }
                left.push("QEMU does not answer any more: what was changed in it could not be put back; if its guest is paused, \
                 resume it with `cont`, and do not remove the overlays"
                    .into());
            }
        }
        self.stream = None;
        left.extend(self.remove_files().err().map(|error| error.message));
        left.into_iter().fold(cause, |cause, left| cause.and(left))
    }

    /// Returns whether QEMU was lost on the way.
    fn undo_online(&mut self, guest: &mut dyn Guest, left: &mut Vec<String>) -> bool {
        let mut note = |result: Result<()>| left.extend(result.err().map(|error| error.message));
        let mode = self.settings.as_ref().map_or(Mode::Paused, |(_, mode)| *mode);
        let migrating = self.stream.as_ref().filter(|_| self.migrating);
        if let Some(stream) = migrating {
            note(stream.give_up(guest, mode));
        }
        if self.paused {
            note(guest.resume(Deadline::after(PATIENCE)));
        }
        if let Some(stream) = migrating {
            note(stream.wait_given_up(guest));
            // A migration that was given up while it set up has stopped the guest once more, and left it as it found it.
            if self.paused {
                note(guest.resume(Deadline::after(PATIENCE)));
            }
        }
        if self.settings.is_some() {
            // Refused where it was never passed, and where a migration has taken it.
            let _ = commands::closefd(guest, FD_NAME, Deadline::after(PATIENCE));
        }
        if self.switched {
            // A guest that was saved while it was paused has handed its disks over, and does not take them back by itself.
            if !self.ran && guest.status().is_ok_and(|status| status.status == "postmigrate") {
                note(reactivate_disks(guest));
            }
            note(guest.merge_disks());
            // It can have come to the end of an overlay's file system, and stand since. Now there is room again.
            if self.ran && guest.status().is_ok_and(|status| status.status == "io-error") {
                note(guest.resume(Deadline::after(PATIENCE)));
            }
        }
        if let Some((settings, mode)) = &self.settings {
            note(settings.restore(guest, *mode));
        }
        if self.overlays {
            note(guest.discard_overlays());
        }
        !left.is_empty() && guest.presence() != Presence::Here
    }

    fn remove_files(&self) -> Result<()> {
        let image = self.image.as_ref().map(|image| image.path().to_owned());
        for path in self.files.iter().chain(&image) {
            sys::remove_file(path)
                .map_err(|error| Error::system(format!("cannot remove '{}'", path.display()), error))?;
        }
        Ok(())
    }
}

/// QEMU hangs with its guest paused. `cont` is queued, for it to find when it comes to, and waited for.
fn insist(guest: &mut dyn Guest) -> Presence {
    let deadline = Deadline::after(STUBBORN);
    // The reply would come when it would, and is not needed: the state is looked at next.
    let _ = commands::cont(guest, Deadline::after(Duration::from_millis(100)));
    loop {
        match guest.presence() {
            Presence::Silent if deadline.left().is_some() => {}
            presence => return presence,
        }
    }
}
