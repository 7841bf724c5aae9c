// SPDX-License-Identifier: LGPL-2.1-or-later

//! The functions of `instantsnap.h` for memory images.

use std::ffi::{c_char, c_int, c_uint};
use std::path::Path;

use super::{abi, c_string, last_error};
use crate::boundary::boundary;
use crate::error::fail;
use crate::image::{self, Contents, Format, Level};
use crate::pointers::Text;

/// The format with this number in C.
pub(super) fn format_of(number: u32) -> Option<Format> {
    match number {
        abi::INSTANTSNAP_IMAGE_RAW => Some(Format::Raw),
        abi::INSTANTSNAP_IMAGE_SPARSE => Some(Format::Sparse),
        abi::INSTANTSNAP_IMAGE_ZSTD => Some(Format::Zstd(Level::default())),
        _ => None,
    }
}

/// `instantsnap_image_info`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_image_info(path: Text) -> *mut c_char {
    boundary(last_error::set, || {
        let contents = Contents::read(Path::new(path.required("path")?))?;
        Ok(c_string(contents.to_json()?)?.into_raw())
    })
}

/// `instantsnap_image_verify`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_image_verify(path: Text) -> c_int {
    boundary(last_error::set, || {
        image::verify(Path::new(path.required("path")?))?;
        Ok(0)
    })
}

/// `instantsnap_image_index`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_image_index(path: Text, flags: c_uint) -> c_int {
    boundary(last_error::set, || {
        let path = path.required("path")?;
        if flags != 0 {
            fail!(InvalidArg, "unsupported flags {flags:#x}");
        }
        image::make_index(Path::new(path))?;
        Ok(0)
    })
}

/// `instantsnap_image_convert`.
#[unsafe(no_mangle)]
pub extern "C" fn instantsnap_image_convert(path: Text, format: c_uint, flags: c_uint) -> c_int {
    boundary(last_error::set, || {
        let path = path.required("path")?;
        let Some(format) = format_of(format) else {
            fail!(InvalidArg, "{format} is no format that an image can be converted to");
        };
        if flags != 0 {
            fail!(InvalidArg, "unsupported flags {flags:#x}");
        }
        image::convert(Path::new(path), format)?;
        Ok(0)
    })
}
