//! What the tests need of the machine's packages: `scripts/deps test` installs it, and so does
//! `scripts/debian`.

/// For a test that is to return because a package is missing: says which. Where `INSTANTSNAP_CI` is
/// set nothing may be missing, and it is a failure. What no package brings (KVM, huge pages, root)
/// is not for here.
#[track_caller]
pub fn missing_package(what: &str) {
    eprintln!("skipped: {what}");
    assert!(
        std::env::var_os("INSTANTSNAP_CI").is_none(),
        "{what}: see scripts/deps and scripts/debian"
    );
}
