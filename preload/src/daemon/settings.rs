// SPDX-License-Identifier: LGPL-2.1-or-later

//! Reads the settings in the daemon's environment.

use std::sync::OnceLock;

/// By default, a daemon can run 20 long calls at once. Half of them are left for other calls.
const MAX_JOBS: usize = 10;

/// The settings. They are read once, because the daemon's environment is set when it is started.
#[derive(Debug)]
pub struct Settings {
    /// LIVE snapshots are made as INSTANT ones.
    pub upgrade_live: bool,
    /// How many snapshots can be taken at once.
    pub max_jobs: usize,
    /// Use a libvirt version that is not known to work.
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
