// SPDX-License-Identifier: LGPL-2.1-or-later

//! libvirt's private functions, for a process that is a libvirt daemon. Its QEMU driver uses them
//! too.
//!
//! They are found at run time. If one is missing, or if this version of libvirt was not tried,
//! [`Daemon::get`] returns an error and none of them is used.

use std::cell::{Cell, UnsafeCell};
use std::ffi::{CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::io::Write;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use once_cell::sync::OnceCell;

use crate::pointers::Text;
use crate::symbols::{Library, symbols};

/// The versions of libvirt whose driver does not use the domain object any more after one of these
/// functions has returned. 9.0, 11.3 and 12.8 were tried; the versions between them, and a little
/// later, are assumed to be alike.
const TRIED_VERSIONS: std::ops::Range<(u64, u64)> = (9, 0)..(13, 0);

symbols! {
    /// The functions of libvirt and GLib. They have these types in all versions that are accepted.
    #[derive(Debug)]
    pub struct Daemon;

    unsafe extern "C" {
        unsafe fn virObjectLock(*mut c_void);
        unsafe fn virObjectUnlock(*mut c_void);
        unsafe fn virObjectRef(*mut c_void) -> *mut c_void;
        unsafe fn virObjectUnref(*mut c_void);
        safe fn virIdentityGetCurrent() -> *mut c_void;
        safe fn virIdentityGetSystem() -> *mut c_void;
        unsafe fn virIdentitySetCurrent(*mut c_void) -> c_int;
        unsafe fn g_object_unref(*mut c_void);
    }
}

symbols! {
    /// The public function that returns libvirt's version.
    struct Version;

    unsafe extern "C" {
        safe fn virGetVersion(Option<&mut c_ulong>, Text, Option<&mut c_ulong>) -> c_int;
    }
}

symbols! {
    /// libvirt's log.
    struct Log;

    unsafe extern "C" {
        variadic fn virLogMessage(*mut Source, c_uint, Text, c_int, Text, *mut c_void, Text);
    }
}

/// Whether the private functions of this libvirt are known, that of the log among them.
static HAS_KNOWN_LOG: AtomicBool = AtomicBool::new(false);

static DAEMON: OnceCell<Result<Daemon, String>> = OnceCell::new();

impl Daemon {
    /// The daemon; or the reason why this process is not regarded as one. Call this only if
    /// libvirt's driver is known to be in this process.
    pub fn get(any_version: bool) -> Result<&'static Daemon, &'static str> {
        DAEMON.get_or_init(|| Daemon::load(any_version)).as_ref().map_err(String::as_str)
    }

    /// The daemon, if [`Daemon::get`] has found that this process is one.
    pub fn of_this_process() -> Option<&'static Daemon> {
        DAEMON.get()?.as_ref().ok()
    }

    fn load(any_version: bool) -> Result<Daemon, String> {
        let library = libvirt().ok_or("libvirt.so.0 is not in this process")?;
        check_version(library, any_version)?;
        HAS_KNOWN_LOG.store(true, Ordering::Relaxed);
        // `Table` finds these two, but as optional ones. A driver cannot answer without them.
        for name in [c"virGetDomainSnapshot", c"virSetError"] {
            if library.find(name).is_null() {
                return Err(missing(&name.to_string_lossy()));
            }
        }
        Daemon::find(|name| library.find(name)).map_err(missing)
    }

    /// Unlocks a domain object until the returned value is dropped. The object cannot be freed
    /// meanwhile.
    ///
    /// # Safety
    /// `object` is a live `virDomainObj` that this thread has locked, and may unlock.
    pub unsafe fn unlocked(&'static self, object: NonNull<c_void>) -> Unlocked {
        // SAFETY: the object lives and is locked by this thread, as the caller promises.
        unsafe {
            (self.virObjectRef)(object.as_ptr());
            (self.virObjectUnlock)(object.as_ptr());
        }
        Unlocked { daemon: self, object, _of_this_thread: PhantomData }
    }

    /// Gives this thread the daemon's own identity, in place of its client's, until the returned
    /// value is dropped.
    ///
    /// libvirt keeps the identity of the client by thread, and checks it by its access driver at
    /// each call. Our calls are steps of a call that was allowed already, and some are made by
    /// threads of our own, which have no identity.
    pub fn itself(&'static self) -> Itself {
        let identity = |object| Identity { daemon: self, object };
        let before = identity((self.virIdentityGetCurrent)());
        let system = identity((self.virIdentityGetSystem)());
        if system.object.is_null() || !system.set() {
            log(Priority::Error, "libvirt does not let a thread have the daemon's own identity");
        }
        Itself { before, _step: step() }
    }
}

