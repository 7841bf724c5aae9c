// SPDX-License-Identifier: LGPL-2.1-or-later

//! virsh's `--memspec` and `--diskspec`, and the `<domainsnapshot>` that they make.

/// `--memspec [file=]FILE[,snapshot=TYPE]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemorySpec {
    /// `file=`.
    pub file: Option<String>,
    /// `snapshot=`.
    pub snapshot: Option<String>,
}

/// `--diskspec DISK[,snapshot=TYPE][,driver=TYPE][,stype=TYPE][,file=FILE]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// The disk.
    pub name: String,
    /// `snapshot=`.
    pub snapshot: Option<String>,
    driver: Option<String>,
    storage: Option<String>,
    file: Option<String>,
}

/// The parts of a list that commas separate. Two commas stand for one that is meant.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' {
            parts.last_mut().expect("there is one").push(letter);
        } else if letters.next_if_eq(&',').is_some() {
            parts.last_mut().expect("there is one").push(',');
        } else {
            parts.push(String::new());
        }
    }
    parts
}

fn put(place: &mut Option<String>, key: &str, value: &str) -> Result<(), String> {
    if value.is_empty() {
        return Err(format!("'{key}=' has no value"));
    }
    match place.replace(value.to_owned()) {
        None => Ok(()),
        Some(_) => Err(format!("'{key}' is given twice")),
    }
}

/// A path that libvirt and QEMU accept. They have another working directory than the user.
fn absolute(path: &str) -> Result<String, String> {
    if path.starts_with('/') {
        return Ok(path.to_owned());
    }
    let shown = std::path::absolute(path)
        .map_or_else(|_| "an absolute path".to_owned(), |whole| format!("'{}'", whole.display()));
    Err(format!("'{path}' is not an absolute path: write {shown}"))
}

impl MemorySpec {
    /// Parses it.
    pub fn parse(text: &str) -> Result<MemorySpec, String> {
        let mut spec = MemorySpec::default();
        for part in parts(text) {
            match part.split_once('=') {
                Some(("file", file)) => put(&mut spec.file, "file", &absolute(file)?)?,
                Some(("snapshot", kind)) => {
                    check("snapshot", kind, &["external", "internal", "no"])?;
                    put(&mut spec.snapshot, "snapshot", kind)?;
                }
                None if spec.file.is_none() && !part.is_empty() => {
                    spec.file = Some(absolute(&part)?);
                }
                _ if part.starts_with('/') && spec.file.is_none() => spec.file = Some(part),
                _ => return Err(format!("'{part}' is neither file=FILE nor snapshot=TYPE")),
            }
        }
        if let (Some(file), Some("internal" | "no")) = (&spec.file, spec.snapshot.as_deref()) {
            return Err(format!("the file '{file}' needs snapshot=external"));
        }
        Ok(spec)
    }

    /// Whether memory is left out.
    pub fn is_left_out(&self) -> bool {
        self.snapshot.as_deref() == Some("no")
    }

    /// Whether memory goes to a file whose name is still open.
    pub fn needs_file(&self) -> bool {
        self.file.is_none() && matches!(self.snapshot.as_deref(), None | Some("external"))
    }

    fn to_xml(&self) -> String {
        let attributes = attribute("snapshot", self.snapshot.as_deref())
            + &attribute("file", self.file.as_deref());
        if attributes.is_empty() { String::new() } else { format!("  <memory{attributes}/>\n") }
    }
}

impl DiskSpec {
    /// Parses it.
    pub fn parse(text: &str) -> Result<DiskSpec, String> {
        let mut parts = parts(text).into_iter();
        let name = parts.next().filter(|name| !name.is_empty());
        let name = name.ok_or("it names no disk: write DISK[,snapshot=TYPE][,file=FILE]...")?;
        let mut spec = DiskSpec { name, ..DiskSpec::default() };
        for part in parts {
            match part.split_once('=') {
                Some(("snapshot", kind)) => {
                    check("snapshot", kind, &["external", "internal", "manual", "no"])?;
                    put(&mut spec.snapshot, "snapshot", kind)?;
                }
                Some(("driver", kind)) => put(&mut spec.driver, "driver", kind)?,
                Some(("stype", kind)) => {
                    check("stype", kind, &["file", "block"])?;
                    put(&mut spec.storage, "stype", kind)?;
                }
                Some(("file", file)) => put(&mut spec.file, "file", &absolute(file)?)?,
                _ => {
                    return Err(format!(
                        "'{part}' is none of snapshot=TYPE, driver=TYPE, stype=TYPE and file=FILE \
                         (a comma in a path is written twice)"
                    ));
                }
            }
        }
        Ok(spec)
    }

    fn to_xml(&self) -> String {
        let on_device = self.storage.as_deref() == Some("block");
        let head = format!(
            "    <disk{}{}{}",
            attribute("name", Some(&self.name)),
            attribute("snapshot", self.snapshot.as_deref()),
            attribute("type", self.storage.as_deref())
        );
        if self.driver.is_none() && self.file.is_none() {
            return format!("{head}/>\n");
        }
        let element = |name, attribute: String| match attribute.as_str() {
            "" => String::new(),
            attribute => format!("      <{name}{attribute}/>\n"),
        };
        let source = attribute(if on_device { "dev" } else { "file" }, self.file.as_deref());
        format!(
            "{head}>\n{}{}    </disk>\n",
            element("driver", attribute("type", self.driver.as_deref())),
            element("source", source)
        )
    }
}

