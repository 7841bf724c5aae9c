// SPDX-License-Identifier: LGPL-2.1-or-later

//! Safe wrappers of libvirt's public functions, as far as they are needed.
//!
//! Nothing here depends on how this library takes snapshots. Objects are counted references like
//! libvirt's own, and like those they can be used by several threads at once. Every call blocks
//! until libvirt answers, which can take as long as another client's job on the domain.

pub mod daemon;
pub mod driver;
mod error;
#[allow(missing_docs, non_camel_case_types)]
pub mod table;

use std::ffi::{CStr, CString, c_int, c_uint, c_ulong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

pub use error::{VirError, set_last};
use table::{
    Table, virConnect, virDomain, virDomainBlockInfo, virDomainBlockJobInfo, virDomainJobInfo,
    virDomainSnapshot, virError,
};

use crate::error::{Code, Result};
use crate::model::flags::{CURRENT, REDEFINE};
use crate::pointers::{Malloced, Text};

/// The result of a call of libvirt.
pub type VirResult<T> = std::result::Result<T, VirError>;

/// The first libvirt that restores memory images that are compressed by zstd.
pub const RESTORES_ZSTD: (u64, u64, u64) = (10, 4, 0);

/// The first libvirt that restores sparse memory images.
pub const RESTORES_SPARSE: (u64, u64, u64) = (11, 2, 0);

/// `virDomainXMLFlags`.
pub mod xml {
    /// The XML includes passwords.
    pub const SECURE: u32 = 1 << 0;
    /// The definition for the next start.
    pub const INACTIVE: u32 = 1 << 1;
    /// The XML can be used on another host.
    pub const MIGRATABLE: u32 = 1 << 3;
}

/// The `virDomainState`s that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The domain runs.
    Running,
    /// The domain is paused.
    Paused,
    /// The domain is shut off.
    Off,
    /// Any other `virDomainState`.
    Other(i32),
}

/// `virDomainBlockCommitFlags` and the like.
pub mod block {
    /// Merges into the next image only.
    pub const COMMIT_SHALLOW: u32 = 1 << 0;
    /// Removes the files that were merged.
    pub const COMMIT_DELETE: u32 = 1 << 1;
    /// Allows to merge the active image.
    pub const COMMIT_ACTIVE: u32 = 1 << 2;
    /// Does not wait for the job's end.
    pub const ABORT_ASYNC: u32 = 1 << 0;
    /// Makes the domain continue with the base.
    pub const ABORT_PIVOT: u32 = 1 << 1;
}

/// `virDomainSaveRestoreFlags`.
pub mod restore {
    /// The domain runs afterwards.
    pub const RUNNING: u32 = 1 << 1;
    /// The domain is paused afterwards.
    pub const PAUSED: u32 = 1 << 2;
    /// Resets the UEFI variables to their template. libvirt >= 8.1.
    pub const RESET_NVRAM: u32 = 1 << 4;
}

/// `virDomainUndefineFlagsValues`.
pub mod undefine {
    /// Keeps the UEFI variables.
    pub const KEEP_NVRAM: u32 = 1 << 3;
    /// Keeps the TPM's state. libvirt >= 8.9.
    pub const KEEP_TPM: u32 = 1 << 6;
}

/// `virDomainSnapshotListFlags`.
pub mod list {
    /// Includes the children's descendants.
    pub const DESCENDANTS: u32 = 1 << 0;
    /// Lists a parent before its children. libvirt >= 5.2.
    pub const TOPOLOGICAL: u32 = 1 << 10;
}

