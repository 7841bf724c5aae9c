// SPDX-License-Identifier: LGPL-2.1-or-later

//! `snapshot-create-as` and `snapshot-create`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use instantsnap_core::engine::{Job, Returns, Stats, WatchdogKind};
use instantsnap_core::error::{Code, Error};
use instantsnap_core::image::Format;
use instantsnap_core::model::flags::{self, CreateFlags};
use instantsnap_core::model::snapshot_xml::SnapshotXml;
use instantsnap_core::model::{check_name, domain, generated_names, xml};
use serde_json::{Value, json};

use super::follow::{Interval, Lines, Report, Text, follow};
use super::names::{self, Word, assign};
use super::spec::{self, DiskSpec, MemorySpec};
use crate::complete;
use crate::failure::{Failure, Result};
use crate::guest::{Guest, Managed};
use crate::image::format;
use crate::signals::Signals;
use crate::{Context, output};

/// What both commands have.
#[derive(Args)]
struct Common {
    /// Do not record the snapshot
    #[arg(long)]
    no_metadata: bool,
    /// End the guest when the snapshot is complete
    #[arg(long)]
    halt: bool,
    /// Only disks, without memory. libvirt takes the snapshot itself
    #[arg(long, conflicts_with_all = ["live", "instant", "image_format"])]
    disk_only: bool,
    /// Use overlays that exist
    #[arg(long)]
    reuse_external: bool,
    /// Freeze the guest's file systems
    #[arg(long, requires = "disk_only")]
    quiesce: bool,
    /// All disks or none: an instant snapshot always is
    #[arg(long)]
    atomic: bool,
    /// Keep the guest running: an instant snapshot always does
    #[arg(long)]
    live: bool,
    /// Take the snapshot of the moment of the call: the default
    #[arg(long)]
    instant: bool,
    /// Take another kind of snapshot: with --live, one of some later moment; without, one that
    /// pauses the guest until its memory is written
    #[arg(long, conflicts_with = "instant")]
    no_instant: bool,
    /// Validate the XML against libvirt's schema
    #[arg(long)]
    validate: bool,
    /// How the memory image holds the memory: raw, sparse or zstd
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    image_format: Option<Format>,
}

impl Common {
    fn is_instant(&self) -> bool {
        !self.disk_only && !self.no_instant
    }

    /// Makes it a snapshot of disks alone, which is what libvirt calls one without memory.
    fn leave_memory_out(&mut self) -> Result<()> {
        if self.instant || self.live {
            return Err(Failure::Usage(
                "--live and --instant are for snapshots with memory, and snapshot='no' leaves it \
                 out: drop one of the two"
                    .into(),
            ));
        }
        self.disk_only = true;
        Ok(())
    }

    fn bits(&self) -> u32 {
        [
            (self.no_metadata, flags::NO_METADATA),
            (self.halt, flags::HALT),
            (self.disk_only, flags::DISK_ONLY),
            (self.reuse_external, flags::REUSE_EXT),
            (self.quiesce, flags::QUIESCE),
            (self.atomic, flags::ATOMIC),
            (self.live, flags::LIVE),
            (self.validate, flags::VALIDATE),
            (self.is_instant(), flags::LIVE | flags::INSTANT),
        ]
        .iter()
        .filter(|(is_set, _)| *is_set)
        .fold(0, |bits, (_, bit)| bits | bit)
    }
}

