// SPDX-License-Identifier: LGPL-2.1-or-later

//! `image info`, `image verify` and `image convert`, for memory images.

use std::path::PathBuf;

use clap::{Subcommand, ValueHint};
use indicatif::BinaryBytes;
use instantsnap_core::image::{self, Contents, Format};
use serde_json::{Value, json};

use crate::examples;
use crate::failure::{Failure, Result};
use crate::signals::uninterrupted;
use crate::{Context, output};

/// A command for memory images.
#[derive(Subcommand)]
pub enum Image {
    /// Show what is in a memory image
    #[command(after_help = examples::of("image info"))]
    Info {
        /// The memory image
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Check that memory images are complete and undamaged
    ///
    /// The header is checked, the structure of QEMU's stream, and that no part of it is missing;
    /// but not the content of the pages.
    #[command(after_help = examples::of("image verify"))]
    Verify {
        /// The memory images
        #[arg(required = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
        files: Vec<PathBuf>,
    },
    /// Convert a memory image, in place
    ///
    /// The image takes its new format at once, when all of it is on disk; until then it stays as it
    /// is. Its snapshot must not be deleted meanwhile.
    #[command(after_help = examples::of("image convert"))]
    Convert {
        /// The new format: raw, sparse or zstd
        #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = format)]
        format: Format,
        /// The memory image
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

/// Parses the name of a format.
pub fn format(name: &str) -> std::result::Result<Format, String> {
    Format::named(name).ok_or_else(|| "write raw, sparse or zstd".to_owned())
}

/// Runs a command.
pub fn run(command: Image, context: &Context) -> Result<()> {
    match command {
        Image::Info { file } => {
            let contents = Contents::read(&file)?;
            if context.json {
                let text = contents.to_json()?;
                let value = serde_json::from_str::<Value>(&text);
                return output::json(&value.map_err(|error| Failure::Other(error.to_string()))?);
            }
            output::print(&format!("image: {}\n{}", file.display(), shown(&contents)))
        }
        Image::Verify { files } => verify(&files, context),
        Image::Convert { format, file } => {
            uninterrupted("a conversion", || Ok(image::convert(&file, format)?))?;
            if context.json {
                return output::json(&json!({ "file": file, "format": format.name() }));
            }
            if context.quiet {
                return Ok(());
            }
            output::line(&format!("{} is {} now", file.display(), format.name()))
        }
    }
}

/// Checks all of them, even if one is damaged.
fn verify(files: &[PathBuf], context: &Context) -> Result<()> {
    let (mut results, mut damaged) = (Vec::new(), Vec::new());
    for file in files {
        match image::verify(file) {
            Ok(()) => {
                results.push(json!({ "file": file, "good": true }));
                if !context.json && !context.quiet {
                    output::line(&format!("{}: complete, and undamaged", file.display()))?;
                }
            }
            Err(error) => {
                results.push(json!({ "file": file, "good": false, "why": error.message }));
                damaged.push(error);
            }
        }
    }
    if context.json {
        output::json(&Value::Array(results))?;
    }
    // The last one is the failure of the whole.
    let last = damaged.pop();
    damaged.iter().for_each(|error| output::warn(&error.message));
    last.map_or(Ok(()), |error| Err(error.into()))
}

fn shown(contents: &Contents) -> String {
    let unknown = || "not known".to_owned();
    let mut text = format!(
        "format: {}\ndomain: {}\nmachine: {}\nguest: {}\nfile length: {}\ndisk size: {}\n",
        contents.format,
        contents.domain.clone().unwrap_or_else(unknown),
        contents.machine.clone().unwrap_or_else(unknown),
        if contents.was_running { "ran" } else { "was paused" },
        BinaryBytes(contents.file_bytes),
        BinaryBytes(contents.disk_bytes),
    );
    for block in &contents.blocks {
        text += &format!(
            "memory block {}: {}, {} pages of data, {} of zeros\n",
            block.name,
            BinaryBytes(block.bytes),
            block.data_pages,
            block.zero_pages
        );
    }
    text
}