/// A reference to an identity of libvirt's. NULL is no identity, which an access driver refuses.
#[derive(Debug)]
struct Identity {
    daemon: &'static Daemon,
    object: *mut c_void,
}

impl Identity {
    /// Makes it this thread's identity. Returns whether libvirt accepts that.
    fn set(&self) -> bool {
        // SAFETY: NULL, or an identity that lives by our reference; libvirt takes its own.
        unsafe { (self.daemon.virIdentitySetCurrent)(self.object) == 0 }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        if !self.object.is_null() {
            // SAFETY: the reference is ours, and not used any more.
            unsafe { (self.daemon.g_object_unref)(self.object) };
        }
    }
}

/// Locks the domain object again when it is dropped: see [`Daemon::unlocked`].
#[derive(Debug)]
pub struct Unlocked {
    daemon: &'static Daemon,
    object: NonNull<c_void>,
    /// The same thread must lock the object again, because its caller relies on that.
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Unlocked {
    fn drop(&mut self) {
        // SAFETY: the object lives by our reference, and this thread has not locked it. The caller
        // has a reference of its own, so that ours is not the last.
        unsafe {
            (self.daemon.virObjectLock)(self.object.as_ptr());
            (self.daemon.virObjectUnref)(self.object.as_ptr());
        }
    }
}

thread_local! {
    static IN_A_CALL: Cell<bool> = const { Cell::new(false) };
}

/// Marks this thread as being in a call of ours, until the returned value is dropped. If the driver
/// is in this process, it recognizes our requests by that: they are steps of our call.
pub fn step() -> Step {
    Step { was: IN_A_CALL.replace(true), _of_this_thread: PhantomData }
}

/// Whether this thread is in a call of ours.
pub fn is_in_a_call() -> bool {
    IN_A_CALL.get()
}

/// Removes the mark of [`step`] when it is dropped.
#[derive(Debug)]
pub struct Step {
    was: bool,
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Step {
    fn drop(&mut self) {
        IN_A_CALL.set(self.was);
    }
}

/// Restores the thread's identity when it is dropped: see [`Daemon::itself`].
#[derive(Debug)]
pub struct Itself {
    before: Identity,
    _step: Step,
}

impl Drop for Itself {
    fn drop(&mut self) {
        self.before.set();
    }
}

/// libvirt, if it is loaded in this process.
fn libvirt() -> Option<Library> {
    Library::loaded(c"libvirt.so.0")
}

fn missing(name: &str) -> String {
    format!("this libvirt has no {name}()")
}

fn check_version(library: Library, any_version: bool) -> Result<(), String> {
    let functions = Version::find(|name| library.find(name)).map_err(missing)?;
    let mut number: c_ulong = 0;
    let got = (functions.virGetVersion)(Some(&mut number), Text::NULL, None);
    let version = (number / 1_000_000, number / 1000 % 1000);
    if got != 0 || (!TRIED_VERSIONS.contains(&version) && !any_version) {
        let (major, minor) = version;
        return Err(format!(
            "libvirt {major}.{minor} is not one that this version of instantsnap knows ({}.{} or \
             later, before {}.{}; set INSTANTSNAP_ANY_LIBVIRT=1 in the daemon's environment to try \
             it nevertheless)",
            TRIED_VERSIONS.start.0,
            TRIED_VERSIONS.start.1,
            TRIED_VERSIONS.end.0,
            TRIED_VERSIONS.end.1
        ));
    }
    Ok(())
}

/// `virLogPriority`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Priority {
    /// Details for those who look for the cause of a problem.
    Info = 2,
    /// A requested feature does not work.
    Warning = 3,
    /// A call has failed.
    Error = 4,
}

/// `virLogSource`. libvirt changes it.
#[repr(C)]
struct Source {
    name: *const c_char,
    priority: c_uint,
    serial: c_uint,
}

struct Shared(UnsafeCell<Source>);

// SAFETY: only libvirt's log accesses it, and has a lock for its changes.
unsafe impl Sync for Shared {}

static SOURCE: Shared = Shared(UnsafeCell::new(Source {
    name: c"instantsnap".as_ptr(),
    priority: Priority::Error as c_uint,
    serial: 0,
}));

/// Writes a line to the daemon's log. If libvirt's log function is not known, writes it to standard
/// error, which the system's journal records.
pub fn log(priority: Priority, message: &str) {
    let library = libvirt().filter(|_| HAS_KNOWN_LOG.load(Ordering::Relaxed));
    let functions = library.and_then(|library| Log::find(|name| library.find(name)).ok());
    let text = CString::new(message.replace('\0', "\\0")).unwrap_or_default();
    let Some(functions) = functions else {
        // Unlike `eprintln!`, this does not end the daemon if standard error is closed.
        let _ = writeln!(std::io::stderr(), "instantsnap: {message}");
        return;
    };
    let name = Text::from(c"instantsnap");
    // SAFETY: the source and the strings are live, and the format takes one string.
    unsafe {
        (functions.virLogMessage)(
            SOURCE.0.get(),
            priority as c_uint,
            name,
            0,
            name,
            ptr::null_mut(),
            Text::from(c"%s"),
            text.as_ptr(),
        );
    }
}

/// The URI by which a client on this machine connects to this daemon: it names the socket that the
/// daemon listens on. If there is no such socket, the driver's own URI, `uri`.
pub fn address(uri: &str) -> String {
    let Some(socket) = own_socket() else { return uri.to_owned() };
    let path = uri
        .split_once("://")
        .map_or("/system", |(_, path)| path.split('?').next().unwrap_or_default());
    format!("qemu+unix://{path}?socket={}", escape(&socket))
}

/// Whether this process listens on a socket for libvirt's clients.
pub fn is_listening() -> bool {
    own_socket().is_some()
}

fn own_socket() -> Option<String> {
    let own: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .ok()?
        .filter_map(|entry| {
            std::fs::read_link(entry.ok()?.path()).ok()?.into_os_string().into_string().ok()
        })
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    listening(&std::fs::read_to_string("/proc/self/net/unix").ok()?, &own)
}

/// The path of the socket for clients, in a table like `/proc/net/unix`: it listens, and its inode
/// is one of `own`.
fn listening(table: &str, own: &[String]) -> Option<String> {
    const ACCEPTS: &str = "00010000";
    table.lines().find_map(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut columns = line.split_whitespace();
        let (flags, inode) = (columns.nth(3)?, columns.nth(2)?);
        let path = columns.next()?;
        let name = path.rsplit_once('/')?.1;
        let is_for_clients = flags == ACCEPTS && matches!(name, "libvirt-sock" | "virtqemud-sock");
        (is_for_clients && own.iter().any(|own| own == inode)).then(|| path.to_owned())
    })
}