/// `snapshot-create-as`.
#[derive(Args)]
pub struct CreateAs {
    /// The domain's name, id or UUID; for a qmp: URI, its name
    #[arg(value_name = "DOMAIN", add = ArgValueCompleter::new(complete::domains))]
    domain: Option<String>,
    /// The snapshot's name; by default the time in seconds
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// A text for people
    #[arg(value_name = "DESCRIPTION")]
    description: Option<String>,
    /// Disks, as by --diskspec
    #[arg(value_name = "DISKSPEC", hide = true)]
    disks: Vec<String>,
    #[arg(long = "domain", id = "domain-option", value_name = "DOMAIN", hide = true,
          add = ArgValueCompleter::new(complete::domains))]
    domain_option: Option<String>,
    #[arg(long = "name", id = "name-option", value_name = "NAME", hide = true)]
    name_option: Option<String>,
    #[arg(
        long = "description",
        id = "description-option",
        value_name = "DESCRIPTION",
        hide = true
    )]
    description_option: Option<String>,
    /// Show the XML instead of taking the snapshot
    #[arg(long, conflicts_with_all = ["no_metadata", "halt", "reuse_external"])]
    print_xml: bool,
    /// The memory image: [file=]FILE[,snapshot=external|no]
    #[arg(long, value_name = "MEMSPEC", value_parser = MemorySpec::parse)]
    memspec: Option<MemorySpec>,
    /// A disk that is not to have its default, and its overlay:
    /// DISK[,snapshot=external|no|manual][,driver=qcow2][,stype=file|block][,file=FILE]. A comma in
    /// a path is written twice
    #[arg(long, value_name = "DISKSPEC", value_parser = DiskSpec::parse)]
    diskspec: Vec<DiskSpec>,
    #[command(flatten)]
    common: Common,
}

impl CreateAs {
    /// Runs it.
    pub fn run(mut self, context: &Context) -> Result<()> {
        let word = |name, by_option: &mut Option<String>, is_required| Word {
            name,
            by_option: by_option.take(),
            is_required,
        };
        let words = [
            word("DOMAIN", &mut self.domain_option, true),
            word("NAME", &mut self.name_option, false),
            word("DESCRIPTION", &mut self.description_option, false),
        ];
        let given = [self.domain, self.name, self.description].into_iter().flatten();
        let ([domain, mut name, description], more) = assign(words, given.chain(self.disks))?;
        let domain = domain.unwrap_or_default();
        let mut disks = self.diskspec;
        for text in more {
            let disk = DiskSpec::parse(&text)
                .map_err(|why| Failure::Usage(format!("unexpected argument '{text}': {why}")))?;
            disks.push(disk);
        }
        let mut memory = self.memspec.unwrap_or_default();
        if memory.is_left_out() {
            self.common.leave_memory_out()?;
        } else if self.common.disk_only && memory != MemorySpec::default() {
            return Err(Failure::Usage("--disk-only leaves memory out: drop --memspec".into()));
        }
        if let Some(name) = &name {
            check_name(name)?;
        }
        let guest = context.guest(&domain)?;
        if !self.print_xml {
            check_runs(&guest, &self.common)?;
        }
        if !self.common.disk_only
            && memory.needs_file()
            && let Guest::Libvirt(managed) = &guest
        {
            let chosen = name.map_or_else(|| fresh_name(&guest), Ok)?;
            let left_out: Vec<&str> = disks
                .iter()
                .filter(|disk| matches!(disk.snapshot.as_deref(), Some("no" | "manual")))
                .map(|disk| disk.name.as_str())
                .collect();
            memory = memory_beside_disks(managed, guest.name(), &chosen, &left_out)?;
            name = Some(chosen);
        }
        let xml = spec::to_xml(name.as_deref(), description.as_deref(), &memory, &disks);
        if self.print_xml {
            return output::print(&xml);
        }
        take(&guest, &xml, &self.common, self.common.bits(), None, context)
    }
}

/// `snapshot-create`.
#[derive(Args)]
pub struct Create {
    /// The domain's name, id or UUID; for a qmp: URI, its name
    #[arg(value_name = "DOMAIN", add = ArgValueCompleter::new(complete::domains))]
    domain: Option<String>,
    /// The file with the <domainsnapshot>; - is standard input
    #[arg(value_name = "XMLFILE", value_hint = clap::ValueHint::FilePath)]
    file: Option<String>,
    #[arg(long = "domain", id = "domain-option", value_name = "DOMAIN", hide = true,
          add = ArgValueCompleter::new(complete::domains))]
    domain_option: Option<String>,
    #[arg(long = "xmlfile", id = "file-option", value_name = "XMLFILE", hide = true,
          value_hint = clap::ValueHint::FilePath)]
    file_option: Option<String>,
    /// Restore or change the metadata of a snapshot that exists
    #[arg(long,
          conflicts_with_all = ["no_metadata", "halt", "live", "instant", "image_format"])]
    redefine: bool,
    /// With --redefine, make the snapshot the current one
    #[arg(long, requires = "redefine")]
    current: bool,
    #[command(flatten)]
    common: Common,
}

