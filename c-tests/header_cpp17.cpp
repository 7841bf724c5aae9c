/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * header_cpp17 VERSION: checks that the header is C++17, too, with C linkage, and needs no casts.
 */
#include <instantsnap.h>

#include <memory>
#include <string>
#include <type_traits>

static_assert(std::is_standard_layout_v<instantsnap_stats> && std::is_trivial_v<instantsnap_stats>);
static_assert(std::is_standard_layout_v<instantsnap_revert_disk> &&
              std::is_trivial_v<instantsnap_revert_disk>);
static_assert(std::is_standard_layout_v<instantsnap_event> && std::is_trivial_v<instantsnap_event>);
static_assert(std::is_standard_layout_v<instantsnap_job_info> &&
              std::is_trivial_v<instantsnap_job_info>);
static_assert(std::is_standard_layout_v<instantsnap_create_options> &&
              std::is_trivial_v<instantsnap_create_options>);
static_assert(std::is_standard_layout_v<instantsnap_storage_call> &&
              std::is_trivial_v<instantsnap_storage_call>);
static_assert(std::is_standard_layout_v<instantsnap_storage_disk> &&
              std::is_trivial_v<instantsnap_storage_disk>);
static_assert(std::is_standard_layout_v<instantsnap_revert_options> &&
              std::is_trivial_v<instantsnap_revert_options>);
static_assert(std::is_standard_layout_v<instantsnap_memory_backend> &&
              std::is_trivial_v<instantsnap_memory_backend>);
static_assert(std::is_standard_layout_v<instantsnap_load_options> &&
              std::is_trivial_v<instantsnap_load_options>);
static_assert(std::is_standard_layout_v<instantsnap_load_stats> &&
              std::is_trivial_v<instantsnap_load_stats>);
static_assert(std::is_standard_layout_v<instantsnap_memory_progress> &&
              std::is_trivial_v<instantsnap_memory_progress>);
static_assert(std::is_standard_layout_v<instantsnap_storage_hook> &&
              std::is_trivial_v<instantsnap_storage_hook>);

struct Close {
    void operator()(instantsnap_guest *guest) const { instantsnap_close(guest); }
    void operator()(instantsnap_job *job) const { instantsnap_job_free(job); }
};

int main(int argc, char **argv)
{
    if (argc != 2 || std::string(instantsnap_version()) != argv[1])
        return 1;

    std::unique_ptr<instantsnap_guest, Close> guest(
        instantsnap_open_qmp("/nonexistent/qmp", nullptr, "."));
    if (guest || instantsnap_last_error()->code != VIR_ERR_SYSTEM_ERROR)
        return 1;

    unsigned int flags = VIR_DOMAIN_SNAPSHOT_CREATE_LIVE | VIR_DOMAIN_SNAPSHOT_CREATE_INSTANT;
    if (instantsnap_snapshot_create_xml(guest.get(), "<domainsnapshot/>", flags, nullptr) != -1)
        return 1;

    int seen = 0;
    instantsnap_create_options options{};
    options.size = sizeof(options);
    options.callback = [](const instantsnap_event *, void *opaque) {
        ++*static_cast<int *>(opaque);
    };
    options.opaque = &seen;
    options.flags = INSTANTSNAP_CREATE_AT_ONCE;
    std::unique_ptr<instantsnap_job, Close> job(
        instantsnap_snapshot_create_start(guest.get(), "<domainsnapshot/>", flags, &options));
    if (job || instantsnap_last_error()->code != VIR_ERR_INVALID_ARG || seen != 0)
        return 1;

    instantsnap_event event{};
    event.size = sizeof(event);
    return instantsnap_job_next_event(job.get(), &event) != -1;
}
