//! Whether KVM really works here: a `/dev/kvm` that can be opened is not enough where it is nested.

use std::sync::OnceLock;
use std::time::Duration;

use crate::{Accel, Binary, Machine};

/// True when the tick guest boots and counts under KVM. Tried once per process, for some seconds.
///
/// A test that needs KVM and does not have it says so on stderr, and returns.
pub fn kvm_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        std::path::Path::new("/dev/kvm").exists()
            && Machine::new(&Binary::all()[0]).accel(Accel::Kvm).start().try_ticks(3, Duration::from_secs(30)).is_ok()
    })
}
