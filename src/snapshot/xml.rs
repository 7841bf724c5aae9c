//! Reading XML safely: bounded size, no DTD (thus no entities), and a few words for walking the tree.

use roxmltree::{Document, Node, ParsingOptions};

use crate::error::{Code, Error, Result, fail};

/// Larger than any XML that libvirt writes.
const LONGEST: usize = 8 << 20;

/// Parses `text`, whose root must be `root`.
pub fn parse<'a>(text: &'a str, root: &str) -> Result<Document<'a>> {
    if text.len() > LONGEST {
        fail!(XmlDetail, "<{root}> XML is {} bytes, at most {LONGEST} are accepted", text.len());
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: 1 << 20, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)
        .map_err(|error| Error::new(Code::XmlDetail, format!("cannot parse <{root}> XML: {error}")))?;
    let found = document.root_element().tag_name().name();
    if found != root {
        fail!(XmlError, "unexpected root element <{found}>, expecting <{root}>");
    }
    Ok(document)
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
