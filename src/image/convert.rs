// SPDX-License-Identifier: LGPL-2.1-or-later

//! Converts a memory image to another format.
//!
//! The new image is written to a file of its own beside the old one, which takes the old one's name
//! when all of it is on disk. So the image is at no time without its content: a process that has
//! the old one open reads that to its end.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tempfile::NamedTempFile;

use super::classic::{self, Zeros};
use super::contents::check_size;
use super::file::{Image, mark_complete, marked_partial};
use super::format::Format;
use super::page_writer::{Failure, PageWriter};
use super::pipe::CHUNK;
use super::records::Head;
use crate::error::{Code, Error, Result, fail};
use crate::sys;

/// Converts a complete image that is not compressed, in place. It keeps its domain XML, libvirt's
/// cookie, its mode and, where this process may set it, its owner. An image that has the format
/// already stays as it is.
pub fn convert(path: &Path, format: Format) -> Result<()> {
    let image = Image::open(path)?;
    if image.format() == format {
        return Ok(());
    }
    let cannot = |error: io::Error| {
        Error::system(format!("cannot convert the memory image '{}'", path.display()), error)
    };
    // The name can be a symbolic link, which stays.
    let path = path.canonicalize().map_err(cannot)?;
    let new = new_file(&path).map_err(cannot)?;
    write(&image, format, new.as_file()).map_err(|failure| match failure {
        Failure::File(error) => cannot(error),
        Failure::Stream(what) => Error::new(
            Code::ConfigUnsupported,
            format!(
                "the memory image '{}' cannot be converted to the format '{}': {what}",
                path.display(),
                format.name()
            ),
        ),
    })?;
    sys::copy_owner_and_mode(new.as_file(), &path).map_err(cannot)?;
    mark_complete(new.as_file()).map_err(cannot)?;
    let is_same = |old: &File| {
        let (old, now) = (old.metadata()?, path.metadata()?);
        Ok((old.dev(), old.ino()) == (now.dev(), now.ino()))
    };
    if !is_same(&image.file).map_err(cannot)? {
        fail!(
            OperationInvalid,
            "the memory image '{}' was replaced or removed while it was being converted",
            path.display()
        );
    }
    new.persist(&path).map_err(|error| cannot(error.error))?;
    sys::sync_parent(&path).map_err(cannot)
}

/// Creates a hidden file beside the image.
fn new_file(path: &Path) -> io::Result<NamedTempFile> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    let directory = path.parent().unwrap_or(Path::new("/"));
    tempfile::Builder::new().prefix(&prefix).suffix(".converting").tempfile_in(directory)
}

/// Writes a partial image of this format.
fn write(image: &Image, format: Format, to: &File) -> std::result::Result<(), Failure> {
    let begin = image.stream_offset;
    to.write_all_at(&marked_partial(image, format)?, 0)?;
    match &image.sparse {
        Some(sparse) => {
            let mut to = BufWriter::with_capacity(CHUNK, to);
            to.seek(SeekFrom::Start(begin))?;
            // A QEMU that loads the image need not have fresh memory.
            classic::write(&image.file, sparse, Zeros::All, &mut to)?;
            to.flush()?;
        }
        None => write_sparse(&image.file, begin, to)?,
    }
    Ok(())
}

fn write_sparse(from: &File, begin: u64, to: &File) -> std::result::Result<(), Failure> {
    let mut buffer = vec![0; CHUNK];
    let (mut filled, mut at) = (0, begin);
    let mut writer = None;
    loop {
        let read = match from.read_at(&mut buffer[filled..], at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        at += read as u64;
        filled += read;
        if writer.is_none() {
            let bytes = &buffer[..filled];
            if let Some((head, _)) = Head::parse(bytes).map_err(Failure::Stream)? {
                check_size(&head).map_err(|what| Failure::Stream(format!("it {what}")))?;
            }
            writer = PageWriter::begin(to, bytes, begin)?;
        }
        let used = match &mut writer {
            Some(writer) => writer.write(to, &buffer[..filled])?,
            None => 0,
        };
        buffer.copy_within(used..filled, 0);
        filled -= used;
        if read == 0 {
            return match writer {
                Some(writer) if filled == 0 => writer.finish(to),
                _ => Err(Failure::Stream("it ends among its pages".into())),
            };
        }
    }
}
