// SPDX-License-Identifier: LGPL-2.1-or-later

//! Follows a snapshot that is being taken: its events, and the user who interrupts it.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{BinaryBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use instantsnap_core::engine::{Event, EventKind, Flow, Job, Observer};
use serde_json::{Value, json};

use crate::output::{duration, warn};
use crate::signals::Signals;

/// Time between two reports of the progress.
const INTERVAL: Duration = Duration::from_millis(250);

/// Asks for the progress.
pub struct Interval;

impl Observer for Interval {
    fn interval(&self) -> Option<Duration> {
        Some(INTERVAL)
    }
}

/// Shows how far a snapshot is.
pub trait Report {
    /// Something has happened.
    fn event(&mut self, event: &Event);

    /// The user has interrupted the command, perhaps not for the first time.
    fn interrupted(&mut self, again: bool);
}

/// Follows a job to its end. The first signal cancels it, and is returned; all others only report
/// that the undo is under way.
pub fn follow(job: &Job, signals: &Signals, report: &mut dyn Report) -> Option<i32> {
    let mut interrupted = None;
    loop {
        while let Some(event) = job.next_event() {
            report.event(&event);
            if matches!(event.kind, EventKind::Complete | EventKind::Failed(_)) {
                job.wait(None);
                return interrupted;
            }
        }
        while let Some(signal) = signals.take() {
            job.cancel();
            report.interrupted(interrupted.is_some());
            interrupted.get_or_insert(signal);
        }
        signals.wait(&[job.readable()]);
    }
}

/// The report for people: lines, and a bar in a terminal.
pub struct Text {
    quiet: bool,
    bar: Option<ProgressBar>,
    was_running: bool,
}

impl Text {
    /// The report. If it is to be quiet, only an interruption is reported.
    pub fn new(quiet: bool) -> Text {
        Text { quiet, bar: None, was_running: false }
    }

    /// The bar; nothing of it is shown where standard error is not a terminal.
    fn bar(&mut self) -> &ProgressBar {
        self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:28} {percent:>3}%  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        })
    }

    fn show(&mut self, flow: Flow) {
        if self.quiet {
            return;
        }
        let expected = expected(flow);
        let bar = self.bar();
        bar.set_message(progress(flow));
        // Both at once, for one picture.
        bar.update(|state| {
            state.set_len(expected.max(1));
            state.set_pos(flow.done.min(expected));
        });
    }

    /// Writes a line while there may be a bar.
    fn line(&self, line: &str) {
        let write = || {
            // The snapshot goes on even if nobody reads this any more.
            let mut output = io::stdout().lock();
            let _ = writeln!(output, "{line}").and_then(|()| output.flush());
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The size that the memory image will have, at most. Pages of zeros take no room, and QEMU finds
/// out which these are only when it comes to them.
fn expected(flow: Flow) -> u64 {
    const PAGE: u64 = 4096;
    let left = flow.pages_left.saturating_mul(PAGE);
    flow.done.saturating_add(left).min(flow.total.max(flow.done))
}

/// How much is saved, how fast, and how long the rest takes at most.
fn progress(flow: Flow) -> String {
    let (done, expected) = (flow.done, expected(flow));
    let mut text = format!("{} of {}", BinaryBytes(done), BinaryBytes(expected));
    if flow.per_second > 0 {
        let left = Duration::from_secs((expected - done).div_ceil(flow.per_second));
        text += &format!("  {}/s  {:#} left", BinaryBytes(flow.per_second), HumanDuration(left));
    }
    text
}

impl Report for Text {
    fn event(&mut self, event: &Event) {
        match event.kind {
            EventKind::Paused => self.was_running = true,
            EventKind::Switched => {}
            EventKind::Instant => {
                if !self.quiet {
                    let paused = duration(event.paused);
                    self.line(&match self.was_running {
                        true => format!("The guest may be changed now; it was paused {paused}"),
                        false => "The guest may be changed now; it was paused already".to_owned(),
                    });
                }
                // QEMU has not said yet how much is left.
                let flow = Flow { pages_left: u64::MAX, ..event.flow };
                self.show(flow);
            }
            EventKind::Progress => self.show(event.flow),
            EventKind::Complete | EventKind::Failed(_) => self.end(),
        }
    }

    fn interrupted(&mut self, again: bool) {
        let line = match again {
            false => "interrupted: the snapshot is being undone",
            true => "the snapshot is still being undone; the guest runs meanwhile",
        };
        match &self.bar {
            Some(bar) => bar.suspend(|| warn(line)),
            None => warn(line),
        }
    }
}

/// The report for programs: an object on each line.
pub struct Lines;

/// An event for programs.
fn to_json(event: &Event) -> Option<Value> {
    let Flow { done, total, per_second, pages_left, .. } = event.flow;
    let paused = event.paused.as_micros() as u64;
    Some(match event.kind {
        EventKind::Paused => json!({ "event": "paused" }),
        EventKind::Switched => json!({ "event": "switched" }),
        EventKind::Instant => json!({ "event": "instant", "paused_us": paused }),
        EventKind::Progress => json!({
            "event": "progress",
            "bytes_done": done,
            "bytes_total": total,
            "bytes_per_second": per_second,
            "pages_left": pages_left,
        }),
        // The last line, which the command writes, has more about these.
        EventKind::Complete | EventKind::Failed(_) => return None,
    })
}

impl Report for Lines {
    fn event(&mut self, event: &Event) {
        if let Some(event) = to_json(event) {
            let mut output = io::stdout().lock();
            let _ = writeln!(output, "{event}").and_then(|()| output.flush());
        }
    }

    fn interrupted(&mut self, again: bool) {
        Text::new(true).interrupted(again);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_size_shrinks_as_pages_of_zeros_are_skipped() {
        let flow = |done, total, pages_left| Flow { done, total, pages_left, ..Flow::default() };
        assert_eq!(expected(flow(0, 0, 0)), 0);
        assert_eq!(expected(flow(0, 1 << 20, u64::MAX)), 1 << 20);
        assert_eq!(expected(flow(0, 1 << 20, 256)), 1 << 20);
        assert_eq!(expected(flow(4096, 1 << 20, 1)), 8192);
        assert_eq!(expected(flow(2 << 20, 1 << 20, 0)), 2 << 20);
        assert_eq!(expected(flow(u64::MAX, u64::MAX, u64::MAX)), u64::MAX);
    }
}
