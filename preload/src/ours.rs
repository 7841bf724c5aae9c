//! libinstantsnap, opened when it is needed.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::environment;
use crate::error::{Code, Error, Result};
use crate::libvirt::{Domain, Snapshot};

const SONAME: &str = "libinstantsnap.so.0";

/// What reverts to a snapshot or deletes it; the first argument is NULL.
pub type OnSnapshot = unsafe extern "C" fn(*mut c_void, *mut Snapshot, c_uint) -> c_int;

type Create = unsafe extern "C" fn(*mut Domain, *mut c_void, *const c_char, c_uint) -> *mut Snapshot;
type LastError = unsafe extern "C" fn() -> *const RawError;

/// Its functions.
pub struct Ours {
    pub create: Create,
    pub revert: OnSnapshot,
    pub delete: OnSnapshot,
    last_error: LastError,
}

/// `instantsnap_error`.
#[repr(C)]
struct RawError {
    code: c_int,
    domain: c_int,
    message: *const c_char,
}

impl Ours {
    /// The library. Where it cannot be opened, that is tried again at the next call.
    pub fn get() -> Result<&'static Ours> {
        static OURS: OnceLock<Ours> = OnceLock::new();
        match OURS.get() {
            Some(ours) => Ok(ours),
            None => Ours::find().map(|ours| OURS.get_or_init(|| ours)),
        }
    }

    fn find() -> Result<Ours> {
        let library = open()?;
        let symbol = |name: &CStr| {
            // SAFETY: an open library and a NUL-terminated name; dlsym only looks.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            let missing = || missing(&format!("it has no {}()", name.to_string_lossy()));
            if found.is_null() { Err(missing()) } else { Ok(found) }
        };
        // SAFETY: the symbols have these types in instantsnap.h and instantsnap-libvirt.h, where the soname is this.
        unsafe {
            Ok(Ours {
                create: std::mem::transmute::<*mut c_void, Create>(symbol(c"qemuSnapshotCreateXML")?),
                revert: std::mem::transmute::<*mut c_void, OnSnapshot>(symbol(c"qemuSnapshotRevert")?),
                delete: std::mem::transmute::<*mut c_void, OnSnapshot>(symbol(c"qemuSnapshotDelete")?),
                last_error: std::mem::transmute::<*mut c_void, LastError>(symbol(c"instantsnap_last_error")?),
            })
        }
    }

    /// Its own last error of this thread.
    pub fn last_error(&self) -> Error {
        // SAFETY: never NULL; code and message are this thread's until its next call.
        let (code, message) = unsafe {
            let last = &*(self.last_error)();
            (last.code, CStr::from_ptr(last.message).to_string_lossy().into_owned())
        };
        Error::new(Code::from_number(code).unwrap_or(Code::InternalError), message)
    }
}

fn missing(why: &str) -> Error {
    Error::new(
        Code::OperationUnsupported,
        format!(
            "instant snapshots need {SONAME}: {why}; install it where the loader finds it, or set INSTANTSNAP_LIBRARY to its path"
        ),
    )
}

fn open() -> Result<*mut c_void> {
    let mut why = String::new();
    for candidate in candidates() {
        let Ok(name) = CString::new(candidate.into_os_string().into_vec()) else { continue };
        // SAFETY: a NUL-terminated name; the library's initialisers are fit for any process.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !library.is_null() {
            return Ok(library);
        }
        // SAFETY: after a failure NULL or a string of this thread's.
        let reason = unsafe { libc::dlerror() };
        if !reason.is_null() {
            // SAFETY: as above; copied before the next call of its family.
            why = unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned();
        }
    }
    Err(missing(&why))
}

/// What was asked for and nothing else; or what is beside this library, then whatever the loader finds.
fn candidates() -> Vec<PathBuf> {
    if let Some(named) = environment::variable("INSTANTSNAP_LIBRARY") {
        return vec![named.into()];
    }
    let beside = directory().into_iter().map(|directory| directory.join(SONAME)).filter(|file| file.exists());
    beside.chain([PathBuf::from(SONAME)]).collect()
}

/// Where this library was loaded from. A relative path would be of the directory that the program was started in, and it may
/// be in another now: that is none.
fn directory() -> Option<PathBuf> {
    static HERE: u8 = 0;
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: any address may be asked for, and `info` is written; the name is the loader's, for as long as we are loaded.
    let name = unsafe {
        if libc::dladdr((&raw const HERE).cast(), &raw mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        OsStr::from_bytes(CStr::from_ptr(info.dli_fname).to_bytes())
    };
    Path::new(name).parent().filter(|directory| directory.is_absolute()).map(Path::to_owned)
}
