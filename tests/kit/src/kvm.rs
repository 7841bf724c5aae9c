//! Whether KVM really works here: a `/dev/kvm` that can be opened is not enough where it is nested.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::{Accel, Binary, DEADLINE, Daemon, Machine};

/// True when the tick guest boots and counts under KVM with this QEMU. Tried once per process and
/// QEMU, for some seconds. A test that needs KVM and does not have it returns; it is said here why.
pub fn kvm_works(binary: &'static Binary) -> bool {
    static TRIED: Mutex<BTreeMap<PathBuf, bool>> = Mutex::new(BTreeMap::new());
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    *tried.entry(binary.path.clone()).or_insert_with(|| {
        if !Path::new("/dev/kvm").exists() {
            return is_skipped(&format!("QEMU {} under KVM", binary.name), "there is no /dev/kvm");
        }
        let guest = Machine::new(binary).accel(Accel::Kvm).spawn();
        match guest.try_ticks(3, Duration::from_secs(30)) {
            Ok(_) => true,
            Err(why) => {
                let said = std::fs::read_to_string(guest.directory().join("stderr.log"))
                    .unwrap_or_default();
                is_skipped(&format!("QEMU {} under KVM", binary.name), &format!("{why}\n{said}"))
            }
        }
    })
}

/// The same of a domain as it is, tried at each call: what KVM cannot do here may be its CPU's, as
/// where nested KVM does not let QEMU set one of the host's model-specific registers.
pub fn kvm_runs(machine: &Machine, daemon: &Daemon) -> bool {
    let tried = machine.try_start_under(daemon).and_then(|guest| {
        let log = daemon.qemu_log(guest.name());
        let said = |why| format!("{why}\n{}", std::fs::read_to_string(log).unwrap_or_default());
        guest.try_ticks(3, DEADLINE).map_err(said)
    });
    match tried {
        Ok(_) => true,
        Err(why) => is_skipped("this domain under KVM", &why),
    }
}

fn is_skipped(what: &str, why: &str) -> bool {
    eprintln!("skipped: {what} does not run here: {why}");
    false
}
