//! The structures of the C header, and where their fields are.
//!
//! The build includes this file as well, and has the C compiler compare every size and offset with the header's.
//! It is therefore free of dependencies, and each field is written down once.

// The crate uses the structures, the build their layouts: neither uses both.
#![allow(dead_code)]
// Names are C's, and the header says what the fields are.
#![allow(missing_docs, non_camel_case_types)]

use core::ffi::{c_char, c_int};
use core::mem::{offset_of, size_of};

/// A structure as the C compiler must see it.
pub struct Layout {
    /// Its name in C.
    pub name: &'static str,
    /// `sizeof` it.
    pub size: usize,
    /// All its fields, in order.
    pub fields: &'static [Field],
}

/// A field of a structure.
pub struct Field {
    /// Its name in C.
    pub name: &'static str,
    /// `offsetof` it.
    pub offset: usize,
    /// `sizeof` it.
    pub size: usize,
}

macro_rules! structures {
    ($($(#[$attribute:meta])* struct $name:ident { $($field:ident: $type:ty,)+ })+) => {
        $(
            $(#[$attribute])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name {
                $(
                    #[allow(missing_docs)]
                    pub $field: $type,
                )+
            }
        )+

        /// Every structure that crosses the border.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            size: size_of::<$name>(),
            fields: &[$(Field {
                name: stringify!($field),
                offset: offset_of!($name, $field),
                size: size_of::<$type>(),
            },)+],
        },)+];
    };
}

structures! {
    /// Why the last failed call of a thread failed.
    struct instantsnap_error {
        code: c_int,
        domain: c_int,
        message: *const c_char,
    }

    /// What a snapshot took: microseconds, bytes and counts.
    #[derive(Default)]
    struct instantsnap_stats {
        size: usize,
        validate_us: u64,
        plan_us: u64,
        prepare_us: u64,
        pause_us: u64,
        switch_us: u64,
        arm_us: u64,
        drain_us: u64,
        finish_us: u64,
        undo_us: u64,
        total_us: u64,
        instant_us: u64,
        guest_paused_us: u64,
        memory_image_bytes: u64,
        pause_from_events: u32,
        disks: u32,
    }

    /// One disk of a revert plan; the strings are the plan's.
    struct instantsnap_revert_disk {
        size: usize,
        name: *const c_char,
        file: *const c_char,
        format: *const c_char,
        backing_file: *const c_char,
    }
}
