// SPDX-License-Identifier: LGPL-2.1-or-later

//! Checks QEMU's migration stream, as far as that is possible without loading it.
//!
//! QEMU finds out only during a load that it cannot load a stream, and can end then. By that time
//! the domain that was to be reverted has been ended. So the library checks these parts before:
//!
//! ```text
//! 0    magic     QEVM, u32 version (3)
//! 8    u8        7, where QEMU notes its machine: u32 length, the machine type's name, more
//! ...            memory, devices; each section ends with 0x7e and its number (u32), where QEMU
//! notes its machine ...  u8        0: the end
//!      u8        6: a description of the devices: u32 length, JSON. QEMU can be told to write none
//! ```
//!
//! Numbers are big-endian.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::from_offset::FromOffset;

const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const MACHINE: u8 = 7;
const END_OF_SECTION: u8 = 0x7e;
const END: u8 = 0;
const DESCRIPTION: u8 = 6;
/// What is wrong with a stream that does not end as streams do.
pub const NO_END: &str = "is cut off, or damaged at its end: QEMU's stream has no end";
/// Longer than any machine type's name.
const LONGEST_NAME: u32 = 255;
/// The part of a stream's beginning that is checked.
pub const LONGEST_HEAD: usize = 13 + LONGEST_NAME as usize;
/// Longer than any description of devices.
pub const LONGEST_TEXT: u64 = 32 << 20;
/// Longer than most of them.
const USUAL_TEXT: u64 = 1 << 20;

/// Checks a stream that begins here and ends with the file. Returns the machine type that QEMU has
/// noted, if it has noted one. The error is the reason why no QEMU can load the stream.
pub fn check(file: &File, begin: u64) -> Result<Option<String>, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    let mut head = Vec::new();
    FromOffset { file, at: begin }
        .take(LONGEST_HEAD as u64)
        .read_to_end(&mut head)
        .map_err(failed)?;
    let machine = check_head(&head)?;
    if !has_tail(file, begin, |tail| is_end(tail, machine.as_deref())).map_err(failed)? {
        return Err(NO_END.into());
    }
    Ok(machine)
}

/// Whether the stream of this machine type can end with these bytes.
pub fn is_end(tail: &[u8], machine: Option<&str>) -> bool {
    ends_with_description(tail) || ends_without_description(tail, machine.is_some())
}

/// Whether a stream that begins here and ends with the file has a description of the devices at its
/// end. QEMU writes that last, after everything else. False if QEMU writes none.
pub fn is_described(file: &File, begin: u64) -> io::Result<bool> {
    has_tail(file, begin, ends_with_description)
}

/// Whether a domain of one machine type cannot load a stream of the other. A name without a version
/// stands for another name, so it is not compared.
pub fn is_other_machine(wanted: &str, noted: &str) -> bool {
    let has_version = |name: &str| name.contains('.');
    has_version(wanted) && has_version(noted) && wanted != noted
}

/// Checks the first bytes of a stream: [`LONGEST_HEAD`] of them, or all. Returns the machine type
/// that QEMU has noted, if it has noted one.
pub fn check_head(head: &[u8]) -> Result<Option<String>, String> {
    let short = || "is too short: QEMU's stream is missing".to_owned();
    let part = |at: usize, length: usize| head.get(at..at + length).ok_or_else(short);
    let number = |at: usize| {
        let bytes = part(at, 4)?;
        Ok::<_, String>(bytes.iter().fold(0, |number: u32, byte| number << 8 | u32::from(*byte)))
    };
    if part(0, 9)?[..4] != *MAGIC {
        return Err("has no stream of QEMU's in it: it is damaged".into());
    }
    let version = number(4)?;
    if version != VERSION {
        return Err(format!(
            "has a stream of version {version} in it, and QEMU loads {VERSION}: it is damaged"
        ));
    }
    if head[8] != MACHINE {
        return Ok(None);
    }
    let length = number(9)?;
    if length > LONGEST_NAME {
        return Err("has a damaged machine type in it".into());
    }
    let name = part(13, length as usize)?.to_vec();
    String::from_utf8(name).map(Some).map_err(|_| "has a damaged machine type in it".into())
}

/// Whether the stream has such an end.
fn has_tail(file: &File, begin: u64, is_such: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
    Ok(is_such(&read_tail(file, begin, USUAL_TEXT)?)
        || is_such(&read_tail(file, begin, LONGEST_TEXT)?))
}

fn read_tail(file: &File, begin: u64, longest: u64) -> io::Result<Vec<u8>> {
    let end = file.metadata()?.len();
    let begin = end.saturating_sub(longest).max(begin);
    let mut tail = vec![0; end.saturating_sub(begin) as usize];
    file.read_exact_at(&mut tail, begin)?;
    Ok(tail)
}

