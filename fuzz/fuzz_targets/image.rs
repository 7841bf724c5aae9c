// SPDX-License-Identifier: LGPL-2.1-or-later

//! The file of a memory image.

#![no_main]

use instantsnap_core::image::hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::image(bytes));
