// SPDX-License-Identifier: LGPL-2.1-or-later

//! The output of the tick guest on its serial line, read from the log file that QEMU writes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The state of a tick guest, by the last lines of its log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serial {
    /// The last number that it has counted to; `None` before the first.
    pub tick: Option<u32>,
    /// The line that reports that its memory or disks do not agree (`TORN ...`), or that it cannot
    /// continue (`FAIL ...`). It is the last line.
    pub trouble: Option<String>,
}

impl Serial {
    /// Reads the end of the log, which grows by hundreds of lines a second.
    pub fn read(log: &Path) -> Serial {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(log) {
            let length = file.metadata().map_or(0, |metadata| metadata.len());
            let _ = file.seek(SeekFrom::Start(length.saturating_sub(1024)));
            let _ = file.read_to_end(&mut text);
        }
        let text = String::from_utf8_lossy(&text);
        // The text after the last newline is an incomplete line, and the text before the first
        // newline can be the end of one.
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let mut serial = Serial::default();
        for line in complete.lines() {
            if let Some(tick) = line.strip_prefix("T ") {
                serial.tick = tick.parse().ok();
            } else if line.starts_with("TORN ") || line.starts_with("FAIL ") {
                serial.trouble = Some(line.to_owned());
            }
        }
        serial
    }

    /// Whether the guest found a snapshot torn.
    pub fn torn(&self) -> bool {
        self.trouble.as_ref().is_some_and(|line| line.starts_with("TORN "))
    }
}
