// SPDX-License-Identifier: LGPL-2.1-or-later

//! `instantsnap daemon`: puts the library into libvirt's daemon, and takes it out.

mod dropin;
mod library;
mod process;
mod root;
mod systemctl;
mod units;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use dropin::DropIn;
use library::Kind;
use process::Mapped;
use root::Root;
use systemctl::systemctl;

/// A result with an error message for the user.
type Result<T> = std::result::Result<T, String>;

/// What to do with the daemon.
#[derive(Subcommand)]
pub enum Daemon {
    /// Make systemd start the daemon with libinstantsnap-preload.so
    Enable {
        #[command(flatten)]
        place: Place,
        /// The library's absolute path; by default that of the installed one. With --root, the path
        /// is as that system sees it, without the directory
        #[arg(long, value_name = "PATH")]
        library: Option<PathBuf>,
        /// Make LIVE external snapshots with memory instant too, for clients that cannot ask for
        /// INSTANT
        #[arg(long)]
        upgrade_live: bool,
        /// How many instant snapshots can be taken at once (10); stay below the daemon's
        /// max_workers
        #[arg(long, value_name = "NUMBER")]
        max_snapshots: Option<u32>,
        /// Restart the daemon; guests run on
        #[arg(long)]
        now: bool,
    },
    /// Undo `enable`
    Disable {
        #[command(flatten)]
        place: Place,
        /// Restart the daemon; guests run on
        #[arg(long)]
        now: bool,
    },
    /// Show whether the daemon is set up to have the library, and whether the running one has it.
    /// Exits with 0 if both are so, and with 3 if not, or if another file of the unit overrides
    /// ours
    Status {
        #[command(flatten)]
        place: Place,
        /// Check this process, instead of all with the unit's name
        #[arg(long)]
        pid: Option<u32>,
    },
}

/// A daemon.
#[derive(Args)]
pub struct Place {
    /// Which daemon
    #[arg(long, value_enum, default_value = "libvirtd")]
    unit: Unit,
    /// The directory of a system's image, instead of /; nothing is reloaded or restarted then
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
}

impl Place {
    fn open(&self) -> Result<Root> {
        Root::open(&self.root).map_err(|error| format!("{}: {error}", self.root.display()))
    }
}

/// A daemon of libvirt's.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Unit {
    /// The one daemon for everything
    Libvirtd,
    /// The daemon for QEMU only
    Virtqemud,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Libvirtd => "libvirtd",
            Unit::Virtqemud => "virtqemud",
        }
    }
}

/// Runs the command.
pub fn run(command: Daemon) -> Result<ExitCode> {
    match command {
        Daemon::Enable { place, library, upgrade_live, max_snapshots, now } => {
            enable(&place, library.as_deref(), upgrade_live, max_snapshots, now)
                .map(|()| ExitCode::SUCCESS)
        }
        Daemon::Disable { place, now } => disable(&place, now).map(|()| ExitCode::SUCCESS),
        Daemon::Status { place, pid } => status(&place, pid),
    }
}

fn enable(
    place: &Place,
    library: Option<&Path>,
    upgrade_live: bool,
    max_snapshots: Option<u32>,
    now: bool,
) -> Result<()> {
    let root = place.open()?;
    let library = match library {
        Some(library) => library.to_owned(),
        None => library::installed(&root)?,
    };
    library::check(&root, &library)?;
    let unit = place.unit.name();
    let preload = units::preload(&root, unit)?;
    if let Some(why) = preload.overridden {
        return Err(why);
    }
    let drop_in = DropIn::of(&root, unit);
    // A drop-in of an earlier version is replaced. If another file preloads that version's library,
    // ours takes its place.
    let others = library::others(&preload.others);
    drop_in.write(&others, &library, upgrade_live, max_snapshots)?;
    println!("{unit} will be started with {} ({})", library.display(), drop_in.path().display());
    take_effect(&root, unit, now)
}

fn disable(place: &Place, now: bool) -> Result<()> {
    let (root, unit) = (place.open()?, place.unit.name());
    let drop_in = DropIn::of(&root, unit);
    if !drop_in.remove()? {
        println!(
            "{unit} is not to be started with libinstantsnap: there is no {}",
            drop_in.path().display()
        );
        return Ok(());
    }
    println!("{unit} will be started without it again ({} is removed)", drop_in.path().display());
    take_effect(&root, unit, now)
}

/// Makes systemd read the change. The running daemon stays as it is until it is restarted.
fn take_effect(root: &Root, unit: &str, now: bool) -> Result<()> {
    let systemd_runs = root.is_own() && Path::new("/run/systemd/system").is_dir();
    if !systemd_runs {
        println!("systemd does not run here: this holds from the daemon's next start by systemd");
        return Ok(());
    }
    systemctl(&["daemon-reload"])?;
    if now {
        systemctl(&["restart", unit])?;
        println!("{unit} was restarted; guests run on");
    } else {
        println!("restart it for that to take effect: systemctl restart {unit} (guests run on)");
    }
    Ok(())
}

/// The advice for a daemon that an earlier version has enabled.
const FORMER: &str = "that is the library for programs, with which a daemon takes no instant \
                      snapshots any more, and which is passed on to QEMU: run `instantsnap daemon \
                      enable` with the options that it had, and restart the daemon";

/// Whether a list of preloaded libraries has a library of this kind.
fn preloads(list: &str, kind: Kind) -> bool {
    list.split([':', ' ']).any(|library| Kind::of(library) == Some(kind))
}

fn status(place: &Place, pid: Option<u32>) -> Result<ExitCode> {
    let (root, unit) = (place.open()?, place.unit.name());
    let drop_in = DropIn::of(&root, unit);
    let wanted = drop_in.library()?;
    let is_former = wanted.as_ref().is_some_and(|list| !preloads(list, Kind::Preload));
    match &wanted {
        Some(library) => {
            println!("{unit} is to be started with {library} ({})", drop_in.path().display());
            if is_former {
                println!("{FORMER}");
            }
        }
        None => println!(
            "{unit} is not to be started with libinstantsnap: there is no {}",
            drop_in.path().display()
        ),
    }
    let overridden = if wanted.is_some() { units::preload(&root, unit)?.overridden } else { None };
    if let Some(why) = &overridden {
        println!("that has no effect: {why}");
    }
    let pids = match pid {
        Some(pid) => vec![pid],
        None => process::called(unit),
    };
    if pids.is_empty() {
        println!("{unit} does not run");
    }
    let mut all_have = !pids.is_empty();
    for pid in pids {
        match process::mapped(pid)? {
            Some(Mapped { kind: Kind::Preload, shown }) => println!("process {pid} has {shown}"),
            Some(Mapped { kind: Kind::Former, shown }) => {
                all_have = false;
                println!("process {pid} has {shown}: {FORMER}");
            }
            None => {
                all_have = false;
                println!("process {pid} does not have it: restart it");
            }
        }
    }
    let will_have = wanted.is_some() && !is_former && overridden.is_none();
    Ok(if will_have && all_have { ExitCode::SUCCESS } else { ExitCode::from(3) })
}
