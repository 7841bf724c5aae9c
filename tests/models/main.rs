// SPDX-License-Identifier: LGPL-2.1-or-later

//! Models of threads, checked in every order in which the threads can run.

mod early_start;
mod job;
