// SPDX-License-Identifier: LGPL-2.1-or-later

//! What a shell offers when the user presses Tab: commands and options, domains and snapshots.
//!
//! The shells' scripts (`cli/completions/`) run `instantsnap complete`. It asks nobody for a
//! password: it connects only to this machine's libvirt, read-only, and waits for a short time.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;
use std::{env, fs, thread};

use clap::{ArgMatches, Args, CommandFactory, ValueEnum};
use clap_complete::engine::{CompletionCandidate, complete};
use instantsnap_core::backend::SnapshotList;
use instantsnap_core::libvirt::{self, Connect, Snapshot};
use instantsnap_core::model::{self, Store};

use crate::failure::{Failure, Result};
use crate::uri::Uri;
use crate::{Cli, output};

/// How long the user waits for a list of names.
const PATIENCE: Duration = Duration::from_secs(2);

/// The words of the command line that is being completed, without the one that is.
static WORDS: OnceLock<Vec<OsString>> = OnceLock::new();

/// `complete`.
#[derive(Args)]
pub struct Complete {
    shell: Shell,
    /// The index of the word that is being completed
    index: usize,
    #[arg(last = true)]
    words: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Complete {
    /// Runs it.
    pub fn run(self) -> Result<()> {
        let Line { words, index, offered_from } = match self.shell {
            Shell::Bash => Line::of_bash(&self.words, self.index),
            _ => Line { words: self.words, index: self.index, offered_from: 0 },
        };
        let mut before = words.clone();
        if index < before.len() {
            before.remove(index);
        }
        let _ = WORDS.set(before);
        let found = complete(&mut Cli::command(), words, index, env::current_dir().ok().as_deref())
            .map_err(|error| Failure::Other(error.to_string()))?;
        let lines = found.iter().filter_map(|candidate| {
            let value = candidate.get_value().to_str()?;
            let help = candidate.get_help().map(ToString::to_string).unwrap_or_default();
            let help = help.lines().next().unwrap_or_default();
            Some(match self.shell {
                Shell::Bash => format!("{}\n", quoted(value.get(offered_from..)?)),
                Shell::Zsh => {
                    format!("{}:{help}\n", value.replace('\\', "\\\\").replace(':', "\\:"))
                }
                Shell::Fish => format!("{value}\t{help}\n"),
            })
        });
        output::print(&lines.collect::<String>())
    }
}

/// A command line, and the word of it that is being completed.
struct Line {
    words: Vec<OsString>,
    index: usize,
    /// The shell knows this many bytes of the word already.
    offered_from: usize,
}

impl Line {
    /// bash ends words at each `:` and `=`, which are words of their own then, and keeps quotes.
    fn of_bash(given: &[OsString], index: usize) -> Line {
        let is_break = |word: &OsString| {
            !word.is_empty() && word.as_encoded_bytes().iter().all(|b| b":=".contains(b))
        };
        let mut line = Line { words: Vec::new(), index: 0, offered_from: 0 };
        let mut joins = false;
        for (number, word) in given.iter().enumerate() {
            let breaks = is_break(word) && number > 0;
            let text = unquoted(word);
            match line.words.last_mut().filter(|_| breaks || joins) {
                Some(last) => {
                    if number == index {
                        line.offered_from = last.len() + if breaks { text.len() } else { 0 };
                    }
                    last.push(text);
                }
                None => line.words.push(text),
            }
            // A break that ends a word before another word looks like one within a word.
            joins = breaks;
            if number == index {
                line.index = line.words.len() - 1;
            }
        }
        line
    }
}

/// A word without the shell's quotes.
fn unquoted(word: &OsStr) -> OsString {
    let Some(text) = word.to_str() else { return word.to_owned() };
    let (mut plain, mut quote, mut letters) = (String::new(), None, text.chars());
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (None, '\'' | '"') => quote = Some(letter),
            (Some(open), close) if open == close => quote = None,
            (None | Some('"'), '\\') => plain.extend(letters.next()),
            _ => plain.push(letter),
        }
    }
    plain.into()
}

/// A word for bash.
fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_alphanumeric() || "-_./=:@%+,".contains(letter);
    let escaped =
        |letter| if is_plain(letter) { letter.to_string() } else { format!("\\{letter}") };
    word.chars().map(escaped).collect()
}

/// The names of the domains.
pub fn domains(current: &OsStr) -> Vec<CompletionCandidate> {
    let Some(matches) = matches() else { return Vec::new() };
    if sub(&matches).is_some_and(|sub| text(sub, "domain-option").is_some()) {
        // The first word is the snapshot then.
        return snapshots(current);
    }
    candidates(current, move || match uri(&matches)? {
        Uri::Qmp(place) => {
            let xml = fs::read_to_string(place.domain?).ok()?;
            Some(vec![model::Domain::parse(&xml).ok()?.name])
        }
        Uri::Libvirt(uri) => {
            let domains = connect(&uri)?.domains().ok()?;
            Some(domains.iter().filter_map(|domain| domain.name().ok()).collect())
        }
    })
}

