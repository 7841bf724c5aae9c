// SPDX-License-Identifier: LGPL-2.1-or-later

//! Compresses QEMU's stream into a zstd memory image.
//!
//! The image has two frames, which the zstd program reads as one stream: the memory, and the
//! devices. So the devices can be read without decompressing the memory. If the stream is of a kind
//! that this does not know, it is one frame.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use zstd::stream::raw::CParameter;
use zstd::stream::write::Encoder;

use super::format::Level;
use super::page_writer::Failure;
use super::pages_file::{Collector, PageNotes};
use super::records::{HeadReader, LONGEST_HEAD, Record, Records};
use super::sparse_reader::MOST_MEMORY;

/// The most threads that compress one stream.
const MOST_THREADS: usize = 8;
/// The window of 1 MiB and the pieces of 2 MiB that a thread compresses at once: they limit the
/// memory to about 10 MiB for each thread at the usual levels.
const WINDOW: u32 = 20;
const PIECE: u32 = 2 << 20;

/// A file, written from a place on.
#[derive(Debug)]
struct Appended {
    file: File,
    at: u64,
}

impl Write for Appended {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.at)?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compresses a stream as it comes.
pub struct ZstdWriter {
    /// `None` only while a frame ends.
    encoder: Option<Encoder<'static, Appended>>,
    level: Level,
    reading: Reading,
    /// Bytes of the stream that no record is made of yet. They are compressed already.
    rest: Vec<u8>,
    has_unflushed: bool,
}

/// What is known of the stream.
enum Reading {
    Head(HeadReader),
    Records {
        records: Records,
        notes: Box<Collector>,
    },
    /// It is of an unknown kind.
    Unknown,
}

impl ZstdWriter {
    /// Begins a stream at this offset of the file.
    pub fn begin(file: &File, offset: u64, level: Level) -> io::Result<ZstdWriter> {
        let to = Appended { file: file.try_clone()?, at: offset };
        Ok(ZstdWriter {
            encoder: Some(encoder(to, level)?),
            level,
            reading: Reading::Head(HeadReader::default()),
            rest: Vec::new(),
            has_unflushed: false,
        })
    }

    /// Writes the next bytes of the stream.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Where the devices begin in `bytes`.
        let devices = match self.reading {
            Reading::Unknown => None,
            _ => self.read(bytes),
        };
        match devices {
            Some(at) => {
                self.compress(&bytes[..at])?;
                self.next_frame()?;
                self.compress(&bytes[at..])
            }
            None => self.compress(bytes),
        }
    }

    fn compress(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.has_unflushed |= !bytes.is_empty();
        self.encoder.as_mut().map_or(Ok(()), |encoder| encoder.write_all(bytes))
    }

    fn next_frame(&mut self) -> io::Result<()> {
        let Some(ended) = self.encoder.take() else { return Ok(()) };
        self.encoder = Some(encoder(ended.finish()?, self.level)?);
        Ok(())
    }

    /// Puts all that was written into the file, so that it can be decompressed.
    pub fn flush(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.has_unflushed) {
            return Ok(());
        }
        self.encoder.as_mut().map_or(Ok(()), Encoder::flush)
    }

    /// Ends the stream. Returns the notes of its pages, if it is of a known kind.
    pub fn finish(mut self) -> Result<Option<PageNotes>, Failure> {
        let notes = match self.reading {
            Reading::Records { records, .. } if !records.is_after_pages() => {
                return Err(Failure::Stream("it ends among its pages".into()));
            }
            Reading::Records { notes, .. } => Some(notes.finish()),
            Reading::Head(_) | Reading::Unknown => None,
        };
        if let Some(encoder) = self.encoder.take() {
            encoder.finish()?;
        }
        Ok(notes)
    }

    /// Reads the records in these bytes. Returns where the devices begin, if they begin here.
    fn read(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.rest.len();
        self.rest.extend_from_slice(bytes);
        match self.read_records() {
            Ok((used, is_tail)) => {
                self.rest.drain(..used);
                if !is_tail {
                    return None;
                }
                let begin = used.saturating_sub(before);
                // Nothing more of the stream is read.
                self.rest = Vec::new();
                Some(begin)
            }
            // The stream is compressed as it is; whether QEMU can load it is QEMU's business.
            Err(_) => {
                (self.reading, self.rest) = (Reading::Unknown, Vec::new());
                None
            }
        }
    }

    /// Returns how many of the bytes were used, and whether the devices follow.
    fn read_records(&mut self) -> Result<(usize, bool), String> {
        let mut used = 0;
        if let Reading::Head(reader) = &mut self.reading {
            match reader.read(&self.rest)? {
                None if self.rest.len() > LONGEST_HEAD => return Err("its head is long".into()),
                None => return Ok((0, false)),
                Some((head, length)) => {
                    let total: u64 = head.blocks.iter().map(|block| block.size).sum();
                    if total > MOST_MEMORY {
                        return Err("its memory is too large".into());
                    }
                    let notes = Box::new(Collector::new(&head.blocks));
                    self.reading = Reading::Records { records: Records::new(&head), notes };
                    used = length;
                }
            }
        }
        let Reading::Records { records, notes } = &mut self.reading else {
            return Ok((self.rest.len(), false));
        };
        if records.is_after_pages() {
            return Ok((self.rest.len(), false));
        }
        while let Some((record, length)) = records.next(&self.rest[used..])? {
            match record {
                Record::Page { block, offset, content } => {
                    notes.page(block, offset, &content, || None);
                }
                Record::Tail(_) => {}
                Record::Mark => {}
            }
            used += length;
            if records.is_after_pages() {
                return Ok((used, true));
            }
        }
        Ok((used, false))
    }
}

fn encoder(to: Appended, level: Level) -> io::Result<Encoder<'static, Appended>> {
    let mut encoder = Encoder::new(to, level.number().into())?;
    encoder.include_checksum(true)?;
    encoder.window_log(WINDOW)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    // Without threads this process compresses on its own one.
    encoder.multithread(threads as u32)?;
    encoder.set_parameter(CParameter::JobSize(PIECE))?;
    Ok(encoder)
}
