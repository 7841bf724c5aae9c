// SPDX-License-Identifier: LGPL-2.1-or-later

//! Whether instant snapshots are on in the daemon that this process is, and what it says of that.

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

/// By this the instantsnap command finds the version in the library's file; the colon ends it
/// there.
const MARK: &str = concat!("instantsnap-preload/", env!("CARGO_PKG_VERSION"), ":");

const DRIVERS: &CStr = c"qemuSnapshotCreateXML";

/// This libvirt has taken an ordinary snapshot where an instant one was asked for.
static IS_ELSEWHERE: AtomicBool = AtomicBool::new(false);

/// The daemon that this process is; or why instant snapshots are off in it, which its log says once
/// too.
pub fn found() -> std::result::Result<&'static Daemon, String> {
    static SAID: Once = Once::new();
    let look = || {
        let settings = Settings::get();
        let daemon = Daemon::get(settings.any_version)?;
        table::table().map_err(|error| error.message)?;
        check_driver()?;
        Ok((daemon, settings))
    };
    let found = caught(|| Ok(look())).unwrap_or_else(|error| Err(error.message));
    SAID.call_once(|| match &found {
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
pub fn driver_is_elsewhere() {
    IS_ELSEWHERE.store(true, Ordering::Relaxed);
}

/// Why the driver's snapshots would not arrive at this library, if so.
fn check_driver() -> std::result::Result<(), String> {
    let name = DRIVERS.to_string_lossy();
    if IS_ELSEWHERE.load(Ordering::Relaxed) {
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

/// Tells the client, and the daemon's log.
pub fn failed(error: Error) {
    log(Priority::Error, &error.message);
    set_last_error(&error);
}
