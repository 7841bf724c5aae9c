// SPDX-License-Identifier: LGPL-2.1-or-later

//! How a memory image holds the guest's memory.

use serde::{Deserialize, Serialize};

/// The format of a memory image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// QEMU's stream as it came. Every libvirt reads that.
    Raw,
    /// Each page at its own place, zero pages as holes. libvirt 11.2 and later restores that.
    Sparse,
}

impl Format {
    const ALL: [Format; 2] = [Format::Raw, Format::Sparse];

    /// The format with this name.
    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The format with libvirt's number.
    pub fn numbered(number: u32) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.number() == number)
    }

    /// libvirt's name of the format.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Sparse => "sparse",
        }
    }

    /// libvirt's number of the format, in the header of an image.
    pub fn number(self) -> u32 {
        match self {
            Format::Raw => 0,
            Format::Sparse => 6,
        }
    }
}
