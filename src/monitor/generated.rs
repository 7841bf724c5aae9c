// SPDX-License-Identifier: LGPL-2.1-or-later

//! Pseudo-random JSON, for tests.

use serde_json::{Value, json};

/// Generates the same texts in each run.
pub struct Generator(u64);

impl Generator {
    pub fn new() -> Generator {
        Generator(0x9e37_79b9_7f4a_7c15)
    }

    /// A number less than `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    /// A random object, on one line or on several.
    pub fn text(&mut self) -> String {
        let members = (0..self.below(4)).map(|_| (self.string(), self.value(4))).collect();
        let object = Value::Object(members);
        if self.below(2) == 0 {
            object.to_string()
        } else {
            serde_json::to_string_pretty(&object).unwrap()
        }
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 5 } else { 7 }) {
            0 => Value::Null,
            1 => (self.below(2) == 0).into(),
            2 => (self.below(2000) as i64 - 1000).into(),
            3 => json!(self.below(2000) as f64 / 64.0 - 10.0),
            4 => self.string().into(),
            5 => (0..self.below(4)).map(|_| self.value(depth - 1)).collect(),
            _ => Value::Object(
                (0..self.below(4)).map(|_| (self.string(), self.value(depth - 1))).collect(),
            ),
        }
    }

    fn string(&mut self) -> String {
        const PARTS: [&str; 12] =
            ["a", "\"", "\\", "{", "}", "[", "]", "\n", "\u{1f980}", "\u{1}", ":", ","];
        (0..self.below(5)).map(|_| PARTS[self.below(PARTS.len())]).collect()
    }
}
