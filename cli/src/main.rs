// SPDX-License-Identifier: LGPL-2.1-or-later

//! The `instantsnap` command: snapshots for people who type virsh, and for their scripts.
//!
//! ```text
//! main        the command line, and the exit status
//!  ├ snapshot    the commands for snapshots, spelled as virsh spells them
//!  ├ image, recover, doctor, daemon    the other commands
//!  ├ complete, man    what the shells and man show
//!  ├ guest    a domain of libvirt's, or a QEMU with a QMP socket
//!  └ uri, signals, output, examples, failure
//! ```

mod complete;
mod daemon;
mod doctor;
mod examples;
mod failure;
mod guest;
mod image;
mod man;
mod output;
mod recover;
mod signals;
mod snapshot;
mod uri;

use std::env;
use std::io::Write;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use complete::Complete;
use daemon::Daemon;
use doctor::Doctor;
use failure::{Failure, Result, most_like};
use guest::Guest;
use image::Image;
use recover::Recover;
use snapshot::Snapshot;
use uri::Uri;

/// Instant snapshots of running virtual machines
///
/// A snapshot of a running guest, memory and disks, taken at the moment of the call: the guest is
/// paused for milliseconds, and runs on while its memory is written. The commands for snapshots are
/// those of virsh.
#[derive(Parser)]
#[command(name = "instantsnap", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Topic,
}

#[derive(Args)]
struct Global {
    /// Where the guest is: libvirt's URI, or qmp:///SOCKET?state=DIR[&domain=FILE]
    ///
    /// It is a URI of libvirt's (qemu:///system), or qmp:///PATH/TO/SOCKET?state=DIR[&domain=FILE]
    /// for a QEMU without libvirt: with its QMP socket, the directory for the metadata of its
    /// snapshots, and the file with its <domain> XML. The default is $LIBVIRT_DEFAULT_URI, or else
    /// what libvirt chooses.
    #[arg(short, long, global = true, value_name = "URI", value_parser = Uri::parse)]
    connect: Option<Uri>,
    /// Show JSON, for programs
    #[arg(long, global = true)]
    json: bool,
    /// Show only what was asked for, no messages and no progress
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Topic {
    #[command(flatten)]
    Snapshot(Snapshot),
    /// Look at memory images, and convert them
    #[command(subcommand)]
    Image(Image),
    /// Finish or undo a snapshot whose processes were killed
    ///
    /// That is so after a crash of the host, or if both the process that took the snapshot and its
    /// watchdog were killed. What cannot be proved is left as it is, and named.
    #[command(after_help = examples::of("recover"))]
    Recover(Recover),
    /// Say whether instant snapshots of a domain, or on this host, work, and what helps if not
    ///
    /// Each check is a line that begins with PASS, WARN (it works, but could be better), FAIL (it
    /// does not work) or SKIP (it could not be checked); a line below says what helps. Nothing is
    /// changed. The exit status is 0 if no check failed.
    #[command(after_help = examples::of("doctor"))]
    Doctor(Doctor),
    /// Instant snapshots for every client of libvirt's daemon, by way of the daemon itself
    #[command(subcommand)]
    Daemon(Daemon),
    /// What a shell offers when the user presses Tab
    #[command(hide = true)]
    Complete(Complete),
    /// Show the man page's source
    #[command(hide = true)]
    Man,
}

/// What holds for all commands.
pub struct Context {
    uri: Option<Uri>,
    /// Whether a program reads the output.
    pub json: bool,
    /// Whether the user wants no messages.
    pub quiet: bool,
}

impl Context {
    /// The guest of this name.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        match &self.uri {
            Some(uri) => Guest::open(Some(uri), name),
            None => Guest::open(default_uri()?.as_ref(), name),
        }
    }
}

/// The URI in the environment.
fn default_uri() -> Result<Option<Uri>> {
    const NAME: &str = "LIBVIRT_DEFAULT_URI";
    let Some(text) = env::var_os(NAME).filter(|text| !text.is_empty()) else { return Ok(None) };
    let text = text.to_string_lossy();
    Uri::parse(&text)
        .map(Some)
        .map_err(|why| Failure::Usage(format!("invalid value '{text}' of {NAME}: {why}")))
}

fn main() -> ExitCode {
    let matches = match Cli::command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => with_advice(error).exit(),
    };
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let is_json = cli.global.json;
    match run(cli) {
        Ok(status) => status,
        Err(failure) => {
            if is_json {
                let _ = writeln!(std::io::stderr().lock(), "{}", failure.to_json());
            } else if let Failure::Usage(message) = &failure {
                usage(&matches, message);
            } else {
                output::warn(failure.message());
            }
            failure.status()
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let Global { connect, json, quiet } = cli.global;
    let context = Context { uri: connect, json, quiet };
    let done = match cli.command {
        Topic::Snapshot(command) => snapshot::run(command, &context),
        Topic::Image(command) => image::run(command, &context),
        Topic::Recover(command) => command.run(&context),
        Topic::Doctor(command) => command.run(&context),
        Topic::Daemon(_) if json => Err(Failure::Usage("daemon has no --json".into())),
        Topic::Daemon(command) => return daemon::run(command).map_err(Failure::Other),
        Topic::Complete(command) => command.run(),
        Topic::Man => man::show(Cli::command()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Reports wrong use as clap does, with the usage of the command.
fn usage(matches: &ArgMatches, message: &str) {
    let mut command = Cli::command();
    command.build();
    let (mut at, mut matches) = (&mut command, matches);
    while let Some((name, sub)) = matches.subcommand() {
        match at.find_subcommand_mut(name) {
            // A borrow of the one above ends here.
            Some(_) => at = at.find_subcommand_mut(name).expect("it was found"),
            None => break,
        }
        matches = sub;
    }
    let _ = at.error(ErrorKind::ValueValidation, message).print();
}

/// Says what to type instead of a command that does not exist.
fn with_advice(mut error: clap::Error) -> clap::Error {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return error;
    }
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else {
        return error;
    };
    let instead = match word.as_str() {
        "create" | "take" | "snapshot" | "create-as" | "snap" => "snapshot-create-as DOMAIN NAME",
        "list" | "ls" | "snapshots" => "snapshot-list DOMAIN",
        "revert" | "restore" | "snapshot-restore" => "snapshot-revert DOMAIN SNAPSHOT",
        "delete" | "remove" | "rm" | "snapshot-remove" => "snapshot-delete DOMAIN SNAPSHOT",
        "info" | "show" | "snapshot-show" => "snapshot-info DOMAIN SNAPSHOT",
        "verify" | "check" => "image verify FILE",
        "convert" => "image convert -O FORMAT FILE",
        "enable" | "disable" | "status" => "daemon status",
        _ if error.get(ContextKind::SuggestedSubcommand).is_none() => {
            let tip = format!("virsh has the commands for domains: virsh {word}");
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
            return error;
        }
        word => {
            // clap names all that are a little like it.
            let command = Cli::command();
            let names = command.get_subcommands().filter(|sub| !sub.is_hide_set());
            let names: Vec<&str> = names.map(|sub| sub.get_name()).collect();
            if let Some(like) = most_like(word, names) {
                let like = ContextValue::String(like.to_owned());
                error.insert(ContextKind::SuggestedSubcommand, like);
            }
            return error;
        }
    };
    let tip = format!("type 'instantsnap {instead}'");
    error.remove(ContextKind::SuggestedSubcommand);
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}
