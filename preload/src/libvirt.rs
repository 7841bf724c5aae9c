//! The libvirt that the program has loaded.

use std::cell::UnsafeCell;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use crate::environment;
use crate::error::{DOMAIN, Error};
use crate::pointers::{Malloced, Text};
use crate::symbols::{Library, symbols};

/// `virConnect`. Behind a shared reference libvirt writes to it, as to the others.
#[repr(C)]
pub struct Connect(UnsafeCell<[u8; 0]>);
/// `virDomain`.
#[repr(C)]
pub struct Domain(UnsafeCell<[u8; 0]>);
/// `virDomainSnapshot`.
#[repr(C)]
pub struct Snapshot(UnsafeCell<[u8; 0]>);

/// What reverts to a snapshot or deletes it.
pub type OnSnapshot = extern "C" fn(Option<&Snapshot>, c_uint) -> c_int;

/// `virError`, whose strings libvirt only reads where it is given one.
#[repr(C)]
#[allow(non_camel_case_types)]
struct virError<'a> {
    code: c_int,
    domain: c_int,
    message: Text<'a>,
    level: c_int,
    conn: *mut Connect,
    dom: *mut Domain,
    str1: Text<'a>,
    str2: Text<'a>,
    str3: Text<'a>,
    int1: c_int,
    int2: c_int,
    net: *mut c_void,
}

/// What went wrong.
pub struct LastError {
    pub code: c_int,
    pub message: String,
}

symbols! {
    /// Those that this library stands before.
    pub struct Next;

    unsafe extern "C" {
        safe fn virDomainSnapshotCreateXML(Option<&Domain>, Text, c_uint) -> *mut Snapshot;
        safe fn virDomainRevertToSnapshot(Option<&Snapshot>, c_uint) -> c_int;
        safe fn virDomainSnapshotDelete(Option<&Snapshot>, c_uint) -> c_int;
    }
}

symbols! {
    /// Those that it calls.
    struct Functions;

    unsafe extern "C" {
        safe fn virConnectGetType(&Connect) -> Text;
        safe fn virDomainGetConnect(&Domain) -> Option<&Connect>;
        safe fn virDomainIsActive(&Domain) -> c_int;
        safe fn virDomainSnapshotGetConnect(&Snapshot) -> Option<&Connect>;
        safe fn virDomainSnapshotGetXMLDesc(&Snapshot, c_uint) -> Malloced;
        safe fn virGetLastError() -> *mut virError<'static>;
        safe fn virResetLastError();
    }

    // Not of the public API: the daemon's and the drivers', which another libvirt may not have.
    optional {
        safe fn virSetError(&mut virError) -> c_int;
        safe fn virDispatchError(Option<&Connect>);
    }
}

/// The functions.
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

    /// libvirt is there, because somebody has called one of its functions. None where it is
    /// something else.
    fn find() -> Option<Libvirt> {
        let library = Library::loaded(c"libvirt.so.0")?;
        // The definition that comes after ours: another preloaded library's, or libvirt's.
        let next = |name| {
            let found = Library::NEXT.find(name);
            // A program that opened libvirt, as Python does, has it to itself: it is not among
            // those that come next.
            if found.is_null() { library.find(name) } else { found }
        };
        Some(Libvirt {
            next: Next::find(next).ok()?,
            functions: Functions::find(|name| library.find(name)).ok()?,
        })
    }

    /// Whether this is QEMU's driver, and the guest is there.
    pub fn is_running_under_qemu(&self, domain: &Domain) -> bool {
        self.is_qemu(self.connection_of_domain(Some(domain)))
            && (self.functions.virDomainIsActive)(domain) == 1
    }

    pub fn connection_of_domain<'a>(&self, domain: Option<&'a Domain>) -> Option<&'a Connect> {
        (self.functions.virDomainGetConnect)(domain?)
    }

    pub fn connection_of_snapshot<'a>(
        &self,
        snapshot: Option<&'a Snapshot>,
    ) -> Option<&'a Connect> {
        (self.functions.virDomainSnapshotGetConnect)(snapshot?)
    }

    pub fn is_qemu(&self, connection: Option<&Connect>) -> bool {
        connection.is_some_and(|connection| {
            (self.functions.virConnectGetType)(connection).get() == Some(c"QEMU")
        })
    }

    /// The snapshot's XML.
    pub fn snapshot_xml(&self, snapshot: &Snapshot) -> Option<String> {
        let text = (self.functions.virDomainSnapshotGetXMLDesc)(snapshot, 0);
        text.get().map(|text| text.to_string_lossy().into_owned())
    }

    /// This thread's last error.
    pub fn last_error(&self) -> Option<LastError> {
        // SAFETY: NULL, or this thread's error, which nobody changes meanwhile.
        let last =
            unsafe { (self.functions.virGetLastError)().as_ref() }.filter(|last| last.code != 0)?;
        let message = last.message.lossy().unwrap_or_else(|| "no reason is given".into());
        Some(LastError { code: last.code, message })
    }

    pub fn reset_last_error(&self) {
        (self.functions.virResetLastError)();
    }

    /// Makes an error this thread's last one; where this libvirt does not let us, it is on stderr.
    pub fn set_last_error(&self, error: &Error) {
        const LEVEL_ERROR: c_int = 2;
        let Some(set_error) = self.functions.virSetError else {
            return environment::say(&error.message);
        };
        let message =
            CString::new(error.message.replace('\0', "\\0")).expect("there is no NUL any more");
        let mut raw = virError {
            code: error.code as c_int,
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

    /// Tells the program's error handler of the last error, as each of libvirt's functions does at
    /// its end.
    pub fn dispatch(&self, connection: Option<&Connect>) {
        if let Some(dispatch) = self.functions.virDispatchError {
            dispatch(connection);
        }
    }
}
