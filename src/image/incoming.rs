// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads QEMU's stream as it comes, in pieces of any length: its head, then its records.

use std::ops::ControlFlow;

use super::pipe::CHUNK;
use super::records::{Head, HeadReader, LONGEST_HEAD, Record, Records};

/// A stream, of which some bytes have come and are not used yet.
#[derive(Debug)]
pub struct Incoming {
    buffer: Vec<u8>,
    filled: usize,
    /// The length of the head, which is in the buffer until the first records are taken.
    head: usize,
    has_ended: bool,
}

impl Incoming {
    pub fn new() -> Incoming {
        Incoming { buffer: vec![0; CHUNK], filled: 0, head: 0, has_ended: false }
    }

    /// The bytes that have come and are not used. Before [`Incoming::each`] these are all that have
    /// come.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    /// Whether the stream has ended.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Reads the head, and on until the first page has come, which shows that the records are of a
    /// known kind. `read` reads some bytes; none at the end. The inner error is what is not
    /// understood.
    pub fn head<E>(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> Result<usize, E>,
    ) -> Result<Result<Head, String>, E> {
        let mut start = Start::Head(HeadReader::default());
        loop {
            self.read(&mut read)?;
            match start.look(&self.buffer[..self.filled]) {
                Err(what) => return Ok(Err(what)),
                Ok(Some((head, length))) => {
                    self.head = length;
                    return Ok(Ok(head));
                }
                Ok(None) if self.has_ended => {
                    return Ok(Err("it ends before its first page".into()));
                }
                Ok(None) => {}
            }
        }
    }

    /// Hands on what comes after the head, until the stream ends, or `take` breaks. `take` gets
    /// bytes that begin with a record, and returns how many of them it has used: the others come
    /// again before the next ones. Returns whether all bytes of the stream were used.
    pub fn each<E>(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> Result<usize, E>,
        mut take: impl FnMut(&[u8]) -> Result<ControlFlow<(), usize>, E>,
    ) -> Result<bool, E> {
        let mut used = std::mem::take(&mut self.head);
        loop {
            match take(&self.buffer[used..self.filled])? {
                ControlFlow::Break(()) => return Ok(true),
                ControlFlow::Continue(more) => used += more,
            }
            self.buffer.copy_within(used..self.filled, 0);
            self.filled -= used;
            used = 0;
            if self.has_ended {
                return Ok(self.filled == 0);
            }
            self.read(&mut read)?;
        }
    }

    fn read<E>(&mut self, read: &mut impl FnMut(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        let got = read(&mut self.buffer[self.filled..])?;
        self.filled += got;
        self.has_ended = got == 0;
        Ok(())
    }
}

/// How far the part before the first page has been read.
enum Start {
    Head(HeadReader),
    /// The head and its length are known. The first page comes behind the bytes before `at`.
    Records {
        head: Head,
        length: usize,
        records: Records,
        at: usize,
    },
    Page,
}

impl Start {
    /// Looks at all bytes that have come. Returns the head and its length once the first page is
    /// there. Nothing is looked at twice.
    fn look(&mut self, bytes: &[u8]) -> Result<Option<(Head, usize)>, String> {
        if let Start::Head(reader) = self {
            let Some((head, length)) = reader.read(bytes)? else { return Ok(None) };
            let records = Records::new(&head);
            *self = Start::Records { head, length, records, at: length };
        }
        let Start::Records { records, at, .. } = self else { return Ok(None) };
        loop {
            match records.next(&bytes[*at..])? {
                None if bytes.len() < LONGEST_HEAD => return Ok(None),
                None => return Err("its first page does not come".into()),
                Some((Record::Mark, length)) => *at += length,
                Some((Record::Page { .. }, _)) => break,
                Some((Record::Tail(_), _)) => return Err("devices come before its pages".into()),
            }
        }
        match std::mem::replace(self, Start::Page) {
            Start::Records { head, length, .. } => Ok(Some((head, length))),
            _ => Ok(None),
        }
    }
}
