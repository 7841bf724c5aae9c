//! libvirt's public functions, found at run time: the library loads where libvirt is not installed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_ulonglong, c_void};

use once_cell::sync::OnceCell;

use crate::error::{Code, Error, Result};

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug)]
            pub struct $name {
                _opaque: [u8; 0],
            }
        )+
    };
}

opaque! {
    /// `virConnect`.
    virConnect,
    /// `virDomain`.
    virDomain,
    /// `virDomainSnapshot`.
    virDomainSnapshot,
}

/// `virError`.
#[repr(C)]
#[derive(Debug)]
pub struct virError {
    pub code: c_int,
    pub domain: c_int,
    pub message: *mut c_char,
    pub level: c_int,
    pub conn: *mut virConnect,
    pub dom: *mut virDomain,
    pub str1: *mut c_char,
    pub str2: *mut c_char,
    pub str3: *mut c_char,
    pub int1: c_int,
    pub int2: c_int,
    pub net: *mut c_void,
}

/// `virDomainBlockJobInfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct virDomainBlockJobInfo {
    pub kind: c_int,
    pub bandwidth: c_ulong,
    pub cur: c_ulonglong,
    pub end: c_ulonglong,
}

/// `virDomainBlockInfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct virDomainBlockInfo {
    pub capacity: c_ulonglong,
    pub allocation: c_ulonglong,
    pub physical: c_ulonglong,
}

/// `virDomainJobInfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct virDomainJobInfo {
    pub kind: c_int,
    /// Time, data, memory and files: how much in all, how much is done, how much is left.
    pub figures: [c_ulonglong; 11],
}

/// The two libraries.
#[derive(Debug)]
struct Libraries {
    libvirt: *mut c_void,
    libvirt_qemu: *mut c_void,
}

macro_rules! table {
    ($($library:ident { $(fn $name:ident($($argument:ty),* $(,)?) $(-> $result:ty)?;)+ })+) => {
        /// The functions.
        #[derive(Debug)]
        #[allow(non_snake_case)]
        pub struct Table {
            $($(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)+)+
            /// One of libvirt's private functions, which may be missing: makes an error the thread's last one.
            pub virSetError: Option<unsafe extern "C" fn(*mut virError) -> c_int>,
            /// Another: makes an object that stands for the snapshot of this name.
            pub virGetDomainSnapshot:
                Option<unsafe extern "C" fn(*mut virDomain, *const c_char) -> *mut virDomainSnapshot>,
        }

        impl Table {
            fn find(libraries: &Libraries) -> Result<Table> {
                Ok(Table {
                    $($(
                        // SAFETY: the symbol is the public function of this name, whose signature in libvirt's headers is
                        // the field's; it has been this since the symbol exists.
                        $name: unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(
                                required(libraries.$library, concat!(stringify!($name), "\0"))?,
                            )
                        },
                    )+)+
                    // SAFETY: `int virSetError(virErrorPtr)` in every version that has it.
                    virSetError: unsafe {
                        std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn(*mut virError) -> c_int>>(
                            libc::dlsym(libraries.libvirt, c"virSetError".as_ptr()),
                        )
                    },
                    // SAFETY: `virDomainSnapshotPtr virGetDomainSnapshot(virDomainPtr, const char *)` likewise.
                    virGetDomainSnapshot: unsafe {
                        std::mem::transmute::<
                            *mut c_void,
                            Option<unsafe extern "C" fn(*mut virDomain, *const c_char) -> *mut virDomainSnapshot>,
                        >(libc::dlsym(libraries.libvirt, c"virGetDomainSnapshot".as_ptr()))
                    },
                })
            }
        }
    };
}

