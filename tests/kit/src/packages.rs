// SPDX-License-Identifier: LGPL-2.1-or-later

//! The packages that the tests need. `scripts/deps test` and `scripts/debian` install them.

use crate::program::skip;

/// Skips the test because a package is missing. With `INSTANTSNAP_CI` set it fails the test
/// instead. Other requirements (KVM, huge pages, root) are not for this function.
#[track_caller]
pub fn missing_package(what: &str) -> ! {
    match std::env::var_os("INSTANTSNAP_CI") {
        Some(_) => panic!("{what}: see scripts/deps and scripts/debian"),
        None => skip(what),
    }
}
