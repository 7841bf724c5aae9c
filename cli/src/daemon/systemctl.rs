// SPDX-License-Identifier: LGPL-2.1-or-later

//! Runs systemctl.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Result;

/// This variable names systemctl, in the environment of the build or of the command.
const VARIABLE: &str = "INSTANTSNAP_SYSTEMCTL";
const BUILT_IN: Option<&str> = option_env!("INSTANTSNAP_SYSTEMCTL");

/// The paths in distributions.
const USUAL: [&str; 2] = ["/usr/bin/systemctl", "/bin/systemctl"];

/// Runs systemctl with these arguments.
pub fn systemctl(words: &[&str]) -> Result<()> {
    let program = choose(is_secure(), env::var_os(VARIABLE), BUILT_IN)?;
    let status = Command::new(&program)
        .args(words)
        .status()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("systemctl {} failed: {status}", words.join(" ")))
    }
}

/// Whether this process has more rights than the user who has started it: the kernel says so in the
/// auxiliary vector. If that cannot be read, the answer is yes.
fn is_secure() -> bool {
    const AT_SECURE: usize = 23;
    const WORD: usize = size_of::<usize>();
    let Ok(vector) = std::fs::read("/proc/self/auxv") else { return true };
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, usize::from_ne_bytes);
    let mut entries = vector.chunks_exact(2 * WORD).map(|entry| entry.split_at(WORD));
    entries.find(|(kind, _)| word(kind) == AT_SECURE).is_none_or(|(_, value)| word(value) != 0)
}

/// The systemctl that the variable names, or else the one that the build has fixed, or else the one
/// of the distribution. The variable is ignored in a process with more rights than the user who has
/// started it, because that user has set it.
fn choose(secure: bool, named: Option<OsString>, built_in: Option<&str>) -> Result<PathBuf> {
    let named = named.filter(|named| !secure && !named.is_empty());
    let built_in = built_in.filter(|path| !path.is_empty());
    match named.or_else(|| built_in.map(OsString::from)).map(PathBuf::from) {
        Some(program) if program.is_absolute() => Ok(program),
        Some(program) => Err(format!("'{}' is no absolute path ({VARIABLE})", program.display())),
        None => {
            let usual = USUAL.iter().map(Path::new).find(|path| path.exists());
            usual.map(Path::to_owned).ok_or_else(|| "systemctl was not found".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_no_more_rights_than_its_user() {
        assert!(!is_secure());
    }

    #[test]
    fn systemctl_is_the_one_that_is_named_or_the_builds_and_never_one_in_path() {
        let named = || Some(OsString::from("/opt/systemctl"));
        let built_in = Some("/built/systemctl");
        assert_eq!(choose(false, named(), built_in), Ok("/opt/systemctl".into()));
        assert_eq!(choose(true, named(), built_in), Ok("/built/systemctl".into()));
        assert_eq!(choose(false, Some("".into()), built_in), Ok("/built/systemctl".into()));
        choose(false, Some("systemctl".into()), built_in).unwrap_err();
        let usual = choose(false, None, Some(""));
        assert!(usual.map_or(true, |path| USUAL.map(Path::new).contains(&path.as_path())));
    }
}
