// SPDX-License-Identifier: LGPL-2.1-or-later

//! What the daemon's environment says.

use std::sync::OnceLock;

/// A daemon's default limits allow 20 calls at once that take their time: half of them are for
/// others.
const MAX_JOBS: usize = 10;

/// Read once: who starts the daemon sets them.
#[derive(Debug)]
pub struct Settings {
    /// LIVE snapshots are to be instant.
    pub upgrade_live: bool,
    /// So many snapshots can be taken at once.
    pub max_jobs: usize,
    /// A libvirt that nobody has looked at is good enough.
    pub any_version: bool,
}

impl Settings {
    /// The settings of this process.
    pub fn get() -> &'static Settings {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        SETTINGS.get_or_init(|| Settings::of(|name| std::env::var(name).ok()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Settings {
        let is_on = |name: &str| variable(name).is_some_and(|value| value == "1");
        let max_jobs =
            variable("INSTANTSNAP_MAX_SNAPSHOTS").and_then(|value| value.trim().parse().ok());
        Settings {
            upgrade_live: is_on("INSTANTSNAP_UPGRADE_LIVE"),
            max_jobs: max_jobs.unwrap_or(MAX_JOBS),
            any_version: is_on("INSTANTSNAP_ANY_LIBVIRT"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> (bool, usize, bool) {
        let settings = Settings::of(|name| {
            pairs.iter().find(|pair| pair.0 == name).map(|(_, value)| (*value).to_owned())
        });
        (settings.upgrade_live, settings.max_jobs, settings.any_version)
    }

    #[test]
    fn what_is_not_set_or_makes_no_sense_is_as_by_default() {
        assert_eq!(of(&[]), (false, MAX_JOBS, false));
        let nonsense = [
            ("INSTANTSNAP_UPGRADE_LIVE", "yes"),
            ("INSTANTSNAP_MAX_SNAPSHOTS", "-1"),
            ("INSTANTSNAP_ANY_LIBVIRT", ""),
        ];
        assert_eq!(of(&nonsense), (false, MAX_JOBS, false));
        let all = [
            ("INSTANTSNAP_UPGRADE_LIVE", "1"),
            ("INSTANTSNAP_MAX_SNAPSHOTS", "3"),
            ("INSTANTSNAP_ANY_LIBVIRT", "1"),
        ];
        assert_eq!(of(&all), (true, 3, true));
    }
}
