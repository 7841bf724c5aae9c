// SPDX-License-Identifier: LGPL-2.1-or-later

//! QEMU's events. Only the kinds that are used are kept, and only the newest of them.
//!
//! The number is limited because a guest can make QEMU send events at any rate, and so can a proxy
//! between QEMU and us.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;

/// The kinds of events that are used.
const USED: [&str; 2] = ["STOP", "RESUME"];
/// The number of events that are kept. No pause has more.
const KEPT: usize = 256;

/// An event that QEMU sent.
#[derive(Clone, Debug)]
pub struct Event {
    /// The event's name, `event`.
    pub name: &'static str,
    /// QEMU's own time stamp, since the epoch.
    pub time: Duration,
}

impl Event {
    /// The event in a message; none if the message is none, or of a kind that is not used.
    pub fn read(message: &Value) -> Option<Event> {
        let name = message["event"].as_str()?;
        let name = USED.into_iter().find(|used| *used == name)?;
        let number = |unit| message["timestamp"][unit].as_u64().unwrap_or_default();
        let time = Duration::from_secs(number("seconds"))
            .checked_add(Duration::from_micros(number("microseconds")))?;
        Some(Event { name, time })
    }
}

/// The events that were not taken yet, oldest first.
#[derive(Debug, Default)]
pub struct Events(VecDeque<Event>);

impl Events {
    /// Adds an event. The oldest one is dropped if there are too many.
    pub fn keep(&mut self, event: Event) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    /// All events since the last call.
    pub fn take(&mut self) -> Vec<Event> {
        self.0.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_of_those_that_are_used_are_kept() {
        let event = |name: &str, seconds: usize| {
            Event::read(
                &json!({ "event": name, "timestamp": { "seconds": seconds, "microseconds": 0 } }),
            )
        };
        assert!(event("RTC_CHANGE", 1).is_none());
        let mut events = Events::default();
        (0..KEPT + 2).for_each(|n| events.keep(event("STOP", n).unwrap()));
        let kept = events.take();
        assert_eq!((kept.len(), kept[0].time.as_secs()), (KEPT, 2));
        assert!(events.take().is_empty());
    }
}
