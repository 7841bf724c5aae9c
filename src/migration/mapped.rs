// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's own reader of sparse memory images: its capability mapped-ram, with multifd, by which
//! several threads read pages.

use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Map, json};

use super::settings::{Mode, Settings, set_capabilities};
use crate::backend::{DEFAULT_TIMEOUT, Guest};
use crate::deadline::Deadline;
use crate::error::Result;
use crate::monitor::commands;

const MAPPED_RAM: &str = "mapped-ram";
const MULTIFD: &str = "multifd";
const CHANNELS: &str = "multifd-channels";
/// The parameter by which QEMU reads the image past the host's page cache, through descriptors of
/// another kind.
const DIRECT_IO: &str = "direct-io";

impl Settings {
    /// Whether QEMU has the capability mapped-ram (9.0 and later).
    pub fn has_mapped_ram(&self) -> bool {
        let has = |wanted: &str| self.capabilities.iter().any(|(name, _)| name == wanted);
        has(MAPPED_RAM) && has(MULTIFD) && self.parameters.contains_key(CHANNELS)
    }

    fn reads_directly(&self) -> bool {
        self.parameters.get(DIRECT_IO).is_some_and(|on| on == true)
    }

    /// Prepares QEMU to load a sparse image by mapped-ram, with so many threads that read it.
    pub fn apply_mapped(&self, guest: &mut dyn Guest, channels: u8) -> Result<()> {
        self.apply(guest, Mode::Paused)?;
        let mut parameters = Map::from_iter([(CHANNELS.to_owned(), json!(channels))]);
        if self.reads_directly() {
            parameters.insert(DIRECT_IO.into(), json!(false));
        }
        commands::migrate_set_parameters(guest, parameters, Deadline::after(DEFAULT_TIMEOUT))?;
        let on = [MAPPED_RAM, MULTIFD].map(|name| (name.to_owned(), true));
        set_capabilities(guest, &on, Deadline::after(DEFAULT_TIMEOUT))
            .map_err(|failure| failure.into_error("cannot set the migration capabilities"))
    }

    /// Puts all settings back that [`Settings::apply_mapped`] can have changed.
    pub fn restore_mapped(&self, guest: &mut dyn Guest) -> Result<()> {
        let mut parameters =
            Map::from_iter([(CHANNELS.to_owned(), self.parameters[CHANNELS].clone())]);
        if self.reads_directly() {
            parameters.insert(DIRECT_IO.into(), json!(true));
        }
        let restored =
            commands::migrate_set_parameters(guest, parameters, Deadline::after(DEFAULT_TIMEOUT));
        self.restore(guest, Mode::Paused).and(restored)
    }
}

/// An image that QEMU can open by a name of its own, although it may not have the right to open the
/// file.
#[derive(Debug)]
pub struct PassedImage {
    set: i64,
}

impl PassedImage {
    /// Passes an image that is open for reading.
    pub fn pass(guest: &mut dyn Guest, image: impl AsFd) -> Result<PassedImage> {
        let image: BorrowedFd = image.as_fd();
        let set = commands::add_fd(guest, image, Deadline::after(DEFAULT_TIMEOUT))?;
        Ok(PassedImage { set })
    }

    /// Where an incoming migration finds the stream that begins at this offset of the image.
    pub fn uri(&self, offset: u64) -> String {
        format!("file:/dev/fdset/{},offset={offset}", self.set)
    }

    /// Has QEMU close the image. A QEMU that has ended needs no more.
    pub fn close(self, guest: &mut dyn Guest) -> Result<()> {
        commands::remove_fd(guest, self.set, Deadline::after(DEFAULT_TIMEOUT))
    }
}
