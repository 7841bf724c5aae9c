// SPDX-License-Identifier: LGPL-2.1-or-later

//! The file of a memory image: libvirt's header, the domain XML, space for a longer one, QEMU's
//! stream.
//!
//! ```text
//! 0    magic     LibvirtQemudPart while incomplete, LibvirtQemudSave when complete
//! 16   u32       version (2), data_len, was_running, format (0: raw, 5: zstd, 6: sparse), cookie
//!                offset (0: none), 14 unused
//! 92   data_len  domain XML with its NUL, the cookie with its NUL where there is one, then zeros
//! ...            QEMU's migration stream
//! ```
//!
//! Numbers are in the host's byte order, as libvirt writes them.

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::format::{Format, Level};
use super::pages_file::{self, PageNotes};
use super::sparse_reader::SparseStream;
use super::stream::{self, LONGEST_TEXT};
use super::zstd_frames::Frames;
use super::zstd_reader;
use crate::error::{Code, Error, Result, fail};
use crate::own_file::{KnownFile, OwnFile};
use crate::sys;

const COMPLETE: &[u8; 16] = b"LibvirtQemudSave";
const PARTIAL: &[u8; 16] = b"LibvirtQemudPart";
const VERSION: u32 = 2;
const HEADER: usize = 92;
/// The same, for those who make one.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) const LIBVIRT_HEADER: usize = HEADER;
/// Where the format is in the header.
const FORMAT_AT: u64 = 28;
/// The space that libvirt leaves so that the XML of an image can be edited.
const ROOM: usize = 64 << 10;
/// More than any XML with its space. A larger number means that the header is damaged.
const LONGEST: u32 = 64 << 20;
/// The alignment of the stream, for readers and writers that move whole pages.
const ALIGN: usize = 4096;

/// The name of a memory image while its snapshot is being deleted. No caller can revert to the
/// snapshot then.
pub fn deleting(memory: &Path) -> PathBuf {
    let mut name = memory.as_os_str().to_owned();
    name.push(".deleting");
    name.into()
}

/// Whether a file is known to be no memory image, not even a partial one. False for a file that
/// this process may not read.
pub fn is_another(path: &Path) -> bool {
    let Ok(metadata) = path.metadata() else { return false };
    if !metadata.is_file() {
        return true;
    }
    let mut magic = [0; COMPLETE.len()];
    match sys::open_file(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) => magic != *COMPLETE && magic != *PARTIAL,
        Err(error) => error.kind() == io::ErrorKind::UnexpectedEof,
    }
}

