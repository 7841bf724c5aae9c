// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's names of what a snapshot changes in it.

pub const BACKGROUND: &str = "background-snapshot";
pub const TLS: &str = "tls-creds";
/// The name of TLS credentials that do not exist. As long as it is set, each migration fails as it
/// begins, and changes nothing. QEMU tells this name to the client that begins it.
pub const LOCK: &str = "instantsnap: a snapshot of this guest is being taken";
/// The same while a guest's memory follows.
pub const LAZY_LOCK: &str = "instantsnap: this guest's memory is still coming from its snapshot";
pub const POST_COPY: &str = "postcopy-ram";
/// The parameter that records the settings as they were: QEMU uses it with credentials only.
pub const RECORD: &str = "tls-hostname";
/// The name under which QEMU keeps the memory pipe until a migration takes it.
pub const FD_NAME: &str = "instantsnap-memory";
