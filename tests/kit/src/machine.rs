// SPDX-License-Identifier: LGPL-2.1-or-later

//! The virtual machine that a test needs, and its QEMU command line.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::binary::Binary;
use crate::compile::tick_guest;
use crate::domain::{DiskExtras, Extras};
use crate::guest::{Disk, Guest};

/// The size of the disks that are created for a machine. The tick guest uses the first 5 MiB.
pub const DISK_SIZE: u64 = 16 << 20;

/// QEMU's accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    Tcg,
    Kvm,
}

/// QEMU's machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineType {
    Pc,
    Q35,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl MachineType {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            MachineType::Pc => "pc",
            MachineType::Q35 => "q35",
        }
    }
}

impl Format {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// How disks are given to QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// `-drive id=drive-N`: QEMU generates the node names.
    Drive,
    /// `-blockdev node-name=disk-N`, as libvirt does.
    Blockdev,
}

#[derive(Clone, Debug)]
pub(crate) struct DiskWanted {
    pub(crate) format: Format,
    /// An existing image; where there is none, one is created in the guest's directory.
    pub(crate) file: Option<PathBuf>,
    pub(crate) extras: DiskExtras,
}

/// A builder of a virtual machine. The defaults are those of [`Machine::new`].
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) binary: &'static Binary,
    pub(crate) machine_type: MachineType,
    pub(crate) accel: Accel,
    memory_mib: Option<u32>,
    pub(crate) cpus: u32,
    pub(crate) prealloc: bool,
    pub(crate) attach: Attach,
    pub(crate) disks: Vec<DiskWanted>,
    pub(crate) device_options: String,
    pub(crate) append: String,
    pub(crate) restless: bool,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, PathBuf)>,
    pub(crate) paused: bool,
    pub(crate) incoming: bool,
    pub(crate) uid: Option<u32>,
    pub(crate) extras: Extras,
}

/// How long a guest rests between its rounds, each of which takes a tenth of a millisecond. Nearly
/// all snapshots of it fall into a rest, so a test that must not rely on that uses a restless
/// machine.
const REST_US: u32 = 7500;

impl Machine {
    /// A `pc` without disks, under TCG, which boots the tick guest. It has 16 MiB, or 64 where it
    /// writes densely: QEMU takes a quarter of a second for 64 MiB in each snapshot.
    pub fn new(binary: &'static Binary) -> Machine {
        Machine {
            binary,
            machine_type: MachineType::Pc,
            accel: Accel::Tcg,
            memory_mib: None,
            cpus: 1,
            prealloc: false,
            attach: Attach::Drive,
            disks: Vec::new(),
            device_options: String::new(),
            append: String::new(),
            restless: false,
            args: Vec::new(),
            env: Vec::new(),
            paused: false,
            incoming: false,
            uid: None,
            extras: Extras::default(),
        }
    }

    pub fn machine_type(mut self, machine_type: MachineType) -> Machine {
        self.machine_type = machine_type;
        self
    }

    pub fn accel(mut self, accel: Accel) -> Machine {
        self.accel = accel;
        self
    }

    pub fn memory(mut self, mib: u32) -> Machine {
        self.memory_mib = Some(mib);
        self
    }

