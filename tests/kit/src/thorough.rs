//! Tests that there is not always time for.

/// Whether `INSTANTSNAP_TEST_LONG` is set; says so where it is not, and the test that asks is to return.
pub fn thorough() -> bool {
    let thorough = std::env::var_os("INSTANTSNAP_TEST_LONG").is_some();
    if !thorough {
        eprintln!("skipped: it is run with INSTANTSNAP_TEST_LONG=1");
    }
    thorough
}