/// Whether a file is a memory image that is incomplete.
pub fn is_partial(path: &Path) -> bool {
    let mut magic = [0; PARTIAL.len()];
    sys::open_file(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok()
        && magic == *PARTIAL
}

/// A memory image that is being written.
#[derive(Debug)]
pub struct MemoryImage {
    own: OwnFile,
    /// The file of notes beside it; `None` if there is to be none.
    pages: Option<OwnFile>,
    stream_offset: u64,
    format: Format,
}

impl MemoryImage {
    /// Creates the file with mode 0600, and marks it partial. An existing file is an error, and is
    /// not changed. Creates the file of notes beside it, if the format has one. `cookie` is
    /// libvirt's save cookie, `format` that which the image is to have.
    pub fn create(
        path: &Path,
        domain_xml: &str,
        cookie: Option<&str>,
        was_running: bool,
        format: Format,
    ) -> Result<MemoryImage> {
        let own = match OwnFile::create(path) {
            Ok(own) => own,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fail!(
                ConfigUnsupported,
                "memory snapshot file '{}' already exists: remove it or name another",
                path.display()
            ),
            Err(error) => {
                return Err(Error::system(
                    format!("cannot create memory snapshot file '{}'", path.display()),
                    error,
                ));
            }
        };
        let texts = domain_xml.len() + 1 + cookie.map_or(0, |cookie| cookie.len() + 1);
        let cookie_offset = if cookie.is_some() { domain_xml.len() as u32 + 1 } else { 0 };
        let begin = (HEADER + texts + ROOM).next_multiple_of(ALIGN);
        let mut head = Vec::with_capacity(begin);
        head.extend_from_slice(PARTIAL);
        for number in
            [VERSION, (begin - HEADER) as u32, was_running.into(), format.number(), cookie_offset]
        {
            head.extend_from_slice(&number.to_ne_bytes());
        }
        head.resize(HEADER, 0);
        for text in [Some(domain_xml), cookie].into_iter().flatten() {
            head.extend_from_slice(text.as_bytes());
            head.push(0);
        }
        head.resize(begin, 0);
        if let Err(error) = own.file().write_all_at(&head, 0) {
            let _ = own.remove();
            return Err(Error::system(
                format!("cannot write memory snapshot file '{}'", path.display()),
                error,
            ));
        }
        let pages = if format.is_raw() {
            // A raw image is written without being read, so nothing is noted of its pages. Notes
            // that an earlier image has left are not of this one.
            let _ = pages_file::remove(path);
            None
        } else {
            pages_file::create(path)
        };
        Ok(MemoryImage { own, pages, stream_offset: begin as u64, format })
    }

    /// The image's path.
    pub fn path(&self) -> &Path {
        self.own.path()
    }

    /// The image and the file of notes beside it, for a watchdog.
    pub fn known(&self) -> impl Iterator<Item = KnownFile> + use<'_> {
        [&self.own].into_iter().chain(&self.pages).map(OwnFile::known)
    }

    /// Gives the image to the owner of this file.
    pub fn give_to_owner_of(&self, model: &Path) -> io::Result<()> {
        let mut all = [&self.own].into_iter().chain(&self.pages);
        all.try_for_each(|own| sys::give_to_owner_of(model, own.file()))
    }

    /// Removes the image.
    pub fn remove(&self) -> Result<()> {
        let pages = self.pages.as_ref().map_or(Ok(()), OwnFile::remove);
        self.own.remove().and(pages).map_err(|error| {
            Error::system(format!("cannot remove '{}'", self.path().display()), error)
        })
    }

    /// Removes the image, so that not even a loss of power brings it back.
    pub fn remove_for_good(&self) -> Result<()> {
        self.remove()?;
        sys::sync_parent(self.path()).map_err(|error| {
            Error::system(format!("cannot remove '{}' for good", self.path().display()), error)
        })
    }

    /// The offset of QEMU's stream.
    pub fn stream_offset(&self) -> u64 {
        self.stream_offset
    }

    /// The format that the image is to have.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The space that the image takes on its disk, in bytes.
    pub fn occupied(&self) -> Result<u64> {
        let metadata = self.own.file().metadata();
        metadata.map(|metadata| metadata.blocks() * 512).map_err(|error| {
            Error::system(
                format!("cannot look at memory snapshot file '{}'", self.path().display()),
                error,
            )
        })
    }

    /// The file, for a drain to write to.
    pub fn file(&self) -> Result<File> {
        self.own
            .file()
            .try_clone()
            .map_err(|error| Error::system("cannot duplicate a file descriptor", error))
    }

    /// The file of notes, for a drain to write to.
    pub fn pages_file(&self) -> Result<Option<File>> {
        let clone = self.pages.as_ref().map(|pages| pages.file().try_clone()).transpose();
        clone.map_err(|error| Error::system("cannot duplicate a file descriptor", error))
    }

    /// Removes what was written of a stream.
    pub fn discard_stream(&self) -> Result<()> {
        let pages = self.pages.as_ref().map_or(Ok(()), |pages| pages_file::empty(pages.file()));
        self.own.file().set_len(self.stream_offset).and(pages).map_err(|error| {
            Error::system(
                format!("cannot truncate memory snapshot file '{}'", self.path().display()),
                error,
            )
        })
    }

    /// QEMU's word for the guest's state when it began to save its devices: `running`, `paused`,
    /// ... In a background snapshot that is the state at the instant. QEMU saves this state as a
    /// device, and devices come last in the stream. `None` if the stream does not have it.
    pub fn state_at_instant(&self) -> Result<Option<String>> {
        self.look_for_state().map_err(|error| {
            Error::system(
                format!("cannot read memory snapshot file '{}'", self.path().display()),
                error,
            )
        })
    }

    fn look_for_state(&self) -> io::Result<Option<String>> {
        const PIECE: u64 = 1 << 20;
        let file = self.own.file();
        if let Format::Zstd(_) = self.format {
            // The pieces overlap here too.
            let (mut piece, mut found) = (Vec::new(), None);
            zstd_reader::last_frame(file, self.stream_offset, |bytes| {
                piece.drain(..piece.len().saturating_sub(STATE.len() + LONGEST_WORD));
                piece.extend_from_slice(bytes);
                found = state_in(&piece).or(found.take());
            })?;
            return Ok(found.flatten());
        }
        let mut end = file.metadata()?.len();
        let mut piece = Vec::new();
        while end > self.stream_offset {
            let begin = end.saturating_sub(PIECE).max(self.stream_offset);
            // The pieces overlap, so that the section and its text are found across a border.
            let length = (end - begin) as usize;
            let overlap = piece.len().min(2 * STATE.len());
            piece.truncate(overlap);
            piece.splice(..0, std::iter::repeat_n(0, length));
            file.read_exact_at(&mut piece[..length], begin)?;
            if let Some(state) = state_in(&piece) {
                return Ok(state);
            }
            end = begin;
        }
        Ok(None)
    }

    /// Whether QEMU has written the whole stream: see [`stream::is_described`].
    pub fn has_whole_stream(&self) -> Result<bool> {
        let (file, begin) = (self.own.file(), self.stream_offset);
        let is_described = match self.format {
            Format::Zstd(_) => zstd_reader::end_of_last_frame(file, begin, LONGEST_TEXT)
                .map(|end| stream::ends_with_description(&end)),
            Format::Raw | Format::Sparse => stream::is_described(file, begin),
        };
        is_described.map_err(|error| {
            Error::system(
                format!("cannot read memory snapshot file '{}'", self.path().display()),
                error,
            )
        })
    }

    /// Allows nobody to write the file any more, not even its owner: a QEMU that maps a complete
    /// image would be changed, or ended, by each change of it.
    pub fn protect(&self) -> Result<()> {
        let protect = || {
            let file = self.own.file();
            let mode = file.metadata()?.mode();
            file.set_permissions(Permissions::from_mode(mode & 0o444))
        };
        protect().map_err(|error| {
            let path = self.path().display();
            Error::system(format!("cannot protect memory snapshot file '{path}'"), error)
        })
    }

    /// Syncs the file of notes, or removes it if it is not whole: the image is good without it.
    fn complete_pages(&self, format: Format) -> io::Result<()> {
        let Some(pages) = &self.pages else { return Ok(()) };
        let (own, begin) = (self.own.file(), self.stream_offset);
        match PageNotes::read(pages.file(), own, begin) {
            Ok(_) if !format.is_raw() => pages.file().sync_all(),
            _ => pages.remove(),
        }
    }

    /// Called when the stream is complete: syncs it to disk, and only then marks the image
    /// complete. `format` is the format that the image has.
    pub fn complete(&self, format: Format) -> Result<()> {
        let complete = || -> io::Result<()> {
            let file = self.own.file();
            file.write_all_at(&format.number().to_ne_bytes(), FORMAT_AT)?;
            self.complete_pages(format)?;
            mark_complete(file)?;
            sys::sync_parent(self.path())
        };
        complete().map_err(|error| {
            Error::system(
                format!("cannot complete memory snapshot file '{}'", self.path().display()),
                error,
            )
        })
    }
}

