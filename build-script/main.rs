// SPDX-License-Identifier: LGPL-2.1-or-later

//! Sets the soname, reads the C header for Rust, and proves that the header and Rust agree.
//!
//! `bindings.rs` is bindgen's translation of the header; `src/ffi` uses its handles. `abi_check.c`
//! has the declarations of the Rust sources in C: every constant, structure and field, the
//! prototype of every function that C calls, and the functions of libvirt's that the libraries
//! declare. The C compiler compares them with the headers; the result is not linked.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, panic};

use bindgen::callbacks::{EnumVariantCustomBehavior, EnumVariantValue, ParseCallbacks};
use bindgen::{EnumVariation, RustEdition, RustTarget};

mod constants;
mod prototypes;
mod sources;

use prototypes::Prototypes;

/// The prefixes of the header's constants, among all those of libvirt's headers.
const CONSTANTS: [&str; 4] = ["INSTANTSNAP_", "VIR_DOMAIN_SNAPSHOT_", "VIR_ERR_", "VIR_FROM_QEMU"];

fn main() {
    let read = ["build-script", "include", "src/ffi", "src/pointers.rs", prototypes::PRELOADED];
    let all = read.iter().chain(&constants::SOURCES).chain(&prototypes::DECLARING);
    // A published package of this crate has no preload/.
    for path in all.filter(|path| Path::new(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=PKG_CONFIG");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    println!("cargo::rustc-check-cfg=cfg(have_libvirt_headers)");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libinstantsnap.so.0");
    // A thread of the library can still run after a dlclose().
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

/// Ends the build with a message for the user. The status is 0, because cargo fails a build for the
/// message alone, and with another status would also print all output of this program.
fn stop(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(0)
}

/// The compiler flags for libvirt's headers, if these are installed.
fn libvirt_cflags() -> Option<Vec<String>> {
    let program = env::var_os("PKG_CONFIG").unwrap_or_else(|| "pkg-config".into());
    let output = Command::new(program).args(["--cflags", "libvirt"]).output().ok()?;
    let flags = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| flags.split_whitespace().map(String::from).collect())
}

/// Leaves out the other constants of libvirt's enumerations.
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
        // libvirt's enumerations are found by their names. Ours have no names: bindgen treats their
        // constants as variables.
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

/// Ends the build if libclang is missing, with advice. bindgen would panic, and only say where it
/// has looked.
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

/// Makes the C compiler compare the Rust side with the headers.
fn check_abi(unit: &Path, bindings: &Path, libvirt: Option<&[String]>) {
    let prototypes = Prototypes::read().unwrap_or_else(|why| stop(&why));
    let header = fs::read_to_string(bindings).expect("it was just written");
    if let Some(missing) = prototypes.missing(&header) {
        stop(&format!("the header declares a function that src/ffi does not have: {missing}()"));
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

/// Compiles the assertions, with our header's own constants, or with libvirt's headers, which are
/// included first then.
fn compile(unit: &Path, libvirt: Option<&[String]>) {
    let mut build = cc::Build::new();
    build.file(unit).include("include").std("c11").cargo_metadata(false);
    build.warnings(true).extra_warnings(true).warnings_into_errors(true);
    if let Some(flags) = libvirt {
        build.define("WITH_LIBVIRT", None).flags(flags);
    }
    if let Err(error) = build.try_compile_intermediates() {
        let headers = if libvirt.is_some() { "libvirt's headers" } else { "include/instantsnap.h" };
        stop(&format!("the Rust side and {headers} do not agree, see the errors above: {error}"));
    }
}

/// The file for the C compiler.
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
