// SPDX-License-Identifier: LGPL-2.1-or-later

//! The source of a post-copy migration, made of a memory image: QEMU's guest runs as soon as its
//! devices are loaded, and its memory follows.
//!
//! QEMU takes the library for another QEMU that the guest comes from. The order of the stream
//! ([`protocol`]) is that of QEMU 6.0 to 11.1 for a guest whose pages are all still at the source.
//! QEMU asks for the pages that the guest needs by the return path ([`return_path`]). A [`Source`]
//! answers, and sends all others in between, each page exactly once: QEMU fails on a page that it
//! has.
//!
//! Pages of zeros are sent only where QEMU asks for them. QEMU empties all of its memory before,
//! and memory that has not come when all is over is zero.

mod order;
mod protocol;
mod return_path;
mod sent;
mod source;

pub use self::source::{Numbers, Outcome, Progress, Seen, Source, Start};
