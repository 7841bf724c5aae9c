// SPDX-License-Identifier: LGPL-2.1-or-later

//! The words of a command line that are no options. As with virsh, each of them can be given by an
//! option too (`--domain vm1`), and those that are left then move up.

use clap::Args;
use clap_complete::engine::ArgValueCompleter;

use crate::complete;
use crate::failure::{Failure, Result};

/// A word: its name in messages, what an option has given for it, and whether it must be given.
pub struct Word {
    /// `DOMAIN`.
    pub name: &'static str,
    /// The value of its option.
    pub by_option: Option<String>,
    /// Whether it must be given.
    pub is_required: bool,
}

/// Distributes the words that are given without options.
pub fn assign<const N: usize>(
    words: [Word; N],
    given: impl IntoIterator<Item = String>,
) -> Result<([Option<String>; N], Vec<String>)> {
    let mut given = given.into_iter();
    let mut missing = None;
    let found = words.map(|Word { name, by_option, is_required }| {
        let found = by_option.or_else(|| given.next());
        match &found {
            Some(text) if text.is_empty() => missing = Some(format!("{name} is empty")),
            None if is_required => missing = Some(format!("{name} is missing")),
            _ => {}
        }
        found
    });
    match missing {
        Some(what) => Err(Failure::Usage(what)),
        None => Ok((found, given.collect())),
    }
}

/// Refuses words that no place is left for.
pub fn refuse(more: &[String]) -> Result<()> {
    match more.first() {
        Some(word) => Err(Failure::Usage(format!("unexpected argument '{word}'"))),
        None => Ok(()),
    }
}

/// `DOMAIN`.
#[derive(Args)]
pub struct DomainWord {
    /// The domain's name, id or UUID; for a qmp: URI, its name
    #[arg(value_name = "DOMAIN", add = ArgValueCompleter::new(complete::domains))]
    domain: Option<String>,
    #[arg(long = "domain", id = "domain-option", value_name = "DOMAIN", hide = true,
          add = ArgValueCompleter::new(complete::domains))]
    domain_option: Option<String>,
}

impl DomainWord {
    /// The domain.
    pub fn get(&self) -> Result<String> {
        let word =
            Word { name: "DOMAIN", by_option: self.domain_option.clone(), is_required: true };
        let ([domain], more) = assign([word], self.domain.clone())?;
        refuse(&more)?;
        Ok(domain.unwrap_or_default())
    }
}

/// `DOMAIN SNAPSHOT`.
#[derive(Args)]
pub struct SnapshotWords {
    #[command(flatten)]
    domain: DomainWord,
    /// The snapshot's name
    #[arg(value_name = "SNAPSHOT", add = ArgValueCompleter::new(complete::snapshots))]
    snapshot: Option<String>,
    #[arg(long = "snapshotname", id = "snapshot-option", value_name = "SNAPSHOT", hide = true,
          add = ArgValueCompleter::new(complete::snapshots))]
    snapshot_option: Option<String>,
}

impl SnapshotWords {
    /// The domain and the snapshot, if one is named.
    pub fn get(&self, is_required: bool) -> Result<(String, Option<String>)> {
        let domain = Word {
            name: "DOMAIN",
            by_option: self.domain.domain_option.clone(),
            is_required: true,
        };
        let snapshot =
            Word { name: "SNAPSHOT", by_option: self.snapshot_option.clone(), is_required };
        let given = self.domain.domain.iter().chain(&self.snapshot).cloned();
        let ([domain, snapshot], more) = assign([domain, snapshot], given)?;
        refuse(&more)?;
        Ok((domain.unwrap_or_default(), snapshot))
    }
}

/// `DOMAIN {SNAPSHOT | --current}`.
#[derive(Args)]
pub struct OneSnapshot {
    #[command(flatten)]
    words: SnapshotWords,
    /// The current snapshot
    #[arg(long)]
    current: bool,
}

impl OneSnapshot {
    /// The domain, and the snapshot unless it is the current one.
    pub fn get(&self) -> Result<(String, Option<String>)> {
        let (domain, snapshot) = self.words.get(false)?;
        match (&snapshot, self.current) {
            (Some(name), true) => {
                Err(Failure::Usage(format!("either '{name}' or --current, and not both")))
            }
            (None, false) => {
                Err(Failure::Usage("SNAPSHOT is missing: name it, or say --current".into()))
            }
            _ => Ok((domain, snapshot)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(domain: Option<&str>, snapshot: Option<&str>) -> [Word; 2] {
        [("DOMAIN", domain), ("SNAPSHOT", snapshot)].map(|(name, by_option)| Word {
            name,
            by_option: by_option.map(str::to_owned),
            is_required: true,
        })
    }

    #[test]
    fn words_move_up_where_an_option_has_taken_their_place() {
        let given = |given: &[&str]| given.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let both = [Some("vm".to_owned()), Some("s".to_owned())];
        for (domain, snapshot, rest) in [
            (None, None, given(&["vm", "s"])),
            (Some("vm"), None, given(&["s"])),
            (None, Some("s"), given(&["vm"])),
            (Some("vm"), Some("s"), given(&[])),
        ] {
            let (found, more) = assign(words(domain, snapshot), rest).unwrap();
            assert_eq!(found, both);
            assert!(more.is_empty());
        }
        let (_, more) = assign(words(Some("vm"), None), given(&["s", "t"])).unwrap();
        assert!(refuse(&more).unwrap_err().message().contains("'t'"));
        let missing = assign(words(Some("vm"), None), given(&[])).unwrap_err();
        assert_eq!(missing.message(), "SNAPSHOT is missing");
        let empty = assign(words(Some(""), None), given(&["s"])).unwrap_err();
        assert_eq!(empty.message(), "DOMAIN is empty");
    }
}
