/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * header_c99 VERSION: checks that the header is C99, and that the installed library has every
 * function that it declares.
 */
#include <instantsnap.h>
/* The header may be included twice. */
#include <instantsnap.h>

#include <stdio.h>
#include <string.h>

typedef void (*function)(void);

static const function functions[] = {
    (function) instantsnap_version,
    (function) instantsnap_last_error,
    (function) instantsnap_free_string,
    (function) instantsnap_free_string_list,
    (function) instantsnap_open_qmp,
    (function) instantsnap_close,
    (function) instantsnap_set_pause_limit,
    (function) instantsnap_set_overlap_tries,
    (function) instantsnap_set_watchdog_required,
    (function) instantsnap_set_storage_hook,
    (function) instantsnap_snapshot_create_xml,
    (function) instantsnap_snapshot_create,
    (function) instantsnap_snapshot_create_start,
    (function) instantsnap_job_wait,
    (function) instantsnap_job_get_fd,
    (function) instantsnap_job_next_event,
    (function) instantsnap_job_get_info,
    (function) instantsnap_job_get_result,
    (function) instantsnap_job_get_name,
    (function) instantsnap_job_get_xml,
    (function) instantsnap_job_get_stats,
    (function) instantsnap_job_cancel,
    (function) instantsnap_job_free,
    (function) instantsnap_snapshot_cancel,
    (function) instantsnap_get_stats,
    (function) instantsnap_snapshot_list,
    (function) instantsnap_snapshot_get_xml,
    (function) instantsnap_snapshot_current,
    (function) instantsnap_snapshot_prepare_revert,
    (function) instantsnap_snapshot_prepare_revert_hooked,
    (function) instantsnap_snapshot_prepare_revert_with,
    (function) instantsnap_revert_plan_disk_count,
    (function) instantsnap_revert_plan_get_disk,
    (function) instantsnap_revert_plan_memory_backend_count,
    (function) instantsnap_revert_plan_get_memory_backend,
    (function) instantsnap_revert_plan_memory_file,
    (function) instantsnap_revert_plan_domain_xml,
    (function) instantsnap_revert_plan_free,
    (function) instantsnap_snapshot_load,
    (function) instantsnap_snapshot_load_with,
    (function) instantsnap_memory_get_progress,
    (function) instantsnap_memory_wait,
    (function) instantsnap_snapshot_delete,
    (function) instantsnap_image_info,
    (function) instantsnap_image_verify,
    (function) instantsnap_image_convert,
    (function) instantsnap_image_index,
    (function) instantsnap_recover,
    (function) instantsnap_doctor,
    (function) instantsnap_recover_offline,
    (function) instantsnap_snapshot_get_name,
    (function) instantsnap_snapshot_free,
};

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++) {
        if (!functions[i])
            return 1;
    }
    if (argc != 2 || strcmp(instantsnap_version(), argv[1]) != 0) {
        fprintf(stderr, "the library is version %s\n", instantsnap_version());
        return 1;
    }
    return instantsnap_last_error()->code != VIR_ERR_OK;
}
