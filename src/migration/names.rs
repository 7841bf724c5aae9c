// SPDX-License-Identifier: LGPL-2.1-or-later

//! The names by which QEMU knows what a snapshot changes in it.

pub const BACKGROUND: &str = "background-snapshot";
pub const TLS: &str = "tls-creds";
/// A migration for which QEMU is to use credentials that it does not have fails as it begins, and
/// changes nothing. This is their name, which whoever begins it is told.
pub const LOCK: &str = "instantsnap: a snapshot of this guest is being taken";
/// Where the settings are noted as they were: QEMU uses it with credentials only.
pub const RECORD: &str = "tls-hostname";
/// The name under which QEMU keeps our pipe until a migration takes it.
pub const FD_NAME: &str = "instantsnap-memory";
