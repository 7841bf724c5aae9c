// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads a unit's environment from its files.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::Result;
use super::root::Root;

/// The name of our drop-in.
pub const OURS: &str = "instantsnap.conf";

const VARIABLE: &str = "LD_PRELOAD";

/// systemd's directories, the one with the highest precedence last.
const DIRECTORIES: [&str; 5] = [
    "lib/systemd/system",
    "usr/lib/systemd/system",
    "usr/local/lib/systemd/system",
    "run/systemd/system",
    "etc/systemd/system",
];

/// The libraries that a unit preloads, by all files except ours.
pub struct Preload {
    /// The value that comes before ours, and stays preloaded.
    pub others: String,
    /// Why our drop-in has no effect, and what to do about it.
    pub overridden: Option<String>,
}

/// Reads a unit's environment as systemd does: `Environment=` of all files in their order, then the
/// files that any `EnvironmentFile=` names, and last any `UnsetEnvironment=`. An empty value
/// cancels the earlier values of the same setting.
pub fn preload(root: &Root, unit: &str) -> Result<Preload> {
    let (mut others, mut overridden, mut unset, mut named) =
        (String::new(), None, None, Vec::new());
    for (file, is_after_ours) in files(root, unit) {
        let shown = root.shown(&file);
        let shown = shown.display();
        let moved = format!(
            "and comes after {OURS}: remove that, or give the file a name that comes before"
        );
        for (name, value) in settings(&read(root, &file)?) {
            match (name.as_str(), value.is_empty()) {
                ("Environment", true) if is_after_ours => {
                    overridden = Some(format!(
                        "{shown} empties the environment of {unit} (Environment=), {moved}"
                    ));
                }
                ("Environment", true) => others.clear(),
                ("Environment", false) => match preload_in(&value) {
                    Some(_) if is_after_ours => {
                        overridden = Some(format!("{shown} sets {VARIABLE} for {unit}, {moved}"));
                    }
                    Some(preload) => others = preload,
                    None => {}
                },
                ("EnvironmentFile", true) => named.clear(),
                ("EnvironmentFile", false) => named.push(value.trim_start_matches('-').to_owned()),
                ("UnsetEnvironment", true) => unset = None,
                ("UnsetEnvironment", false)
                    if words(&value)
                        .iter()
                        .any(|word| word == VARIABLE || assigned(word).is_some()) =>
                {
                    unset = Some(format!(
                        "{shown} unsets {VARIABLE} for {unit} (UnsetEnvironment=), whichever file sets \
                         it: remove that"
                    ));
                }
                _ => {}
            }
        }
    }
    let sets = |text: String| text.lines().any(|line| assigned(line).is_some());
    let set = named.iter().find(|file| root.read(file).is_ok_and(sets)).map(|file| {
        format!(
            "{} sets {VARIABLE} for {unit}, and systemd gives it precedence: remove that, or move \
             it to an Environment= in a drop-in with a name that comes before {OURS}",
            root.shown(file).display()
        )
    });
    Ok(Preload { others, overridden: unset.or(set).or(overridden) })
}

/// The unit's file, and its drop-ins except ours, each with whether systemd reads it after ours.
fn files(root: &Root, unit: &str) -> Vec<(PathBuf, bool)> {
    let directories = || DIRECTORIES.iter().map(Path::new);
    let main = directories()
        .map(|directory| directory.join(format!("{unit}.service")))
        .rfind(|file| root.has_file(file));
    // The unit's own drop-ins have precedence over those for all services.
    let kinds = ["service.d".to_owned(), format!("{unit}.service.d")];
    let places =
        kinds.iter().flat_map(|kind| directories().map(move |directory| directory.join(kind)));
    // They are sorted by name, whatever directory they are in. Of those with the same name, only
    // the one with the highest precedence counts.
    let mut drop_ins: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for place in places {
        let names = root.names(&place).unwrap_or_default();
        drop_ins.extend(names.into_iter().map(|name| (name.clone(), place.join(name))));
    }
    drop_ins.retain(|name, path| path.extension().is_some_and(|end| end == "conf") && name != OURS);
    let drop_ins =
        drop_ins.into_iter().map(|(name, path)| (path, name.as_os_str() > OsStr::new(OURS)));
    main.map(|file| (file, false)).into_iter().chain(drop_ins).collect()
}

/// Reads a file of a unit. A dangling link counts as empty.
fn read(root: &Root, file: &Path) -> Result<String> {
    match root.read(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        other => {
            other.map_err(|error| format!("cannot read {}: {error}", root.shown(file).display()))
        }
    }
}

/// The libraries that a file of a unit preloads.
pub fn preload_of(text: &str) -> Option<String> {
    let mut last = None;
    for (_, value) in settings(text).into_iter().filter(|(name, _)| name == "Environment") {
        last = if value.is_empty() { None } else { preload_in(&value).or(last) };
    }
    last.filter(|value| !value.is_empty())
}

/// The last `LD_PRELOAD` of an `Environment=`.
fn preload_in(value: &str) -> Option<String> {
    let words = words(value);
    Some(words.iter().rev().find_map(|word| assigned(word))?.replace("%%", "%"))
}

/// The value that is assigned to `LD_PRELOAD`, if any.
fn assigned(assignment: &str) -> Option<&str> {
    assignment.split_once('=').filter(|(name, _)| name.trim() == VARIABLE).map(|(_, value)| value)
}

/// The settings in `[Service]` of a unit's file: names and values.
fn settings(text: &str) -> Vec<(String, String)> {
    let (mut settings, mut in_service, mut whole) = (Vec::new(), false, String::new());
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(begin) = line.strip_suffix('\\') {
            whole += begin;
            whole.push(' ');
            continue;
        }
        whole += line;
        let line = std::mem::take(&mut whole);
        if line.starts_with('[') {
            in_service = line == "[Service]";
        } else if let Some((name, value)) = line.split_once('=').filter(|_| in_service) {
            settings.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    settings
}

/// Splits a line at spaces that are not quoted.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for letter in line.chars() {
        match (quote, letter) {
            (Some(open), _) if open == letter => quote = None,
            (None, '"' | '\'') => quote = Some(letter),
            (None, _) if letter.is_whitespace() => words.push(std::mem::take(&mut word)),
            _ => word.push(letter),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_preload_counts_however_it_is_quoted() {
        let last = |lines: &str| preload_of(&format!("[Service]\n{lines}"));
        let quoted = "Environment=A=b \"LD_PRELOAD=/a.so /b.so\"\nEnvironment='C=d e'\n";
        assert_eq!(last(quoted).as_deref(), Some("/a.so /b.so"));
        assert_eq!(
            last("Environment=LD_PRELOAD=/a\nEnvironment = LD_PRELOAD=/b\n").as_deref(),
            Some("/b")
        );
        assert_eq!(
            last("Environment=A=b \\\n# a comment\n  LD_PRELOAD=/a\n").as_deref(),
            Some("/a")
        );
        assert_eq!(last("Environment=LD_PRELOAD=/a\nEnvironment=\n"), None);
        assert_eq!(last("Environment=LD_PRELOAD=/a LD_PRELOAD=\n"), None);
        assert_eq!(last("Environment=LD_PRELOAD LD_PRELOADED=/a\n"), None);
        assert_eq!(
            last("# Environment=LD_PRELOAD=/a\nEnvironmentFile=-/etc/default/libvirtd\n"),
            None
        );
        assert_eq!(last("[Unit]\nEnvironment=LD_PRELOAD=/a\n"), None);
    }
}