table! {
    libvirt {
    fn virInitialize() -> c_int;
    fn virGetVersion(*mut c_ulong, *const c_char, *mut c_ulong) -> c_int;
    fn virGetLastError() -> *mut virError;
    fn virResetLastError();
    fn virConnectOpen(*const c_char) -> *mut virConnect;
    fn virConnectRef(*mut virConnect) -> c_int;
    fn virConnectClose(*mut virConnect) -> c_int;
    fn virConnectGetURI(*mut virConnect) -> *mut c_char;
    fn virConnectListAllDomains(*mut virConnect, *mut *mut *mut virDomain, c_uint) -> c_int;
    fn virConnectGetLibVersion(*mut virConnect, *mut c_ulong) -> c_int;
    fn virConnectGetType(*mut virConnect) -> *const c_char;
    fn virConnectIsAlive(*mut virConnect) -> c_int;
    fn virDomainRef(*mut virDomain) -> c_int;
    fn virDomainFree(*mut virDomain) -> c_int;
    fn virDomainGetConnect(*mut virDomain) -> *mut virConnect;
    fn virDomainGetName(*mut virDomain) -> *const c_char;
    fn virDomainGetUUIDString(*mut virDomain, *mut c_char) -> c_int;
    fn virDomainGetID(*mut virDomain) -> c_uint;
    fn virDomainLookupByUUIDString(*mut virConnect, *const c_char) -> *mut virDomain;
    fn virDomainGetXMLDesc(*mut virDomain, c_uint) -> *mut c_char;
    fn virDomainGetState(*mut virDomain, *mut c_int, *mut c_int, c_uint) -> c_int;
    fn virDomainGetBlockInfo(*mut virDomain, *const c_char, *mut virDomainBlockInfo, c_uint) -> c_int;
    fn virDomainBlockResize(*mut virDomain, *const c_char, c_ulonglong, c_uint) -> c_int;
    fn virDomainGetJobInfo(*mut virDomain, *mut virDomainJobInfo) -> c_int;
    fn virDomainIsActive(*mut virDomain) -> c_int;
    fn virDomainIsPersistent(*mut virDomain) -> c_int;
    fn virDomainGetAutostart(*mut virDomain, *mut c_int) -> c_int;
    fn virDomainSetAutostart(*mut virDomain, c_int) -> c_int;
    fn virDomainSuspend(*mut virDomain) -> c_int;
    fn virDomainResume(*mut virDomain) -> c_int;
    fn virDomainDestroyFlags(*mut virDomain, c_uint) -> c_int;
    fn virDomainDefineXMLFlags(*mut virConnect, *const c_char, c_uint) -> *mut virDomain;
    fn virDomainUndefineFlags(*mut virDomain, c_uint) -> c_int;
    fn virDomainHasManagedSaveImage(*mut virDomain, c_uint) -> c_int;
    fn virDomainSaveImageGetXMLDesc(*mut virConnect, *const c_char, c_uint) -> *mut c_char;
    fn virDomainRestoreFlags(*mut virConnect, *const c_char, *const c_char, c_uint) -> c_int;
    fn virDomainBlockCommit(*mut virDomain, *const c_char, *const c_char, *const c_char, c_ulong, c_uint) -> c_int;
    fn virDomainBlockJobAbort(*mut virDomain, *const c_char, c_uint) -> c_int;
    fn virDomainGetBlockJobInfo(*mut virDomain, *const c_char, *mut virDomainBlockJobInfo, c_uint) -> c_int;
    fn virDomainListAllSnapshots(*mut virDomain, *mut *mut *mut virDomainSnapshot, c_uint) -> c_int;
    fn virDomainSnapshotCreateXML(*mut virDomain, *const c_char, c_uint) -> *mut virDomainSnapshot;
    fn virDomainSnapshotGetXMLDesc(*mut virDomainSnapshot, c_uint) -> *mut c_char;
    fn virDomainSnapshotLookupByName(*mut virDomain, *const c_char, c_uint) -> *mut virDomainSnapshot;
    fn virDomainHasCurrentSnapshot(*mut virDomain, c_uint) -> c_int;
    fn virDomainSnapshotCurrent(*mut virDomain, c_uint) -> *mut virDomainSnapshot;
    fn virDomainSnapshotGetParent(*mut virDomainSnapshot, c_uint) -> *mut virDomainSnapshot;
    fn virDomainSnapshotListAllChildren(*mut virDomainSnapshot, *mut *mut *mut virDomainSnapshot, c_uint) -> c_int;
    fn virDomainSnapshotIsCurrent(*mut virDomainSnapshot, c_uint) -> c_int;
    fn virDomainSnapshotGetName(*mut virDomainSnapshot) -> *const c_char;
    fn virDomainSnapshotGetDomain(*mut virDomainSnapshot) -> *mut virDomain;
    fn virDomainSnapshotRef(*mut virDomainSnapshot) -> c_int;
    fn virDomainSnapshotFree(*mut virDomainSnapshot) -> c_int;
    fn virDomainRevertToSnapshot(*mut virDomainSnapshot, c_uint) -> c_int;
    fn virDomainSnapshotDelete(*mut virDomainSnapshot, c_uint) -> c_int;
    }

    libvirt_qemu {
    fn virDomainQemuMonitorCommandWithFiles(
        *mut virDomain,
        *const c_char,
        c_uint,
        *mut c_int,
        *mut c_uint,
        *mut *mut c_int,
        *mut *mut c_char,
        c_uint,
    ) -> c_int;
    }
}

fn required(library: *mut c_void, name: &str) -> Result<*mut c_void> {
    let symbol = CStr::from_bytes_with_nul(name.as_bytes()).expect("written with its NUL");
    // SAFETY: an open library and a NUL-terminated name; dlsym only looks.
    let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    if found.is_null() {
        return Err(unusable(format!("it has no {}()", symbol.to_string_lossy())));
    }
    Ok(found)
}

fn unusable(why: String) -> Error {
    Error::new(Code::OperationUnsupported, format!("libvirt 8.2 or later is needed on this machine: {why}"))
}

fn open(name: &CStr) -> Result<*mut c_void> {
    // SAFETY: a NUL-terminated name. libvirt's initialisers are meant to be run in any process.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: dlerror returns NULL or a string of this thread, valid until the next call of its family.
        let reason = unsafe {
            let reason = libc::dlerror();
            if reason.is_null() { None } else { Some(CStr::from_ptr(reason).to_string_lossy().into_owned()) }
        };
        return Err(unusable(reason.unwrap_or_else(|| format!("{} cannot be loaded", name.to_string_lossy()))));
    }
    Ok(library)
}

/// The table: looked up at the first call that finds libvirt, and kept for good.
pub fn table() -> Result<&'static Table> {
    static TABLE: OnceCell<Table> = OnceCell::new();
    TABLE.get_or_try_init(|| {
        let libraries = Libraries { libvirt: open(c"libvirt.so.0")?, libvirt_qemu: open(c"libvirt-qemu.so.0")? };
        let table = Table::find(&libraries)?;
        // Opening a connection does it too, but before one is there, libvirt's errors would be kept in memory of others.
        // SAFETY: no arguments; any thread may call it, any number of times.
        match unsafe { (table.virInitialize)() } {
            0 => Ok(table),
            _ => Err(unusable("it does not initialise itself".into())),
        }
    })
}