    /// The size of its memory in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.memory_mib.unwrap_or(if self.append.contains("dense=") { 64 } else { 16 })
    }

    /// Sets the number of CPUs. The tick guest uses two with its parameter `cpus=2`.
    pub fn cpus(mut self, cpus: u32) -> Machine {
        self.cpus = cpus;
        self
    }

    /// Allocates all memory at the start.
    pub fn prealloc(mut self) -> Machine {
        self.prealloc = true;
        self
    }

    /// Sets how all disks are attached.
    pub fn attach(mut self, attach: Attach) -> Machine {
        self.attach = attach;
        self
    }

    /// Adds a disk on a new image.
    pub fn disk(mut self, format: Format) -> Machine {
        self.disks.push(DiskWanted { format, file: None, extras: DiskExtras::default() });
        self
    }

    /// Adds a disk on an existing image.
    pub fn disk_on(mut self, file: &Path, format: Format) -> Machine {
        self.disks.push(DiskWanted {
            format,
            file: Some(file.to_owned()),
            extras: DiskExtras::default(),
        });
        self
    }

    /// Adds options to all disk devices: `iothread=io0`.
    pub fn device_options(mut self, options: &str) -> Machine {
        self.device_options = format!(",{options}");
        self
    }

    /// Adds parameters of the tick guest: `pages=1024 dense=64`.
    pub fn append(mut self, parameters: &str) -> Machine {
        self.append = parameters.to_owned();
        self
    }

    /// Makes the guest write all the time. Otherwise it rests between its rounds under TCG, unless
    /// it writes densely, so that many guests leave CPU time to each other and to the library.
    pub fn restless(mut self) -> Machine {
        self.restless = true;
        self
    }

    /// The tick guest's command line.
    pub(crate) fn command_line(&self) -> String {
        let writes = ["dense=", "halt=", "delay="].iter().any(|key| self.append.contains(key));
        let more = match self.accel {
            Accel::Kvm => String::new(),
            Accel::Tcg if self.restless || writes => " wait=1".to_owned(),
            Accel::Tcg => format!(" rest={REST_US}"),
        };
        format!("{}{more}", self.append).trim_start().to_owned()
    }

    /// Adds a QEMU option.
    pub fn arg(mut self, arg: &str) -> Machine {
        self.args.push(arg.to_owned());
        self
    }

    /// Sets a variable in QEMU's environment.
    pub fn env(mut self, name: &str, value: &Path) -> Machine {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Keeps the guest paused until `cont` (`-S`).
    pub fn paused(mut self) -> Machine {
        self.paused = true;
        self
    }

    /// Makes QEMU wait for `migrate-incoming` (`-incoming defer`).
    pub fn incoming(mut self) -> Machine {
        self.incoming = true;
        self
    }

    /// Runs QEMU as this user, without groups. This needs root.
    pub fn run_as(mut self, uid: u32) -> Machine {
        self.uid = Some(uid);
        self
    }

    /// The machine that continues a snapshot of this one: the same machine on the given disk
    /// images, waiting for its memory, without the environment (preloaded libraries are for the
    /// original).
    pub fn for_revert(&self, disks: &[(PathBuf, Format)]) -> Machine {
        assert_eq!(disks.len(), self.disks.len(), "a snapshot has as many disks as its guest");
        let mut clone = self.clone().incoming();
        for (disk, (file, format)) in clone.disks.iter_mut().zip(disks) {
            (disk.file, disk.format) = (Some(file.clone()), *format);
        }
        clone.env.clear();
        clone.paused = false;
        clone
    }

    /// Starts the machine in a temporary directory of its own. Returns when QEMU answers.
    pub fn start(&self) -> Guest {
        let guest = self.spawn();
        drop(guest.control());
        guest
    }

    /// Starts the machine without waiting. QEMU can still fail.
    pub(crate) fn spawn(&self) -> Guest {
        let directory = tempfile::Builder::new()
            .prefix("instantsnap-")
            .tempdir()
            .expect("no temporary directory");
        let disks = self.make_disks(directory.path());
        // A copy that a QEMU of another user can read.
        let kernel = directory.path().join("tick.elf");
        std::fs::copy(tick_guest(), &kernel).expect("the tick guest cannot be copied");
        if let Some(uid) = self.uid {
            give_to(uid, directory.path());
        }
        let mut command = self.command(directory.path(), &kernel, &disks);
        let stderr =
            std::fs::File::create(directory.path().join("stderr.log")).expect("stderr.log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let child = command.spawn().expect("QEMU cannot be run");
        Guest::spawned(self.clone(), directory, child, disks)
    }

    pub(crate) fn make_disks(&self, directory: &Path) -> Vec<Disk> {
        let disk = |(index, wanted): (usize, &DiskWanted)| {
            let file = wanted.file.clone().unwrap_or_else(|| {
                let file = directory.join(format!("disk-{index}.{}", wanted.format.name()));
                make_image(&file, wanted.format, None);
                file
            });
            Disk {
                device: format!("vd{index}"),
                backend: match self.attach {
                    Attach::Drive => format!("drive-{index}"),
                    Attach::Blockdev => format!("disk-{index}"),
                },
                file,
                format: wanted.format,
            }
        };
        self.disks.iter().enumerate().map(disk).collect()
    }

    fn command(&self, directory: &Path, kernel: &Path, disks: &[Disk]) -> Command {
        let mut command = self.binary.command();
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        let machine = self.machine_type.name();
        command.args(["-accel", if self.accel == Accel::Kvm { "kvm" } else { "tcg" }]);
        command.args(["-m", &self.memory_mib().to_string(), "-smp", &self.cpus.to_string()]);
        if self.prealloc {
            let memory =
                format!("memory-backend-ram,id=ram0,size={}M,prealloc=on", self.memory_mib());
            command.args(["-object", &memory]);
            command.args(["-machine", &format!("{machine},memory-backend=ram0")]);
        } else {
            command.args(["-machine", machine]);
        }
        for name in ["qmp.sock", "control.sock", "watchdog.sock"] {
            let socket = directory.join(name);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        }
        command.args(["-serial", &format!("file:{}", directory.join("serial.log").display())]);
        command.arg("-kernel").arg(kernel);
        // The guest looks for " KEY=". QEMU puts the first space after the kernel's name.
        command.args(["-append", &self.command_line()]);
        for disk in disks {
            self.attach_disk(&mut command, disk);
        }
        if self.paused {
            command.arg("-S");
        }
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        command.args(&self.args);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn attach_disk(&self, command: &mut Command, disk: &Disk) {
        let (file, format, backend) = (disk.file.display(), disk.format.name(), &disk.backend);
        match self.attach {
            Attach::Drive => {
                command
                    .args(["-drive", &format!("if=none,id={backend},file={file},format={format}")]);
            }
            Attach::Blockdev => {
                command.args([
                    "-blockdev",
                    &format!("driver=file,node-name={backend}-file,filename={file}"),
                    "-blockdev",
                    &format!("driver={format},node-name={backend},file={backend}-file"),
                ]);
            }
        }
        let device =
            format!("virtio-blk-pci,id={},drive={backend}{}", disk.device, self.device_options);
        command.args(["-device", &device]);
    }
}

/// Creates a disk image: an empty one, or an overlay of another image.
pub fn make_image(file: &Path, format: Format, backing: Option<(&Path, Format)>) {
    if format == Format::Raw {
        assert!(backing.is_none(), "a raw image has no backing file");
        std::fs::File::create_new(file)
            .and_then(|image| image.set_len(DISK_SIZE))
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        return;
    }
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format.name()]);
    if let Some((backing, backing_format)) = backing {
        command.arg("-b").arg(backing).args(["-F", backing_format.name()]).arg(file);
    } else {
        command.arg(file).arg(DISK_SIZE.to_string());
    }
    let output = command.output().expect("qemu-img cannot be run");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn give_to(uid: u32, directory: &Path) {
    let entries = std::fs::read_dir(directory).expect("the guest's directory cannot be read");
    let files = entries.map(|entry| entry.expect("a directory entry").path());
    for path in files.chain([directory.to_owned()]) {
        std::os::unix::fs::chown(&path, Some(uid), Some(uid))
            .unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    }
}
