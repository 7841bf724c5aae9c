// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the command writes to standard output: text as virsh writes it, or JSON.

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;
use unicode_width::UnicodeWidthStr;

use crate::failure::{Failure, Result};

/// Writes text to standard output. A reader that has seen enough (`| head`) is no failure.
pub fn print(text: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Other(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes a message to standard error, if anyone reads that: the command goes on.
pub fn warn(message: &str) {
    let _ = writeln!(io::stderr().lock(), "instantsnap: {message}");
}

/// Writes a line to standard output.
pub fn line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Writes a value as one document.
pub fn json(value: &Value) -> Result<()> {
    line(&format!("{value:#}"))
}

/// A table as virsh shows it.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(columns: &[&str]) -> Table {
        Table { rows: vec![columns.iter().map(|&column| column.to_owned()).collect()] }
    }

    /// Adds a row, with a cell for each column.
    pub fn add(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// The text; without the columns' names if the reader is to have the rows only.
    pub fn text(&self, with_header: bool) -> String {
        const GAP: usize = 3;
        let columns = self.rows[0].len();
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].width()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let whole = widths.iter().map(|width| width + GAP).sum::<usize>();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            if number == 0 && !with_header {
                continue;
            }
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line += &format!(" {cell}{}", " ".repeat(width - cell.width() + GAP - 1));
            }
            text += line.trim_end();
            text.push('\n');
            if number == 0 {
                text += &"-".repeat(whole);
                text.push('\n');
            }
        }
        text
    }
}

/// A time in seconds since the epoch, as virsh shows it: in the local time zone.
pub fn local_time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.map_or_else(
        || seconds.to_string(),
        |time| {
            time.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %z").to_string()
        },
    )
}

/// A short duration.
pub fn duration(duration: Duration) -> String {
    let milliseconds = duration.as_secs_f64() * 1e3;
    match milliseconds {
        ..9.95 => format!("{milliseconds:.1} ms"),
        ..10_000.0 => format!("{milliseconds:.0} ms"),
        _ => format!("{:.1} s", milliseconds / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["Name", "State"]);
        table.add(vec!["a".into(), "running".into()]);
        table.add(vec!["二つ".into(), "x".into()]);
        let rows = " a      running\n 二つ   x\n";
        assert_eq!(table.text(false), rows);
        assert_eq!(table.text(true), format!(" Name   State\n{}\n{rows}", "-".repeat(17)));
    }

    #[test]
    fn durations_are_shown_as_precisely_as_they_matter() {
        let shown = |micros| duration(Duration::from_micros(micros));
        assert_eq!(shown(840), "0.8 ms");
        assert_eq!(shown(9_960), "10 ms");
        assert_eq!(shown(1_234_000), "1234 ms");
        assert_eq!(shown(12_340_000), "12.3 s");
    }
}
