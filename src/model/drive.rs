// SPDX-License-Identifier: LGPL-2.1-or-later

//! A drive of a guest, as the backend describes it and the plan needs it.

/// What a drive is to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Gets an overlay.
    Disk,
    /// Cannot change, or holds a removable medium that the guest reads: left out.
    ReadOnly,
    /// No medium is in it: there is nothing to keep, and nothing to put an overlay on.
    Empty,
    /// UEFI variables (pflash): QEMU does not write-protect them, so they are copied and compared
    /// instead.
    Firmware,
}

/// A dirty bitmap that an overlay must carry on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Its granularity in bytes.
    pub granularity: u64,
}

/// A drive of a guest.
#[derive(Clone, Debug)]
pub struct Drive {
    /// By what it may be called, the best name first: target, qdev id, drive alias, node name.
    pub names: Vec<String>,
    /// What it is to a snapshot.
    pub role: Role,
    /// The node at the top of its chain.
    pub node: String,
    /// The image of that node: an absolute path, or another of QEMU's file names.
    pub file: String,
    /// The format of that image.
    pub format: String,
    /// The images below it, from the top down.
    pub backing: Vec<String>,
    /// What the guest sees, in bytes.
    pub size: u64,
    /// Persistent bitmaps that record.
    pub bitmaps: Vec<Bitmap>,
    /// How QEMU opened the image, for its overlay to be opened alike.
    pub options: OpenOptions,
    /// Why it can get no overlay, and what to do.
    pub unsupported_reason: Option<String>,
    /// The domain XML's own wish: `<disk snapshot=''>`.
    pub snapshot: Option<String>,
}

impl Drive {
    /// The name by which messages and metadata call it.
    pub fn name(&self) -> &str {
        self.names.first().unwrap_or(&self.node)
    }

    /// Its images, from the top down.
    pub fn images(&self) -> Vec<String> {
        std::iter::once(&self.file).chain(&self.backing).cloned().collect()
    }
}

/// How an image is opened, as far as QEMU tells or the domain XML says.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// `detect-zeroes`.
    pub detect_zeroes: Option<String>,
    /// `aio`.
    pub aio: Option<String>,
    /// `discard`.
    pub discard: Option<String>,
}
