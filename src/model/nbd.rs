// SPDX-License-Identifier: LGPL-2.1-or-later

//! Images of NBD servers, which libvirt, QEMU and the overlays on them name in different ways.
//!
//! libvirt has an element (`<source protocol='nbd' name='x'><host .../></source>`); QEMU, and so a
//! qcow2 header, has a URI (`nbd+unix:///x?socket=/s`), an older form (`nbd:unix:/s:exportname=x`)
//! or options (`json:{...}`). All become one [`Export`], whose URI stands where a local image has
//! its path.

use quick_xml::escape::escape;
use roxmltree::Node;
use serde_json::{Map, Value};

use super::xml;

/// The default port of NBD servers.
const PORT: &str = "10809";

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    server: Server,
    /// Its name on the server; empty: the server's default export.
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Unix { socket: String },
    Tcp { host: String, port: String },
}

impl Export {
    /// Parses QEMU's name for an export. `None` if it is no NBD export's name, or says more than
    /// which export it is, such as a part of it or a secret.
    pub fn named(name: &str) -> Option<Export> {
        if let Some(options) = name.strip_prefix("json:") {
            return Export::of_options(&serde_json::from_str(options).ok()?);
        }
        if let Some(rest) =
            name.strip_prefix("nbd+unix://").or_else(|| name.strip_prefix("nbd+unix:"))
        {
            let (export, socket) = rest.split_once('?')?;
            let socket =
                decoded(socket.strip_prefix("socket=").filter(|socket| !socket.contains('&'))?)?;
            return Export::new(
                Server::Unix { socket },
                &decoded(export.strip_prefix('/').unwrap_or(export))?,
            );
        }
        if let Some(rest) = name.strip_prefix("nbd://").or_else(|| name.strip_prefix("nbd+tcp://"))
        {
            let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
            let is_plain = !rest.contains(['?', '@', '#']);
            return Export::new(tcp(&decoded(server).filter(|_| is_plain)?)?, &decoded(export)?);
        }
        let rest = name.strip_prefix("nbd:")?;
        let (server, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
        let server = match server.strip_prefix("unix:") {
            Some(socket) => Server::Unix { socket: socket.into() },
            None => tcp(server)?,
        };
        Export::new(server, export)
    }

    /// Parses libvirt's `<source>`. `None` if it is no NBD export, or says more than a name can:
    /// TLS, a part of the image, how to reconnect.
    pub fn of(source: Node) -> Option<Export> {
        let attribute = |name| source.attribute(name);
        let is_known = |name: &str| matches!(name, "protocol" | "name" | "index" | "tls");
        let mut children = source.children().filter(|child| child.is_element());
        let host = children.next().filter(|host| host.has_tag_name("host"))?;
        let is_plain = attribute("protocol") == Some("nbd")
            && attribute("tls").is_none_or(|tls| tls == "no")
            && source.attributes().all(|attribute| is_known(attribute.name()))
            && children.all(|child| child.has_tag_name("seclabel"));
        let server = match host.attribute("transport") {
            // QEMUs differ in how often they decode a `%`.
            Some("unix") => Server::Unix {
                socket: host.attribute("socket").filter(|path| !path.contains('%'))?.into(),
            },
            None | Some("tcp") => Server::Tcp {
                host: host.attribute("name")?.into(),
                port: host.attribute("port").filter(|port| *port != "0").unwrap_or(PORT).into(),
            },
            Some(_) => return None,
        };
        let export =
            Export::new(server, attribute("name").unwrap_or_default()).filter(|_| is_plain)?;
        // An address with a zone (`fe80::1%eth0`) has no URI.
        (Export::named(&export.uri()).as_ref() == Some(&export)).then_some(export)
    }

    /// The export's URI, which is its only name in this library and one of QEMU's names. It is the
    /// name that QEMU itself reports, unless a part of it must be escaped.
    pub fn uri(&self) -> String {
        let export = encoded(&self.name);
        match &self.server {
            Server::Unix { socket } if export.is_empty() => {
                format!("nbd+unix://?socket={}", encoded(socket))
            }
            Server::Unix { socket } => format!("nbd+unix:///{export}?socket={}", encoded(socket)),
            Server::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { encoded(host) };
                let slash = if export.is_empty() { "" } else { "/" };
                format!("nbd://{host}:{port}{slash}{export}")
            }
        }
    }

