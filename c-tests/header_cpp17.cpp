/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* header_cpp17 VERSION: the header is C++ as well, with C linkage and nothing that needs a cast. */
#include <instantsnap.h>

#include <memory>
#include <string>
#include <type_traits>

static_assert(std::is_standard_layout_v<instantsnap_stats> && std::is_trivial_v<instantsnap_stats>);
static_assert(std::is_standard_layout_v<instantsnap_revert_disk> && std::is_trivial_v<instantsnap_revert_disk>);

struct Close {
    void operator()(instantsnap_guest *guest) const { instantsnap_close(guest); }
};

int main(int argc, char **argv)
{
    if (argc != 2 || std::string(instantsnap_version()) != argv[1])
        return 1;

    std::unique_ptr<instantsnap_guest, Close> guest(instantsnap_open_qmp("/nonexistent/qmp", nullptr, "."));
    if (guest || instantsnap_last_error()->code != VIR_ERR_SYSTEM_ERROR)
        return 1;

    unsigned int flags = VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT;
    return instantsnap_snapshot_create_xml(guest.get(), "<domainsnapshot/>", flags, nullptr) != -1;
}
