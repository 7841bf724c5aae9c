#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# installed.sh BUILD_DIR SOURCE_DIR: installs into a temporary directory, and builds programs there
# as a user of the library would, with pkg-config's options only. Needs MESON and PREFIX in the
# environment.
set -eu

build=$1
source=$2
stage=$(mktemp -d)
log=$build/meson-logs/install-log.txt

# `ninja uninstall` reads Meson's list of installed files, which must not have this test's files.
finish() {
    if [ -f "$stage/install-log.txt" ]; then
        mv "$stage/install-log.txt" "$log"
    else
        rm -f "$log"
    fi
    rm -rf "$stage"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM
if [ -f "$log" ]; then cp -p "$log" "$stage/install-log.txt"; fi

root=$stage/root
DESTDIR=$root "$MESON" install -C "$build" --no-rebuild --quiet

# pkg-config leaves out directories that the compiler knows (/usr/include). Here they are below
# $root, which the compiler does not know.
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

# The names that the linker and the loader look for: each is a link to the one file.
real=libinstantsnap.so.$version
[ -f "$libdir/$real" ] || fail "no $real"
for link in libinstantsnap.so.0 libinstantsnap.so; do
    [ "$(readlink "$libdir/$link")" = "$real" ] || fail "$link is no link to $real"
done

# The program that the library starts.
watchdog=$(find "$root$PREFIX" -name instantsnap-watchdog)
[ "${watchdog##*/libexec/}" = instantsnap/instantsnap-watchdog ] || fail "no watchdog in libexec"
[ -x "$watchdog" ] || fail "the watchdog is no program"

# Only programs that include instantsnap-libvirt.h need libvirt.
if grep -q -i libvirt "$pc"; then fail "instantsnap.pc wants libvirt"; fi

strict='-Wall -Wextra -Werror -pedantic'
flags() {
    pkg-config --cflags --libs instantsnap
}

# shellcheck disable=SC2086,SC2046 # options are to be split
{
    ${CC:-cc} -std=c99 $strict "$source/c-tests/header_c99.c" -o "$stage/header_c99" $(flags)
    "$stage/header_c99" "$version"
    for example in hello snapshot_many storage_hook daemon; do
        ${CC:-cc} -std=c99 $strict "$source/examples/$example.c" -o "$stage/$example" $(flags) \
            -lpthread
    done

    # The static library, with the libraries that instantsnap.pc names.
    ${CC:-cc} -std=c99 $strict "$source/c-tests/header_c99.c" -o "$stage/header_static" \
        $(pkg-config --cflags instantsnap) "$libdir/libinstantsnap.a" \
        $(pkg-config --static --libs-only-l instantsnap | sed 's/-linstantsnap//')
    LD_LIBRARY_PATH='' "$stage/header_static" "$version"

    if command -v "${CXX:-c++}" > /dev/null; then
        ${CXX:-c++} -std=c++17 $strict "$source/c-tests/header_cpp17.cpp" \
            -o "$stage/header_cpp17" $(flags)
        "$stage/header_cpp17" "$version"
    fi

    # instantsnap-libvirt.h compiles where libvirt's headers are (the compiler's own search path has
    # them on most systems).
    echo '#include <libvirt/libvirt.h>' > "$stage/probe.c"
    if ${CC:-cc} -fsyntax-only "$stage/probe.c" 2> /dev/null; then
        echo '#include <instantsnap-libvirt.h>' > "$stage/probe.c"
        ${CC:-cc} -std=c99 $strict -fsyntax-only "$stage/probe.c" $(pkg-config --cflags instantsnap)
        # instantsnap.h after libvirt's headers takes its numbers from them.
        printf '#include <%s>\n' libvirt/libvirt.h libvirt/virterror.h instantsnap.h \
            > "$stage/probe.c"
        ${CC:-cc} -std=c99 $strict -fsyntax-only "$stage/probe.c" $(pkg-config --cflags instantsnap)
    fi
}