    /// libvirt's element for the export.
    pub fn source(&self) -> String {
        let name = match self.name.as_str() {
            "" => String::new(),
            name => format!(" name='{}'", escape(name)),
        };
        let host = match &self.server {
            Server::Unix { socket } => {
                format!("<host transport='unix' socket='{}'/>", escape(socket.as_str()))
            }
            Server::Tcp { host, port } => {
                format!("<host name='{}' port='{port}'/>", escape(host.as_str()))
            }
        };
        format!("<source protocol='nbd'{name}>{host}</source>")
    }

    fn new(server: Server, name: &str) -> Option<Export> {
        let is_valid = match &server {
            Server::Unix { socket } => !socket.is_empty(),
            Server::Tcp { host, port } => {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            }
        };
        is_valid.then(|| Export { server, name: name.into() })
    }

    /// Parses the options of a node: nested, or with dots in their names, with or without a format.
    fn of_options(options: &Value) -> Option<Export> {
        let mut flat = Map::new();
        flatten("", options, &mut flat);
        // The options of the format are around those of the server; libvirt leaves out which format
        // it is.
        if flat.keys().any(|key| key.starts_with("file.")) {
            flat.retain(|key, driver| key != "driver" || !is_format(driver));
            let inner = flat
                .into_iter()
                .map(|(key, value)| Some((key.strip_prefix("file.")?.to_owned(), value)));
            flat = inner.collect::<Option<_>>()?;
        }
        let mut take = |key: &str| match flat.remove(key)? {
            Value::String(text) => Some(text),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        if take("driver")? != "nbd" {
            return None;
        }
        let export = take("export").unwrap_or_default();
        let kind = take("server.type");
        let socket = take("server.path").or_else(|| take("path"));
        let (host, port) = (
            take("server.host").or_else(|| take("host")),
            take("server.port").or_else(|| take("port")),
        );
        let server = match (kind.as_deref(), socket, host) {
            (None | Some("unix"), Some(socket), None) => Server::Unix { socket },
            (None | Some("inet"), None, Some(host)) => {
                Server::Tcp { host, port: port.unwrap_or_else(|| PORT.into()) }
            }
            _ => return None,
        };
        // These options only say how the export is opened.
        let open_options = [
            "node-name",
            "read-only",
            "auto-read-only",
            "discard",
            "detect-zeroes",
            "reconnect-delay",
            "open-timeout",
        ];
        let is_open_option =
            |key: &String| open_options.contains(&key.as_str()) || key.starts_with("cache.");
        Export::new(server, &export).filter(|_| flat.keys().all(is_open_option))
    }
}

/// Whether the driver is one of the formats that libvirt supports for images on servers.
fn is_format(driver: &Value) -> bool {
    driver == "raw" || driver == "qcow2"
}

/// Parses `host`, `host:port` or `[::1]:port`.
fn tcp(server: &str) -> Option<Server> {
    let (host, port) = match server.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':'))
        }
        None => server.rsplit_once(':').map_or((server, None), |(host, port)| (host, Some(port))),
    };
    Some(Server::Tcp { host: host.into(), port: port.unwrap_or(PORT).into() })
}

fn flatten(prefix: &str, value: &Value, into: &mut Map<String, Value>) {
    match value {
        Value::Object(options) => {
            for (key, value) in options {
                flatten(
                    &format!("{prefix}{}{key}", if prefix.is_empty() { "" } else { "." }),
                    value,
                    into,
                );
            }
        }
        value => drop(into.insert(prefix.into(), value.clone())),
    }
}

