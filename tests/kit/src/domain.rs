// SPDX-License-Identifier: LGPL-2.1-or-later

//! A machine as a domain of libvirt: what the builder adds for it, and its XML.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::daemon::Daemon;
use crate::guest::{Disk, Guest};
use crate::machine::{Accel, Machine, MachineType};

/// The parts of a machine that only libvirt is told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extras {
    name: Option<String>,
    transient: bool,
    domain: String,
    os: Option<String>,
    devices: String,
    edits: Vec<Edit>,
}

/// The parts of a disk that only libvirt is told.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskExtras {
    attributes: String,
    driver: String,
    elements: String,
}

type EditXml = dyn Fn(String) -> String + Send + Sync;

#[derive(Clone)]
struct Edit(Arc<EditXml>);

impl fmt::Debug for Edit {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an edit")
    }
}

/// These apply to [`Machine::start_under`] and the like only, not to a QEMU that is started
/// directly.
impl Machine {
    /// Sets the domain's name, which is `tick-N` by default.
    pub fn name(mut self, name: &str) -> Machine {
        self.extras.name = Some(name.to_owned());
        self
    }

    /// Makes the domain transient (`virsh create`) instead of persistent (`virsh define`, `virsh
    /// start`).
    pub fn transient(mut self) -> Machine {
        self.extras.transient = true;
        self
    }

    /// Adds elements to `<domain>`: `<memoryBacking>`, `<cpu>`, `<iothreads>`.
    pub fn domain_elements(mut self, xml: &str) -> Machine {
        self.extras.domain.push_str(xml);
        self
    }

    /// Sets the `<os>` element, which by default boots the tick guest. `KERNEL` and `CMDLINE` in it
    /// stand for the tick guest's.
    pub fn os(mut self, xml: &str) -> Machine {
        self.extras.os = Some(xml.to_owned());
        self
    }

    /// Adds devices.
    pub fn devices(mut self, xml: &str) -> Machine {
        self.extras.devices.push_str(xml);
        self
    }

    /// Adds a CD-ROM drive `sda` or `hda`, empty or with an image. It is not among
    /// [`Guest::disks`].
    pub fn cdrom(self, image: Option<&Path>) -> Machine {
        let (target, bus) = match self.machine_type {
            MachineType::Pc => ("hda", "ide"),
            MachineType::Q35 => ("sda", "sata"),
        };
        let source =
            image.map_or(String::new(), |image| format!("<source file='{}'/>", image.display()));
        self.devices(&format!(
            "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>{source}\
             <target dev='{target}' bus='{bus}'/><readonly/></disk>"
        ))
    }

    /// Adds attributes to the last disk: `snapshot='no'`.
    pub fn disk_attributes(mut self, attributes: &str) -> Machine {
        self.last_disk().attributes.push_str(&format!(" {attributes}"));
        self
    }

    /// Adds attributes to the last disk's `<driver>`: `iothread='1'`.
    pub fn disk_driver(mut self, attributes: &str) -> Machine {
        self.last_disk().driver.push_str(&format!(" {attributes}"));
        self
    }

    /// Adds elements to the last disk: `<readonly/>`.
    pub fn disk_elements(mut self, xml: &str) -> Machine {
        self.last_disk().elements.push_str(xml);
        self
    }

    /// Edits the domain's XML at the end. Several edits are applied in order.
    pub fn edit_xml(mut self, edit: impl Fn(String) -> String + Send + Sync + 'static) -> Machine {
        self.extras.edits.push(Edit(Arc::new(edit)));
        self
    }

    fn last_disk(&mut self) -> &mut DiskExtras {
        &mut self.disks.last_mut().expect("a disk").extras
    }

    /// Starts the machine as a domain of this libvirt.
    pub fn start_under(&self, daemon: &Daemon) -> Guest {
        let guest = self.make(daemon);
        self.start_created(&guest).unwrap_or_else(|error| guest.fail(&error));
        daemon.keep_capabilities();
        guest
    }

    /// The same for a machine whose QEMU may not start here. The error is virsh's message.
    pub(crate) fn try_start_under(&self, daemon: &Daemon) -> Result<Guest, String> {
        let guest = self.make(daemon);
        self.start_created(&guest).map(|()| guest)
    }

    fn start_created(&self, guest: &Guest) -> Result<(), String> {
        let daemon = guest.daemon();
        let xml = guest.directory().join("domain.xml");
        let xml = xml.to_str().expect("a path of UTF-8");
        let paused: &[&str] = if self.paused { &["--paused"] } else { &[] };
        if self.extras.transient {
            daemon.try_virsh(&[&["create", xml], paused].concat()).map(drop)
        } else {
            daemon.try_virsh(&["define", xml])?;
            guest.try_start_domain_with(paused)
        }
    }

    /// Defines the machine as a domain of this libvirt, and leaves it shut off.
    pub fn define_under(&self, daemon: &Daemon) -> Guest {
        let guest = self.make(daemon);
        daemon.virsh(&[
            "define",
            guest.directory().join("domain.xml").to_str().expect("a path of UTF-8"),
        ]);
        guest
    }

