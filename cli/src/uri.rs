// SPDX-License-Identifier: LGPL-2.1-or-later

//! The URIs of `--connect`: libvirt's, and `qmp:///PATH/TO/SOCKET?state=DIR[&domain=FILE]`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Where a guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// At a daemon of libvirt's.
    Libvirt(String),
    /// A QEMU with a QMP socket.
    Qmp(Qmp),
}

/// A QEMU with a QMP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qmp {
    /// The socket.
    pub socket: PathBuf,
    /// The directory with the metadata of the guest's snapshots.
    pub state: PathBuf,
    /// The file with the guest's `<domain>` XML.
    pub domain: Option<PathBuf>,
}

const FORM: &str = "write qmp:///PATH/TO/SOCKET?state=DIR[&domain=FILE]";

impl Uri {
    /// Parses a URI. Everything that is not `qmp:` is libvirt's, which checks it itself.
    pub fn parse(text: &str) -> Result<Uri, String> {
        match text.strip_prefix("qmp:") {
            Some(rest) => parse_qmp(rest).map(Uri::Qmp),
            None if text.starts_with('/') => Err(format!("that is a path: {FORM}")),
            None if text.is_empty() => {
                Err("it is empty: leave the option out for libvirt's default".into())
            }
            None => Ok(Uri::Libvirt(text.to_owned())),
        }
    }
}

fn parse_qmp(rest: &str) -> Result<Qmp, String> {
    let Some(rest) = rest.strip_prefix("//") else { return Err(FORM.into()) };
    if !rest.starts_with('/') {
        return Err(format!("there is no host in it, so it has three slashes: {FORM}"));
    }
    let (socket, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (mut state, mut domain) = (None, None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let Some((key, value)) = parameter.split_once('=') else {
            return Err(format!("'{parameter}' has no value: {FORM}"));
        };
        let place = match key {
            "state" => &mut state,
            "domain" => &mut domain,
            _ => return Err(format!("'{key}' is neither 'state' nor 'domain': {FORM}")),
        };
        let path = decode(value)?;
        if !path.is_absolute() {
            return Err(format!("the path '{}' of '{key}' is not absolute", path.display()));
        }
        if place.replace(path).is_some() {
            return Err(format!("it has '{key}' twice"));
        }
    }
    let Some(state) = state else {
        return Err(format!(
            "it names no directory for the metadata of the snapshots (state=DIR): {FORM}"
        ));
    };
    Ok(Qmp { socket: decode(socket)?, state, domain })
}

/// A path, with its `%XX` decoded.
fn decode(text: &str) -> Result<PathBuf, String> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, more @ ..] = rest {
        rest = more;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = more.get(..2).and_then(|digits| str::from_utf8(digits).ok());
        let byte = digits
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte {
            Some(0) | None => {
                return Err(format!("'{text}' has a '%' that no two digits follow: write %25"));
            }
            Some(byte) => {
                bytes.push(byte);
                rest = &more[2..];
            }
        }
    }
    Ok(OsString::from_vec(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, part: &str) {
        let said = Uri::parse(text).unwrap_err();
        assert!(said.contains(part), "{said}");
    }

    #[test]
    fn a_qmp_uri_names_socket_state_and_domain() {
        let Uri::Qmp(qmp) = Uri::parse("qmp:///run/a%20b.sock?state=/s%3f&domain=/d.xml").unwrap()
        else {
            panic!("not by QMP")
        };
        assert_eq!(qmp.socket, PathBuf::from("/run/a b.sock"));
        assert_eq!(qmp.state, PathBuf::from("/s?"));
        assert_eq!(qmp.domain, Some("/d.xml".into()));
    }

    #[test]
    fn all_other_uris_are_libvirts() {
        for text in ["qemu:///system", "qemu+ssh://host/system", "test:///default"] {
            assert_eq!(Uri::parse(text).unwrap(), Uri::Libvirt(text.into()));
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_right_form() {
        refused("qmp:/run/a.sock?state=/s", "qmp:///PATH");
        refused("qmp://run/a.sock?state=/s", "three slashes");
        refused("qmp:///run/a.sock", "state=DIR");
        refused("qmp:///run/a.sock?state=s", "not absolute");
        refused("qmp:///run/a.sock?state=/s&state=/t", "twice");
        refused("qmp:///run/a.sock?state=/s&disk=/t", "neither 'state' nor 'domain'");
        refused("qmp:///run/a.sock?state", "has no value");
        refused("qmp:///run/%zz?state=/s", "%25");
        refused("qmp:///run/%00?state=/s", "%25");
        refused("qmp:///run/%", "state=DIR");
        refused("/run/a.sock", "is a path");
        refused("", "empty");
    }
}