/// The section of QEMU's note of the guest's state: its name with its length, its instance and its
/// version. The length of the text and the text follow.
const STATE: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0";
/// The length of the longest word for a state, and more.
const LONGEST_WORD: usize = 100;

/// The last note of the guest's state in these bytes, if there is one: `Some(None)` if it is not a
/// word.
fn state_in(piece: &[u8]) -> Option<Option<String>> {
    let at = piece.windows(STATE.len()).rposition(|window| window == STATE)?;
    // The text begins after the last byte of its length.
    let text = piece.get(at + STATE.len() + 1..).unwrap_or_default();
    let state = text.split(|byte| *byte == 0).next().unwrap_or_default();
    // QEMU's word is short; anything else is not this section.
    let is_word = state.len() <= LONGEST_WORD && state.iter().all(|byte| byte.is_ascii_graphic());
    Some(is_word.then(|| String::from_utf8_lossy(state).into_owned()))
}

/// The numbers of a header, from the version on.
fn numbers<const N: usize>(header: &[u8; HEADER]) -> [u32; N] {
    let mut numbers = header[COMPLETE.len()..].chunks_exact(4);
    std::array::from_fn(|_| {
        numbers.next().and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
    })
}

/// What was found out of a stream without reading its pages.
#[derive(Debug)]
struct Surveyed {
    machine: Option<String>,
    sparse: Option<SparseStream>,
    zstd: Option<Frames>,
}

