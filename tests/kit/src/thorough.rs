//! Tests that there is not always time for.

/// Whether `INSTANTSNAP_TEST_LONG` is set; says so where it is not, and the test that asks is to
/// return.
pub fn thorough() -> bool {
    if !is_thorough() {
        eprintln!("skipped: it is run with INSTANTSNAP_TEST_LONG=1");
    }
    is_thorough()
}

pub(crate) fn is_thorough() -> bool {
    std::env::var_os("INSTANTSNAP_TEST_LONG").is_some()
}
