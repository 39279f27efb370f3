"""Keys of a `config.json` that cannot change a forward pass of the model as it is served here, by reason. No torch."""

from __future__ import annotations

INERT: dict[str, str] = {
    "they say who made the checkpoint": """
        architectures model_type auto_map transformers_version _name_or_path name_or_path finetuning_task
        task_specific_params tokenizer_class problem_type id2label label2id custom_pipelines _commit_hash
        """,
    "they choose an implementation of the same computation": """
        torch_dtype dtype use_cache use_bfloat16 torchscript tf_legacy_loss chunk_size_feed_forward pretraining_tp
        _attn_implementation _attn_implementation_autoset attn_implementation _experts_implementation
        experts_implementation use_flash_attention_2 use_kernel gradient_checkpointing keys_to_ignore_at_inference
        """,
    "only training uses them": """
        initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop router_jitter_noise
        router_aux_loss_coef aux_loss_alpha output_router_logits seq_aux moe_capacity
        """,
    "they choose what a call in Python returns": "return_dict output_attentions output_hidden_states is_decoder",
    "they name tokens": """
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id prefix eod_token_id
        """,
    "they are settings of transformers' generate": """
        max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
        num_beam_groups diversity_penalty temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
        repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids force_words_ids constraints renormalize_logits forced_bos_token_id forced_eos_token_id
        remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
        token_healing guidance_scale watermarking_config num_return_sequences output_scores output_logits
        return_dict_in_generate cache_implementation cache_config max_cache_len penalty_alpha dola_layers
        """,
    "layers for multi-token prediction are not read": """
        num_nextn_predict_layers num_mtp_layers use_mtp num_mtp_modules mtp_transformer_layers
        """,
    "transformers does not read them in this family": "use_sliding_window max_window_layers",
}
INERT_PREFIXES = ("unsloth_",)  # marks of a training library
_NAMES = frozenset(name for names in INERT.values() for name in names.split())


def is_inert(name: str) -> bool:
    """Whether a key that the family does not read cannot change a forward pass."""
    return name in _NAMES or name.startswith(INERT_PREFIXES)


def is_empty(value: object) -> bool:
    """Whether a value says nothing."""
    return value in (None, False, "", [], {})
