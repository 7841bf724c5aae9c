//! libvirt, as its clients see it: the public functions that we need, safe to call.
//!
//! Nothing here knows what a snapshot of ours is. Objects are counted references, as libvirt's own, and can be used by
//! several threads at once, as libvirt's own. Every call blocks until libvirt answers, which can take as long as another
//! client's job on the domain.

pub mod daemon;
mod error;
#[allow(missing_docs, non_camel_case_types)]
pub mod table;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

pub use error::{VirError, set_last};
use table::{
    Table, virConnect, virDomain, virDomainBlockInfo, virDomainBlockJobInfo, virDomainJobInfo, virDomainSnapshot,
};

use crate::error::{Code, Result};

/// What calls of libvirt return.
pub type VirResult<T> = std::result::Result<T, VirError>;

/// `virDomainXMLFlags`.
pub mod xml {
    /// With passwords.
    pub const SECURE: u32 = 1 << 0;
    /// What the next start will be like.
    pub const INACTIVE: u32 = 1 << 1;
    /// Fit to be started elsewhere.
    pub const MIGRATABLE: u32 = 1 << 3;
}

/// `virDomainState`s that we tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// It is paused.
    Paused,
    /// It is not there, or shut off.
    Off,
    /// `virDomainState`, whatever it is.
    Other(i32),
}

/// `virDomainBlockCommitFlags` and the like.
pub mod block {
    /// Into the next image only.
    pub const COMMIT_SHALLOW: u32 = 1 << 0;
    /// Removes the files that were merged.
    pub const COMMIT_DELETE: u32 = 1 << 1;
    /// The active image.
    pub const COMMIT_ACTIVE: u32 = 1 << 2;
    /// Does not wait.
    pub const ABORT_ASYNC: u32 = 1 << 0;
    /// Goes on with the base.
    pub const ABORT_PIVOT: u32 = 1 << 1;
}

/// `virDomainSaveRestoreFlags`.
pub mod restore {
    /// It runs afterwards.
    pub const RUNNING: u32 = 1 << 1;
    /// It is paused afterwards.
    pub const PAUSED: u32 = 1 << 2;
    /// UEFI variables from their template. libvirt >= 8.1.
    pub const RESET_NVRAM: u32 = 1 << 4;
}

/// `virDomainUndefineFlagsValues`.
pub mod undefine {
    /// UEFI variables stay.
    pub const KEEP_NVRAM: u32 = 1 << 3;
    /// The TPM's state stays. libvirt >= 8.9.
    pub const KEEP_TPM: u32 = 1 << 6;
}

/// `virDomainSnapshotListFlags`.
pub mod list {
    /// Children's children too.
    pub const DESCENDANTS: u32 = 1 << 0;
    /// A parent before its children. libvirt >= 5.2.
    pub const TOPOLOGICAL: u32 = 1 << 10;
}

/// Any string that libvirt allocated.
fn take_string(pointer: *mut c_char) -> String {
    // SAFETY: libvirt returned a NUL-terminated string from malloc, which is ours now.
    unsafe {
        let text = CStr::from_ptr(pointer).to_string_lossy().into_owned();
        libc::free(pointer.cast());
        text
    }
}

fn c_text(text: &str) -> VirResult<CString> {
    CString::new(text)
        .map_err(|_| VirError { code: Code::InvalidArg as i32, message: "a string holds a NUL character".into() })
}

