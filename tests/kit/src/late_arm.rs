// SPDX-License-Identifier: LGPL-2.1-or-later

//! A QEMU whose snapshot thread can be held, in its setup or between "active" and "armed":
//! `shim/late-arm.c`.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::compile::{gcc, workspace};
use crate::machine::Machine;

impl Machine {
    /// Makes each background snapshot wait until the file `release` exists, 5 seconds at most. It
    /// waits after its migration has become `active`, and before the device state is saved and
    /// write tracking is armed.
    pub fn late_arm(self, release: &Path) -> Machine {
        self.shimmed().env("INSTANTSNAP_LATE_ARM_RELEASE", release)
    }

    /// Makes the setup of each background snapshot take this much longer.
    pub fn long_setup(self, time: Duration) -> Machine {
        self.shimmed().env("INSTANTSNAP_SETUP_US", Path::new(&time.as_micros().to_string()))
    }

    fn shimmed(self) -> Machine {
        // QEMU names its threads only on request, and the shim finds the thread by its name.
        self.arg("-name").arg("tick,debug-threads=on").env("LD_PRELOAD", library())
    }
}

fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = workspace().join("tests/kit/shim/late-arm.c");
        gcc(&source, "late-arm.so", "-shared -fPIC")
    })
}
