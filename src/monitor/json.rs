//! JSON as deep as QEMU's can be.
//!
//! QEMU describes an image with the images below nested in it. So a chain of more than a hundred is deeper than a parser that
//! guards its stack accepts by itself.

use serde::Deserialize;
use serde_json::Value;

/// As deep as QEMU itself accepts it. What is deeper is not QEMU's, and could exhaust the stack.
const DEEPEST: usize = 1024;

/// Reads it; what is wrong with it otherwise.
pub fn parse(text: &[u8]) -> Result<Value, String> {
    if depth(text) > DEEPEST {
        return Err("it is nested too deeply".into());
    }
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    deserializer.disable_recursion_limit();
    let value = Value::deserialize(&mut deserializer).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// How deep it is, at most.
fn depth(text: &[u8]) -> usize {
    let (mut now, mut deepest) = (0usize, 0);
    let (mut quoted, mut escaped) = (false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                now += 1;
                deepest = deepest.max(now);
            }
            b']' | b'}' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize) -> String {
        "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth)
    }

    #[test]
    fn a_long_chain_of_images_can_be_read_and_nothing_deeper_than_qemu_says() {
        let value = parse(nested(DEEPEST).as_bytes()).unwrap();
        assert!(value["a"]["a"].is_object());
        parse(nested(DEEPEST + 1).as_bytes()).unwrap_err();
        parse("[".repeat(10_000_000).as_bytes()).unwrap_err();
    }

    #[test]
    fn brackets_in_strings_are_text() {
        let text = format!("[\"{}\\\"[\", 1]", "[".repeat(DEEPEST * 2));
        assert_eq!(parse(text.as_bytes()).unwrap()[1], 1);
    }

    #[test]
    fn garbage_is_an_error() {
        for text in ["", "{", "{} {}", "no", "\"\\"] {
            parse(text.as_bytes()).unwrap_err();
        }
    }
}