/// Checks the stream of an image, as far as that is possible without reading its pages. The error
/// is why it cannot be loaded.
fn survey(file: &File, format: Format, begin: u64) -> std::result::Result<Surveyed, String> {
    let (mut sparse, mut zstd) = (None, None);
    let machine = match format {
        Format::Raw => stream::check(file, begin)?,
        Format::Sparse => {
            let machine = stream::check(file, begin)?;
            sparse = Some(SparseStream::read(file, begin)?);
            machine
        }
        Format::Zstd(_) => {
            let failed =
                |error: io::Error| format!("is damaged: it cannot be decompressed: {error}");
            let frames = Frames::find(file, begin).map_err(|broken| broken.to_string())?;
            zstd = Some(frames);
            let most = stream::LONGEST_HEAD as u64;
            let head = zstd_reader::beginning(file, begin, most).map_err(failed)?;
            let machine = stream::check_head(&head)?;
            // An image that libvirt has saved is one frame. That it is whole, its frame says.
            if frames.count > 1 {
                let end = zstd_reader::end_of_last_frame(file, begin, LONGEST_TEXT);
                if !stream::is_end(&end.map_err(failed)?, machine.as_deref()) {
                    return Err(stream::NO_END.into());
                }
            }
            machine
        }
    };
    Ok(Surveyed { machine, sparse, zstd })
}

/// A complete memory image, opened for reading.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub file: File,
    /// The offset of QEMU's stream.
    pub stream_offset: u64,
    /// The places of a sparse image; `None` if the image is not sparse.
    pub sparse: Option<SparseStream>,
    /// The frames of a zstd image; `None` if the image is not compressed.
    pub zstd: Option<Frames>,
    /// Whether the guest ran at the instant.
    pub was_running: bool,
    /// The domain XML.
    pub domain_xml: String,
    /// The machine type of the guest, if QEMU has saved it.
    pub machine: Option<String>,
}

impl Image {
    /// Checks the file of a complete image, which can be compressed. Returns the guest's machine
    /// type, if the image has it, or why the image cannot be loaded.
    pub fn check(file: &File) -> std::result::Result<Option<String>, String> {
        let mut header = [0; HEADER];
        let read = file.read_exact_at(&mut header, 0);
        if read.is_err() || &header[..COMPLETE.len()] != COMPLETE {
            return Err("is damaged, or was never completed".into());
        }
        let [version, data_len, _, format] = numbers(&header);
        // It is compressed by another program than zstd, or from a host with another byte order:
        // libvirt itself checks these.
        let (VERSION, Some(format)) = (version, Format::numbered(format)) else { return Ok(None) };
        let begin = HEADER as u64 + u64::from(data_len);
        survey(file, format, begin).map(|surveyed| surveyed.machine)
    }

