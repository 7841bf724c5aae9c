// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the tests need of the machine's packages: `scripts/deps test` installs it, and so does
//! `scripts/debian`.

use crate::program::skip;

/// Skips the test that a package is missing for. Where `INSTANTSNAP_CI` is set nothing may be
/// missing, and the test fails. What no package brings (KVM, huge pages, root) is not for here.
#[track_caller]
pub fn missing_package(what: &str) -> ! {
    match std::env::var_os("INSTANTSNAP_CI") {
        Some(_) => panic!("{what}: see scripts/deps and scripts/debian"),
        None => skip(what),
    }
}
