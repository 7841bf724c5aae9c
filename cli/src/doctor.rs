// SPDX-License-Identifier: LGPL-2.1-or-later

//! `doctor`: says whether instant snapshots work, and what to do where they do not.

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use instantsnap_core::engine::{Finding, Verdict, doctor_report, examine_host};
use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::{Context, complete, output};

/// `doctor`.
#[derive(Args)]
pub struct Doctor {
    /// The domain's name, id or UUID; for a qmp: URI, its name. Without it this host is examined
    #[arg(add = ArgValueCompleter::new(complete::domains))]
    domain: Option<String>,
}

impl Doctor {
    /// Runs it.
    pub fn run(self, context: &Context) -> Result<()> {
        let found = match &self.domain {
            Some(domain) => context.guest(domain)?.handle()?.examine(),
            None => examine_host(),
        };
        if context.json {
            let report: Value = serde_json::from_str(&doctor_report(&found))
                .map_err(|error| Failure::Other(error.to_string()))?;
            output::json(&report)?;
        } else {
            let is_shown = |found: &&Finding| !context.quiet || found.verdict == Verdict::Fail;
            output::print(&found.iter().filter(is_shown).map(shown).collect::<String>())?;
        }
        match found.iter().filter(|found| found.verdict == Verdict::Fail).count() {
            0 => Ok(()),
            1 => Err(Failure::Other("1 check failed: instant snapshots do not work".into())),
            failed => Err(Failure::Other(format!(
                "{failed} checks failed: instant snapshots do not work"
            ))),
        }
    }
}

/// A line for the check, and one for what helps.
fn shown(found: &Finding) -> String {
    let verdict = match found.verdict {
        Verdict::Pass => "PASS",
        Verdict::Warn => "WARN",
        Verdict::Fail => "FAIL",
        Verdict::Skip => "SKIP",
    };
    let of = if found.object.is_empty() { String::new() } else { format!(" {}", found.object) };
    let line = format!("{verdict}  {}{of}: {}\n", found.check, found.message);
    match found.remedy.as_str() {
        "" => line,
        remedy => format!("{line}      {remedy}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_and_its_remedy_another() {
        let mut found = Finding {
            check: "disk",
            verdict: Verdict::Pass,
            object: "vda".into(),
            message: "it can be switched".into(),
            remedy: String::new(),
        };
        assert_eq!(shown(&found), "PASS  disk vda: it can be switched\n");
        (found.verdict, found.object) = (Verdict::Fail, String::new());
        found.remedy = "sysctl -w x=1".into();
        assert_eq!(shown(&found), "FAIL  disk: it can be switched\n      sysctl -w x=1\n");
    }
}
