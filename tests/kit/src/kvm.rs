// SPDX-License-Identifier: LGPL-2.1-or-later

//! Whether KVM really works here. Where it is nested, a `/dev/kvm` that can be opened does not
//! suffice.

use std::path::Path;
use std::time::Duration;

use crate::program::skip;
use crate::{Accel, Binary, DEADLINE, Daemon, Machine, run};

/// Whether the tick guest boots and counts under KVM with this QEMU. It is tried once in a run, for
/// some seconds.
pub fn kvm_works(binary: &'static Binary) -> bool {
    trouble(binary).is_empty()
}

/// The QEMUs among these with which KVM works here. Skips the test where there is none.
pub fn where_kvm_works(
    binaries: impl IntoIterator<Item = &'static Binary>,
) -> Vec<&'static Binary> {
    let mut troubles = Vec::new();
    let mut works = Vec::new();
    for binary in binaries {
        match trouble(binary) {
            trouble if trouble.is_empty() => works.push(binary),
            trouble => troubles.push(format!("QEMU {}: {trouble}", binary.name)),
        }
    }
    if works.is_empty() {
        skip(format!("no KVM here: {}", troubles.join("; ")));
    }
    works
}

/// The reason why KVM does not work; empty where it works.
fn trouble(binary: &'static Binary) -> String {
    run::once(&format!("kvm of {}", binary.path.display()), || {
        if !Path::new("/dev/kvm").exists() {
            return "there is no /dev/kvm".into();
        }
        let guest = Machine::new(binary).accel(Accel::Kvm).spawn();
        let log = guest.directory().join("stderr.log");
        let said = |why| format!("{why} {}", std::fs::read_to_string(log).unwrap_or_default());
        guest.try_ticks(3, Duration::from_secs(30)).map_or_else(said, |_| String::new())
    })
}

/// Skips the test where this domain does not run. KVM can fail because of its CPU, as where nested
/// KVM does not let QEMU set one of the host's model-specific registers.
pub fn kvm_runs(machine: &Machine, daemon: &Daemon) {
    let tried = machine.try_start_under(daemon).and_then(|guest| {
        let log = daemon.qemu_log(guest.name());
        let said = |why| format!("{why}\n{}", std::fs::read_to_string(log).unwrap_or_default());
        guest.try_ticks(3, DEADLINE).map_err(said)
    });
    if let Err(why) = tried {
        skip(format!("this domain does not run under KVM here: {why}"));
    }
}
