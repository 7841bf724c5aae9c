// SPDX-License-Identifier: LGPL-2.1-or-later

//! How a memory image holds the guest's memory.

use serde::{Deserialize, Serialize};

/// The format of a memory image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// QEMU's stream as it came. Every libvirt reads that.
    Raw,
    /// QEMU's stream, compressed by zstd. libvirt 10.4 and later restores that.
    Zstd(Level),
    /// Each page at its own place, zero pages as holes. libvirt 11.2 and later restores that.
    Sparse,
}

/// How thoroughly zstd compresses. An image does not tell: for one that exists, it is the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level(u8);

impl Default for Level {
    fn default() -> Level {
        Level(3)
    }
}

impl Level {
    const HIGHEST: u8 = 19;

    /// The level with this number, from 1 to 19.
    pub fn numbered(number: u32) -> Option<Level> {
        let number = u8::try_from(number).ok()?;
        (1..=Level::HIGHEST).contains(&number).then_some(Level(number))
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl Format {
    /// The format with this name, with the default of all that can be set.
    pub fn named(name: &str) -> Option<Format> {
        Format::all().into_iter().find(|format| format.name() == name)
    }

    /// The format with libvirt's number, with the default of all that can be set.
    pub fn numbered(number: u32) -> Option<Format> {
        Format::all().into_iter().find(|format| format.number() == number)
    }

    fn all() -> [Format; 3] {
        [Format::Raw, Format::Zstd(Level::default()), Format::Sparse]
    }

    /// libvirt's name of the format.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Zstd(_) => "zstd",
            Format::Sparse => "sparse",
        }
    }

    /// libvirt's number of the format, in the header of an image.
    pub fn number(self) -> u32 {
        match self {
            Format::Raw => 0,
            Format::Zstd(_) => 5,
            Format::Sparse => 6,
        }
    }

    /// Whether an image of this format is QEMU's stream byte by byte.
    pub fn is_raw(self) -> bool {
        self == Format::Raw
    }
}