/// The names of the domain's snapshots.
pub fn snapshots(current: &OsStr) -> Vec<CompletionCandidate> {
    let Some(matches) = matches() else { return Vec::new() };
    candidates(current, move || match uri(&matches)? {
        Uri::Qmp(place) => Store::open(&place.state).ok()?.names().ok(),
        Uri::Libvirt(uri) => {
            let sub = sub(&matches)?;
            let name = text(sub, "domain-option").or_else(|| text(sub, "domain"))?;
            let domains = connect(&uri)?.domains().ok()?;
            let named =
                domains.iter().find(|domain| domain.name().is_ok_and(|known| known == name))?;
            Some(named.snapshots().ok()?.iter().map(Snapshot::name).collect())
        }
    })
}

fn candidates(
    current: &OsStr,
    list: impl FnOnce() -> Option<Vec<String>> + Send + 'static,
) -> Vec<CompletionCandidate> {
    let (sender, receiver) = channel();
    // If it does not answer in time, this process ends before it.
    thread::spawn(move || sender.send(list()));
    let names = receiver.recv_timeout(PATIENCE).ok().flatten().unwrap_or_default();
    let current = current.to_str().unwrap_or_default();
    names
        .into_iter()
        .filter(|name| name.starts_with(current))
        .map(CompletionCandidate::new)
        .collect()
}

/// The command line, as far as it makes sense already.
fn matches() -> Option<ArgMatches> {
    Cli::command().ignore_errors(true).try_get_matches_from(WORDS.get()?).ok()
}

fn sub(matches: &ArgMatches) -> Option<&ArgMatches> {
    matches.subcommand().map(|(_, sub)| sub)
}

fn text(matches: &ArgMatches, id: &str) -> Option<String> {
    matches.try_get_one::<String>(id).ok().flatten().cloned()
}

fn uri(matches: &ArgMatches) -> Option<Uri> {
    let named = matches.try_get_one::<Uri>("connect").ok().flatten().cloned();
    named.or_else(|| crate::default_uri().ok().flatten()).or_else(|| {
        let is_root = rustix::process::geteuid().is_root();
        let usual = if is_root { "qemu:///system" } else { "qemu:///session" };
        Some(Uri::Libvirt(configured().unwrap_or_else(|| usual.to_owned())))
    })
}

/// The default URI in the configuration of libvirt's clients.
fn configured() -> Option<String> {
    let config = env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".config")));
    let own = config.map(|config| config.join("libvirt/libvirt.conf"));
    let file = match rustix::process::geteuid().is_root() {
        true => Some(PathBuf::from("/etc/libvirt/libvirt.conf")),
        false => own,
    };
    let text = fs::read_to_string(file?).ok()?;
    let value = |line: &str| {
        let value = line.trim().strip_prefix("uri_default")?.trim_start().strip_prefix('=')?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    text.lines().find_map(value)
}

/// A read-only connection to this machine's libvirt.
fn connect(uri: &str) -> Option<Connect> {
    if !is_local(uri) {
        return None;
    }
    libvirt::silence().ok()?;
    Connect::open_read_only(uri).ok()?.ok()
}

/// Whether a URI is of this machine, and not by a transport that may ask for a password.
fn is_local(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let is_direct = scheme.split_once('+').is_none_or(|(_, transport)| transport == "unix");
    is_direct && rest.starts_with('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_bash(words: &[&str], index: usize) -> (Vec<OsString>, usize, usize) {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let Line { words, index, offered_from } = Line::of_bash(&words, index);
        (words, index, offered_from)
    }

    #[test]
    fn words_that_bash_has_split_are_joined_again() {
        let uri = ["x", "-c", "qmp", ":", "///s?state", "=", "/d", "snapshot-info", ""];
        let (words, index, from) = of_bash(&uri, 8);
        assert_eq!(words, ["x", "-c", "qmp:///s?state=/d", "snapshot-info", ""]);
        assert_eq!((index, from), (4, 0));
        let (words, index, from) = of_bash(&["x", "list", "--from", "=", "be"], 4);
        assert_eq!(words, ["x", "list", "--from=be"]);
        assert_eq!((index, from), (2, "--from=".len()));
        let (words, index, from) = of_bash(&["x", "list", "--from", "="], 3);
        assert_eq!(words, ["x", "list", "--from="]);
        assert_eq!((index, from), (2, "--from=".len()));
        let (words, ..) = of_bash(&["x", "'a:b c'", "d\\ e", "\"f'\""], 0);
        assert_eq!(words, ["x", "a:b c", "d e", "f'"]);
    }

    #[test]
    fn names_are_quoted_for_bash() {
        assert_eq!(quoted("before-upgrade"), "before-upgrade");
        assert_eq!(quoted("a b*"), "a\\ b\\*");
    }

    #[test]
    fn only_this_machine_is_asked_for_names() {
        for local in ["qemu:///system", "qemu+unix:///session?socket=/s", "test:///default"] {
            assert!(is_local(local), "{local}");
        }
        for other in ["qemu+ssh://host/system", "qemu://host/system", "qemu+tls:///system", "x"] {
            assert!(!is_local(other), "{other}");
        }
    }
}