fn check(key: &str, value: &str, known: &[&str]) -> Result<(), String> {
    if known.contains(&value) {
        return Ok(());
    }
    Err(format!("'{key}={value}' does not exist: write {key}={}", known.join("|")))
}

fn attribute(name: &str, value: Option<&str>) -> String {
    value.map(|value| format!(" {name}='{}'", escape(value))).unwrap_or_default()
}

/// Text for XML.
fn escape(text: &str) -> String {
    let escaped = |letter| match letter {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        '\'' => "&apos;".to_owned(),
        other => other.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// A `<domainsnapshot>`, as virsh writes it.
pub fn to_xml(
    name: Option<&str>,
    description: Option<&str>,
    memory: &MemorySpec,
    disks: &[DiskSpec],
) -> String {
    let element = |element: &str, text: Option<&str>| {
        text.map(|text| format!("  <{element}>{}</{element}>\n", escape(text))).unwrap_or_default()
    };
    let mut xml = String::from("<domainsnapshot>\n");
    xml += &element("name", name);
    xml += &element("description", description);
    xml += &memory.to_xml();
    if !disks.is_empty() {
        let disks: String = disks.iter().map(DiskSpec::to_xml).collect();
        xml += &format!("  <disks>\n{disks}  </disks>\n");
    }
    xml + "</domainsnapshot>\n"
}

/// The elements of a name and of memory.
pub fn elements(name: Option<&str>, memory: &MemorySpec) -> String {
    let name = name.map(|name| format!("  <name>{}</name>\n", escape(name))).unwrap_or_default();
    name + &memory.to_xml()
}

/// The user's XML, with more elements at its beginning.
pub fn inserted(xml: &str, elements: &str) -> Result<String, String> {
    let document = roxmltree::Document::parse(xml).map_err(|error| error.to_string())?;
    let root = document.root_element();
    let (range, text) = match root.first_child() {
        Some(child) => {
            let at = child.range().start;
            (at..at, format!("\n{}", elements.trim_end()))
        }
        None => (root.range(), format!("<domainsnapshot>\n{elements}</domainsnapshot>")),
    };
    let mut xml = xml.to_owned();
    xml.replace_range(range, &text);
    Ok(xml)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_commas_are_one() {
        assert_eq!(parts("a,,b,c,,,d"), ["a,b", "c,", "d"]);
    }

    #[test]
    fn a_memory_file_can_do_without_its_key() {
        let spec = |text| MemorySpec::parse(text).unwrap();
        assert_eq!(spec("/m"), spec("file=/m"));
        assert_eq!(spec("/a=b").file.as_deref(), Some("/a=b"));
        assert_eq!(spec("/m,snapshot=external").snapshot.as_deref(), Some("external"));
        assert!(spec("snapshot=no").is_left_out());
        assert!(spec("snapshot=external").needs_file() && !spec("snapshot=internal").needs_file());
    }

    #[test]
    fn nonsense_in_a_spec_is_refused() {
        for (text, part) in [
            ("m", "is not an absolute path"),
            ("/m,/n", "neither file=FILE"),
            ("/m,snapshot=no", "needs snapshot=external"),
            ("/m,snapshot=here", "external|internal|no"),
            ("/m,file=/n", "twice"),
            ("file=", "not an absolute path"),
            ("", "neither file=FILE"),
        ] {
            let said = MemorySpec::parse(text).unwrap_err();
            assert!(said.contains(part), "{text}: {said}");
        }
        for (text, part) in [
            ("", "names no disk"),
            (",file=/x", "names no disk"),
            ("vda,/x", "none of snapshot=TYPE"),
            ("vda,file=x", "not an absolute path"),
            ("vda,snapshot=full", "external|internal|manual|no"),
            ("vda,stype=net", "file|block"),
            ("vda,driver=", "no value"),
        ] {
            let said = DiskSpec::parse(text).unwrap_err();
            assert!(said.contains(part), "{text}: {said}");
        }
    }

    #[test]
    fn memory_is_added_to_xml_that_does_not_mention_it() {
        let memory = MemorySpec::parse("/m,snapshot=external").unwrap();
        let added = |xml| inserted(xml, &elements(None, &memory)).unwrap();
        assert_eq!(elements(Some("a<b"), &MemorySpec::default()), "  <name>a&lt;b</name>\n");
        let memory = "<memory snapshot='external' file='/m'/>";
        assert_eq!(
            added("<domainsnapshot/>"),
            format!("<domainsnapshot>\n  {memory}\n</domainsnapshot>")
        );
        assert_eq!(
            added("<!-- <domainsnapshot> --><domainsnapshot><name/></domainsnapshot>"),
            format!(
                "<!-- <domainsnapshot> --><domainsnapshot>\n  {memory}<name/></domainsnapshot>"
            )
        );
    }
}
