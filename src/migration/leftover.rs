// SPDX-License-Identifier: LGPL-2.1-or-later

//! Migration settings that an earlier snapshot has left in QEMU.

use serde_json::{Map, Value, json};

use super::lazy::Lazy;
use super::maker;
use super::names::{BACKGROUND, LOCK, RECORD, TLS};
use crate::error::{Result, fail};

/// The record of the settings begins with this.
const PREFIX: &str = "instantsnap: ";

/// The settings that an earlier snapshot has left in QEMU: its process and its watchdog were
/// killed, or could not reach QEMU any more.
///
/// QEMU itself keeps the record of what its settings were before: in the parameter `tls-hostname`,
/// which QEMU does not use as long as no credentials are set. So the record outlives all of our
/// processes, and ends with QEMU.
#[derive(Debug)]
pub struct Leftover {
    /// All capabilities as they were before that snapshot, as far as that is known.
    pub capabilities: Vec<(String, bool)>,
    /// The parameters that the snapshot has changed, as they were before it.
    pub parameters: Map<String, Value>,
    /// The load whose memory followed, or follows, if that has changed the settings.
    pub lazy: Option<Lazy>,
    /// The processes that took the snapshot: see [`maker`].
    maker: Value,
}

impl Leftover {
    /// The record of the settings: the capabilities that are on, and the parameters that will be
    /// changed.
    pub fn describe<'a>(
        capabilities: &[(String, bool)],
        parameters: &Map<String, Value>,
        changed: impl Iterator<Item = &'a str>,
        watchdog: Option<u32>,
        lazy: Option<&Lazy>,
    ) -> String {
        let on = capabilities.iter().filter(|(_, state)| *state);
        let capabilities: Vec<_> = on.map(|(name, _)| name).collect();
        let parameters: Map<_, _> =
            changed.map(|name| (name.to_owned(), parameters[name].clone())).collect();
        let maker = maker::note(watchdog);
        format!(
            "{PREFIX}{}",
            json!({
                "capabilities": capabilities,
                "parameters": parameters,
                "maker": maker,
                "lazy": lazy,
            })
        )
    }

    /// Finds what was left, among the capabilities and parameters that QEMU has now. `never_set`:
    /// no other client sets `background-snapshot` in this guest.
    pub fn find(
        found: &[(String, bool)],
        parameters: &Map<String, Value>,
        never_set: bool,
    ) -> Option<Leftover> {
        let text = |name: &str| parameters.get(name).and_then(Value::as_str).unwrap_or_default();
        let recorded = text(RECORD).strip_prefix(PREFIX);
        if let Some(leftover) = recorded.and_then(|recorded| Leftover::parse(recorded, found)) {
            return Some(leftover);
        }
        let is_on = found.iter().any(|(name, state)| name == BACKGROUND && *state);
        if text(TLS) != LOCK && !(is_on && never_set) {
            return None;
        }
        // It is not known which other capabilities the snapshot has switched off.
        let off = |(name, state): &(String, bool)| (name.clone(), *state && name != BACKGROUND);
        let locked = (text(TLS) == LOCK).then(|| (TLS.to_owned(), json!("")));
        let capabilities = found.iter().map(off).collect();
        Some(Leftover {
            capabilities,
            parameters: locked.into_iter().collect(),
            lazy: None,
            maker: Value::Null,
        })
    }

    fn parse(recorded: &str, found: &[(String, bool)]) -> Option<Leftover> {
        let mut recorded: Value = serde_json::from_str(recorded).ok()?;
        let Value::Object(parameters) = recorded["parameters"].take() else { return None };
        let on = recorded["capabilities"].as_array()?;
        let was = |(name, _): &(String, bool)| (name.clone(), on.iter().any(|on| on == name));
        let capabilities = found.iter().map(was).collect();
        let lazy = serde_json::from_value(recorded["lazy"].take()).ok();
        Some(Leftover { capabilities, parameters, lazy, maker: recorded["maker"].take() })
    }

    /// Refuses settings that another snapshot may still need: this process cannot tell that it has
    /// ended.
    pub fn check_maker(&self) -> Result<()> {
        match maker::snapshot_under_way(&self.maker) {
            None => Ok(()),
            Some(snapshot) => fail!(
                OperationInvalid,
                "another snapshot of this guest is under way, or has left its settings in QEMU: it \
                 is {snapshot}. Wait for it to end; if it was killed, take a snapshot from where it was \
                 begun, or clear QEMU's migration parameter '{RECORD}' (migrate-set-parameters) \
                 and try again"
            ),
        }
    }
}
