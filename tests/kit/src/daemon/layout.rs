// SPDX-License-Identifier: LGPL-2.1-or-later

//! The files of a private libvirtd, its configuration and its command line.

use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::Mode;

pub const LIBVIRTD: &str = "/usr/sbin/libvirtd";

/// The user `nobody`, where the tests run as root: a session must not be root's.
const SESSION_USER: u32 = 65534;
/// The user of a system daemon's QEMUs. Debian's `libvirt-qemu` has this number.
const SYSTEM_QEMU_USER: u32 = 64055;

/// The directories of the machine that a system daemon must not see, and the directories that it
/// sees in their place.
const COVERED: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("run", "/run/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("log", "/var/log/libvirt"),
    ("cache", "/var/cache/libvirt"),
];

/// The files of one daemon.
pub struct Layout {
    mode: Mode,
    directory: PathBuf,
    covered: Vec<(PathBuf, String)>,
    /// Whether it listens on TCP too.
    listens: bool,
}

impl Layout {
    /// Creates the directories and the configuration.
    pub fn make(mode: Mode, directory: &Path) -> Layout {
        let mut layout =
            Layout { mode, directory: directory.to_owned(), covered: Vec::new(), listens: false };
        set_mode(directory, 0o755);
        for name in [
            "etc/libvirt",
            "run",
            "cache",
            "data",
            "lib",
            "log",
            "client",
            "guests",
            "drivers",
            "sockets",
            "state",
        ] {
            std::fs::create_dir_all(directory.join(name)).expect("a directory of the daemon's");
        }
        // Only QEMU's driver is loaded: the other drivers manage the machine's networks, devices
        // and disks.
        let driver = "libvirt_driver_qemu.so";
        symlink(Path::new(DRIVERS).join(driver), directory.join("drivers").join(driver))
            .expect("a link to the driver");
        match mode {
            Mode::Session => layout.configure_session(),
            Mode::System => layout.configure_system(),
        }
        layout
    }

    /// Adds lines to libvirtd.conf.
    pub fn configure(&mut self, lines: &str) {
        self.listens = lines.contains("listen_tcp");
        let file = self.config();
        let before = std::fs::read_to_string(&file)
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        write(&file, &(before + lines));
    }

    fn config(&self) -> PathBuf {
        self.directory.join(match self.mode {
            Mode::Session => "etc/libvirt/libvirtd.conf",
            Mode::System => "etc/libvirtd.conf",
        })
    }

    fn configure_session(&self) {
        write(&self.directory.join("etc/libvirt/qemu.conf"), "stdio_handler = \"file\"\n");
        write(
            &self.directory.join("etc/libvirt/libvirtd.conf"),
            "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n",
        );
        if let Some(uid) = self.daemon_user() {
            for name in ["", "etc", "etc/libvirt", "run", "cache", "data", "guests", "state"] {
                let path = self.directory.join(name);
                chown(&path, Some(uid), Some(uid))
                    .unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
            }
        }
        set_mode(&self.directory.join("run"), 0o700); // as XDG_RUNTIME_DIR has to be
    }

    fn configure_system(&mut self) {
        let qemu = format!(
            "user = \"+{SYSTEM_QEMU_USER}\"\n\
             group = \"+{SYSTEM_QEMU_USER}\"\n\
             stdio_handler = \"file\"\n\
             security_driver = \"none\"\n\
             namespaces = []\n\
             cgroup_controllers = []\n"
        );
        write(&self.directory.join("etc/qemu.conf"), &qemu);
        // Clients do not see the namespace, so the sockets are outside the covered directories.
        let libvirtd = format!(
            "unix_sock_dir = \"{}\"\n\
             unix_sock_rw_perms = \"0777\"\n\
             auth_unix_rw = \"none\"\n\
             auth_unix_ro = \"none\"\n",
            self.directory.join("sockets").display()
        );
        write(&self.directory.join("etc/libvirtd.conf"), &libvirtd);
        for (name, target) in COVERED {
            // Where libvirt is not set up there is nothing to cover, but libvirtd must not create
            // the directory.
            std::fs::create_dir_all(target).unwrap_or_else(|error| panic!("{target}: {error}"));
            self.covered.push((self.directory.join(name), target.to_owned()));
        }
        self.allow_kvm();
        self.add_qemu_user();
    }

