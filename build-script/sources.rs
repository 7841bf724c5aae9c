// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads source files.

use std::fs;
use std::path::Path;

use syn::Item;
use syn::parse::ParseStream;

/// A source file.
pub fn parse(file: &Path) -> Result<syn::File, String> {
    let text = fs::read_to_string(file)
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    syn::parse_file(&text).map_err(|error| format!("{}: {error}", file.display()))
}

/// Parses the arguments of every call of the macro of this name.
pub fn given_to<T>(
    name: &str,
    file: &Path,
    items: &[Item],
    parser: impl Fn(ParseStream) -> syn::Result<Vec<T>>,
) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    for item in items {
        if let Item::Macro(found) = item
            && found.mac.path.is_ident(name)
        {
            let given = found.mac.parse_body_with(&parser);
            all.extend(given.map_err(|error| format!("{}: {error}", file.display()))?);
        }
    }
    match all.is_empty() {
        true => Err(format!("{} gives {name}! nothing", file.display())),
        false => Ok(all),
    }
}
