"""The tests that `--quick` runs: fast tests of every room, including a real engine and a real server."""

from __future__ import annotations

QUICK = """
test_layering.py::test_no_edge_that_is_not_in_the_table
test_layering.py::test_no_circles_between_rooms_and_none_between_files
test_quick.py
types/test_sampling_params.py
system/test_files.py
system/test_pages.py
config/test_engine.py
config/test_expert_policy.py
text/test_detokenizer.py
text/test_tokenizer.py
text/test_chat_history.py
text/test_chat_template.py
text/formats/test_registry.py
text/formats/test_reasoning.py
grammars/test_matcher.py::test_after_the_end_nothing_matters
grammars/test_matcher.py::test_a_token_that_is_not_allowed_is_an_error
wire/test_transport.py
engine/test_page_pool.py
engine/test_prefix_index.py
engine/test_prefix_scheduling.py
engine/test_rank_choice.py
engine/test_request.py
engine/test_engine.py
engine/test_same_tokens.py::test_greedy_tokens_are_those_of_transformers[glm4 groups]
serve/test_generate_route.py
serve/test_openai_routes.py
serve/test_openai_with_a_model.py
cluster/test_process_executor.py::test_ranks_say_hello_and_report
cluster/test_process_executor.py::test_each_rank_gets_its_own_plan_and_results_come_in_order_with_two_in_flight
cluster/test_process_executor.py::test_a_rank_that_raises_is_named_with_its_error
worker/test_sampler.py
models/test_parity.py::test_float32_logits[qwen3 bias, tied-4-native]
models/test_parity.py::test_float32_logits[glm4 groups-2-torch]
models/test_parity.py::test_float32_logits[granite shared-1-torch]
models/test_parity.py::test_float32_logits[deepseek3-1-native]
models/test_hf_config.py
weights/test_checkpoint.py::test_sharded_and_fused_hold_the_same_as_one_file
layers/test_capacity.py
layers/test_kv_cache.py
layers/test_side_stream.py
all2all/test_dispatch.py
experts/test_slots.py
kernels/test_cpu_native.py
kernels/test_cpu_blocks.py
kernels/test_cpu_attention.py
kernels/test_torch_ops.py
kernels/test_triton_tiles.py
balancer/test_choice.py
balancer/test_decide.py
balancer/test_load.py
balancer/test_placement.py
balancer/test_plan.py
balancer/test_split.py
balancer/live/test_load_monitor.py
balancer/live/test_migration.py
balancer/live/test_rebalancer.py
memory/test_initial_placement.py
memory/test_model_size.py
planner/test_shape.py
bench/test_workload.py
demo/test_demo_model.py::test_artifact_is_small_and_partitions_the_neurons
cli/test_inspect.py
cli/test_main.py::test_every_engine_option_is_a_flag
cli/test_main.py::test_serve_by_default
""".strip().splitlines()


def is_quick(name: str) -> bool:
    """Whether a test, named by its path below `tests`, is a quick test or a case of one."""
    return any(name == test or name.startswith((f"{test}::", f"{test}[")) for test in QUICK)
