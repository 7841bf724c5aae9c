# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What fish offers for the command instantsnap. Installed in fish's vendor_completions.d.

function __instantsnap_complete
    set -l words (commandline --current-process --tokenize --cut-at-cursor)
    set -l index (count $words)
    instantsnap complete fish $index -- $words (commandline --current-token) 2>/dev/null </dev/null
end

complete --command instantsnap --no-files --arguments '(__instantsnap_complete)'