macro_rules! reference {
    ($(#[$doc:meta])* $name:ident($raw:ty), $reference:ident, $free:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            table: &'static Table,
            pointer: NonNull<$raw>,
        }

        // SAFETY: libvirt's objects are counted with atomic counters, and their functions may be called by any threads at
        // once; libvirt keeps errors by thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl $name {
            /// Another reference to somebody's object.
            ///
            /// # Safety
            #[doc = concat!("`pointer` is a live `", stringify!($raw), " *`.")]
            pub unsafe fn share(table: &'static Table, pointer: NonNull<$raw>) -> VirResult<$name> {
                // SAFETY: by the caller's promise.
                if unsafe { (table.$reference)(pointer.as_ptr()) } != 0 {
                    return Err(VirError::last(table));
                }
                Ok($name { table, pointer })
            }

            /// Takes over what a function of libvirt returned.
            fn take(table: &'static Table, pointer: *mut $raw) -> VirResult<$name> {
                let pointer = NonNull::new(pointer).ok_or_else(|| VirError::last(table))?;
                Ok($name { table, pointer })
            }

            /// The object, for as long as this reference lives.
            pub fn as_ptr(&self) -> *mut $raw {
                self.pointer.as_ptr()
            }

            /// The object, with this reference.
            pub fn into_raw(self) -> *mut $raw {
                std::mem::ManuallyDrop::new(self).pointer.as_ptr()
            }

            /// libvirt's word for failure made an error.
            fn done(&self, result: c_int) -> VirResult<c_int> {
                if result < 0 { Err(VirError::last(self.table)) } else { Ok(result) }
            }

            fn string(&self, pointer: *mut c_char) -> VirResult<String> {
                if pointer.is_null() { Err(VirError::last(self.table)) } else { Ok(take_string(pointer)) }
            }
        }

        impl Clone for $name {
            fn clone(&self) -> $name {
                // SAFETY: the object lives as long as this reference; counting one more cannot fail then.
                unsafe { (self.table.$reference)(self.as_ptr()) };
                $name { table: self.table, pointer: self.pointer }
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: this reference is ours, and used no more.
                unsafe { (self.table.$free)(self.as_ptr()) };
            }
        }
    };
}

reference! {
    /// A connection.
    Connect(virConnect), virConnectRef, virConnectClose
}
reference! {
    /// A domain.
    Domain(virDomain), virDomainRef, virDomainFree
}
reference! {
    /// A snapshot.
    Snapshot(virDomainSnapshot), virDomainSnapshotRef, virDomainSnapshotFree
}

impl Connect {
    /// Opens a connection without asking anybody for anything.
    pub fn open(uri: &str) -> Result<VirResult<Connect>> {
        let table = table::table()?;
        let open = || {
            let uri = c_text(uri)?;
            // SAFETY: a NUL-terminated string.
            Connect::take(table, unsafe { (table.virConnectOpen)(uri.as_ptr()) })
        };
        Ok(open())
    }

    /// Its URI.
    pub fn uri(&self) -> VirResult<String> {
        // SAFETY: a live connection.
        self.string(unsafe { (self.table.virConnectGetURI)(self.as_ptr()) })
    }