/// The devices of a stream that ends here, without its end and the description after it.
pub fn without_end(devices: &[u8]) -> Option<&[u8]> {
    let end = description(devices).or_else(|| devices.ends_with(&[END]).then(|| devices.len() - 1));
    end.map(|end| &devices[..end])
}

/// Whether a stream with this end, of which [`LONGEST_TEXT`] bytes are looked at, has a description
/// of the devices there.
pub fn ends_with_description(tail: &[u8]) -> bool {
    description(tail).is_some()
}

/// Where the end of a stream with a description of its devices begins.
fn description(tail: &[u8]) -> Option<usize> {
    const BEFORE_TEXT: usize = 6;
    let is_description = |(at, head): (usize, &[u8])| {
        let length = tail.len() - at - BEFORE_TEXT;
        head[..2] == [END, DESCRIPTION]
            && u32::try_from(length).is_ok_and(|length| head[2..] == length.to_be_bytes())
            && tail[at + BEFORE_TEXT..].starts_with(b"{")
            && tail.ends_with(b"}")
    };
    let mut places = tail.windows(BEFORE_TEXT).enumerate().rev();
    places.find(|place| is_description(*place)).map(|(at, _)| at)
}

/// Whether the stream ends as one without a description does. Machine types that QEMU does not note
/// (those of QEMU 2.3 and before) do not mark the ends of sections either.
fn ends_without_description(tail: &[u8], marks_sections: bool) -> bool {
    const AFTER_MARK: usize = 6;
    let marked = || tail.len() >= AFTER_MARK && tail[tail.len() - AFTER_MARK] == END_OF_SECTION;
    tail.ends_with(&[END]) && (!marks_sections || marked())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const HEAD: &[u8] = b"QEVM\0\0\0\x03";
    const NOTE: &[u8] = b"\x07\0\0\0\x09pc-q35-10";
    const DEVICES: &[u8] = b"pages, devices\x7e\0\0\0\x09\0";
    const TEXT: &[u8] = b"\x06\0\0\0\x0d{\"devices\":6}";

    fn look(parts: &[&[u8]]) -> Result<Option<String>, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"libvirt's").unwrap();
        file.write_all(&parts.concat()).unwrap();
        check(&file, 9)
    }

    #[test]
    fn a_stream_that_was_cut_off_is_not_whole() {
        let machine = Some("pc-q35-10".to_owned());
        assert_eq!(look(&[HEAD, NOTE, DEVICES, TEXT]), Ok(machine.clone()));
        let whole = [HEAD, NOTE, DEVICES, TEXT].concat();
        // Without a description, the stream is whole here.
        let undescribed = whole.len() - TEXT.len();
        for cut in (0..whole.len()).filter(|cut| *cut != undescribed) {
            assert!(look(&[&whole[..cut]]).is_err(), "{cut}");
        }
        assert_eq!(look(&[&whole[..undescribed]]), Ok(machine));
        assert!(look(&[&whole, b"}"]).is_err());
        // A stream of an old machine type.
        assert_eq!(look(&[HEAD, b"\x01devices\0"]), Ok(None));
        assert!(look(&[HEAD, b"\x01devices"]).is_err());
    }

    #[test]
    fn a_description_can_be_longer_than_usual() {
        let text = format!("{{{}}}", " ".repeat(2 * USUAL_TEXT as usize));
        let length = (text.len() as u32).to_be_bytes();
        let parts = [HEAD, NOTE, DEVICES, b"\x06", &length, text.as_bytes()];
        assert!(look(&parts).is_ok());
        assert!(look(&[&parts.concat(), b"}"]).is_err());
    }

    #[test]
    fn what_is_no_stream_of_qemus_is_told() {
        for (head, what) in [
            (&b"QEVN\0\0\0\x03\0"[..], "no stream of QEMU's"),
            (b"QEVM\0\0\0\x02\0", "version 2"),
            (b"QEVM\0\0\0\x03\x07\x7f\0\0\0\0", "damaged machine type"),
            (b"QEVM\0\0", "too short"),
        ] {
            let error = look(&[head]).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn machine_types_are_compared_where_both_have_a_version() {
        assert!(is_other_machine("pc-q35-7.2", "pc-q35-10.0"));
        for (wanted, noted) in
            [("pc-q35-7.2", "pc-q35-7.2"), ("q35", "pc-q35-7.2"), ("pc-q35-7.2", "none")]
        {
            assert!(!is_other_machine(wanted, noted), "{wanted} {noted}");
        }
    }
}
