#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# installed.sh BUILD_DIR SOURCE_DIR: installs into a directory of its own, and builds programs there as a stranger
# would, with what pkg-config says and nothing else. Wants MESON and PREFIX in the environment.
set -eu

build=$1
source=$2
stage=$(mktemp -d)
log=$build/meson-logs/install-log.txt

# What is installed here must not pass for what the user has installed: `ninja uninstall` reads that list.
finish() {
    if [ -f "$stage/install-log.txt" ]; then mv "$stage/install-log.txt" "$log"; else rm -f "$log"; fi
    rm -rf "$stage"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM
if [ -f "$log" ]; then cp -p "$log" "$stage/install-log.txt"; fi

root=$stage/root
DESTDIR=$root "$MESON" install -C "$build" --no-rebuild --quiet

# pkg-config leaves out /usr/include and the like as known to the compiler: here they are somewhere else.
export PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 PKG_CONFIG_ALLOW_SYSTEM_LIBS=1
export PKG_CONFIG_SYSROOT_DIR="$root"
pc=$(find "$root$PREFIX" -name instantsnap.pc)
PKG_CONFIG_LIBDIR=$(dirname "$pc")
export PKG_CONFIG_LIBDIR
version=$(pkg-config --modversion instantsnap)
libdir=$root$(PKG_CONFIG_SYSROOT_DIR='' pkg-config --variable=libdir instantsnap)
LD_LIBRARY_PATH=$libdir
export LD_LIBRARY_PATH

fail() {
    echo "$*" >&2
    exit 1
}

# The names that the linker, the loader and people look for, each a link to the one file.
[ -f "$libdir/libinstantsnap.so.0.$version" ] || fail "no libinstantsnap.so.0.$version"
[ "$(readlink "$libdir/libinstantsnap.so.0")" = "libinstantsnap.so.0.$version" ] || fail "libinstantsnap.so.0 is wrong"
[ "$(readlink "$libdir/libinstantsnap.so")" = "libinstantsnap.so.0.$version" ] || fail "libinstantsnap.so is wrong"

# libvirt is for those who include the other header: this library's users need none of it.
if grep -q -i libvirt "$pc"; then fail "instantsnap.pc wants libvirt"; fi

strict='-Wall -Wextra -Werror -pedantic'
flags() {
    pkg-config --cflags --libs instantsnap
}

# shellcheck disable=SC2086,SC2046 # options are to be split
{
    ${CC:-cc} -std=c99 $strict "$source/header_c99.c" -o "$stage/header_c99" $(flags)
    "$stage/header_c99" "$version"
    ${CC:-cc} -std=c99 $strict "$source/hello.c" -o "$stage/hello" $(flags)
    ${CC:-cc} -std=c99 $strict "$source/snapshot_many.c" -o "$stage/snapshot_many" $(flags)

    # The static library, with what instantsnap.pc says it needs.
    ${CC:-cc} -std=c99 $strict "$source/header_c99.c" -o "$stage/header_static" $(pkg-config --cflags instantsnap) \
        "$libdir/libinstantsnap.a" $(pkg-config --static --libs-only-l instantsnap | sed 's/-linstantsnap//')
    LD_LIBRARY_PATH='' "$stage/header_static" "$version"

    if command -v "${CXX:-c++}" > /dev/null; then
        ${CXX:-c++} -std=c++17 $strict "$source/header_cpp17.cpp" -o "$stage/header_cpp17" $(flags)
        "$stage/header_cpp17" "$version"
    fi

    # Where libvirt's headers are (the compiler's own search path is enough on most systems), so is ours on top of them.
    echo '#include <libvirt/libvirt.h>' > "$stage/probe.c"
    if ${CC:-cc} -fsyntax-only "$stage/probe.c" 2> /dev/null; then
        echo '#include <instantsnap-libvirt.h>' > "$stage/probe.c"
        ${CC:-cc} -std=c99 $strict -fsyntax-only "$stage/probe.c" $(pkg-config --cflags instantsnap)
        # Our header alone, after libvirt's: the numbers are then libvirt's.
        printf '%s\n' '#include <libvirt/libvirt.h>' '#include <libvirt/virterror.h>' '#include <instantsnap.h>' \
            > "$stage/probe.c"
        ${CC:-cc} -std=c99 $strict -fsyntax-only "$stage/probe.c" $(pkg-config --cflags instantsnap)
    fi
}
