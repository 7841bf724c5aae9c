// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the library gives to a page server, and what the two tell each other.

use std::path::Path;

use crate::image::Image;
use crate::migration::post_copy::Start;

/// The page server says: it is ready.
pub const READY: u8 = b'r';
/// The caller says: QEMU has the other end of the socket.
pub const BEGIN: u8 = b'b';
/// The page server says: QEMU has loaded the devices, or goes on. Anything else is the beginning of
/// the text that says why not.
pub const LOADED: u8 = b'l';

/// The number of the page server's descriptors before its own: standard input, output and error.
pub const STANDARD: usize = 3;
/// The lifeline, the description, the image, the socket, the numbers.
pub const OWN: usize = 5;
/// The place of the numbers among all descriptors.
pub const NUMBERS: usize = STANDARD + OWN - 1;

/// The most pages that come first: 64 MiB.
pub const MOST_FIRST: usize = 1 << 14;

/// The task of a page server.
#[derive(Debug)]
pub struct Task<'a> {
    pub start: Start,
    /// The image, which is marked as in use.
    pub image: &'a Image,
    /// An argument of the process, by which it can be found.
    pub token: &'a str,
    /// The monitor's socket, by which it puts the settings back at the end.
    pub monitor: Option<&'a Path>,
    /// Blocks and pages that come first, unless the guest asks for others.
    pub first: Vec<(usize, u64)>,
    /// The bytes in a second of pages that nobody has asked for, if that is limited.
    pub bandwidth: Option<u64>,
}
