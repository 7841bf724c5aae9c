// SPDX-License-Identifier: LGPL-2.1-or-later

//! What cargo does not do by itself: the soname, the header as Rust sees it, and proof that header
//! and Rust agree.
//!
//! `bindings.rs` is the header as bindgen reads it, whose handles `src/ffi` uses. `abi_check.c` is
//! the Rust side written out for the C compiler, as the sources have it: every constant, every
//! structure, every field, and the prototype of every function that C calls; then the functions of
//! libvirt's that the libraries declare. Nothing of that unit is linked.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, panic};

use bindgen::callbacks::{EnumVariantCustomBehavior, EnumVariantValue, ParseCallbacks};
use bindgen::{EnumVariation, RustEdition, RustTarget};

mod constants;
mod prototypes;
mod sources;

use prototypes::Prototypes;

/// The constants that are the header's, out of all those that libvirt's headers have.
const CONSTANTS: [&str; 4] = ["INSTANTSNAP_", "VIR_DOMAIN_SNAPSHOT_", "VIR_ERR_", "VIR_FROM_QEMU"];

fn main() {
    let read = ["build-script", "include", "src/ffi", "src/pointers.rs", prototypes::PRELOADED];
    let all = read.iter().chain(&constants::SOURCES).chain(&prototypes::DECLARING);
    // A package of this crate has no preload/.
    for path in all.filter(|path| Path::new(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=PKG_CONFIG");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    println!("cargo::rustc-check-cfg=cfg(have_libvirt_headers)");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libinstantsnap.so.0");
    // A thread of ours can outlive a dlclose().
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let libvirt = libvirt_cflags();
    if libvirt.is_some() {
        println!("cargo::rustc-cfg=have_libvirt_headers");
    }
    let bindings = out.join("bindings.rs");
    write_bindings(&bindings, libvirt.as_deref());
    check_abi(&out.join("abi_check.c"), &bindings, libvirt.as_deref());
}

/// Ends the build with a message that is for the user, not for us. With status 0, because cargo
/// fails a build for the message alone, and would otherwise print everything this program wrote
/// beneath it.
fn stop(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(0)
}

/// The compiler flags for libvirt's headers, where they are installed.
fn libvirt_cflags() -> Option<Vec<String>> {
    let program = env::var_os("PKG_CONFIG").unwrap_or_else(|| "pkg-config".into());
    let output = Command::new(program).args(["--cflags", "libvirt"]).output().ok()?;
    let flags = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| flags.split_whitespace().map(String::from).collect())
}

/// Leaves out what else is in libvirt's enumerations.
#[derive(Debug)]
struct OnlyOurs;

impl ParseCallbacks for OnlyOurs {
    fn enum_variant_behavior(
        &self,
        _: Option<&str>,
        variant: &str,
        _: EnumVariantValue,
    ) -> Option<EnumVariantCustomBehavior> {
        let ours = CONSTANTS.iter().any(|prefix| variant.starts_with(prefix));
        (!ours).then_some(EnumVariantCustomBehavior::Hide)
    }
}

/// Writes the header's functions, structures and constants as Rust.
fn write_bindings(to: &Path, libvirt: Option<&[String]>) {
    require_libclang();
    let header = match libvirt {
        Some(_) => "include/instantsnap-libvirt.h",
        None => "include/instantsnap.h",
    };
    let mut builder = bindgen::Builder::default()
        .header(header)
        .clang_arg("-Iinclude")
        .clang_args(libvirt.unwrap_or_default())
        .allowlist_function("instantsnap_.*|qemuSnapshot.*")
        .allowlist_type("instantsnap_.*")
        // libvirt's enumerations have names, and are found by them; ours have none: their constants
        // are variables here.
        .allowlist_type(
            "virDomainSnapshot(Create|Revert|Delete)Flags|virErrorNumber|virErrorDomain",
        )
        .default_enum_style(EnumVariation::Consts)
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(true)
        .wrap_unsafe_ops(true)
        .use_core()
        .rust_target(
            RustTarget::stable(88, 0).unwrap_or_else(|_| stop("bindgen does not know Rust 1.88")),
        )
        .rust_edition(RustEdition::Edition2024)
        .parse_callbacks(Box::new(OnlyOurs));
    for prefix in CONSTANTS {
        builder = builder.allowlist_var(format!("{prefix}.*"));
    }
    let bindings = builder
        .generate()
        .unwrap_or_else(|error| stop(&format!("bindgen cannot read {header}: {error}")));
    if let Err(error) = bindings.write_to_file(to) {
        stop(&format!("cannot write {}: {error}", to.display()));
    }
}

/// bindgen panics where it finds no libclang. Its reason says where it looked; what to do about it
/// we say.
fn require_libclang() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| ()));
    let loaded = panic::catch_unwind(bindgen::clang_version);
    panic::set_hook(hook);
    if loaded.is_err() {
        stop(
            "libclang is missing, which reads the C headers for this build: install the package \
             libclang-dev (Debian, Ubuntu), or set LIBCLANG_PATH to the directory that has \
             libclang.so",
        );
    }
}

/// Has the C compiler compare what Rust has with what the headers say.
fn check_abi(unit: &Path, bindings: &Path, libvirt: Option<&[String]>) {
    let prototypes = Prototypes::read().unwrap_or_else(|why| stop(&why));
    let header = fs::read_to_string(bindings).expect("it was just written");
    if let Some(missing) = prototypes.missing(&header) {
        stop(&format!("the header has a function that src/ffi has not: {missing}()"));
    }
    let constants = constants::read().unwrap_or_else(|why| stop(&why));
    if let Err(error) = fs::write(unit, unit_for_c(&constants, &prototypes)) {
        stop(&format!("cannot write {}: {error}", unit.display()));
    }
    compile(unit, None);
    if let Some(flags) = libvirt {
        compile(unit, Some(flags));
    }
}

/// Compiles the assertions: against our header's own numbers, or against libvirt's, which are then
/// included first.
fn compile(unit: &Path, libvirt: Option<&[String]>) {
    let mut build = cc::Build::new();
    build.file(unit).include("include").std("c11").cargo_metadata(false);
    build.warnings(true).extra_warnings(true).warnings_into_errors(true);
    if let Some(flags) = libvirt {
        build.define("WITH_LIBVIRT", None).flags(flags);
    }
    if let Err(error) = build.try_compile_intermediates() {
        let whose = if libvirt.is_some() { "libvirt's headers" } else { "include/instantsnap.h" };
        stop(&format!("the Rust side and {whose} do not agree, see the errors above: {error}"));
    }
}

/// The unit for the C compiler.
fn unit_for_c(constants: &[(String, i64)], prototypes: &Prototypes) -> String {
    let mut c = String::from(
        "#include <stddef.h>\n\
         #ifdef WITH_LIBVIRT\n\
         # include <instantsnap-libvirt.h>\n\
         # include <libvirt/libvirt-qemu.h>\n\
         #else\n\
         # include <instantsnap.h>\n\
         #endif\n",
    );
    for (name, value) in constants {
        c += &format!("_Static_assert({name} == {value}, \"{name} is {value} in Rust\");\n");
    }
    c + &prototypes.in_c()
}