    /// The format of the file of a complete image, if this version knows it.
    pub fn format_of(file: &File) -> Option<Format> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let [version, _, _, format] = numbers(&header);
        let is_image = &header[..COMPLETE.len()] == COMPLETE && version == VERSION;
        is_image.then(|| Format::numbered(format)).flatten()
    }

    /// The format of the image.
    pub fn format(&self) -> Format {
        match (&self.sparse, &self.zstd) {
            (Some(_), _) => Format::Sparse,
            (_, Some(_)) => Format::Zstd(Level::default()),
            _ => Format::Raw,
        }
    }

    /// Opens a complete image, which can be compressed by zstd.
    pub fn open(path: &Path) -> Result<Image> {
        let damaged = |what: &str| {
            Error::new(
                Code::InvalidDomainSnapshot,
                format!("memory snapshot file '{}' {what}", path.display()),
            )
        };
        let mut file = sys::open_file(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if deleting(path).exists() => damaged(
                "was renamed, because its snapshot is being deleted: if the delete was \
                 interrupted, delete it again",
            ),
            _ => damaged(&format!("cannot be opened: {error}")),
        })?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(|_| damaged("is too short"))?;
        if &header[..16] == PARTIAL {
            return Err(damaged("is incomplete: its snapshot failed or is still being made"));
        }
        if &header[..16] != COMPLETE {
            return Err(damaged("is not a memory image"));
        }
        let [version, data_len, was_running, format, cookie] = numbers(&header);
        if version != VERSION {
            return Err(damaged(&format!("has version {version}, {VERSION} is supported")));
        }
        let Some(format) = Format::numbered(format) else {
            return Err(damaged("is compressed by another program than zstd: decompress it first"));
        };
        if data_len == 0 || data_len > LONGEST {
            return Err(damaged("has a damaged header"));
        }
        let mut data = vec![0; data_len as usize];
        file.read_exact(&mut data).map_err(|_| damaged("is too short"))?;
        let xml = &data[..if cookie == 0 { data.len() } else { data.len().min(cookie as usize) }];
        let xml = xml.split(|byte| *byte == 0).next().unwrap_or_default();
        let stream_offset = HEADER as u64 + u64::from(data_len);
        let Surveyed { machine, sparse, zstd } =
            survey(&file, format, stream_offset).map_err(|what| damaged(&what))?;
        Ok(Image {
            file,
            stream_offset,
            sparse,
            zstd,
            machine,
            was_running: was_running != 0,
            domain_xml: String::from_utf8(xml.to_vec())
                .map_err(|_| damaged("has a damaged domain XML"))?,
        })
    }
}

/// The header of an image, its domain XML, its cookie and the space after them, as those of a
/// partial image of this format.
pub(super) fn marked_partial(image: &Image, format: Format) -> io::Result<Vec<u8>> {
    let mut head = vec![0; image.stream_offset as usize];
    image.file.read_exact_at(&mut head, 0)?;
    head[..PARTIAL.len()].copy_from_slice(PARTIAL);
    let number = format.number().to_ne_bytes();
    head[FORMAT_AT as usize..][..number.len()].copy_from_slice(&number);
    Ok(head)
}

/// Syncs an image to disk, and only then marks it complete.
pub(super) fn mark_complete(file: &File) -> io::Result<()> {
    file.sync_data()?;
    file.write_all_at(COMPLETE, 0)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_that_an_earlier_image_has_left_are_not_taken_for_those_of_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let notes = pages_file::path_of(&path);
        for format in [Format::Raw, Format::Sparse] {
            std::fs::write(&notes, "InstantsnapPages of an earlier image").unwrap();
            let image = MemoryImage::create(&path, "<domain/>", None, true, format).unwrap();
            image.complete(format).unwrap();
            assert!(!notes.exists(), "{format:?}");
            // A file that is no such file stays.
            image.remove().unwrap();
            std::fs::write(&notes, "of another program").unwrap();
            let image = MemoryImage::create(&path, "<domain/>", None, true, format).unwrap();
            image.complete(format).unwrap();
            assert_eq!(std::fs::read(&notes).unwrap(), b"of another program");
            image.remove().unwrap();
        }
    }

    #[test]
    fn what_is_no_memory_image_is_told_and_a_pipe_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let create = |name| MemoryImage::create(&path(name), "<domain/>", None, true, Format::Raw);
        create("partial").unwrap();
        create("complete").unwrap().complete(Format::Raw).unwrap();
        std::fs::write(path("short"), "LibvirtQemud").unwrap();
        std::fs::write(path("other"), "root:x:0:0:root:/root:/bin/bash\n").unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let others = ["partial", "complete", "short", "other", "pipe", "missing"]
            .map(|name| is_another(&path(name)));
        assert_eq!(others, [false, false, true, true, true, false]);
    }
}