    /// The driver's name: `QEMU`.
    pub fn driver(&self) -> VirResult<String> {
        // SAFETY: a live connection; the string is static.
        let name = unsafe { (self.table.virConnectGetType)(self.as_ptr()) };
        if name.is_null() {
            return Err(VirError::last(self.table));
        }
        // SAFETY: NUL-terminated and static.
        Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    /// The daemon's libvirt: major, minor, release.
    pub fn version(&self) -> VirResult<(u64, u64, u64)> {
        let mut version: c_ulong = 0;
        // SAFETY: a live connection and storage for the result.
        self.done(unsafe { (self.table.virConnectGetLibVersion)(self.as_ptr(), &raw mut version) })?;
        Ok((version / 1_000_000, version / 1000 % 1000, version % 1000))
    }

    /// Whether the daemon is still at its other end, as far as this side has noticed.
    pub fn is_alive(&self) -> bool {
        // SAFETY: a live connection.
        unsafe { (self.table.virConnectIsAlive)(self.as_ptr()) == 1 }
    }

    /// The domain of this UUID.
    pub fn domain(&self, uuid: &str) -> VirResult<Domain> {
        let uuid = c_text(uuid)?;
        // SAFETY: a live connection and a NUL-terminated string.
        Domain::take(self.table, unsafe { (self.table.virDomainLookupByUUIDString)(self.as_ptr(), uuid.as_ptr()) })
    }

    /// Defines a persistent domain, or changes its definition.
    pub fn define(&self, xml: &str, flags: u32) -> VirResult<Domain> {
        let xml = c_text(xml)?;
        // SAFETY: a live connection and a NUL-terminated string.
        Domain::take(self.table, unsafe {
            (self.table.virDomainDefineXMLFlags)(self.as_ptr(), xml.as_ptr(), flags as c_uint)
        })
    }

    /// All its domains that the caller may see.
    pub fn domains(&self) -> VirResult<Vec<Domain>> {
        let mut array: *mut *mut virDomain = ptr::null_mut();
        // SAFETY: a live connection and storage for the array.
        let count = self.done(unsafe { (self.table.virConnectListAllDomains)(self.as_ptr(), &raw mut array, 0) })?;
        // SAFETY: libvirt returned an array of `count` objects and a NULL, from malloc; it and each of
        // them is ours now.
        unsafe {
            let taken =
                (0..count as usize).filter_map(|n| Domain::take(self.table, array.add(n).read()).ok()).collect();
            libc::free(array.cast());
            Ok(taken)
        }
    }

    /// The domain XML in a memory image; [`xml::SECURE`] is allowed.
    pub fn saved_xml(&self, image: &str, flags: u32) -> VirResult<String> {
        let image = c_text(image)?;
        // SAFETY: a live connection and a NUL-terminated string.
        self.string(unsafe {
            (self.table.virDomainSaveImageGetXMLDesc)(self.as_ptr(), image.as_ptr(), flags as c_uint)
        })
    }

    /// Starts a domain from a memory image.
    pub fn restore(&self, image: &str, xml: Option<&str>, flags: u32) -> VirResult<()> {
        let image = c_text(image)?;
        let xml = xml.map(c_text).transpose()?;
        let xml = xml.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
        // SAFETY: a live connection and NUL-terminated strings, of which the second may be NULL.
        self.done(unsafe { (self.table.virDomainRestoreFlags)(self.as_ptr(), image.as_ptr(), xml, flags as c_uint) })?;
        Ok(())
    }
}

impl Domain {
    /// Its connection.
    pub fn connect(&self) -> VirResult<Connect> {
        // SAFETY: a live domain; the connection lives as long as it does, and is counted once more for us.
        unsafe {
            let connect = (self.table.virDomainGetConnect)(self.as_ptr());
            let connect = NonNull::new(connect).ok_or_else(|| VirError::last(self.table))?;
            Connect::share(self.table, connect)
        }
    }