    /// Debian's libvirt does not start without the user `libvirt-qemu`, which only the service's
    /// package creates.
    fn add_qemu_user(&mut self) {
        let ids = format!("{SYSTEM_QEMU_USER}");
        for (file, line) in [
            ("passwd", format!("libvirt-qemu:x:{ids}:{ids}::/nonexistent:/usr/sbin/nologin\n")),
            ("group", format!("libvirt-qemu:x:{ids}:\n")),
        ] {
            let target = format!("/etc/{file}");
            let known = std::fs::read_to_string(&target)
                .unwrap_or_else(|error| panic!("{target}: {error}"));
            if !known.lines().any(|line| line.starts_with("libvirt-qemu:")) {
                let own = self.directory.join(file);
                write(&own, &(known.trim_end().to_owned() + "\n" + &line));
                self.covered.push((own, target));
            }
        }
    }

    /// Makes KVM accessible to QEMU's user, who is not in the group to which udev gives it.
    fn allow_kvm(&mut self) {
        let Ok(kvm) = rustix::fs::stat("/dev/kvm") else {
            return;
        };
        let (own, all) = (self.directory.join("kvm"), rustix::fs::Mode::from_raw_mode(0o666));
        if rustix::fs::mknodat(
            rustix::fs::CWD,
            &own,
            rustix::fs::FileType::CharacterDevice,
            all,
            kvm.st_rdev,
        )
        .is_ok()
        {
            set_mode(&own, 0o666);
            self.covered.push((own, "/dev/kvm".to_owned()));
        }
    }

    /// The one directory with all files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The bind mounts, as source and target.
    pub fn mounts(&self) -> &[(PathBuf, String)] {
        &self.covered
    }

    /// The daemon's user, if it is not this process's.
    pub fn daemon_user(&self) -> Option<u32> {
        (self.mode == Mode::Session && rustix::process::geteuid().is_root()).then_some(SESSION_USER)
    }

    /// QEMU's user.
    pub fn user(&self) -> u32 {
        match self.mode {
            Mode::Session => self.daemon_user().unwrap_or(rustix::process::geteuid().as_raw()),
            Mode::System => SYSTEM_QEMU_USER,
        }
    }

    /// The daemon's command line.
    pub fn libvirtd(&self) -> Vec<String> {
        let own = |name: &str| self.directory.join(name).display().to_string();
        let config = self.config().display().to_string();
        let mut words = vec![LIBVIRTD.to_owned(), "--config".to_owned(), config];
        words.extend(["--pid-file".to_owned(), own("run/libvirtd.pid")]);
        if self.listens {
            words.push("--listen".to_owned());
        }
        words
    }

    /// The daemon's complete environment.
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let own = |name: &str| self.directory.join(name);
        let mut environment = vec![
            ("PATH", PathBuf::from("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")),
            ("LC_ALL", PathBuf::from("C.UTF-8")),
            ("HOME", self.directory.clone()),
            ("LIBVIRT_DRIVER_DIR", own("drivers")),
            (crate::run::STATE, own("state")),
        ];
        if self.mode == Mode::Session {
            environment.extend([
                ("XDG_RUNTIME_DIR", own("run")),
                ("XDG_CONFIG_HOME", own("etc")),
                ("XDG_CACHE_HOME", own("cache")),
                ("XDG_DATA_HOME", own("data")),
            ]);
        }
        environment
    }

    /// The socket for clients.
    pub fn socket(&self) -> PathBuf {
        self.directory.join(match self.mode {
            Mode::Session => "run/libvirt/libvirt-sock",
            Mode::System => "sockets/libvirt-sock",
        })
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("libvirtd.log")
    }

    /// The directory of QEMU's logs.
    pub fn qemu_logs(&self) -> PathBuf {
        self.directory.join(match self.mode {
            Mode::Session => "cache/libvirt/qemu/log",
            Mode::System => "log/qemu",
        })
    }

    /// The directory of QEMU's process ids.
    pub fn pid_files(&self) -> PathBuf {
        self.directory.join(match self.mode {
            Mode::Session => "run/libvirt/qemu/run",
            Mode::System => "run/qemu",
        })
    }

    /// The directory of libvirt's capabilities of QEMU binaries.
    pub fn capabilities(&self) -> PathBuf {
        self.directory.join(match self.mode {
            Mode::Session => "cache/libvirt/qemu/cache/capabilities",
            Mode::System => "cache/qemu/capabilities",
        })
    }

    /// The capabilities depend on the user and on libvirt's version.
    pub fn capabilities_key(&self) -> String {
        let (major, minor, micro) = super::Daemon::version();
        format!("{:?}-{}-{major}.{minor}.{micro}", self.mode, self.user()).to_lowercase()
    }
}

const DRIVERS: &str = "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver";

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
