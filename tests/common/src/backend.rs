// SPDX-License-Identifier: LGPL-2.1-or-later

//! The backend that tests use which are not about one backend.
//!
//! By default the tests of `qmp` open a guest by its socket. With INSTANTSNAP_TEST_BACKEND=driver
//! they open it by a driver in C (`driver.c`). By default the tests of `libvirt` call the library,
//! as its clients do. With INSTANTSNAP_TEST_BACKEND=inside they call libvirt's stock functions in
//! daemons with the library in them (`virt.rs`).

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
    /// The default ones.
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

/// Whether the backend is the driver.
pub fn by_driver() -> bool {
    backend() == Backend::Driver
}

/// Whether the library is in the daemon.
pub fn by_daemon() -> bool {
    backend() == Backend::Inside
}

/// Skips a test of the socket backend where this run uses another backend.
pub fn by_socket_only() {
    if by_driver() {
        skip("it is about the socket backend");
    }
}

/// Skips a test that only a client with the library can run: it acts during a snapshot by an
/// observer, cancels it, sets limits, or uses overlays of its own (`REUSE_EXT`).
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
        // A process that is only given the directory reads it.
        std::fs::write(guest.directory().join("domain.xml"), domain_of(guest.disks())).unwrap();
    }
    open(guest.directory(), socket, domain_xml, state_dir)
}

/// The domain XML that a driver provides.
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
        // SAFETY: the library was just built from driver.c, which has both functions with these
        // signatures.
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
    // SAFETY: the strings and the table live until the call has copied them, and the domain is
    // never freed.
    unsafe {
        let domain =
            domain(&library, socket.as_ptr(), watchdog.as_ptr(), state_dir.as_ptr(), xml.as_ptr());
        driver::open(In::from_ptr(ops()), domain).map(Handle)
    }
}

fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).unwrap()
}
