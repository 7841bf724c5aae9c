// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads XML safely: every size is limited, and there is no DTD (thus no entities). Also has a few
//! functions to walk the tree.

use roxmltree::{Document, Node, ParsingOptions};

use crate::error::{Code, Error, Result, fail};

/// How much XML is accepted.
#[derive(Debug)]
pub struct Limits {
    bytes: usize,
    nodes: u32,
    /// The namespace declarations. The parser compares each with every other of the elements around
    /// it, again and again.
    namespaces: usize,
    /// The attributes of one element. The parser compares each with every other.
    attributes: usize,
}

impl Limits {
    /// The limit in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The limits for XML from outside: more than any XML that libvirt writes.
pub const GIVEN: Limits =
    Limits { bytes: 8 << 20, nodes: 1 << 20, namespaces: 256, attributes: 1000 };
/// The limits for XML that the library wrote: everything that was accepted, with its texts escaped,
/// and some more.
pub const RECORDED: Limits =
    Limits { bytes: 128 << 20, nodes: 2 << 20, namespaces: 512, attributes: 1000 };

/// Parses `text`, whose root must be `root`.
pub fn parse<'a>(text: &'a str, root: &str, limits: &Limits) -> Result<Document<'a>> {
    check_limits(text, root, limits)?;
    let options =
        ParsingOptions { allow_dtd: false, nodes_limit: limits.nodes, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| {
        Error::new(Code::XmlDetail, format!("cannot parse <{root}> XML: {error}"))
    })?;
    let found = document.root_element().tag_name().name();
    if found != root {
        fail!(XmlError, "unexpected root element <{found}>, expecting <{root}>");
    }
    Ok(document)
}

/// Whether a text is complete XML with another root than this one.
pub fn is_another(text: &str, root: &str) -> bool {
    let found = |document: Document| document.root_element().tag_name().name() != root;
    check_limits(text, root, &RECORDED).is_ok() && Document::parse(text).is_ok_and(found)
}

/// Checks the limits before the parser runs, because the parser first allocates memory for
/// everything that the text may contain.
fn check_limits(text: &str, root: &str, limits: &Limits) -> Result<()> {
    let Limits { bytes, nodes, namespaces, attributes } = *limits;
    if text.len() > bytes {
        fail!(XmlDetail, "<{root}> XML is {} bytes, at most {bytes} are accepted", text.len());
    }
    // A node has at most two `<`.
    if text.bytes().filter(|byte| *byte == b'<').count() > 2 * nodes as usize {
        fail!(XmlDetail, "<{root}> XML has too many elements, at most {nodes} are accepted");
    }
    if text.matches("xmlns").nth(namespaces).is_some() {
        fail!(XmlDetail, "<{root}> XML has too many namespaces, at most {namespaces} are accepted");
    }
    // The next tag begins with the next `<`, which no attribute can hold.
    let is_value = |rest: &&str| rest.trim_start().starts_with(['\'', '"']);
    if text.split('<').any(|tag| tag.split('=').skip(1).filter(is_value).nth(attributes).is_some())
    {
        fail!(
            XmlDetail,
            "<{root}> XML has too many attributes, at most {attributes} of an element are accepted"
        );
    }
    Ok(())
}

/// The first child element of this name.
pub fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// All child elements of this name.
pub fn children<'a, 'i>(node: Node<'a, 'i>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

/// The text of the first child element of this name; an empty one counts as absent.
pub fn text(node: Node, name: &str) -> Option<String> {
    let text: String = child(node, name)?.children().filter_map(|child| child.text()).collect();
    (!text.is_empty()).then_some(text)
}

/// An attribute of the first child element of this name.
pub fn attribute<'a>(node: Node<'a, '_>, name: &str, attribute: &str) -> Option<&'a str> {
    child(node, name)?.attribute(attribute)
}
