# SPDX-License-Identifier: LGPL-2.1-or-later
# What the scripts here have in common; sourced by them.

# Says why, and ends the script.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command without standard input. Its output is shown only when it fails.
quietly() {
    local output code=0
    output=$("$@" 2>&1 </dev/null) || code=$?
    if [ "$code" -ne 0 ]; then
        printf '%s\n' "$output" "${0##*/}: failed ($code): $*" >&2
    fi
    return "$code"
}
