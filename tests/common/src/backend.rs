// SPDX-License-Identifier: LGPL-2.1-or-later

//! Which backend the tests use, where there are two; as far as they do not test one of them itself.
//!
//! Those of the socket open a guest by its socket, or, with INSTANTSNAP_TEST_BACKEND=driver, by a
//! driver in C (`driver.c`). Those of libvirt use the library, as its clients do, or, with
//! INSTANTSNAP_TEST_BACKEND=inside, libvirt's plain functions and daemons with the library in them
//! (`virt.rs`).

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use instantsnap::error::Error;
use instantsnap::ffi::abi::instantsnap_driver_ops;
use instantsnap::ffi::driver;
use instantsnap::pointers::{In, Text};
use instantsnap_testkit::compile::{gcc, workspace};
use instantsnap_testkit::{Disk, Guest, skip};
use quick_xml::escape::escape;

use super::Handle;

#[derive(Clone, Copy, PartialEq)]
enum Backend {
    /// The first ones.
    Plain,
    Driver,
    Inside,
}

fn backend() -> Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    *BACKEND.get_or_init(|| match std::env::var("INSTANTSNAP_TEST_BACKEND").as_deref() {
        Err(_) | Ok("" | "qmp") => Backend::Plain,
        Ok("driver") => Backend::Driver,
        Ok("inside") => Backend::Inside,
        Ok(other) => {
            panic!("INSTANTSNAP_TEST_BACKEND={other}: what is that? It is qmp, driver or inside")
        }
    })
}

/// Whether it is the driver's.
pub fn by_driver() -> bool {
    backend() == Backend::Driver
}

/// Whether it is the daemon's.
pub fn by_daemon() -> bool {
    backend() == Backend::Inside
}

/// Skips a test of what only the socket backend has, where this run goes by another.
pub fn by_socket_only() {
    if by_driver() {
        skip("it is about the socket backend");
    }
}

/// The same for what only a client with the library has: it observes a snapshot and does something
/// meanwhile, cancels it, sets its limits, brings overlays of its own (`REUSE_EXT`).
pub fn by_client_only() {
    if by_daemon() {
        skip("it is about clients that have the library");
    }
}

/// Opens a guest whose QEMU has its sockets in `directory`.
pub fn open(
    directory: &Path,
    socket: &Path,
    domain_xml: Option<&str>,
    state_dir: &Path,
) -> Result<Handle, Error> {
    if !by_driver() {
        return Handle::open_qmp(socket, domain_xml, state_dir);
    }
    let noted = directory.join("domain.xml");
    let domain_xml = domain_xml
        .map_or_else(|| std::fs::read_to_string(&noted).unwrap_or_default(), str::to_owned);
    open_driver(socket, &directory.join("watchdog.sock"), &domain_xml, state_dir)
}

/// Opens a guest of the kit, by another socket than its own where a proxy is in between.
pub fn open_guest(
    guest: &Guest,
    socket: &Path,
    domain_xml: Option<&str>,
    state_dir: &Path,
) -> Result<Handle, Error> {
    if by_driver() {
        // For a process that knows the directory only.
        std::fs::write(guest.directory().join("domain.xml"), domain_of(guest.disks())).unwrap();
    }
    open(guest.directory(), socket, domain_xml, state_dir)
}

/// What a driver knows of its domain.
pub fn domain_of(disks: &[Disk]) -> String {
    let disk = |disk: &Disk| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{}'/><source \
             file='{}'/><target dev='{}'/></disk>",
            disk.format.name(),
            escape(disk.file.to_str().unwrap()),
            disk.device
        )
    };
    let disks: String = disks.iter().map(disk).collect();
    format!("<domain type='qemu'><name>guest</name><devices>{disks}</devices></domain>")
}

#[repr(C)]
struct Library {
    event: extern "C" fn(*mut c_void, Text),
    set_reason: extern "C" fn(Text),
}

type Ops = unsafe extern "C" fn() -> *const instantsnap_driver_ops;
type Domain = unsafe extern "C" fn(
    *const Library,
    *const c_char,
    *const c_char,
    *const c_char,
    *const c_char,
) -> *mut c_void;

fn open_driver(
    socket: &Path,
    watchdog: &Path,
    domain_xml: &str,
    state_dir: &Path,
) -> Result<Handle, Error> {
    static LOADED: OnceLock<(Ops, Domain)> = OnceLock::new();
    let (ops, domain) = LOADED.get_or_init(|| {
        let options =
            format!("-shared -fPIC -I{} -lpthread", workspace().join("include").display());
        let file = c_string(
            gcc(&workspace().join("tests/common/driver.c"), "driver.so", &options)
                .as_os_str()
                .as_bytes(),
        );
        // SAFETY: the file was just made of driver.c, which has both, with these signatures.
        unsafe {
            let loaded = libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            let find = |name: &CStr| libc::dlsym(loaded, name.as_ptr());
            let (ops, domain) = (find(c"test_driver_ops"), find(c"test_driver_domain"));
            assert!(!ops.is_null() && !domain.is_null(), "{file:?} cannot be loaded");
            (
                std::mem::transmute::<*mut c_void, Ops>(ops),
                std::mem::transmute::<*mut c_void, Domain>(domain),
            )
        }
    });
    let library = Library {
        event: driver::instantsnap_driver_event,
        set_reason: driver::instantsnap_driver_set_reason,
    };
    let [socket, watchdog, state_dir] =
        [socket, watchdog, state_dir].map(|path| c_string(path.as_os_str().as_bytes()));
    let xml = c_string(domain_xml.as_bytes());
    // SAFETY: the strings and the table live for the call, which copies them; the domain lives for
    // ever.
    unsafe {
        let domain =
            domain(&library, socket.as_ptr(), watchdog.as_ptr(), state_dir.as_ptr(), xml.as_ptr());
        driver::open(In::from_ptr(ops()), domain).map(Handle)
    }
}

fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).unwrap()
}