impl Create {
    /// Runs it.
    pub fn run(mut self, context: &Context) -> Result<()> {
        let words = [
            Word { name: "DOMAIN", by_option: self.domain_option.take(), is_required: true },
            Word { name: "XMLFILE", by_option: self.file_option.take(), is_required: false },
        ];
        let given = [self.domain, self.file].into_iter().flatten();
        let ([domain, file], more) = assign(words, given)?;
        names::refuse(&more)?;
        let mut text = file.as_deref().map_or_else(|| Ok("<domainsnapshot/>".to_owned()), read)?;
        let found = SnapshotXml::parse(&text, &xml::GIVEN).map_err(|error| match &file {
            Some(file) => Error::new(error.code, format!("'{file}': {}", error.message)),
            None => error,
        })?;
        let memory = found.memory.as_ref().and_then(|memory| memory.snapshot.as_deref());
        if memory == Some("no") && !self.redefine {
            self.common.leave_memory_out()?;
        }
        let guest = context.guest(&domain.unwrap_or_default())?;
        let mut bits = self.common.bits();
        if self.redefine {
            bits = bits & !(flags::LIVE | flags::INSTANT) | flags::REDEFINE;
            bits |= if self.current { flags::CURRENT } else { 0 };
        } else {
            check_runs(&guest, &self.common)?;
            if let Guest::Libvirt(managed) = &guest
                && self.common.is_instant()
            {
                text = with_memory(&guest, managed, &text, found)?;
            }
        }
        take(&guest, &text, &self.common, bits, file.as_deref(), context)
    }
}

/// Reads the file of the user; `-` is standard input.
fn read(file: &str) -> Result<String> {
    let read = if file == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    read.map_err(|error| Failure::Other(format!("cannot read '{file}': {error}")))
}

/// Adds a memory image and a name to the user's XML, if it does not mention memory.
fn with_memory(guest: &Guest, managed: &Managed, text: &str, found: SnapshotXml) -> Result<String> {
    match &found.memory {
        None => {}
        Some(memory) if memory.file.is_none() => {
            return Err(Failure::Usage(
                "<memory> names no file: add file='/PATH', or leave <memory> out for the default"
                    .into(),
            ));
        }
        Some(_) => return Ok(text.to_owned()),
    }
    let left_out: Vec<&str> = found
        .disks
        .iter()
        .flatten()
        .filter(|disk| matches!(disk.snapshot.as_deref(), Some("no" | "manual")))
        .map(|disk| disk.target.as_str())
        .collect();
    let (name, is_fresh) = match found.name.as_deref() {
        Some(name) => (name.to_owned(), false),
        None => (fresh_name(guest)?, true),
    };
    check_name(&name)?;
    let memory = memory_beside_disks(managed, guest.name(), &name, &left_out)?;
    let more = spec::elements(is_fresh.then_some(name.as_str()), &memory);
    Ok(spec::inserted(text, &more).map_err(|why| Error::new(Code::XmlDetail, why))?)
}

/// A name that no snapshot of the guest has: the time in seconds, as libvirt gives it.
fn fresh_name(guest: &Guest) -> Result<String> {
    let known = guest.snapshots()?;
    let is_free = |name: &String| known.iter().all(|known| known.name != *name);
    let name = generated_names().find(is_free);
    name.ok_or_else(|| Failure::Other("no name is free: give one".into()))
}

/// The memory image beside the first disk that is snapshotted.
fn memory_beside_disks(
    managed: &Managed,
    domain: &str,
    snapshot: &str,
    left_out: &[&str],
) -> Result<MemorySpec> {
    let disks = domain::domain_disks(&managed.xml()?)?;
    let is_left_out = |disk: &domain::Disk| {
        disk.read_only
            || matches!(disk.snapshot.as_deref(), Some("no" | "manual"))
            || left_out
                .iter()
                .any(|name| *name == disk.target || Some(*name) == disk.file.as_deref())
    };
    let directory = disks
        .iter()
        .filter(|disk| disk.kind == "file" && !is_left_out(disk))
        .filter_map(|disk| Path::new(disk.file.as_deref()?).parent())
        .next();
    let Some(directory) = directory else {
        return Err(Failure::Usage(format!(
            "no disk of domain '{domain}' that is snapshotted is a file, beside which its memory \
             could be: say where it is to be, by --memspec FILE or in the XML"
        )));
    };
    let file: PathBuf = directory.join(format!("{domain}.{snapshot}.mem"));
    Ok(MemorySpec {
        file: Some(file.to_string_lossy().into_owned()),
        snapshot: Some("external".into()),
    })
}

