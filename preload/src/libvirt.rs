//! The libvirt that the program has loaded.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use crate::environment;
use crate::error::{DOMAIN, Error};

/// `virConnect`.
pub type Connect = c_void;
/// `virDomain`.
pub type Domain = c_void;
/// `virDomainSnapshot`.
pub type Snapshot = c_void;

/// What reverts to a snapshot or deletes it.
pub type OnSnapshot = unsafe extern "C" fn(*mut Snapshot, c_uint) -> c_int;

/// `virError`.
#[repr(C)]
struct RawError {
    code: c_int,
    domain: c_int,
    message: *mut c_char,
    level: c_int,
    conn: *mut Connect,
    dom: *mut Domain,
    str1: *mut c_char,
    str2: *mut c_char,
    str3: *mut c_char,
    int1: c_int,
    int2: c_int,
    net: *mut c_void,
}

/// What went wrong.
pub struct LastError {
    pub code: c_int,
    pub message: String,
}

macro_rules! functions {
    (
        next { $(fn $next:ident: $next_type:ty;)+ }
        public { $(fn $name:ident: $type:ty;)+ }
        private { $(fn $private:ident: $private_type:ty;)+ }
    ) => {
        /// The functions.
        #[allow(non_snake_case)]
        pub struct Libvirt {
            // Those that this library stands before.
            $(pub $next: $next_type,)+
            $($name: $type,)+
            // Not of the public API: the daemon's and the drivers', which another libvirt may not have.
            $($private: Option<$private_type>,)+
        }

        impl Libvirt {
            /// libvirt is there, because somebody has called one of its functions. None where it is something else.
            fn find() -> Option<Libvirt> {
                // SAFETY: a NUL-terminated name; nothing is loaded by this.
                let library = unsafe { libc::dlopen(c"libvirt.so.0".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
                if library.is_null() {
                    return None;
                }
                // SAFETY: the symbols are libvirt's functions of these names, and the types are theirs in all versions; of
                // those that may be missing, NULL is None.
                unsafe {
                    Some(Libvirt {
                        $($next: std::mem::transmute::<*mut c_void, Option<$next_type>>(
                            next(library, concat!(stringify!($next), "\0")),
                        )?,)+
                        $($name: std::mem::transmute::<*mut c_void, Option<$type>>(
                            symbol(library, concat!(stringify!($name), "\0")),
                        )?,)+
                        $($private: std::mem::transmute::<*mut c_void, Option<$private_type>>(
                            symbol(library, concat!(stringify!($private), "\0")),
                        ),)+
                    })
                }
            }
        }
    };
}

functions! {
    next {
        fn virDomainSnapshotCreateXML: unsafe extern "C" fn(*mut Domain, *const c_char, c_uint) -> *mut Snapshot;
        fn virDomainRevertToSnapshot: OnSnapshot;
        fn virDomainSnapshotDelete: OnSnapshot;
    }
    public {
        fn virConnectGetType: unsafe extern "C" fn(*mut Connect) -> *const c_char;
        fn virDomainGetConnect: unsafe extern "C" fn(*mut Domain) -> *mut Connect;
        fn virDomainIsActive: unsafe extern "C" fn(*mut Domain) -> c_int;
        fn virDomainSnapshotGetConnect: unsafe extern "C" fn(*mut Snapshot) -> *mut Connect;
        fn virDomainSnapshotGetXMLDesc: unsafe extern "C" fn(*mut Snapshot, c_uint) -> *mut c_char;
        fn virGetLastError: unsafe extern "C" fn() -> *mut RawError;
        fn virResetLastError: unsafe extern "C" fn();
    }
    private {
        fn virSetError: unsafe extern "C" fn(*mut RawError) -> c_int;
        fn virDispatchError: unsafe extern "C" fn(*mut Connect);
    }
}

/// The definition that comes after ours: another preloaded library's, or libvirt's.
fn next(library: *mut c_void, name: &str) -> *mut c_void {
    let found = symbol(libc::RTLD_NEXT, name);
    // A program that opened libvirt, as Python does, has it to itself: it is not among those that come next.
    if found.is_null() { symbol(library, name) } else { found }
}

fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let name = CStr::from_bytes_with_nul(name.as_bytes()).expect("written with its NUL");
    // SAFETY: an open library or RTLD_NEXT, and a NUL-terminated name; dlsym only looks.
    unsafe { libc::dlsym(library, name.as_ptr()) }
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

    /// Whether this is QEMU's driver, and the guest is there.
    ///
    /// # Safety
    /// `domain` is one of libvirt's.
    pub unsafe fn is_running_under_qemu(&self, domain: *mut Domain) -> bool {
        // SAFETY: by the caller's promise.
        unsafe { self.is_qemu(self.connection_of_domain(domain)) && (self.virDomainIsActive)(domain) == 1 }
    }

    /// # Safety
    /// `domain` is NULL or one of libvirt's.
    pub unsafe fn connection_of_domain(&self, domain: *mut Domain) -> *mut Connect {
        if domain.is_null() {
            return ptr::null_mut();
        }
        // SAFETY: by the caller's promise.
        unsafe { (self.virDomainGetConnect)(domain) }
    }

    /// # Safety
    /// `snapshot` is NULL or one of libvirt's.
    pub unsafe fn connection_of_snapshot(&self, snapshot: *mut Snapshot) -> *mut Connect {
        if snapshot.is_null() {
            return ptr::null_mut();
        }
        // SAFETY: by the caller's promise.
        unsafe { (self.virDomainSnapshotGetConnect)(snapshot) }
    }

    /// # Safety
    /// `connection` is NULL or one of libvirt's.
    pub unsafe fn is_qemu(&self, connection: *mut Connect) -> bool {
        if connection.is_null() {
            return false;
        }
        // SAFETY: by the caller's promise; the string is the connection's or a constant.
        unsafe {
            let kind = (self.virConnectGetType)(connection);
            !kind.is_null() && CStr::from_ptr(kind) == c"QEMU"
        }
    }

    /// The snapshot's XML.
    ///
    /// # Safety
    /// `snapshot` is one of libvirt's.
    pub unsafe fn snapshot_xml(&self, snapshot: *mut Snapshot) -> Option<String> {
        // SAFETY: by the caller's promise; the text is NUL-terminated, from malloc, and the caller's.
        unsafe {
            let text = (self.virDomainSnapshotGetXMLDesc)(snapshot, 0);
            if text.is_null() {
                return None;
            }
            let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
            libc::free(text.cast());
            Some(owned)
        }
    }

    /// This thread's last error.
    pub fn last_error(&self) -> Option<LastError> {
        // SAFETY: NULL, or this thread's error, which nobody changes meanwhile.
        unsafe {
            let last = (self.virGetLastError)();
            if last.is_null() || (*last).code == 0 {
                return None;
            }
            let message = (*last).message;
            let message = if message.is_null() { c"no reason is given" } else { CStr::from_ptr(message) };
            Some(LastError { code: (*last).code, message: message.to_string_lossy().into_owned() })
        }
    }

    pub fn reset_last_error(&self) {
        // SAFETY: of this thread only.
        unsafe { (self.virResetLastError)() }
    }

    /// Makes an error this thread's last one; where this libvirt does not let us, it is on stderr.
    pub fn set_last_error(&self, error: &Error) {
        const LEVEL_ERROR: c_int = 2;
        let Some(set_error) = self.virSetError else {
            return environment::say(&error.message);
        };
        let message = CString::new(error.message.replace('\0', "\\0")).expect("there is no NUL any more");
        let mut raw = RawError {
            code: error.code as c_int,
            domain: DOMAIN,
            message: message.as_ptr().cast_mut(),
            level: LEVEL_ERROR,
            conn: ptr::null_mut(),
            dom: ptr::null_mut(),
            str1: message.as_ptr().cast_mut(),
            str2: ptr::null_mut(),
            str3: ptr::null_mut(),
            int1: -1,
            int2: -1,
            net: ptr::null_mut(),
        };
        // SAFETY: a whole virError, which libvirt copies.
        unsafe { set_error(&raw mut raw) };
    }

    /// Tells the program's error handler of the last error, as each of libvirt's functions does at its end.
    ///
    /// # Safety
    /// `connection` is NULL or one of libvirt's.
    pub unsafe fn dispatch(&self, connection: *mut Connect) {
        if let Some(dispatch) = self.virDispatchError {
            // SAFETY: by the caller's promise.
            unsafe { dispatch(connection) }
        }
    }
}
