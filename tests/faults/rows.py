"""Every bad input and every fault that must be survived, and the tests that see to it.

A row of each table is a number, what happens, and the tests: `file::test`, below `tests/`.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    what: str
    tests: tuple[str, ...]


_RECIPE = "unit/test_recipe_refusals.py"
_HEADER = "unit/test_header.py"
_FOLDER = "unit/test_folder.py"
_CLI = "test_cli_refusals.py"
_KILL = "test_cli_kill.py"
_SIGNALS = "test_cli_signals.py"
_RESUME = "test_resume.py"
_PLACES = "faults/test_places.py"
_MEANING = "faults/test_meaning.py"
_CALLS = "faults/test_every_call.py::test_a_fault_at_any_call_is_survived"
_INPUTS = "faults/test_changing_inputs.py"


def _row(what: str, file: str, *names: str) -> Row:
    return Row(what, tuple(f"{file}::{name}" for name in names))


BAD_INPUTS: dict[int, Row] = {
    1: _row("config: empty", _RECIPE, "test_fault_1_empty"),
    2: _row("config: tabs, syntax error", _RECIPE, "test_fault_2_syntax"),
    3: _row("config: unknown key", _RECIPE, "test_fault_3_unknown_keys"),
    4: _row(
        "config: wrong type",
        _RECIPE,
        "test_fault_4_wrong_types",
        "test_fault_4_weights_that_are_no_numbers",
        "test_fault_4_a_key_that_no_text_can_be",
    ),
    5: _row(
        "config: duplicate key",
        _RECIPE,
        "test_fault_5_a_key_given_twice_names_both_places",
        "test_fault_5_a_parameter_inline_and_under_parameters",
    ),
    6: _row(
        "config: alias bomb",
        _RECIPE,
        "test_fault_6_an_alias_bomb",
        "test_fault_6_endless_and_deep_nesting",
        "test_fault_6_a_large_file_that_is_no_recipe",
    ),
    7: Row(
        "config: 1e-3, .5, yes",
        (
            "unit/test_recipe.py::test_fault_7_numbers_that_yaml_1_1_takes_for_text",
            "unit/test_recipe.py::test_fault_7_text_that_yaml_1_1_takes_for_something_else",
            f"{_RECIPE}::test_fault_7_only_true_and_false_are_booleans",
        ),
    ),
    8: _row("config: NaN or inf weight", _RECIPE, "test_fault_8_numbers_that_are_not_finite"),
    9: _row("config: density outside (0, 1]", _RECIPE, "test_fault_9_density_out_of_bounds"),
    10: _row("config: weights that sum to zero", _RECIPE, "test_fault_10_weights_that_sum_to_zero"),
    11: _row(
        "config: !!python/object",
        _RECIPE,
        "test_fault_11_tags",
        "test_fault_11_a_tag_that_does_not_fit_its_text",
    ),
    12: Row(
        "config: not UTF-8, BOM, CRLF",
        (
            f"{_RECIPE}::test_fault_12_not_utf_8_names_the_offset",
            "unit/test_recipe.py::test_fault_12_a_byte_order_mark_and_crlf_are_fine",
        ),
    ),
    13: Row(
        "config: model folder missing",
        (
            f"{_CLI}::test_a_missing_input_is_named",
            f"{_RECIPE}::test_fault_13_references_are_known_beside_other_problems",
        ),
    ),
    14: _row(
        "config: the same model twice",
        _RECIPE,
        "test_fault_14_the_same_model_twice",
        "test_fault_14_two_paths_to_the_same_folder",
    ),
    15: _row("safetensors: empty", _HEADER, "test_bad_frames"),
    16: _row("safetensors: under 8 bytes", _HEADER, "test_bad_frames"),
    17: _row(
        "safetensors: impossible header length",
        _HEADER,
        "test_bad_frames",
        "test_a_header_over_100_mb_is_not_read",
    ),
    18: _row("safetensors: bad UTF-8, bad JSON, deep nesting", _HEADER, "test_bad_json"),
    19: _row("safetensors: a hole between tensors", _HEADER, "test_bad_cover"),
    20: _row("safetensors: overlap", _HEADER, "test_bad_cover"),
    21: _row("safetensors: trailing bytes", _HEADER, "test_one_byte_short_and_one_too_many"),
    22: Row(
        "safetensors: one byte short",
        (
            f"{_HEADER}::test_one_byte_short_and_one_too_many",
            f"{_CLI}::test_a_truncated_adapter_is_named",
        ),
    ),
    23: _row("safetensors: shape and extent disagree", _HEADER, "test_bad_entries"),
    24: _row("safetensors: unknown dtype", _HEADER, "test_bad_entries"),
    25: _row("safetensors: duplicate tensor name", _HEADER, "test_bad_json"),
    26: _row(
        "safetensors: names with .., /, NUL, 64 KB, empty",
        _HEADER,
        "test_bad_names",
        "test_names_that_are_never_paths_may_look_like_paths",
    ),
    27: _row(
        "safetensors: zeros at the end, a torn write",
        _MEANING,
        "test_a_file_that_ends_in_zeros_is_warned_of",
    ),
    28: _row("safetensors: a Git LFS pointer", _HEADER, "test_foreign_formats_are_named"),
    29: _row("safetensors: an HTML error page", _HEADER, "test_foreign_formats_are_named"),
    30: _row(
        "safetensors: a renamed pickle",
        _HEADER,
        "test_foreign_formats_are_named",
        "test_a_renamed_zip_is_named",
    ),
    31: _row(
        "safetensors: a directory, FIFO, device, dangling link, link loop",
        _HEADER,
        "test_folder",
        "test_fifo_does_not_block",
        "test_device_and_socket",
        "test_dangling_link_names_its_target",
        "test_link_loop",
    ),
    32: _row(
        "index: ../, absolute path, NUL in weight_map",
        _FOLDER,
        "test_an_index_names_files_of_the_folder",
        "test_a_hub_cache_of_links_works",
    ),
    33: _row(
        "index: a shard listed and absent; present and unlisted",
        _FOLDER,
        "test_a_shard_that_is_listed_and_absent",
        "test_a_shard_that_is_present_and_unlisted",
    ),
    34: _row(
        "index: a tensor elsewhere than it says; in two shards",
        _FOLDER,
        "test_a_tensor_elsewhere_than_the_index_says",
        "test_a_tensor_in_two_shards",
    ),
    35: _row(
        "index: both an index and a single file",
        _FOLDER,
        "test_shards_left_beside_a_single_file",
        "test_a_shard_that_is_present_and_unlisted",
    ),
    36: _row("index: wrong total_size", _FOLDER, "test_a_wrong_total_size_is_noted"),
    37: _row("index: invalid JSON", _FOLDER, "test_a_bad_index"),
    38: _row(
        "shapes that differ",
        _MEANING,
        "test_vocabularies_of_two_lengths_are_refused_with_both_and_the_remedy",
        "test_other_shapes_are_refused_with_both",
    ),
    39: _row(
        "missing or extra tensors",
        _MEANING,
        "test_missing_and_extra_tensors_are_named",
        "test_buffers_that_some_versions_store_follow_the_donor",
    ),
    40: _row(
        "mixed dtypes, integer buffers, 0-d and empty tensors",
        _MEANING,
        "test_mixed_dtypes_take_the_donors",
        "test_integer_buffers_are_copied_where_all_agree",
        "test_tensors_without_dimensions_and_without_elements",
    ),
    41: Row(
        "NaN, Inf, denormals, -0; zero and parallel vectors",
        (
            f"{_CLI}::test_the_file_that_holds_a_nan_is_named",
            f"{_CLI}::test_no_method_swallows_a_nan",
            f"{_MEANING}::test_infinity_is_named_with_its_file",
            f"{_MEANING}::test_denormals_and_signed_zeros_come_through",
            f"{_MEANING}::test_a_task_vector_of_zeros_gives_the_base",
            "contracts/test_spherical.py::test_slerp_takes_a_zero_vector_as_at_right_angles",
        ),
    ),
    42: Row(
        "adapter of another base, rank unlike the config, A without B, unused keys, alpha 0",
        (
            f"{_CLI}::test_an_adapter_of_another_base_is_refused",
            "unit/test_adapter_resolve.py::test_all_kinds_of_problems_are_said_at_once",
            "unit/test_adapter_keys.py::test_a_factor_without_its_other_half_is_named",
            "unit/test_adapter_resolve.py::test_alpha_zero_is_a_value_and_is_said",
            "unit/test_adapter_names.py::test_nothing_matched_names_the_base_it_was_trained_on",
        ),
    ),
    43: _row(
        "integer or fp8 weights without a scale",
        _FOLDER,
        "test_8_bit_floats_are_refused",
        "test_quantised_models_are_refused",
    ),
}

FAULTS: dict[int, Row] = {
    1: Row(
        "killed at every durable call",
        (
            f"{_CALLS}[kill]",
            f"{_CALLS}[kill after]",
            f"{_CALLS}[kill inside]",
            f"{_KILL}::test_a_killed_merge_goes_on",
            "faults/test_strace.py::test_killed_at_every_durable_call",
        ),
    ),
    2: _row(
        "SIGTERM, SIGINT, SIGUSR1, SIGHUP, once and twice",
        _SIGNALS,
        "test_a_signal_stops_it_and_the_line_goes_on",
        "test_a_second_signal_ends_it_at_once",
        "test_it_waits_less_than_ten_seconds",
        "test_signals_at_any_time_lose_nothing",
    ),
    3: Row(
        "no space left",
        (
            f"{_CALLS}[ENOSPC]",
            f"{_PLACES}::test_too_small_a_disk_is_refused_before_data_moves",
            f"{_PLACES}::test_a_disk_that_others_fill_leaves_what_can_be_gone_on_from",
            "test_spill.py::test_without_room_auto_does_without",
        ),
    ),
    4: Row("quota", (f"{_CALLS}[EDQUOT]",)),
    5: Row(
        "EIO on read, write, sync",
        (
            f"{_CALLS}[EIO]",
            f"{_CALLS}[EIO of inputs]",
            "contracts/test_shards_sink.py::test_nothing_is_published_after_a_sync_that_failed",
        ),
    ),
    6: Row(
        "short reads and writes, EINTR",
        (
            f"{_HEADER}::test_short_reads_are_continued",
            f"{_INPUTS}::test_short_reads_and_writes_are_continued",
        ),
    ),
    7: Row("EACCES", (f"{_CALLS}[EACCES]", f"{_HEADER}::test_faults_of_opening")),
    8: Row(
        "read-only file system",
        (f"{_CALLS}[EROFS]", f"{_INPUTS}::test_a_read_only_file_system_is_said"),
    ),
    9: _row(
        "an input truncated while it is read",
        _INPUTS,
        "test_an_input_that_is_cut_is_named",
    ),
    10: Row(
        "an input rewritten between two runs or during one",
        (
            f"{_INPUTS}::test_an_input_that_is_rewritten_is_named",
            f"{_INPUTS}::test_a_tokenizer_that_changes_during_a_merge_is_named",
            f"{_RESUME}::test_changed_inputs_are_refused_and_named",
        ),
    ),
    11: _row(
        "an input deleted or replaced",
        _INPUTS,
        "test_an_input_that_is_replaced_is_named",
        "test_an_input_that_is_deleted_is_named_or_read_on",
        "test_an_input_that_goes_before_the_run_is_missing",
    ),
    12: _row(
        "the output exists, or is an input",
        _CLI,
        "test_another_recipes_output_is_kept_unless_forced",
        "test_force_replaces_no_folder_of_others",
        "test_force_replaces_no_file_and_no_link",
        "test_an_output_that_touches_an_input_is_refused",
    ),
    13: _row(
        "two processes with the same output",
        _KILL,
        "test_a_second_process_is_refused",
        "test_many_at_once_leave_one_complete_output",
    ),
    14: Row(
        "a lock left by a dead process",
        (
            f"{_PLACES}::test_without_flock_the_lock_of_a_dead_process_is_taken_over",
            f"{_KILL}::test_a_killed_merge_goes_on",
        ),
    ),
    15: _row(
        "no flock",
        _PLACES,
        "test_without_flock_it_works_and_tidies_up",
        "test_without_flock_a_second_process_is_refused",
    ),
    16: _row(
        "inputs, cache and output on different file systems",
        _INPUTS,
        "test_every_folder_may_be_a_file_system_of_its_own",
    ),
    17: _row("clock jumps, mtime in the future", _INPUTS, "test_clocks_do_not_matter"),
    18: _row(
        "a torn, damaged or foreign journal",
        _RESUME,
        "test_any_torn_end_of_the_journal_will_do",
        "test_a_flipped_bit_is_said_and_costs_what_follows",
        "test_a_journal_of_another_version_is_refused",
        "test_another_recipe_is_refused_with_what_differs",
    ),
    19: Row(
        "a spill chunk missing, truncated, flipped",
        (
            "unit/test_spill_store.py::test_a_damaged_chunk_is_named",
            "unit/test_spill_store.py::test_a_chunk_that_somebody_removed_is_forgotten",
            "test_spill.py::test_a_damaged_chunk_ends_the_merge_and_the_next_one_succeeds",
        ),
    ),
    20: Row("cgroup just above the budget", (f"{_INPUTS}::test_a_cgroup_just_above_the_budget",)),
    21: _row(
        "a worker that fails; a cancelled item that finishes",
        _INPUTS,
        "test_a_worker_that_fails_ends_the_merge_with_its_error",
    ),
    22: _row(
        "64 file handles, a file size limit",
        _PLACES,
        "test_64_handles_are_enough",
        "test_a_file_size_limit_is_refused_with_both_remedies",
    ),
    23: Row(
        "the cache purged between runs and during one",
        (
            f"{_INPUTS}::test_a_purged_cache_costs_nothing",
            "test_spill.py::test_the_cache_purged_while_it_is_needed",
            "test_spill.py::test_what_a_dead_run_left_goes_with_the_next",
        ),
    ),
    24: _row(
        "stdout closed; HOME unset; a C locale",
        "test_cli.py",
        "test_a_closed_pipe_does_not_spoil_a_merge",
        "test_closed_streams_do_not_spoil_a_merge",
        "test_no_home_is_needed",
        "test_a_c_locale_is_enough",
    ),
}
