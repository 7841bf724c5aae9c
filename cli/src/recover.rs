// SPDX-License-Identifier: LGPL-2.1-or-later

//! `recover`: finishes or undoes a snapshot whose processes were killed.

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use instantsnap_core::engine::{recover_offline, recovery_report};
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::guest::Guest;
use crate::signals::uninterrupted;
use crate::{Context, complete, output};

/// `recover`.
#[derive(Args)]
pub struct Recover {
    /// The domain's name, id or UUID; for a qmp: URI, its name
    #[arg(add = ArgValueCompleter::new(complete::domains))]
    domain: String,
    /// QEMU has ended, and is not started again yet (qmp: URIs only)
    #[arg(long)]
    offline: bool,
}

impl Recover {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let guest = context.guest(&self.domain)?;
        let found = match &guest {
            Guest::Qmp(direct) if self.offline => {
                uninterrupted("a recovery", || Ok(recover_offline(direct.store().directory())?))?
            }
            Guest::Libvirt(_) if self.offline => {
                return Err(Failure::Usage("--offline is for qmp: URIs".into()));
            }
            _ => uninterrupted("a recovery", || Ok(guest.handle()?.recover()?))?,
        };
        let report: Value = serde_json::from_str(&recovery_report(&found))
            .map_err(|error| Failure::Other(error.to_string()))?;
        if context.json {
            output::json(&report)?;
        } else if !context.quiet {
            output::print(&shown(&report, guest.name()))?;
        }
        match found.iter().find(|found| found.blocks) {
            None => Ok(()),
            Some(left) => Err(Failure::Other(format!(
                "the guest's next snapshot is refused until this is settled: {left}"
            ))),
        }
    }
}

fn shown(report: &Value, domain: &str) -> String {
    let found = report.as_array().map(Vec::as_slice).unwrap_or_default();
    if found.is_empty() {
        return format!("No snapshot of domain {domain} was interrupted\n");
    }
    let line = |found: &Value| {
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        let of = match text("snapshot").as_str() {
            "" => String::new(),
            snapshot => format!(" of snapshot {snapshot}"),
        };
        let (action, what, object) = (text("action"), text("what"), text("object"));
        format!("{action}: {what} '{object}'{of}: {}\n", text("why"))
    };
    found.iter().map(line).collect()
}
