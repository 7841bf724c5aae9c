// SPDX-License-Identifier: LGPL-2.1-or-later

//! A drive of a guest, as the backend describes it for the plan.

/// How a snapshot treats a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It gets an overlay.
    Disk,
    /// It cannot change, or has a removable medium that the guest only reads: it is left out.
    ReadOnly,
    /// It has no medium: there is nothing to keep, and nothing to put an overlay on.
    Empty,
    /// UEFI variables (pflash): QEMU does not write-protect them, so they are copied and compared
    /// instead.
    Firmware,
}

/// A dirty bitmap that the overlay must continue.
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
    /// Its names, the best one first: target, qdev id, drive alias, node name.
    pub names: Vec<String>,
    /// How a snapshot treats it.
    pub role: Role,
    /// The node at the top of its chain.
    pub node: String,
    /// The image of that node: an absolute path, or another of QEMU's file names.
    pub file: String,
    /// The format of that image.
    pub format: String,
    /// The images below it, from the top down.
    pub backing: Vec<String>,
    /// The virtual size in bytes.
    pub size: u64,
    /// The persistent bitmaps that are recording.
    pub bitmaps: Vec<Bitmap>,
    /// How QEMU opened the image. Its overlay is opened with the same options.
    pub options: OpenOptions,
    /// Why it can get no overlay, and what the user can do.
    pub unsupported_reason: Option<String>,
    /// The `snapshot=` of its `<disk>` in the domain XML.
    pub snapshot: Option<String>,
}

impl Drive {
    /// A drive of which only the topmost image is known.
    pub fn of_image(name: &str, role: Role, node: &str, file: &str, format: &str) -> Drive {
        Drive {
            names: vec![name.into()],
            role,
            node: node.into(),
            file: file.into(),
            format: format.into(),
            backing: Vec::new(),
            size: 0,
            bitmaps: Vec::new(),
            options: OpenOptions::default(),
            unsupported_reason: None,
            snapshot: None,
        }
    }

    /// Its name in messages and metadata.
    pub fn name(&self) -> &str {
        self.names.first().unwrap_or(&self.node)
    }

    /// Its images, from the top down.
    pub fn images(&self) -> Vec<String> {
        std::iter::once(&self.file).chain(&self.backing).cloned().collect()
    }
}

/// How an image is opened, as far as QEMU or the domain XML tell.
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
