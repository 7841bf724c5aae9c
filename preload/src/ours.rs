//! libinstantsnap, opened when it is needed.

use std::ffi::{CStr, CString, OsStr, c_int, c_uint};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::environment;
use crate::error::{Code, Error, Result};
use crate::libvirt::{Domain, Snapshot};
use crate::pointers::Text;
use crate::symbols::{Library, symbols};

const SONAME: &str = "libinstantsnap.so.0";

/// What reverts to a snapshot or deletes it, for a client: the first argument is NULL.
pub type OnSnapshot = extern "C" fn(Option<&virDomainObj>, Option<&Snapshot>, c_uint) -> c_int;

/// A driver's own object, which a client has none of.
#[allow(non_camel_case_types)]
#[repr(C)]
pub struct virDomainObj([u8; 0]);

symbols! {
    /// Its functions, which have these types in instantsnap.h and instantsnap-libvirt.h, where the
    /// soname is this.
    pub struct Ours;

    unsafe extern "C" {
        safe fn qemuSnapshotCreateXML(Option<&Domain>, Option<&virDomainObj>, Text, c_uint) -> *mut Snapshot;
        safe fn qemuSnapshotRevert(Option<&virDomainObj>, Option<&Snapshot>, c_uint) -> c_int;
        safe fn qemuSnapshotDelete(Option<&virDomainObj>, Option<&Snapshot>, c_uint) -> c_int;
        safe fn instantsnap_last_error() -> *const instantsnap_error;
    }
}

/// `instantsnap_error`.
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct instantsnap_error {
    code: c_int,
    domain: c_int,
    message: Text<'static>,
}

impl Ours {
    /// The library. Where it cannot be opened, that is tried again at the next call.
    pub fn get() -> Result<&'static Ours> {
        static OURS: OnceLock<Ours> = OnceLock::new();
        match OURS.get() {
            Some(ours) => Ok(ours),
            None => Ours::look().map(|ours| OURS.get_or_init(|| ours)),
        }
    }

    fn look() -> Result<Ours> {
        let library = open()?;
        Ours::find(|name| library.find(name))
            .map_err(|name| missing(&format!("it has no {name}()")))
    }

    /// Its own last error of this thread.
    pub fn last_error(&self) -> Error {
        // SAFETY: never NULL; code and message are this thread's until its next call.
        let last = unsafe { &*(self.instantsnap_last_error)() };
        let code = Code::from_number(last.code).unwrap_or(Code::InternalError);
        Error::new(code, last.message.lossy().unwrap_or_default())
    }
}

fn missing(why: &str) -> Error {
    Error::new(
        Code::OperationUnsupported,
        format!(
            "instant snapshots need {SONAME}: {why}; install it where the loader finds it, or set \
             INSTANTSNAP_LIBRARY to its path"
        ),
    )
}

fn open() -> Result<Library> {
    let mut why = String::new();
    for candidate in candidates() {
        let Ok(name) = CString::new(candidate.into_os_string().into_vec()) else { continue };
        match Library::open(&name) {
            Ok(library) => return Ok(library),
            Err(reason) => why = reason,
        }
    }
    Err(missing(&why))
}

/// What was asked for and nothing else; or what is beside this library, then whatever the loader
/// finds.
fn candidates() -> Vec<PathBuf> {
    if let Some(named) = environment::variable("INSTANTSNAP_LIBRARY") {
        return vec![named.into()];
    }
    let beside = directory()
        .into_iter()
        .map(|directory| directory.join(SONAME))
        .filter(|file| file.exists());
    beside.chain([PathBuf::from(SONAME)]).collect()
}

/// Where this library was loaded from. A relative path would be of the directory that the program
/// was started in, and it may be in another now: that is none.
fn directory() -> Option<PathBuf> {
    static HERE: u8 = 0;
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: any address may be asked for, and `info` is written; the name is the loader's, for as
    // long as we are loaded.
    let name = unsafe {
        if libc::dladdr((&raw const HERE).cast(), &raw mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        OsStr::from_bytes(CStr::from_ptr(info.dli_fname).to_bytes())
    };
    Path::new(name).parent().filter(|directory| directory.is_absolute()).map(Path::to_owned)
}
