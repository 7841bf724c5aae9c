// SPDX-License-Identifier: LGPL-2.1-or-later

//! How the memory of a snapshot comes back.

/// How a QEMU gets the memory of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// By the mapping, if QEMU was started with the memory image mapped; else all of it.
    #[default]
    Auto,
    /// All of it is written to QEMU before the guest runs.
    Full,
    /// The guest runs at once, and a page comes when the guest needs it.
    Lazy,
    /// QEMU has mapped the memory image, and the kernel reads a page when the guest needs it.
    Map,
}

impl Memory {
    const ALL: [Memory; 4] = [Memory::Auto, Memory::Full, Memory::Lazy, Memory::Map];

    /// The choice with C's number.
    pub fn numbered(number: u32) -> Option<Memory> {
        Memory::ALL.into_iter().find(|memory| memory.number() == number)
    }

    /// C's number.
    pub fn number(self) -> u32 {
        match self {
            Memory::Auto => 0,
            Memory::Full => 1,
            Memory::Lazy => 2,
            Memory::Map => 3,
        }
    }

    /// The name, as it is in Python and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Memory::Auto => "auto",
            Memory::Full => "full",
            Memory::Lazy => "lazy",
            Memory::Map => "map",
        }
    }
}