/// The objects that a function of libvirt lists. `list` calls it: it stores an array of objects,
/// and returns their number.
fn listed<T, O>(
    table: &'static Table,
    list: impl FnOnce(&mut *mut *mut T) -> c_int,
    take: fn(&'static Table, *mut T) -> VirResult<O>,
) -> VirResult<Vec<O>> {
    let mut array = ptr::null_mut();
    let count = usize::try_from(list(&mut array)).map_err(|_| VirError::last(table))?;
    // SAFETY: libvirt returned an array of `count` objects and a NULL, from malloc; it and each of
    // them is ours now.
    unsafe {
        let taken = (0..count).filter_map(|n| take(table, array.add(n).read()).ok()).collect();
        libc::free(array.cast());
        Ok(taken)
    }
}

fn c_text(text: &str) -> VirResult<CString> {
    CString::new(text).map_err(|_| VirError {
        code: Code::InvalidArg as i32,
        message: "a string holds a NUL character".into(),
    })
}

macro_rules! reference {
    ($(#[$doc:meta])* $name:ident($raw:ty), $reference:ident, $free:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            table: &'static Table,
            pointer: NonNull<$raw>,
        }

        // SAFETY: libvirt's objects are counted with atomic counters, and their functions may be
        // called by any threads at once; libvirt keeps errors by thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl $name {
            /// Adds a reference to an object.
            pub fn share(table: &'static Table, object: &$raw) -> VirResult<$name> {
                if (table.$reference)(object) != 0 {
                    return Err(VirError::last(table));
                }
                Ok($name { table, pointer: NonNull::from(object) })
            }

            /// The object, which lives as long as this reference.
            fn raw(&self) -> &$raw {
                // SAFETY: a live object of libvirt's, whose type is opaque here.
                unsafe { self.pointer.as_ref() }
            }

            /// Takes over the object that a function of libvirt returned; NULL is an error.
            pub(crate) fn take(table: &'static Table, pointer: *mut $raw) -> VirResult<$name> {
                let pointer = NonNull::new(pointer).ok_or_else(|| VirError::last(table))?;
                Ok($name { table, pointer })
            }

            /// Takes over an object from C, with its reference.
            ///
            /// # Safety
            /// `pointer` is NULL, or an object of libvirt's with a reference that the caller gives
            /// up.
            pub unsafe fn from_raw(
                table: &'static Table,
                pointer: *mut $raw,
            ) -> VirResult<$name> {
                $name::take(table, pointer)
            }

            /// The object, which lives as long as this reference.
            pub fn as_ptr(&self) -> *mut $raw {
                self.pointer.as_ptr()
            }

            /// The object, with this reference.
            pub fn into_raw(self) -> *mut $raw {
                std::mem::ManuallyDrop::new(self).pointer.as_ptr()
            }

            /// Turns libvirt's negative result into an error.
            fn done(&self, result: c_int) -> VirResult<c_int> {
                if result < 0 { Err(VirError::last(self.table)) } else { Ok(result) }
            }

            fn string(&self, string: Malloced) -> VirResult<String> {
                let text = string.get().map(|text| text.to_string_lossy().into_owned());
                text.ok_or_else(|| VirError::last(self.table))
            }
        }

        impl Clone for $name {
            fn clone(&self) -> $name {
                // This cannot fail for a live object.
                (self.table.$reference)(self.raw());
                $name { table: self.table, pointer: self.pointer }
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: this reference is ours, and not used any more.
                unsafe { (self.table.$free)(self.pointer.as_ptr()) };
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
    /// Opens a connection that asks for no credentials.
    pub fn open(uri: &str) -> Result<VirResult<Connect>> {
        Connect::open_by(Some(uri), |table| table.virConnectOpen)
    }

    /// Opens the connection that libvirt chooses: by the environment, by its clients'
    /// configuration, or by what it finds. It asks for no credentials.
    pub fn open_default() -> Result<VirResult<Connect>> {
        Connect::open_by(None, |table| table.virConnectOpen)
    }

    /// Opens a read-only connection, for which libvirt asks nobody for permission.
    pub fn open_read_only(uri: &str) -> Result<VirResult<Connect>> {
        Connect::open_by(Some(uri), |table| table.virConnectOpenReadOnly)
    }

    fn open_by(
        uri: Option<&str>,
        function: impl FnOnce(&Table) -> extern "C" fn(Text) -> *mut virConnect,
    ) -> Result<VirResult<Connect>> {
        let table = table::table()?;
        let open = || {
            let uri = uri.map(c_text).transpose()?;
            let uri = uri.as_ref().map_or(Text::NULL, Text::from);
            Connect::take(table, function(table)(uri))
        };
        Ok(open())
    }

    /// Its URI.
    pub fn uri(&self) -> VirResult<String> {
        self.string((self.table.virConnectGetURI)(self.raw()))
    }

    /// The driver's name: `QEMU`.
    pub fn driver(&self) -> VirResult<String> {
        (self.table.virConnectGetType)(self.raw()).lossy().ok_or_else(|| VirError::last(self.table))
    }

    /// The version of the daemon's libvirt: major, minor, release.
    pub fn version(&self) -> VirResult<(u64, u64, u64)> {
        let mut version: c_ulong = 0;
        self.done((self.table.virConnectGetLibVersion)(self.raw(), Some(&mut version)))?;
        Ok((version / 1_000_000, version / 1000 % 1000, version % 1000))
    }

    /// Whether the connection to the daemon is alive, as far as this side has noticed.
    pub fn is_alive(&self) -> bool {
        (self.table.virConnectIsAlive)(self.raw()) == 1
    }

    /// The domain of this UUID.
    pub fn domain(&self, uuid: &str) -> VirResult<Domain> {
        let uuid = c_text(uuid)?;
        Domain::take(
            self.table,
            (self.table.virDomainLookupByUUIDString)(self.raw(), Text::from(&uuid)),
        )
    }

    /// Defines a persistent domain, or changes its definition.
    pub fn define(&self, xml: &str, flags: u32) -> VirResult<Domain> {
        let xml = c_text(xml)?;
        Domain::take(
            self.table,
            (self.table.virDomainDefineXMLFlags)(self.raw(), Text::from(&xml), flags as c_uint),
        )
    }

    /// All its domains that the caller may see.
    pub fn domains(&self) -> VirResult<Vec<Domain>> {
        listed(
            self.table,
            |array| (self.table.virConnectListAllDomains)(self.raw(), array, 0),
            Domain::take,
        )
    }

    /// The domain XML in a memory image; [`xml::SECURE`] is allowed.
    pub fn saved_xml(&self, image: &str, flags: u32) -> VirResult<String> {
        let image = c_text(image)?;
        self.string((self.table.virDomainSaveImageGetXMLDesc)(
            self.raw(),
            Text::from(&image),
            flags as c_uint,
        ))
    }

    /// Starts a domain from a memory image.
    pub fn restore(&self, image: &str, xml: Option<&str>, flags: u32) -> VirResult<()> {
        let image = c_text(image)?;
        let xml = xml.map(c_text).transpose()?;
        let xml = Text::from(xml.as_ref());
        self.done((self.table.virDomainRestoreFlags)(
            self.raw(),
            Text::from(&image),
            xml,
            flags as c_uint,
        ))?;
        Ok(())
    }
}

impl Domain {
    /// Its connection.
    pub fn connect(&self) -> VirResult<Connect> {
        let connect = (self.table.virDomainGetConnect)(self.raw())
            .ok_or_else(|| VirError::last(self.table))?;
        Connect::share(self.table, connect)
    }

    /// Its name.
    pub fn name(&self) -> VirResult<String> {
        (self.table.virDomainGetName)(self.raw()).lossy().ok_or_else(|| VirError::last(self.table))
    }

    /// Its UUID.
    pub fn uuid(&self) -> VirResult<String> {
        const BUFFER: usize = 37;
        let mut buffer = [0u8; BUFFER];
        // SAFETY: the buffer has VIR_UUID_STRING_BUFLEN bytes.
        self.done(unsafe {
            (self.table.virDomainGetUUIDString)(self.raw(), buffer.as_mut_ptr().cast())
        })?;
        let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }

    /// Its XML.
    pub fn xml(&self, flags: u32) -> VirResult<String> {
        self.string((self.table.virDomainGetXMLDesc)(self.raw(), flags as c_uint))
    }

    /// Its state, as libvirt knows it.
    pub fn state(&self) -> VirResult<State> {
        let mut state: c_int = 0;
        self.done((self.table.virDomainGetState)(self.raw(), Some(&mut state), None, 0))?;
        Ok(match state {
            1 => State::Running,
            3 => State::Paused,
            5 => State::Off,
            other => State::Other(other),
        })
    }

    /// Whether the domain is shut off because it was saved or migrated, so that it continues from
    /// there.
    pub fn is_saved_or_gone(&self) -> VirResult<bool> {
        const SHUT_OFF: c_int = 5;
        const MIGRATED: c_int = 4;
        const SAVED: c_int = 5;
        let (mut state, mut reason): (c_int, c_int) = (0, 0);
        self.done((self.table.virDomainGetState)(
            self.raw(),
            Some(&mut state),
            Some(&mut reason),
            0,
        ))?;
        Ok(state == SHUT_OFF && matches!(reason, MIGRATED | SAVED))
    }

    /// Whether it has a QEMU.
    pub fn is_active(&self) -> VirResult<bool> {
        Ok(self.done((self.table.virDomainIsActive)(self.raw()))? == 1)
    }

    /// Whether it is persistent: its definition stays when its QEMU ends.
    pub fn is_persistent(&self) -> VirResult<bool> {
        Ok(self.done((self.table.virDomainIsPersistent)(self.raw()))? == 1)
    }

    /// Whether the caller may change the domain, by libvirt's access driver: a caller that may can
    /// attach any file as a disk. It is found out by setting `autostart` to the value that it has.
    pub fn may_be_changed(&self) -> bool {
        let mut autostart = 0;
        let got = self.done((self.table.virDomainGetAutostart)(self.raw(), &mut autostart));
        let set = || self.done((self.table.virDomainSetAutostart)(self.raw(), autostart));
        match got.and_then(|_| set()) {
            Ok(_) => true,
            // The access was allowed, but a transient domain cannot be started automatically.
            Err(error) => error.is(Code::OperationInvalid),
        }
    }

    /// Pauses it.
    pub fn suspend(&self) -> VirResult<()> {
        self.done((self.table.virDomainSuspend)(self.raw())).map(drop)
    }

    /// Resumes it.
    pub fn resume(&self) -> VirResult<()> {
        self.done((self.table.virDomainResume)(self.raw())).map(drop)
    }

    /// Ends its QEMU.
    pub fn destroy(&self) -> VirResult<()> {
        self.done((self.table.virDomainDestroyFlags)(self.raw(), 0)).map(drop)
    }

    /// Makes an active persistent domain transient, or removes an inactive one.
    pub fn undefine(&self, flags: u32) -> VirResult<()> {
        self.done((self.table.virDomainUndefineFlags)(self.raw(), flags as c_uint)).map(drop)
    }

    /// Whether it has a managed save image, which its next start resumes.
    pub fn has_managed_save(&self) -> VirResult<bool> {
        Ok(self.done((self.table.virDomainHasManagedSaveImage)(self.raw(), 0))? == 1)
    }

    /// Runs one QMP command, which may have a descriptor. Returns QEMU's whole reply.
    pub fn monitor_command(&self, command: &str, fd: Option<BorrowedFd>) -> VirResult<String> {
        let command = c_text(command)?;
        let mut fds: Vec<c_int> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let mut reply = Malloced::NULL;
        // SAFETY: `fds` holds that number of open descriptors. The places for returned descriptors
        // may be NULL.
        let result = unsafe {
            (self.table.virDomainQemuMonitorCommandWithFiles)(
                self.raw(),
                Text::from(&command),
                fds.len() as c_uint,
                if fds.is_empty() { ptr::null_mut() } else { fds.as_mut_ptr() },
                None,
                None,
                &mut reply,
                0,
            )
        };
        self.done(result)?;
        self.string(reply)
    }

    /// The size that the guest sees of a disk, in bytes.
    pub fn disk_size(&self, disk: &str) -> VirResult<u64> {
        let disk = c_text(disk)?;
        let mut info = virDomainBlockInfo::default();
        self.done((self.table.virDomainGetBlockInfo)(self.raw(), Text::from(&disk), &mut info, 0))?;
        Ok(info.capacity)
    }

    /// Resizes a disk to this number of bytes.
    pub fn resize_disk(&self, disk: &str, size: u64) -> VirResult<()> {
        const BYTES: c_uint = 1;
        let disk = c_text(disk)?;
        self.done((self.table.virDomainBlockResize)(self.raw(), Text::from(&disk), size, BYTES))
            .map(drop)
    }

    /// Its id; none if it is not active.
    pub fn id(&self) -> Option<u32> {
        let id = (self.table.virDomainGetID)(self.raw());
        (id != c_uint::MAX).then_some(id)
    }

    /// Starts to merge images of a disk. The default of `base` is the bottom, of `top` the top.
    pub fn block_commit(
        &self,
        disk: &str,
        base: Option<&str>,
        top: Option<&str>,
        flags: u32,
    ) -> VirResult<()> {
        let disk = c_text(disk)?;
        let base = base.map(c_text).transpose()?;
        let top = top.map(c_text).transpose()?;
        self.done((self.table.virDomainBlockCommit)(
            self.raw(),
            Text::from(&disk),
            Text::from(base.as_ref()),
            Text::from(top.as_ref()),
            0,
            flags as c_uint,
        ))
        .map(drop)
    }

    /// Ends a disk's block job.
    pub fn block_job_abort(&self, disk: &str, flags: u32) -> VirResult<()> {
        let disk = c_text(disk)?;
        self.done((self.table.virDomainBlockJobAbort)(
            self.raw(),
            Text::from(&disk),
            flags as c_uint,
        ))
        .map(drop)
    }

    /// The progress of a disk's block job: how much is done, and of how much. `None` where there is
    /// no job.
    pub fn block_job(&self, disk: &str) -> VirResult<Option<(u64, u64)>> {
        let disk = c_text(disk)?;
        let mut info = virDomainBlockJobInfo::default();
        let found = self.done((self.table.virDomainGetBlockJobInfo)(
            self.raw(),
            Text::from(&disk),
            &mut info,
            0,
        ))?;
        Ok((found == 1).then_some((info.cur, info.end)))
    }

    /// Whether it has a long job under way: a backup, a dump, a migration.
    pub fn has_job(&self) -> VirResult<bool> {
        const BOUNDED: c_int = 1;
        const UNBOUNDED: c_int = 2;
        let mut info = virDomainJobInfo::default();
        self.done((self.table.virDomainGetJobInfo)(self.raw(), &mut info))?;
        Ok(matches!(info.kind, BOUNDED | UNBOUNDED))
    }

    /// Takes a snapshot, or records one.
    pub fn create_snapshot(&self, xml: &str, flags: u32) -> VirResult<Snapshot> {
        let xml = c_text(xml)?;
        Snapshot::take(
            self.table,
            (self.table.virDomainSnapshotCreateXML)(
                Some(self.raw()),
                Text::from(&xml),
                flags as c_uint,
            ),
        )
    }

    /// Changes or restores the record of a snapshot. If `current`, makes it the current snapshot.
    pub fn redefine_snapshot(&self, xml: &str, current: bool) -> VirResult<Snapshot> {
        self.create_snapshot(xml, if current { REDEFINE | CURRENT } else { REDEFINE })
    }

    /// An object for a snapshot of this name, which libvirt need not have recorded.
    pub fn snapshot_object(&self, name: &str) -> VirResult<Snapshot> {
        let name = c_text(name)?;
        let Some(get) = self.table.virGetDomainSnapshot else {
            let message = "this libvirt has no objects for snapshots without metadata".into();
            return Err(VirError { code: Code::OperationUnsupported as i32, message });
        };
        Snapshot::take(self.table, get(self.raw(), Text::from(&name)))
    }

    /// The snapshot of this name. If there is none, libvirt's error may reach the application's
    /// log; [`Domain::find`] avoids that.
    pub fn snapshot(&self, name: &str) -> VirResult<Snapshot> {
        let name = c_text(name)?;
        Snapshot::take(
            self.table,
            (self.table.virDomainSnapshotLookupByName)(self.raw(), Text::from(&name), 0),
        )
    }

    /// All snapshots, parents first.
    pub fn snapshots(&self) -> VirResult<Vec<Snapshot>> {
        let list = |array: &mut _| {
            (self.table.virDomainListAllSnapshots)(self.raw(), array, list::TOPOLOGICAL as c_uint)
        };
        listed(self.table, list, Snapshot::take)
    }

    /// The snapshot of this name, if there is one.
    pub fn find(&self, name: &str) -> VirResult<Option<Snapshot>> {
        Ok(self.snapshots()?.into_iter().find(|snapshot| snapshot.name() == name))
    }

    /// The current snapshot, if there is one.
    pub fn current_snapshot(&self) -> VirResult<Option<Snapshot>> {
        if self.done((self.table.virDomainHasCurrentSnapshot)(self.raw(), 0))? != 1 {
            return Ok(None);
        }
        Snapshot::take(self.table, (self.table.virDomainSnapshotCurrent)(self.raw(), 0)).map(Some)
    }
}

impl Snapshot {
    /// Its name.
    pub fn name(&self) -> String {
        (self.table.virDomainSnapshotGetName)(self.raw()).lossy().unwrap_or_default()
    }

    /// Its domain.
    pub fn domain(&self) -> VirResult<Domain> {
        let domain = (self.table.virDomainSnapshotGetDomain)(self.raw());
        Domain::share(self.table, domain.ok_or_else(|| VirError::last(self.table))?)
    }

    /// Its XML; [`xml::SECURE`] is allowed.
    pub fn xml(&self, flags: u32) -> VirResult<String> {
        self.string((self.table.virDomainSnapshotGetXMLDesc)(self.raw(), flags as c_uint))
    }

    /// Its children; with [`list::DESCENDANTS`] all its descendants. Parents come first.
    pub fn children(&self, flags: u32) -> VirResult<Vec<Snapshot>> {
        let flags = flags | list::TOPOLOGICAL;
        let list = |array: &mut _| {
            (self.table.virDomainSnapshotListAllChildren)(self.raw(), array, flags as c_uint)
        };
        listed(self.table, list, Snapshot::take)
    }

    /// Whether it is the domain's current one.
    pub fn is_current(&self) -> VirResult<bool> {
        Ok(self.done((self.table.virDomainSnapshotIsCurrent)(self.raw(), 0))? == 1)
    }

    /// libvirt's own revert.
    pub fn revert(&self, flags: u32) -> VirResult<()> {
        self.done((self.table.virDomainRevertToSnapshot)(self.raw(), flags as c_uint)).map(drop)
    }

    /// libvirt's own delete.
    pub fn delete(&self, flags: u32) -> VirResult<()> {
        self.done((self.table.virDomainSnapshotDelete)(self.raw(), flags as c_uint)).map(drop)
    }
}

/// Makes libvirt write no errors to standard error, in all of this process. It is for programs: a
/// library must not change what its callers have set.
pub fn silence() -> Result<()> {
    extern "C" fn ignore(_: *mut c_void, _: *mut virError) {}
    (table::table()?.virSetErrorFunc)(ptr::null_mut(), Some(ignore));
    Ok(())
}

/// Clears this thread's last error in libvirt.
pub fn reset_last_error(table: &Table) {
    (table.virResetLastError)();
}
