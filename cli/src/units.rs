//! What the files of a unit say of its environment.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;

/// Our own file among the unit's.
pub const OURS: &str = "instantsnap.conf";

/// systemd's directories, the most important last.
const DIRECTORIES: [&str; 4] =
    ["lib/systemd/system", "usr/lib/systemd/system", "run/systemd/system", "etc/systemd/system"];

/// What a unit preloads without us, which stays preloaded. An error where a file that comes after all of systemd's says so.
pub fn preloaded(root: &Path, unit: &str) -> Result<String> {
    let mut found = String::new();
    for file in files(root, unit) {
        let text = fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        if let Some(value) = preload_of(&text) {
            found = value;
        }
        for other in environment_files(&text) {
            let path = root.join(other.trim_start_matches('/'));
            let Ok(lines) = fs::read_to_string(&path) else { continue };
            if lines.lines().any(|line| line.trim_start().starts_with("LD_PRELOAD=")) {
                return Err(format!(
                    "{} sets LD_PRELOAD for {unit}, and systemd gives it precedence: add the library there, or remove it",
                    path.display()
                ));
            }
        }
    }
    Ok(found)
}

/// The unit's file, and its drop-ins but ours.
fn files(root: &Path, unit: &str) -> Vec<PathBuf> {
    let directories = DIRECTORIES.iter().map(|directory| root.join(directory));
    let main = directories.clone().map(|directory| directory.join(format!("{unit}.service")));
    let main = main.rev().find(|file| file.is_file());
    let mut drop_ins: Vec<PathBuf> = directories
        .filter_map(|directory| fs::read_dir(directory.join(format!("{unit}.service.d"))).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "conf") && path.file_name() != Some(OURS.as_ref()))
        .collect();
    // In the order of their names, wherever they are.
    drop_ins.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    main.into_iter().chain(drop_ins).collect()
}

/// The last `LD_PRELOAD` in `Environment=` lines.
pub fn preload_of(text: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("Environment="));
    let words = lines.flat_map(words);
    let values = words.filter_map(|word| word.strip_prefix("LD_PRELOAD=").map(str::to_owned));
    values.reduce(|_, last| last).filter(|value| !value.is_empty()).map(|value| value.replace("%%", "%"))
}

fn environment_files(text: &str) -> impl Iterator<Item = String> + '_ {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("EnvironmentFile="));
    lines.map(|path| path.trim().trim_start_matches('-').to_owned())
}

/// Words that spaces separate, unless they are quoted.
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
        let text = "[Service]\nEnvironment=A=b \"LD_PRELOAD=/a.so /b.so\"\nEnvironment='C=d e'\n";
        assert_eq!(preload_of(text).as_deref(), Some("/a.so /b.so"));
        assert_eq!(preload_of("Environment=LD_PRELOAD=/a\nEnvironment=LD_PRELOAD=/b\n").as_deref(), Some("/b"));
        assert_eq!(preload_of("# Environment=LD_PRELOAD=/a\nEnvironmentFile=-/etc/default/libvirtd\n"), None);
    }

    #[test]
    fn a_file_that_may_be_missing_is_one() {
        let files: Vec<_> = environment_files("EnvironmentFile=-/etc/default/libvirtd\n").collect();
        assert_eq!(files, ["/etc/default/libvirtd"]);
    }
}