    /// Its name.
    pub fn name(&self) -> VirResult<String> {
        // SAFETY: a live domain; the string is its own.
        let name = unsafe { (self.table.virDomainGetName)(self.as_ptr()) };
        if name.is_null() {
            return Err(VirError::last(self.table));
        }
        // SAFETY: NUL-terminated, and the domain's.
        Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    /// Its UUID.
    pub fn uuid(&self) -> VirResult<String> {
        const BUFFER: usize = 37;
        let mut buffer = [0u8; BUFFER];
        // SAFETY: a live domain, and as much room as VIR_UUID_STRING_BUFLEN.
        self.done(unsafe { (self.table.virDomainGetUUIDString)(self.as_ptr(), buffer.as_mut_ptr().cast()) })?;
        let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }

    /// Its XML.
    pub fn xml(&self, flags: u32) -> VirResult<String> {
        // SAFETY: a live domain.
        self.string(unsafe { (self.table.virDomainGetXMLDesc)(self.as_ptr(), flags as c_uint) })
    }

    /// Its state, as libvirt knows it.
    pub fn state(&self) -> VirResult<State> {
        let mut state: c_int = 0;
        // SAFETY: a live domain and storage for the state; the reason may be NULL.
        self.done(unsafe { (self.table.virDomainGetState)(self.as_ptr(), &raw mut state, ptr::null_mut(), 0) })?;
        Ok(match state {
            1 => State::Running,
            3 => State::Paused,
            5 => State::Off,
            other => State::Other(other),
        })
    }

    /// Whether it is off because it was saved, or went to another machine: it goes on from there.
    pub fn is_saved_or_gone(&self) -> VirResult<bool> {
        const SHUT_OFF: c_int = 5;
        const MIGRATED: c_int = 4;
        const SAVED: c_int = 5;
        let (mut state, mut reason): (c_int, c_int) = (0, 0);
        // SAFETY: a live domain and storage for both.
        self.done(unsafe { (self.table.virDomainGetState)(self.as_ptr(), &raw mut state, &raw mut reason, 0) })?;
        Ok(state == SHUT_OFF && matches!(reason, MIGRATED | SAVED))
    }

    /// Whether a QEMU runs for it.
    pub fn is_active(&self) -> VirResult<bool> {
        // SAFETY: a live domain.
        Ok(self.done(unsafe { (self.table.virDomainIsActive)(self.as_ptr()) })? == 1)
    }

    /// Whether it is defined, and stays when its QEMU ends.
    pub fn is_persistent(&self) -> VirResult<bool> {
        // SAFETY: a live domain.
        Ok(self.done(unsafe { (self.table.virDomainIsPersistent)(self.as_ptr()) })? == 1)
    }

    /// Whether the caller may change it, as far as libvirt asks an access driver about him: where he may, he can give it whatever
    /// file there is as a disk. Asked by a change that changes nothing.
    pub fn may_be_changed(&self) -> bool {
        let mut autostart = 0;
        // SAFETY: a live domain, and storage for the number.
        let got = self.done(unsafe { (self.table.virDomainGetAutostart)(self.as_ptr(), &raw mut autostart) });
        // SAFETY: a live domain.
        let set = || self.done(unsafe { (self.table.virDomainSetAutostart)(self.as_ptr(), autostart) });
        match got.and_then(|_| set()) {
            Ok(_) => true,
            // After it was allowed: a transient domain is not started by itself.
            Err(error) => error.is(Code::OperationInvalid),
        }
    }

    /// Pauses it.
    pub fn suspend(&self) -> VirResult<()> {
        // SAFETY: a live domain.
        self.done(unsafe { (self.table.virDomainSuspend)(self.as_ptr()) }).map(drop)
    }

    /// Resumes it.
    pub fn resume(&self) -> VirResult<()> {
        // SAFETY: a live domain.
        self.done(unsafe { (self.table.virDomainResume)(self.as_ptr()) }).map(drop)
    }

    /// Ends its QEMU.
    pub fn destroy(&self) -> VirResult<()> {
        // SAFETY: a live domain.
        self.done(unsafe { (self.table.virDomainDestroyFlags)(self.as_ptr(), 0) }).map(drop)
    }

    /// Makes a persistent domain transient, or forgets it.
    pub fn undefine(&self, flags: u32) -> VirResult<()> {
        // SAFETY: a live domain.
        self.done(unsafe { (self.table.virDomainUndefineFlags)(self.as_ptr(), flags as c_uint) }).map(drop)
    }

    /// Whether its next start resumes a memory image of libvirt's own.
    pub fn has_managed_save(&self) -> VirResult<bool> {
        // SAFETY: a live domain.
        Ok(self.done(unsafe { (self.table.virDomainHasManagedSaveImage)(self.as_ptr(), 0) })? == 1)
    }

    /// Runs one QMP command, a descriptor going with it; QEMU's reply, whole.
    pub fn monitor_command(&self, command: &str, fd: Option<BorrowedFd>) -> VirResult<String> {
        let command = c_text(command)?;
        let mut fds: Vec<c_int> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let mut reply: *mut c_char = ptr::null_mut();
        // SAFETY: a live domain, a NUL-terminated string, as many open descriptors as are counted, no room for descriptors
        // in return (allowed to be NULL), and storage for the reply.
        let result = unsafe {
            (self.table.virDomainQemuMonitorCommandWithFiles)(
                self.as_ptr(),
                command.as_ptr(),
                fds.len() as c_uint,
                if fds.is_empty() { ptr::null_mut() } else { fds.as_mut_ptr() },
                ptr::null_mut(),
                ptr::null_mut(),
                &raw mut reply,
                0,
            )
        };
        self.done(result)?;
        self.string(reply)
    }

    /// How large a disk is for the guest, in bytes.
    pub fn disk_size(&self, disk: &str) -> VirResult<u64> {
        let disk = c_text(disk)?;
        let mut info = virDomainBlockInfo::default();
        // SAFETY: a live domain, a NUL-terminated string and storage for the result.
        self.done(unsafe { (self.table.virDomainGetBlockInfo)(self.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
        Ok(info.capacity)
    }

    /// Gives a disk this size, in bytes.
    pub fn resize_disk(&self, disk: &str, size: u64) -> VirResult<()> {
        const BYTES: c_uint = 1;
        let disk = c_text(disk)?;
        // SAFETY: a live domain and a NUL-terminated string.
        self.done(unsafe { (self.table.virDomainBlockResize)(self.as_ptr(), disk.as_ptr(), size, BYTES) }).map(drop)
    }

    /// Its number while it is active.
    pub fn id(&self) -> Option<u32> {
        // SAFETY: a live domain.
        let id = unsafe { (self.table.virDomainGetID)(self.as_ptr()) };
        (id != c_uint::MAX).then_some(id)
    }

    /// Starts to merge images of a disk; `None` is the bottom, or the top.
    pub fn block_commit(&self, disk: &str, base: Option<&str>, top: Option<&str>, flags: u32) -> VirResult<()> {
        let disk = c_text(disk)?;
        let base = base.map(c_text).transpose()?;
        let top = top.map(c_text).transpose()?;
        let pointer = |text: &Option<CString>| text.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        // SAFETY: a live domain and NUL-terminated strings, of which two may be NULL.
        self.done(unsafe {
            (self.table.virDomainBlockCommit)(
                self.as_ptr(),
                disk.as_ptr(),
                pointer(&base),
                pointer(&top),
                0,
                flags as c_uint,
            )
        })
        .map(drop)
    }

    /// Ends a disk's block job.
    pub fn block_job_abort(&self, disk: &str, flags: u32) -> VirResult<()> {
        let disk = c_text(disk)?;
        // SAFETY: a live domain and a NUL-terminated string.
        self.done(unsafe { (self.table.virDomainBlockJobAbort)(self.as_ptr(), disk.as_ptr(), flags as c_uint) })
            .map(drop)
    }

    /// A disk's block job: how much is done, of how much; `None` where there is none.
    pub fn block_job(&self, disk: &str) -> VirResult<Option<(u64, u64)>> {
        let disk = c_text(disk)?;
        let mut info = virDomainBlockJobInfo::default();
        // SAFETY: a live domain, a NUL-terminated string and storage for the result.
        let found = self
            .done(unsafe { (self.table.virDomainGetBlockJobInfo)(self.as_ptr(), disk.as_ptr(), &raw mut info, 0) })?;
        Ok((found == 1).then_some((info.cur, info.end)))
    }

    /// Whether it has a job under way that takes its time: a backup, a dump, a migration.
    pub fn has_job(&self) -> VirResult<bool> {
        const BOUNDED: c_int = 1;
        const UNBOUNDED: c_int = 2;
        let mut info = virDomainJobInfo::default();
        // SAFETY: a live domain and storage for the result.
        self.done(unsafe { (self.table.virDomainGetJobInfo)(self.as_ptr(), &raw mut info) })?;
        Ok(matches!(info.kind, BOUNDED | UNBOUNDED))
    }

    /// Takes a snapshot, or records one.
    pub fn create_snapshot(&self, xml: &str, flags: u32) -> VirResult<Snapshot> {
        let xml = c_text(xml)?;
        // SAFETY: a live domain and a NUL-terminated string.
        Snapshot::take(self.table, unsafe {
            (self.table.virDomainSnapshotCreateXML)(self.as_ptr(), xml.as_ptr(), flags as c_uint)
        })
    }

    /// An object for a snapshot of this name, of which libvirt need not know.
    pub fn snapshot_object(&self, name: &str) -> VirResult<Snapshot> {
        let name = c_text(name)?;
        let Some(get) = self.table.virGetDomainSnapshot else {
            let message = "this libvirt makes no objects for snapshots without metadata".into();
            return Err(VirError { code: Code::OperationUnsupported as i32, message });
        };
        // SAFETY: a live domain and a NUL-terminated string.
        Snapshot::take(self.table, unsafe { get(self.as_ptr(), name.as_ptr()) })
    }

    /// The snapshot of this name. Where there is none, libvirt's error may reach the application's log: [`Domain::find`].
    pub fn snapshot(&self, name: &str) -> VirResult<Snapshot> {
        let name = c_text(name)?;
        // SAFETY: a live domain and a NUL-terminated string.
        Snapshot::take(self.table, unsafe {
            (self.table.virDomainSnapshotLookupByName)(self.as_ptr(), name.as_ptr(), 0)
        })
    }

    /// All snapshots, parents first.
    pub fn snapshots(&self) -> VirResult<Vec<Snapshot>> {
        let mut array: *mut *mut virDomainSnapshot = ptr::null_mut();
        // SAFETY: a live domain and storage for the array.
        let count = self.done(unsafe {
            (self.table.virDomainListAllSnapshots)(self.as_ptr(), &raw mut array, list::TOPOLOGICAL as c_uint)
        })?;
        Ok(take_snapshots(self.table, array, count))
    }

    /// The snapshot of this name, if there is one.
    pub fn find(&self, name: &str) -> VirResult<Option<Snapshot>> {
        Ok(self.snapshots()?.into_iter().find(|snapshot| snapshot.name() == name))
    }

    /// The current snapshot, if there is one.
    pub fn current_snapshot(&self) -> VirResult<Option<Snapshot>> {
        // SAFETY: a live domain.
        if self.done(unsafe { (self.table.virDomainHasCurrentSnapshot)(self.as_ptr(), 0) })? != 1 {
            return Ok(None);
        }
        // SAFETY: a live domain.
        Snapshot::take(self.table, unsafe { (self.table.virDomainSnapshotCurrent)(self.as_ptr(), 0) }).map(Some)
    }
}

fn take_snapshots(table: &'static Table, array: *mut *mut virDomainSnapshot, count: c_int) -> Vec<Snapshot> {
    // SAFETY: libvirt returned an array of `count` objects and a NULL, from malloc; it and each of them is ours now.
    unsafe {
        let taken = (0..count as usize).filter_map(|n| Snapshot::take(table, array.add(n).read()).ok()).collect();
        libc::free(array.cast());
        taken
    }
}

impl Snapshot {
    /// Its name.
    pub fn name(&self) -> String {
        // SAFETY: a live snapshot; the string is its own, and never NULL for one.
        unsafe {
            let name = (self.table.virDomainSnapshotGetName)(self.as_ptr());
            if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
        }
    }

    /// Its domain.
    pub fn domain(&self) -> VirResult<Domain> {
        // SAFETY: a live snapshot; its domain lives as long as it does, and is counted once more for us.
        unsafe {
            let domain = (self.table.virDomainSnapshotGetDomain)(self.as_ptr());
            let domain = NonNull::new(domain).ok_or_else(|| VirError::last(self.table))?;
            Domain::share(self.table, domain)
        }
    }

    /// Its XML; [`xml::SECURE`] is allowed.
    pub fn xml(&self, flags: u32) -> VirResult<String> {
        // SAFETY: a live snapshot.
        self.string(unsafe { (self.table.virDomainSnapshotGetXMLDesc)(self.as_ptr(), flags as c_uint) })
    }

    /// Its children; with [`list::DESCENDANTS`] all that come after it, parents first.
    pub fn children(&self, flags: u32) -> VirResult<Vec<Snapshot>> {
        let flags = flags | list::TOPOLOGICAL;
        let mut array: *mut *mut virDomainSnapshot = ptr::null_mut();
        // SAFETY: a live snapshot and storage for the array.
        let count = self.done(unsafe {
            (self.table.virDomainSnapshotListAllChildren)(self.as_ptr(), &raw mut array, flags as c_uint)
        })?;
        Ok(take_snapshots(self.table, array, count))
    }

    /// Whether it is the domain's current one.
    pub fn is_current(&self) -> VirResult<bool> {
        // SAFETY: a live snapshot.
        Ok(self.done(unsafe { (self.table.virDomainSnapshotIsCurrent)(self.as_ptr(), 0) })? == 1)
    }

    /// libvirt's own revert.
    pub fn revert(&self, flags: u32) -> VirResult<()> {
        // SAFETY: a live snapshot.
        self.done(unsafe { (self.table.virDomainRevertToSnapshot)(self.as_ptr(), flags as c_uint) }).map(drop)
    }

    /// libvirt's own delete.
    pub fn delete(&self, flags: u32) -> VirResult<()> {
        // SAFETY: a live snapshot.
        self.done(unsafe { (self.table.virDomainSnapshotDelete)(self.as_ptr(), flags as c_uint) }).map(drop)
    }
}

/// Forgets this thread's last error in libvirt.
pub fn reset_last_error(table: &Table) {
    // SAFETY: no arguments, this thread's error only.
    unsafe { (table.virResetLastError)() }
}
