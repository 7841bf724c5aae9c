// SPDX-License-Identifier: LGPL-2.1-or-later

//! The `instantsnap` command.

mod daemon;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use daemon::Daemon;

/// Instant snapshots of running virtual machines.
#[derive(Parser)]
#[command(name = "instantsnap", version)]
struct Cli {
    #[command(subcommand)]
    command: Topic,
}

#[derive(Subcommand)]
enum Topic {
    /// Instant snapshots for every client of libvirt's daemon, by way of the daemon itself
    #[command(subcommand)]
    Daemon(Daemon),
}

fn main() -> ExitCode {
    let Topic::Daemon(command) = Cli::parse().command;
    daemon::run(command).unwrap_or_else(|error| {
        eprintln!("instantsnap: {error}");
        ExitCode::FAILURE
    })
}
