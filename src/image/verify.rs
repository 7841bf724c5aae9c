// SPDX-License-Identifier: LGPL-2.1-or-later

//! Verifies a memory image: its structure, and its pages where there are checksums of them.

use std::path::Path;

use super::checksums::GROUP;
use super::collect::collect;
use super::contents::Contents;
use super::file::Image;
use super::pages_file::{PageNotes, path_of};
use super::records::PAGE;
use crate::error::{Code, Error, Result};

/// Checks a complete image. It is read to its end, unless it is sparse and there are no checksums
/// of its pages: then its pages are not read.
pub fn verify(path: &Path) -> Result<()> {
    let image = Image::open(path)?;
    let wrong = |what: String| {
        let message = format!("memory snapshot file '{}' {what}", path.display());
        Error::new(Code::InvalidDomainSnapshot, message)
    };
    let notes = PageNotes::of(&image.file, image.stream_offset, path).map_err(|what| {
        let (notes, image) = (path_of(path), path.display());
        let message = format!(
            "'{}', the file of notes beside the memory snapshot file '{image}', {what}: if it is \
             not the image's, remove it",
            notes.display()
        );
        Error::new(Code::InvalidDomainSnapshot, message)
    })?;
    let known = notes.as_ref().and_then(|notes| Some((notes, notes.checksums.as_ref()?)));
    let Some((notes, checksums)) = known else {
        return match image.zstd {
            Some(_) => collect(&image).map(drop).map_err(wrong),
            None => Contents::read(path).map(drop),
        };
    };
    let found = collect(&image).map_err(wrong)?.notes;
    if found.blocks != notes.blocks {
        let what = "is damaged: it has other memory blocks than when it was written";
        return Err(wrong(what.into()));
    }
    // They are not known if a page of a zstd image comes twice.
    let Some((block, group)) = found.checksums.and_then(|found| checksums.difference(&found))
    else {
        return Ok(());
    };
    let begin = group * GROUP * PAGE as u64;
    Err(wrong(format!(
        "is damaged: the MiB at {begin:#x} of its memory block '{}' has another checksum than when \
         it was written",
        String::from_utf8_lossy(&notes.blocks[block].name)
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::super::convert::convert;
    use super::super::format::Format;
    use super::super::index::make_index;
    use super::super::sample;
    use super::*;

    fn flip(path: &Path, at: u64) {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    #[test]
    fn a_bit_of_a_page_that_has_changed_is_found_in_every_format() {
        let first = [sample::named_page(b"pc.ram", 4096, 1), sample::page(1 << 19, 2)];
        // The last page comes again, and another one becomes zero.
        let mut again = vec![sample::named_page(b"pc.ram", 1 << 19, 3), sample::fill(4096, 0)];
        // The end of an image shows whether the notes are of it.
        again.extend((130..512).chain(2..50).map(|page| sample::page(page * 4096, 7)));
        let (_directory, path) = sample::image(&sample::stream(&first, &again));
        make_index(&path).unwrap();
        let notes = path_of(&path);
        assert_eq!(notes.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for format in ["raw", "sparse", "zstd", "raw"] {
            convert(&path, Format::named(format).unwrap()).unwrap();
            verify(&path).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            // In a zstd image: a byte of the first frame.
            let page = bytes.windows(4096).rposition(|page| page == [3; 4096]);
            let stream = Image::open(&path).unwrap().stream_offset;
            flip(&path, page.map_or(stream + 60, |page| page as u64 + 100));
            let error = verify(&path).unwrap_err();
            assert_eq!(error.code, Code::InvalidDomainSnapshot);
            assert!(error.message.contains("is damaged"), "{format}: {error}");
            if page.is_some() {
                assert!(error.message.contains("MiB at 0x0 of its memory block 'pc.ram'"));
                // The structure is as it was.
                Contents::read(&path).unwrap();
            }
            std::fs::write(&path, &bytes).unwrap();
            verify(&path).unwrap();
        }
    }

    #[test]
    fn a_file_of_notes_that_is_damaged_or_of_another_image_is_told_and_harms_no_reader() {
        let image = |byte| {
            let pages = [sample::named_page(b"pc.ram", 4096, byte), sample::page(0, 9)];
            let (directory, path) = sample::image(&sample::stream(&pages, &[]));
            convert(&path, Format::Sparse).unwrap();
            (directory, path)
        };
        let ((_one_directory, one), (_other_directory, other)) = (image(1), image(2));
        let notes = path_of(&one);
        let whole = std::fs::read(&notes).unwrap();
        let refused = |what: &str| {
            let error = verify(&one).expect_err(what);
            assert!(error.message.contains(".pages"), "{what}: {error}");
            assert_eq!(super::super::index::Index::open(&one).unwrap().written_first().count(), 0);
            assert_eq!(Contents::read(&one).unwrap().notes, None);
        };
        for at in (0..whole.len()).step_by(5) {
            flip(&notes, at as u64);
            refused(&format!("byte {at}"));
            flip(&notes, at as u64);
            std::fs::write(&notes, &whole[..at]).unwrap();
            refused(&format!("{at} bytes"));
            std::fs::write(&notes, &whole).unwrap();
        }
        assert_eq!(super::super::index::Index::open(&one).unwrap().written_first().count(), 2);
        std::fs::copy(path_of(&other), &notes).unwrap();
        // The devices of the samples are the same, and so is the length.
        let error = verify(&one).unwrap_err();
        assert!(error.message.contains("another checksum"), "{error}");
        std::fs::remove_file(&notes).unwrap();
        verify(&one).unwrap();
    }
}
