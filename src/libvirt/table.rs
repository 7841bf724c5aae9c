// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's public functions, found at run time, so that this library can be loaded where libvirt
//! is not installed.

use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int, c_uint, c_ulong, c_ulonglong, c_void};
use std::ptr;

use once_cell::sync::OnceCell;

use crate::error::{Code, Error, Result};
use crate::pointers::{Malloced, Text};
use crate::symbols::{Library, symbols};

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug)]
            pub struct $name {
                // libvirt writes to it even through a shared reference.
                _opaque: UnsafeCell<[u8; 0]>,
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

/// `virError`. libvirt does not change the strings of one that it is passed.
#[repr(C)]
#[derive(Debug)]
pub struct virError<'a> {
    pub code: c_int,
    pub domain: c_int,
    pub message: Text<'a>,
    pub level: c_int,
    pub conn: *mut virConnect,
    pub dom: *mut virDomain,
    pub str1: Text<'a>,
    pub str2: Text<'a>,
    pub str3: Text<'a>,
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
    /// Time, data, memory and files: the total, the part that is done, and the rest.
    pub figures: [c_ulonglong; 11],
}

symbols! {
    /// The functions. Safe ones take only live objects, strings, and places for results.
    #[derive(Debug)]
    pub struct Table;

    unsafe extern "C" {
        safe fn virInitialize() -> c_int;
        safe fn virGetVersion(Option<&mut c_ulong>, Text, Option<&mut c_ulong>) -> c_int;
        safe fn virGetLastError() -> *mut virError<'static>;
        safe fn virResetLastError();
        safe fn virSetErrorFunc(*mut c_void, Option<extern "C" fn(*mut c_void, *mut virError)>);
        safe fn virConnectOpen(Text) -> *mut virConnect;
        safe fn virConnectOpenReadOnly(Text) -> *mut virConnect;
        safe fn virConnectRef(&virConnect) -> c_int;
        unsafe fn virConnectClose(*mut virConnect) -> c_int;
        safe fn virConnectGetURI(&virConnect) -> Malloced;
        safe fn virConnectListAllDomains(&virConnect, &mut *mut *mut virDomain, c_uint) -> c_int;
        safe fn virConnectGetLibVersion(&virConnect, Option<&mut c_ulong>) -> c_int;
        safe fn virConnectGetType(&virConnect) -> Text;
        safe fn virConnectIsAlive(&virConnect) -> c_int;
        safe fn virDomainRef(&virDomain) -> c_int;
        unsafe fn virDomainFree(*mut virDomain) -> c_int;
        safe fn virDomainGetConnect(&virDomain) -> Option<&virConnect>;
        safe fn virDomainGetName(&virDomain) -> Text;
        unsafe fn virDomainGetUUIDString(&virDomain, *mut c_char) -> c_int;
        safe fn virDomainGetID(&virDomain) -> c_uint;
        safe fn virDomainLookupByUUIDString(&virConnect, Text) -> *mut virDomain;
        safe fn virDomainGetXMLDesc(&virDomain, c_uint) -> Malloced;
        safe fn virDomainGetState(
            &virDomain,
            Option<&mut c_int>,
            Option<&mut c_int>,
            c_uint,
        ) -> c_int;
        safe fn virDomainGetBlockInfo(&virDomain, Text, &mut virDomainBlockInfo, c_uint) -> c_int;
        safe fn virDomainBlockResize(&virDomain, Text, c_ulonglong, c_uint) -> c_int;
        safe fn virDomainGetJobInfo(&virDomain, &mut virDomainJobInfo) -> c_int;
        safe fn virDomainIsActive(&virDomain) -> c_int;
        safe fn virDomainIsPersistent(&virDomain) -> c_int;
        safe fn virDomainGetAutostart(&virDomain, &mut c_int) -> c_int;
        safe fn virDomainSetAutostart(&virDomain, c_int) -> c_int;
        safe fn virDomainSuspend(&virDomain) -> c_int;
        safe fn virDomainResume(&virDomain) -> c_int;
        safe fn virDomainDestroyFlags(&virDomain, c_uint) -> c_int;
        safe fn virDomainDefineXMLFlags(&virConnect, Text, c_uint) -> *mut virDomain;
        safe fn virDomainUndefineFlags(&virDomain, c_uint) -> c_int;
        safe fn virDomainHasManagedSaveImage(&virDomain, c_uint) -> c_int;
        safe fn virDomainSaveImageGetXMLDesc(&virConnect, Text, c_uint) -> Malloced;
        safe fn virDomainRestoreFlags(&virConnect, Text, Text, c_uint) -> c_int;
        safe fn virDomainBlockCommit(&virDomain, Text, Text, Text, c_ulong, c_uint) -> c_int;
        safe fn virDomainBlockJobAbort(&virDomain, Text, c_uint) -> c_int;
        safe fn virDomainGetBlockJobInfo(
            &virDomain,
            Text,
            &mut virDomainBlockJobInfo,
            c_uint,
        ) -> c_int;
        safe fn virDomainListAllSnapshots(
            &virDomain,
            &mut *mut *mut virDomainSnapshot,
            c_uint,
        ) -> c_int;
        safe fn virDomainSnapshotCreateXML(Option<&virDomain>, Text, c_uint) -> *mut virDomainSnapshot;
        safe fn virDomainSnapshotGetXMLDesc(&virDomainSnapshot, c_uint) -> Malloced;
        safe fn virDomainSnapshotLookupByName(&virDomain, Text, c_uint) -> *mut virDomainSnapshot;
        safe fn virDomainHasCurrentSnapshot(&virDomain, c_uint) -> c_int;
        safe fn virDomainSnapshotCurrent(&virDomain, c_uint) -> *mut virDomainSnapshot;
        safe fn virDomainSnapshotGetParent(&virDomainSnapshot, c_uint) -> *mut virDomainSnapshot;
        safe fn virDomainSnapshotListAllChildren(
            &virDomainSnapshot,
            &mut *mut *mut virDomainSnapshot,
            c_uint,
        ) -> c_int;
        safe fn virDomainSnapshotIsCurrent(&virDomainSnapshot, c_uint) -> c_int;
        safe fn virDomainSnapshotGetName(&virDomainSnapshot) -> Text;
        safe fn virDomainSnapshotGetDomain(&virDomainSnapshot) -> Option<&virDomain>;
        safe fn virDomainSnapshotRef(&virDomainSnapshot) -> c_int;
        unsafe fn virDomainSnapshotFree(*mut virDomainSnapshot) -> c_int;
        safe fn virDomainRevertToSnapshot(&virDomainSnapshot, c_uint) -> c_int;
        safe fn virDomainSnapshotDelete(&virDomainSnapshot, c_uint) -> c_int;
        unsafe fn virDomainQemuMonitorCommandWithFiles(
            &virDomain,
            Text,
            c_uint,
            *mut c_int,
            Option<&mut c_uint>,
            Option<&mut *mut c_int>,
            &mut Malloced,
            c_uint,
        ) -> c_int;
    }

    // libvirt's private functions, which may be missing.
    optional {
        // Makes an error the thread's last one.
        safe fn virSetError(&mut virError) -> c_int;
        // Makes an object for the snapshot of this name.
        safe fn virGetDomainSnapshot(&virDomain, Text) -> *mut virDomainSnapshot;
    }
}

fn unusable(reason: String) -> Error {
    Error::new(
        Code::OperationUnsupported,
        format!("libvirt 8.2 or later is needed on this machine: {reason}"),
    )
}

/// The table. It is made at the first call that finds libvirt, and kept.
pub fn table() -> Result<&'static Table> {
    static TABLE: OnceCell<Table> = OnceCell::new();
    TABLE.get_or_try_init(|| {
        let open = |name| Library::open(name).map_err(unusable);
        let libraries = [open(c"libvirt.so.0")?, open(c"libvirt-qemu.so.0")?];
        let address = |name| {
            let found = libraries.map(|library| library.find(name));
            found.into_iter().find(|found| !found.is_null()).unwrap_or(ptr::null_mut())
        };
        let table =
            Table::find(address).map_err(|missing| unusable(format!("it has no {missing}()")))?;
        // Opening a connection initialises libvirt too. But before that, libvirt would keep its
        // errors in memory that is not its own.
        match (table.virInitialize)() {
            0 => Ok(table),
            _ => Err(unusable("its initialisation failed".into())),
        }
    })
}
