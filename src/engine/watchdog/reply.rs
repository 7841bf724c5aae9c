// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads QEMU's replies in a process that must not allocate memory: byte by byte, and keeps little
//! of them.

/// The id of the watchdog's commands. QEMU repeats it in its replies to them, and in no other
/// reply.
pub const MARK: &str = "instantsnap-watchdog-done";

/// No string that the reader looks for is longer.
const LONGEST: usize = 32;
const _: () = assert!(MARK.len() <= LONGEST, "the watchdog would not know its own replies");

/// A reply of QEMU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// It is the reply to a command of the watchdog.
    pub ours: bool,
    /// The command was carried out.
    pub done: bool,
    /// It says that there is no such block job.
    pub no_job: bool,
    /// It says that a migration is under way.
    pub migrating: bool,
    /// It says that the end of a migration has stopped the guest.
    pub stopped_by_migration: bool,
}

/// The first bytes of a string, and its length.
#[derive(Clone, Copy, Debug)]
struct Text {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Text {
    const EMPTY: Text = Text { bytes: [0; LONGEST], length: 0 };

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
        }
        self.length = self.length.saturating_add(1);
    }

    fn is(&self, other: &str) -> bool {
        self.bytes.get(..self.length) == Some(other.as_bytes())
    }
}

/// The member that the next value belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Id,
    Return,
    Error,
    Class,
    Status,
    Other,
}

/// Reads JSON objects in any layout.
#[derive(Debug)]
pub struct Reader {
    depth: usize,
    in_string: bool,
    escaped: bool,
    text: Text,
    key: Key,
    /// The last delimiter was a colon: a value comes next.
    value: bool,
    reply: Reply,
}

impl Reader {
    /// A reader at the beginning of an object.
    pub fn new() -> Reader {
        Reader {
            depth: 0,
            in_string: false,
            escaped: false,
            text: Text::EMPTY,
            key: Key::Other,
            value: false,
            reply: Reply::default(),
        }
    }

    /// Reads one more byte. Returns the reply if it ends with this byte. An event is returned too,
    /// as a reply that is not `ours`.
    pub fn read(&mut self, byte: u8) -> Option<Reply> {
        if self.in_string {
            match byte {
                _ if self.escaped && byte != b'\n' => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.end_string(),
                // A JSON string does not contain a line's end: the caller had read the beginning of
                // this line, and the reader was not in a string.
                b'\n' => *self = Reader::new(),
                _ => self.text.push(byte),
            }
            return None;
        }
        match byte {
            b'"' => (self.in_string, self.text) = (true, Text::EMPTY),
            b':' => self.value = true,
            b',' => self.value = false,
            b'{' | b'[' => (self.depth, self.value) = (self.depth.saturating_add(1), false),
            b'}' | b']' => {
                (self.depth, self.value) = (self.depth.saturating_sub(1), false);
                if self.depth == 0 {
                    return Some(std::mem::take(&mut self.reply));
                }
            }
            _ => {}
        }
        None
    }

    fn end_string(&mut self) {
        self.in_string = false;
        if !self.value {
            self.key = match self.depth {
                1 if self.text.is("id") => Key::Id,
                1 if self.text.is("return") => Key::Return,
                1 if self.text.is("error") => Key::Error,
                2 if self.text.is("class") => Key::Class,
                2 if self.text.is("status") => Key::Status,
                _ => Key::Other,
            };
            self.reply.done |= self.key == Key::Return;
            return;
        }
        let text = &self.text;
        match self.key {
            Key::Id => self.reply.ours = text.is(MARK),
            Key::Class => self.reply.no_job = text.is("DeviceNotActive"),
            // In every other status (`none`, and those of a migration that has ended) nothing more
            // comes.
            Key::Status => {
                const UNDER_WAY: [&str; 7] = [
                    "setup",
                    "active",
                    "device",
                    "cancelling",
                    "pre-switchover",
                    "wait-unplug",
                    "postcopy-active",
                ];
                self.reply.migrating = UNDER_WAY.iter().any(|status| text.is(status));
                self.reply.stopped_by_migration = text.is("postmigrate");
            }
            Key::Return | Key::Error | Key::Other => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies(text: &str) -> Vec<Reply> {
        let mut reader = Reader::new();
        text.bytes().filter_map(|byte| reader.read(byte)).collect()
    }

    #[test]
    fn replies_are_told_from_events_and_from_replies_to_others() {
        let text = r#"{"timestamp": {"seconds": 1}, "event": "MIGRATION", "data": {"status": "active"}}
            {"return": {"status": "completed", "ram": {"a": [1, {"status": "active"}]}}, "id": "instantsnap-watchdog-done"}
            {"return": {}, "id": "another"}"#;
        let ours: Vec<_> = replies(text).into_iter().filter(|reply| reply.ours).collect();
        assert_eq!(ours, [Reply { ours: true, done: true, ..Reply::default() }]);
        assert_eq!(replies(text).len(), 3);
    }

    #[test]
    fn a_guest_that_a_migration_has_stopped_is_told_from_one_that_is_paused() {
        for (status, stopped_by_migration) in [("postmigrate", true), ("paused", false)] {
            let text = format!(
                "{{\"return\": {{\"status\": \"{status}\", \"running\": false}}, \"id\": \
                 \"{MARK}\"}}"
            );
            let reply = Reply { ours: true, done: true, stopped_by_migration, ..Reply::default() };
            assert_eq!(replies(&text), [reply]);
        }
    }

    #[test]
    fn a_reply_over_several_lines_is_read() {
        let text = "{\n  \"id\": \"instantsnap-watchdog-done\",\n  \"return\": {\n    \"status\": \"active\"\n  }\n}\n";
        assert_eq!(
            replies(text),
            [Reply { ours: true, done: true, migrating: true, ..Reply::default() }]
        );
    }

    #[test]
    fn what_the_caller_has_read_the_beginning_of_is_passed_over() {
        let line = r#"{"return": {"a": ["b", {"c": "d, }"}]}, "id": "another"}"#.to_owned();
        let ours = "\n{\"return\": {}, \"id\": \"instantsnap-watchdog-done\"}\n";
        for begin in 0..line.len() {
            let text = line[begin..].to_owned() + ours;
            assert_eq!(
                replies(&text).into_iter().filter(|reply| reply.ours && reply.done).count(),
                1,
                "{text}"
            );
        }
    }

    #[test]
    fn an_error_is_not_done() {
        let text = r#"{"id": "instantsnap-watchdog-done",
            "error": {"class": "DeviceNotActive", "desc": "\"}}\\ { return"}}"#;
        assert_eq!(replies(text), [Reply { ours: true, no_job: true, ..Reply::default() }]);
    }
}
