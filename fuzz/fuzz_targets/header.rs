// SPDX-License-Identifier: LGPL-2.1-or-later

//! What follows libvirt's header.

#![no_main]

use instantsnap_core::image::hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::header(bytes));
