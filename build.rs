// SPDX-License-Identifier: LGPL-2.1-or-later

//! What cargo does not do by itself: the soname, the header as Rust sees it, and proof that header
//! and Rust agree.
//!
//! `bindings.rs` is the header as bindgen reads it, whose handles `src/ffi` uses. `abi_check.c` is
//! the Rust side written out for the C compiler: every constant, every structure, every field, and,
//! read from the sources of `src/ffi`, the prototype of every function; then the functions of
//! libvirt's that `src/libvirt/table.rs` declares. Nothing of that unit is linked.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, panic};

use bindgen::callbacks::{EnumVariantCustomBehavior, EnumVariantValue, ParseCallbacks};
use bindgen::{EnumVariation, RustEdition, RustTarget};

use prototypes::Prototypes;

#[path = "build_prototypes.rs"]
mod prototypes;

#[allow(unused)]
#[path = "src/ffi/abi.rs"]
mod abi;
#[allow(unused)]
#[path = "src/error.rs"]
mod error;
#[allow(unused)]
#[path = "src/model/flags.rs"]
mod flags;

/// The constants that are the header's, out of all those that libvirt's headers have.
const CONSTANTS: [&str; 4] = ["INSTANTSNAP_", "VIR_DOMAIN_SNAPSHOT_", "VIR_ERR_", "VIR_FROM_QEMU"];

fn main() {
    let sources = ["src/ffi", "src/pointers.rs", "src/error.rs", "src/model/flags.rs", "include"];
    let own = ["build.rs", "build_prototypes.rs"];
    // A package of this crate has no preload/.
    let is_there = |path: &&&str| std::path::Path::new(path).exists();
    for path in sources.iter().chain(&own).chain(&prototypes::DECLARING).filter(is_there) {
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
    if let Err(error) = fs::write(unit, abi_assertions() + &prototypes.in_c()) {
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
fn abi_assertions() -> String {
    let mut c = String::from(
        "#include <stddef.h>\n\
         #ifdef WITH_LIBVIRT\n\
         # include <instantsnap-libvirt.h>\n\
         # include <libvirt/libvirt-qemu.h>\n\
         #else\n\
         # include <instantsnap.h>\n\
         #endif\n",
    );
    let mut equal = |what: &str, value: i64| {
        writeln!(c, "_Static_assert({what} == {value}, \"{what} is {value} in Rust\");")
            .expect("a string can grow");
    };
    for (name, value) in constants() {
        equal(&name, value);
    }
    if same_pointers() {
        for layout in abi::LAYOUTS {
            let name = layout.name;
            equal(&format!("sizeof({name})"), layout.size as i64);
            for field in layout.fields {
                equal(&format!("offsetof({name}, {})", field.name), field.offset as i64);
                equal(&format!("sizeof((({name} *) 0)->{})", field.name), field.size as i64);
            }
        }
    }
    c
}

/// The layouts are those of the machine that builds; they hold for the target where pointers are as
/// wide.
fn same_pointers() -> bool {
    env::var("CARGO_CFG_TARGET_POINTER_WIDTH").is_ok_and(|width| width == usize::BITS.to_string())
}

/// Every constant of the header, by its name in C, with the value that Rust has.
fn constants() -> Vec<(String, i64)> {
    let errors = error::Code::ALL.iter().map(|&(name, code)| (name.to_string(), code as i64));
    let flags = flags::TABLES
        .iter()
        .flat_map(|table| table.rules.iter().map(|rule| (table.name(rule), i64::from(rule.bit))));
    let own = abi::CONSTANTS.iter().map(|&(name, value)| (name.to_string(), i64::from(value)));
    [("VIR_ERR_OK".to_string(), 0), ("VIR_FROM_QEMU".to_string(), i64::from(error::DOMAIN))]
        .into_iter()
        .chain(errors)
        .chain(own)
        .chain(flags)
        .collect()
}
