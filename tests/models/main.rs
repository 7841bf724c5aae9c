// SPDX-License-Identifier: LGPL-2.1-or-later

//! Models of what threads do, checked in every order in which they can run.

mod early_start;
mod job;
