# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What bash offers for the command instantsnap. Installed in bash-completion's directory; or source
# this file.

_instantsnap() {
    mapfile -t COMPREPLY < <(instantsnap complete bash "$COMP_CWORD" -- "${COMP_WORDS[@]}" \
        2>/dev/null </dev/null)
    # A path goes on after its directory, and an option after its sign.
    if [[ ${COMPREPLY-} == *[/=] ]]; then
        compopt -o nospace
    fi
}

complete -o nosort -F _instantsnap instantsnap
