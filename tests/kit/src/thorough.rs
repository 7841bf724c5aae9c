// SPDX-License-Identifier: LGPL-2.1-or-later

//! Tests that only the long run has time for.

use crate::program::skip;

/// Whether `INSTANTSNAP_TEST_LONG` is set, so that tests may take longer.
pub fn thorough() -> bool {
    std::env::var_os("INSTANTSNAP_TEST_LONG").is_some()
}

/// Skips the test unless `INSTANTSNAP_TEST_LONG` is set.
pub fn only_when_thorough() {
    if !thorough() {
        skip("it is run with INSTANTSNAP_TEST_LONG=1");
    }
}