/// Escapes a path for a URI's query.
fn escape(path: &str) -> String {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let escaped = path.bytes().map(|byte| match is_allowed(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    escaped.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    symbols! {
        struct Make;

        unsafe extern "C" {
            safe fn virIdentityNew() -> *mut c_void;
        }
    }

    #[test]
    fn the_socket_for_clients_is_found_among_all() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000: 00000002 00000000 00010000 0001 01 101 /run/libvirt/libvirt-sock-ro\n\
                     0000: 00000003 00000000 00000000 0001 03 102 /run/libvirt/libvirt-sock\n\
                     0000: 00000002 00000000 00010000 0001 01 103 /run/other/libvirt-sock\n\
                     0000: 00000002 00000000 00000000 0002 01 104\n\
                     0000: 00000002 00000000 00010000 0001 01 105 /run/libvirt/libvirt-sock\n";
        let own =
            |inodes: &[&str]| inodes.iter().map(|inode| (*inode).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            listening(table, &own(&["101", "102", "105"])).as_deref(),
            Some("/run/libvirt/libvirt-sock")
        );
        assert_eq!(listening(table, &own(&["101", "102", "104"])), None);
    }

    #[test]
    fn a_path_is_fit_for_a_uri() {
        assert_eq!(escape("/run/a b&c/libvirt-sock"), "/run/a%20b%26c/libvirt-sock");
    }

    #[test]
    fn a_thread_is_the_daemon_only_as_long_as_it_is_in_a_call() {
        if crate::libvirt::table::table().is_err() {
            return;
        }
        let daemon: &'static Daemon = Box::leak(Box::new(Daemon::load(true).unwrap()));
        let identity = |object| Identity { daemon, object };
        // The reference is dropped, and only the address is kept.
        let current = || identity((daemon.virIdentityGetCurrent)()).object;
        let make = Make::find(|name| libvirt().unwrap().find(name)).unwrap();
        let client = identity((make.virIdentityNew)());
        assert!(client.set());
        let client = client.object;
        for _ in 0..2 {
            let itself = daemon.itself();
            assert!(is_in_a_call() && !current().is_null() && current() != client);
            drop(itself);
            assert!(!is_in_a_call() && current() == client);
        }
        let panicked = std::panic::catch_unwind(|| {
            let _itself = daemon.itself();
            panic!("on purpose");
        });
        assert!(panicked.is_err() && !is_in_a_call() && current() == client);
    }

    #[test]
    fn a_process_without_a_driver_is_no_daemon() {
        assert!(Daemon::of_this_process().is_none());
    }
}
