// SPDX-License-Identifier: LGPL-2.1-or-later

//! Finds and calls the libvirt that the program has loaded.

use std::ffi::{CString, c_int, c_uint};
use std::ptr;
use std::sync::OnceLock;

use instantsnap_core::error::{DOMAIN, Error};
use instantsnap_core::libvirt::table::{virConnect, virDomain, virDomainSnapshot, virError};
use instantsnap_core::pointers::{Malloced, Text};
use instantsnap_core::symbols::{Library, symbols};

use crate::environment;

symbols! {
    /// The functions that this library intercepts.
    pub struct Next;

    unsafe extern "C" {
        safe fn virDomainSnapshotCreateXML(Option<&virDomain>, Text, c_uint) -> *mut virDomainSnapshot;
        safe fn virDomainRevertToSnapshot(Option<&virDomainSnapshot>, c_uint) -> c_int;
        safe fn virDomainSnapshotDelete(Option<&virDomainSnapshot>, c_uint) -> c_int;
    }
}

symbols! {
    /// The functions that it calls.
    struct Functions;

    unsafe extern "C" {
        safe fn virConnectGetType(&virConnect) -> Text;
        safe fn virDomainGetConnect(&virDomain) -> Option<&virConnect>;
        safe fn virDomainIsActive(&virDomain) -> c_int;
        safe fn virDomainSnapshotGetConnect(&virDomainSnapshot) -> Option<&virConnect>;
        safe fn virDomainSnapshotGetXMLDesc(&virDomainSnapshot, c_uint) -> Malloced;
        safe fn virResetLastError();
    }

    // Not in the public API: functions for the daemon and the drivers, which another libvirt may
    // not have.
    optional {
        safe fn virSetError(&mut virError) -> c_int;
        safe fn virDispatchError(Option<&virConnect>);
    }
}

/// The functions of libvirt.
pub struct Libvirt {
    pub next: Next,
    functions: Functions,
}

impl Libvirt {
    /// The libvirt of this process.
    pub fn get() -> Option<&'static Libvirt> {
        static LIBVIRT: OnceLock<Libvirt> = OnceLock::new();
        if LIBVIRT.get().is_none() {
            let _ = LIBVIRT.set(Libvirt::find()?);
        }
        LIBVIRT.get()
    }

    /// Finds libvirt, which the program has loaded, because it has called one of its functions.
    /// `None` if that was another library's function.
    fn find() -> Option<Libvirt> {
        let library = Library::loaded(c"libvirt.so.0")?;
        // The definition that comes after ours: another preloaded library's, or libvirt's.
        let next = |name| {
            let found = Library::NEXT.find(name);
            // If the program has opened libvirt with dlopen(), as Python does, libvirt is not in
            // the global scope, and so not found by `NEXT`.
            if found.is_null() { library.find(name) } else { found }
        };
        Some(Libvirt {
            next: Next::find(next).ok()?,
            functions: Functions::find(|name| library.find(name)).ok()?,
        })
    }

    /// Whether the domain belongs to QEMU's driver, and runs.
    pub fn is_running_under_qemu(&self, domain: &virDomain) -> bool {
        self.is_qemu(self.connection_of_domain(Some(domain)))
            && (self.functions.virDomainIsActive)(domain) == 1
    }

    pub fn connection_of_domain<'a>(
        &self,
        domain: Option<&'a virDomain>,
    ) -> Option<&'a virConnect> {
        (self.functions.virDomainGetConnect)(domain?)
    }

    pub fn connection_of_snapshot<'a>(
        &self,
        snapshot: Option<&'a virDomainSnapshot>,
    ) -> Option<&'a virConnect> {
        (self.functions.virDomainSnapshotGetConnect)(snapshot?)
    }

    pub fn is_qemu(&self, connection: Option<&virConnect>) -> bool {
        connection.is_some_and(|connection| {
            (self.functions.virConnectGetType)(connection).get() == Some(c"QEMU")
        })
    }

    /// The snapshot's XML.
    pub fn snapshot_xml(&self, snapshot: &virDomainSnapshot) -> Option<String> {
        let text = (self.functions.virDomainSnapshotGetXMLDesc)(snapshot, 0);
        text.get().map(|text| text.to_string_lossy().into_owned())
    }

    pub fn reset_last_error(&self) {
        (self.functions.virResetLastError)();
    }

    /// Makes an error this thread's last error. If this libvirt does not support that, writes it to
    /// stderr.
    pub fn set_last_error(&self, error: &Error) {
        const LEVEL_ERROR: c_int = 2;
        let Some(set_error) = self.functions.virSetError else {
            return environment::say(&error.message);
        };
        let message =
            CString::new(error.message.replace('\0', "\\0")).expect("there is no NUL any more");
        let mut raw = virError {
            code: error.number(),
            domain: DOMAIN,
            message: Text::from(&message),
            level: LEVEL_ERROR,
            conn: ptr::null_mut(),
            dom: ptr::null_mut(),
            str1: Text::from(&message),
            str2: Text::NULL,
            str3: Text::NULL,
            int1: -1,
            int2: -1,
            net: ptr::null_mut(),
        };
        set_error(&mut raw);
    }

    /// Reports the last error to the program's error handler, as each function of libvirt does at
    /// its end.
    pub fn dispatch(&self, connection: Option<&virConnect>) {
        if let Some(dispatch) = self.functions.virDispatchError {
            dispatch(connection);
        }
    }
}
