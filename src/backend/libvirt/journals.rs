// SPDX-License-Identifier: LGPL-2.1-or-later

//! The directory of the journals of snapshots under libvirt.
//!
//! libvirt's domains have no directory of ours, and a note in a domain's definition would be seen,
//! copied and kept by other clients. So each user's journals are in one directory of that user's,
//! each named after the domain's UUID: a domain can be reached by several URIs, and only one
//! snapshot of it is under way. The system's daemon and root have the same one.

use std::env;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use crate::error::{Error, Result, fail};
use crate::model::{Journals, Reservation, Store};
use crate::sys;

/// The variable that names another directory.
const SETTING: &str = "INSTANTSNAP_STATE_DIRECTORY";

/// The place of the journals.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// The caller names it.
    Named(PathBuf),
    /// The user's usual one, which a sandbox may not let this process write to.
    Usual(PathBuf),
}

/// The place of this process's journals. `None` if there is none.
fn place() -> Result<Option<Place>> {
    // Another user may have set the environment of a process with more rights.
    let variable = |name: &str| env::var_os(name).filter(|_| !sys::is_secure());
    choose(rustix::process::geteuid().is_root(), variable)
}

fn choose(is_root: bool, variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<Place>> {
    if let Some(named) = variable(SETTING).filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        if !named.is_absolute() {
            fail!(InvalidArg, "{SETTING} is no absolute path: '{}'", named.display());
        }
        return Ok(Some(Place::Named(named.join("libvirt"))));
    }
    let directory = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let usual = match is_root {
        true => Some("/var/lib".into()),
        false => {
            directory("XDG_STATE_HOME").or_else(|| Some(directory("HOME")?.join(".local/state")))
        }
    };
    Ok(usual.map(|usual: PathBuf| Place::Usual(usual.join("instantsnap/libvirt"))))
}

/// The journal of the domain with this UUID. `None` if there is none, nor a directory for it, or if
/// this process cannot open one that the caller does not name: then it keeps no journal there
/// either.
pub fn journals(uuid: &str) -> Result<Option<Journals>> {
    match place()? {
        Some(place) => journals_in(place, uuid),
        None => Ok(None),
    }
}

fn journals_in(place: Place, uuid: &str) -> Result<Option<Journals>> {
    let (Place::Named(directory) | Place::Usual(directory)) = &place;
    if !directory.exists() {
        return Ok(None);
    }
    match (Store::open(directory), &place) {
        (Ok(store), _) => Ok(Some(Journals::one(store, uuid.into()))),
        (Err(_), Place::Usual(_)) => Ok(None),
        (Err(error), Place::Named(_)) => Err(error),
    }
}

/// Reserves the journal of the domain with this UUID. `Ok(Err(()))` if another snapshot has it.
/// `None` if this process can keep no journal where the caller does not name a directory for it: a
/// snapshot can be taken without one.
pub fn reserve(uuid: &str) -> Result<std::result::Result<Option<Reservation>, ()>> {
    let claim = |directory: PathBuf| -> Result<Option<Reservation>> {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        created.map_err(|error| {
            let step = format!("cannot create the directory '{}'", directory.display());
            Error::system(step, error)
        })?;
        Store::open(&directory)?.claim(uuid)
    };
    match place()? {
        Some(Place::Named(directory)) => Ok(claim(directory)?.map(Some).ok_or(())),
        Some(Place::Usual(directory)) => match claim(directory) {
            Ok(claimed) => Ok(claimed.map(Some).ok_or(())),
            Err(_) => Ok(Ok(None)),
        },
        None => Ok(Ok(None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_opened_is_an_error_only_where_the_caller_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(journals_in(Place::Usual(file.clone()), "u").unwrap().is_none());
        assert!(journals_in(Place::Named(file), "u").is_err());
    }

    #[test]
    fn the_caller_names_the_directory_or_it_is_the_users_own() {
        let place = |is_root, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            };
            choose(is_root, variable)
        };
        let usual = |path: &str| Some(Place::Usual(path.into()));
        let named = Some(Place::Named("/state/libvirt".into()));
        assert_eq!(place(true, &[(SETTING, "/state")]).unwrap(), named);
        assert_eq!(place(false, &[(SETTING, "/state")]).unwrap(), named);
        assert!(place(true, &[(SETTING, "state")]).is_err());
        let root = usual("/var/lib/instantsnap/libvirt");
        assert_eq!(place(true, &[("XDG_STATE_HOME", "/x"), (SETTING, "")]).unwrap(), root);
        let home = usual("/home/u/.local/state/instantsnap/libvirt");
        assert_eq!(place(false, &[("HOME", "/home/u"), ("XDG_STATE_HOME", "x")]).unwrap(), home);
        let own = usual("/x/instantsnap/libvirt");
        assert_eq!(place(false, &[("HOME", "/home/u"), ("XDG_STATE_HOME", "/x")]).unwrap(), own);
        assert_eq!(place(false, &[]).unwrap(), None);
    }
}
