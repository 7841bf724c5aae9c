# SPDX-License-Identifier: LGPL-2.1-or-later
# Functions that the scripts in this folder share. They source this file.

# Prints a message, and ends the script.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command without standard input. Prints its output only if it fails.
quietly() {
    local output code=0
    output=$("$@" 2>&1 </dev/null) || code=$?
    if [ "$code" -ne 0 ]; then
        printf '%s\n' "$output" "${0##*/}: failed ($code): $*" >&2
    fi
    return "$code"
}

# Runs a command as root, by sudo if necessary. sudo asks for a password only on a terminal.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo ${unattended:+-n} DEBIAN_FRONTEND=noninteractive "$@"
    fi
}
[ -t 2 ] && unattended= || unattended=yes

# Prints "KEYRING URI" of the machine's own source of Debian packages: deb822 (`URIs:`) or one-line
# (`deb ...`).
debian_source() {
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v RS= -F '\n' '
            {
                types = uri = key = ""
                for (line = 1; line <= NF; line++) {
                    value = $line
                    sub(/^[^:]*:[ \t]*/, "", value)
                    split(value, words, /[ \t]+/)
                    if ($line ~ /^Types:/) types = value
                    if ($line ~ /^URIs:/) uri = words[1]
                    if ($line ~ /^Signed-By:[ \t]*\//) key = words[1]
                }
                if (types ~ /(^| )deb( |$)/ && uri ~ /\/debian\/?$/) {
                    print (key ? key : "-"), uri
                    exit
                }
            }' "$file"
    done
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | awk '
        $1 == "deb" {
            key = "-"; uri = $2; options = ""
            if ($2 ~ /^\[/) {
                options = $0
                sub(/^[^[]*\[/, "", options); sub(/\].*/, "", options)
                rest = $0
                sub(/^[^]]*\][ \t]*/, "", rest)
                split(rest, words, /[ \t]+/)
                uri = words[1]
                if (match(options, /signed-by=[^ \t]*/))
                    key = substr(options, RSTART + 10, RLENGTH - 10)
            }
            if (uri ~ /\/debian\/?$/) print key, uri
        }' || true
}