    /// Creates the directory, the disks and the XML.
    fn make(&self, daemon: &Daemon) -> Guest {
        let directory = daemon.guest_directory();
        let disks: Vec<Disk> =
            self.make_disks(directory.path()).into_iter().enumerate().map(target).collect();
        std::fs::copy(crate::compile::tick_guest(), directory.path().join("tick.elf"))
            .expect("the tick guest");
        let name = self.domain_name();
        let xml = self.domain_xml(&name, directory.path(), &disks);
        std::fs::write(directory.path().join("domain.xml"), &xml).expect("domain.xml");
        daemon.give(directory.path());
        Guest::of_libvirt(self.clone(), directory, daemon.clone(), name, disks)
    }

    fn domain_name(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let fresh = || format!("tick-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.extras.name.clone().unwrap_or_else(fresh)
    }

    /// The domain's XML, for a guest with this directory and these disks.
    pub fn domain_xml(&self, name: &str, directory: &Path, disks: &[Disk]) -> String {
        let (machine, accel) = (self.machine_type.name(), self.accel);
        let (memory, cpus, emulator) = (self.memory_mib(), self.cpus, self.binary.emulator());
        let serial = directory.join("serial.log");
        let os = self.os_xml(machine, &directory.join("tick.elf"));
        let disks: String =
            disks.iter().enumerate().map(|(index, disk)| self.disk_xml(index, disk)).collect();
        let xml = format!(
            "<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>{cpus}</vcpu>
  {os}
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  {prealloc}{domain}
  <devices>
    <emulator>{emulator}</emulator>
{disks}    <controller type='usb' model='none'/>
    <serial type='file'><source path='{serial}'/><target port='0'/></serial>
    <memballoon model='none'/>
    {devices}
  </devices>
  {command_line}
  {capabilities}
</domain>
",
            kind = if accel == Accel::Kvm { "kvm" } else { "qemu" },
            prealloc = if self.prealloc {
                "<memoryBacking><allocation mode='immediate'/></memoryBacking>"
            } else {
                ""
            },
            domain = self.extras.domain,
            emulator = emulator.display(),
            serial = serial.display(),
            devices = self.extras.devices,
            command_line = self.command_line_xml(),
            capabilities = if self.extras.domain.contains("<cpu") { "" } else { FEWER_QUESTIONS },
        );
        self.extras.edits.iter().fold(xml, |xml, edit| (edit.0)(xml))
    }

    fn os_xml(&self, machine: &str, kernel: &Path) -> String {
        let plain = format!(
            "<os><type arch='x86_64' machine='{machine}'>hvm</type>\
             <kernel>KERNEL</kernel><cmdline>CMDLINE</cmdline></os>"
        );
        let os = self.extras.os.clone().unwrap_or(plain);
        let os = os
            .replace("KERNEL", &kernel.display().to_string())
            .replace("CMDLINE", &escape(&self.command_line()));
        os.replace("<cmdline></cmdline>", "")
    }

    /// The guest looks for its disks on the first bus, in the order of their slots.
    fn disk_xml(&self, index: usize, disk: &Disk) -> String {
        let extras = &self.disks[index].extras;
        let block = std::fs::metadata(&disk.file)
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()));
        let (kind, attribute) = if block { ("block", "dev") } else { ("file", "file") };
        format!(
            "    <disk type='{kind}' device='disk'{attributes}>
      <driver name='qemu' type='{format}'{driver}/>
      <source {attribute}='{file}'/>
      <target dev='{device}' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x{slot:02x}' function='0x0'/>
      {elements}
    </disk>\n",
            attributes = extras.attributes,
            format = disk.format.name(),
            driver = extras.driver,
            file = escape(&disk.file.display().to_string()),
            device = disk.device,
            slot = 0x10 + index,
            elements = extras.elements,
        )
    }

    fn command_line_xml(&self) -> String {
        let (args, env) = (&self.args, &self.env);
        if args.is_empty() && env.is_empty() {
            return String::new();
        }
        let args: String =
            args.iter().map(|arg| format!("<qemu:arg value='{}'/>", escape(arg))).collect();
        let variable = |(name, value): &(String, PathBuf)| {
            format!("<qemu:env name='{name}' value='{}'/>", value.display())
        };
        let env: String = env.iter().map(variable).collect();
        format!("<qemu:commandline>{args}{env}</qemu:commandline>")
    }
}

/// With this capability libvirt asks each QEMU for some hundred properties of its CPU, one by one.
/// Only a domain whose XML says something of its CPU needs the answers.
const FEWER_QUESTIONS: &str = "<qemu:capabilities>\
     <qemu:del capability='cpu-unavailable-features'/></qemu:capabilities>";

/// A disk with libvirt's names: the target (`vda`), and no node name, which libvirt generates.
fn target((index, disk): (usize, Disk)) -> Disk {
    let letter = char::from(b'a' + u8::try_from(index).expect("a few disks"));
    Disk { device: format!("vd{letter}"), backend: String::new(), ..disk }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}