/// Refuses memory of a domain that has none now.
fn check_runs(guest: &Guest, common: &Common) -> Result<()> {
    if let Guest::Libvirt(managed) = guest
        && !common.disk_only
        && !managed.is_active()?
    {
        return Err(Failure::Failed(Error::new(
            Code::OperationInvalid,
            format!(
                "domain '{name}' is shut off, so it has no memory: start it (virsh start {name}), \
                 or snapshot its disks alone (--disk-only)",
                name = guest.name()
            ),
        )));
    }
    Ok(())
}

/// Takes a snapshot, and reports what happens.
fn take(
    guest: &Guest,
    xml: &str,
    common: &Common,
    bits: u32,
    file: Option<&str>,
    context: &Context,
) -> Result<()> {
    let handle = guest.handle()?;
    // From now on no signal ends this process.
    let signals = Signals::notice()?;
    let (flags, format) = (CreateFlags::parse(bits), common.image_format);
    let job = handle.start(xml, flags, format, Box::new(Interval), Returns::AtOnce)?;
    let mut report: Box<dyn Report> =
        if context.json { Box::new(Lines) } else { Box::new(Text::new(context.quiet)) };
    let interrupted = follow(&job, &signals, &mut *report);
    match (job.result(), interrupted) {
        (Ok(name), interrupted) => {
            if interrupted.is_some() {
                output::warn("the snapshot was complete before it could be undone");
            }
            complete(guest, &job, &name, file, context)
        }
        (Err(error), Some(signal)) if error.code == Code::OperationAborted => {
            let message = "interrupted: the snapshot is undone, and the guest is as before";
            failed(context, Failure::Interrupted(signal, message.into()))
        }
        (Err(error), _) => failed(context, error.into()),
    }
}

/// The last line for programs.
fn failed(context: &Context, failure: Failure) -> Result<()> {
    if context.json {
        let mut event = failure.to_json();
        event["event"] = "failed".into();
        // The status tells it too.
        let _ = output::line(&event.to_string());
    }
    Err(failure)
}

fn complete(
    guest: &Guest,
    job: &Job,
    name: &str,
    file: Option<&str>,
    context: &Context,
) -> Result<()> {
    let stats = job.stats()?;
    let xml = job.xml().ok();
    let found = xml.and_then(|xml| SnapshotXml::parse(&xml, &xml::RECORDED).ok());
    let memory = found.as_ref().and_then(|found| found.external_memory());
    // The snapshot is complete, whether this can be written or not: nothing here is a failure.
    let _ = if context.json {
        output::line(&to_json(guest, name, memory, &stats).to_string())
    } else if context.quiet {
        Ok(())
    } else {
        let from = file.map(|file| format!(" from '{file}'")).unwrap_or_default();
        output::line(&format!("Domain snapshot {name} created{from}"))
    };
    Ok(())
}

fn to_json(guest: &Guest, name: &str, memory: Option<&str>, stats: &Stats) -> Value {
    let micros = |duration: Duration| duration.as_micros() as u64;
    json!({
        "event": "complete",
        "domain": guest.name(),
        "name": name,
        "memory_file": memory,
        "memory_image_bytes": stats.memory_image_bytes,
        "image_format": stats.image_format.map(Format::name),
        "disks": stats.disks,
        "paused_us": stats.paused.map(|(paused, _)| micros(paused)),
        "instant_us": stats.instant.map(micros),
        "total_us": micros(stats.total),
        "watchdog": match stats.watchdog {
            WatchdogKind::None => "none",
            WatchdogKind::Fork => "fork",
            WatchdogKind::Program => "program",
        },
    })
}
