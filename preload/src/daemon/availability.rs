// SPDX-License-Identifier: LGPL-2.1-or-later

//! Decides whether instant snapshots are on in this daemon, and reports that.

use std::ffi::CStr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use instantsnap_core::boundary::caught;
use instantsnap_core::client::set_last_error;
use instantsnap_core::error::Error;
use instantsnap_core::libvirt::daemon::{Daemon, Priority, log};
use instantsnap_core::libvirt::table;
use instantsnap_core::symbols::Library;

use super::imports;
use super::settings::Settings;

/// The instantsnap command finds the library's version in its file by this mark. The colon ends the
/// version.
const MARK: &str = concat!("instantsnap-preload/", env!("CARGO_PKG_VERSION"), ":");

const DRIVERS: &CStr = c"qemuSnapshotCreateXML";

/// This libvirt has taken an ordinary snapshot although an instant one was requested.
static BYPASSED: AtomicBool = AtomicBool::new(false);

/// The daemon in this process, or why instant snapshots are off in it. The first call also logs the
/// result.
pub fn found() -> std::result::Result<&'static Daemon, String> {
    static LOGGED: Once = Once::new();
    let find = || {
        let settings = Settings::get();
        let daemon = Daemon::get(settings.any_version)?;
        table::table().map_err(|error| error.message)?;
        check_driver()?;
        Ok((daemon, settings))
    };
    let found = caught(|| Ok(find())).unwrap_or_else(|error| Err(error.message));
    LOGGED.call_once(|| match &found {
        Ok((_, settings)) => {
            log(
                Priority::Info,
                &format!("{MARK} instant snapshots are on, at most {} at once", settings.max_jobs),
            );
        }
        Err(why) => log(Priority::Error, &format!("instant snapshots are off: {why}")),
    });
    found.map(|(daemon, _)| daemon)
}

/// Switches instant snapshots off, because this libvirt has taken an ordinary one.
pub fn driver_was_bypassed() {
    BYPASSED.store(true, Ordering::Relaxed);
}

/// Returns why the driver's snapshot calls would not reach this library, if they would not.
fn check_driver() -> std::result::Result<(), String> {
    let name = DRIVERS.to_string_lossy();
    if BYPASSED.load(Ordering::Relaxed) {
        return Err(format!("this libvirt takes snapshots without its {name}()"));
    }
    if !imports::is_in_this_object(Library::DEFAULT.find(DRIVERS)) {
        return Err(format!("another library that is preloaded, or none, has {name}()"));
    }
    let mut others = imports::objects().into_iter().filter(|object| !object.is_this());
    if !others.any(|object| object.imports(DRIVERS)) {
        return Err(format!("this libvirt's QEMU driver does not call its {name}() by the symbol"));
    }
    Ok(())
}

/// Reports an error to the client, and to the daemon's log.
pub fn failed(error: Error) {
    log(Priority::Error, &error.message);
    set_last_error(&error);
}