/// Decodes percent-encoding: `%41` is `A`.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        bytes.extend(before.as_bytes());
        let digits = after
            .get(..2)
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    bytes.extend(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

fn encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:,=".contains(&byte);
    let encode =
        |byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

/// Whether an image needs a secret of libvirt's to be opened.
pub fn needs_secret(image: Node) -> bool {
    let Some(source) = xml::child(image, "source") else { return false };
    let secret = |name| xml::child(source, name).is_some() || xml::child(image, name).is_some();
    ["auth", "cookies", "encryption"].into_iter().any(secret)
        || source.attribute("tls") == Some("yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(source: &str) -> Option<Export> {
        Export::of(roxmltree::Document::parse(source).unwrap().root_element())
    }

    #[test]
    fn all_names_of_an_export_are_one() {
        let unix = [
            "nbd+unix:///remote?socket=/run/nbd.sock",
            "nbd+unix:///rem%6Fte?socket=%2Frun/nbd.sock",
            "nbd:unix:/run/nbd.sock:exportname=remote",
            r#"json:{"driver":"nbd","export":"remote","server":{"type":"unix","path":"/run/nbd.sock"}}"#,
            r#"json:{"driver":"raw","file":{"driver":"nbd","server.type":"unix","server.path":"/run/nbd.sock",
                "export":"remote","reconnect-delay":5,"node-name":"x"}}"#,
            r#"json:{"file":{"driver":"nbd","server":{"type":"unix","path":"/run/nbd.sock"},"export":"remote"}}"#,
            r#"json:{"driver":"qcow2","file.driver":"nbd","file.path":"/run/nbd.sock","file.export":"remote"}"#,
        ];
        let tcp = [
            "nbd://[::1]:10809/a%20b",
            "nbd://[::1]/a b",
            "nbd+tcp://[::1]:10809/a b",
            "nbd:[::1]:10809:exportname=a b",
            r#"json:{"driver":"nbd","export":"a b","server":{"type":"inet","host":"::1","port":"10809"}}"#,
        ];
        for (names, source) in [
            (
                &unix[..],
                "<source protocol='nbd' name='remote' index='3'><host transport='unix' \
                 socket='/run/nbd.sock'/></source>",
            ),
            (&tcp[..], "<source protocol='nbd' name='a b' tls='no'><host name='::1'/></source>"),
        ] {
            for name in names {
                let export = Export::named(name).unwrap_or_else(|| panic!("{name}"));
                assert_eq!(export.uri(), names[0], "{name}");
                assert_eq!(of(&export.source()).as_ref(), Some(&export));
            }
            assert_eq!(of(source).unwrap().uri(), names[0]);
        }
    }

    #[test]
    fn exports_differ_by_socket_host_port_and_name_and_each_name_leads_back() {
        let names = [
            "nbd+unix://?socket=/s",
            "nbd+unix:///x?socket=/s",
            "nbd+unix:///X?socket=/s",
            "nbd+unix:///x?socket=/t",
            "nbd+unix:///x%3F%26%25?socket=/s%3Fx",
            "nbd://host:10809",
            "nbd://host:10809/x",
            "nbd://host:10810/x",
            "nbd://other:10809/x",
        ];
        for name in names {
            let export = Export::named(name).unwrap();
            assert_eq!(export.uri(), name);
            assert_eq!(of(&export.source()), Some(export));
        }
    }

    #[test]
    fn what_a_name_does_not_say_is_not_left_out_of_it() {
        for name in [
            "/images/x",
            "nbd",
            "rbd:pool/image",
            "nbds://host/x",
            "nbd://user@host/x",
            "nbd+unix:///x?socket=/s&tls=1",
            "nbd://host:0/x",
            "nbd://host/%+f",
            r#"json:{"driver":"raw","offset":512,"file":{"driver":"nbd","path":"/s"}}"#,
            r#"json:{"driver":"nbd","path":"/s","tls-creds":"t"}"#,
            r#"json:{"driver":"luks","file":{"driver":"nbd","path":"/s"}}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"nbd","path":"/s"},"size":1}}"#,
            "json:{",
        ] {
            assert_eq!(Export::named(name), None, "{name}");
        }
        let host = "<host transport='unix' socket='/s'/>";
        for source in [
            format!("<source protocol='rbd' name='p/i'>{host}</source>"),
            format!("<source protocol='nbd' tls='yes'>{host}</source>"),
            format!(
                "<source protocol='nbd'>{host}<slices><slice type='storage' offset='0' \
                 size='1'/></slices></source>"
            ),
            format!("<source protocol='nbd'>{host}<reconnect delay='10'/></source>"),
            "<source protocol='nbd'><host transport='unix' socket='/a%20b'/></source>".into(),
            "<source protocol='nbd'><host name='fe80::1%eth0' port='1'/></source>".into(),
            "<source protocol='nbd'/>".into(),
            "<source file='/s'/>".into(),
        ] {
            assert_eq!(of(&source), None, "{source}");
        }
    }
}
