"""A config.json as it is read: every setting is either taken, or known to change no number, or refused by name."""

import re
from typing import Any

from lm.core.errors import UsageError

_REQUIRED = object()
# What a model computes from its inputs does not depend on these.
_HARMLESS = re.compile(
    r"_.*|transformers_version|architectures|model_type|dtype|torch_dtype|use_cache|.*_token_ids?|return_dict|output_.*"
    r"|id2label|label2id|problem_type|is_encoder_decoder|is_decoder|max_position_embeddings|n_ctx|initializer_range"
    r"|summary_.*|classifier_dropout(_prob)?|qa_dropout|seq_classif_dropout|pretraining_tp|reorder_and_upcast_attn|use_bfloat16|torchscript|pruned_heads"
    r"|add_cross_attention|cross_attention_hidden_size|tie_encoder_decoder|name_or_path|task_specific_params|finetuning_task"
    r"|keys_to_ignore.*|predict_special_tokens|tokenizer_class|prefix|hidden_dropout_prob"
    r"|down_scale_factor|gap_size|net_structure_type|num_memory_blocks"  # ALBERT's, read by nothing.
    r"|directionality|pooler_(fc_size|num_attention_heads|num_fc_layers|size_per_head|type)|tie_weights_|output_past"
    # How a program runs the model, and where its code was.
    r"|gradient_checkpointing|chunk_size_feed_forward|use_return_dict|attention_probs_dropout_prob|auto_map|cache_implementation|model_max_length|deterministic_flash_attn|reference_compile"
    # Settings of `generate`, which old configs carry.
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p"
    r"|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|remove_invalid_values"
)


class Fields:
    """The settings of one config.json; `finish` refuses what nobody asked for."""

    def __init__(self, config: dict[str, Any], where: str):
        self._config, self._where = config, where
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The setting; raises UsageError where it is missing."""
        value = self.get(name, _REQUIRED)
        if value is _REQUIRED:
            raise UsageError(f"{self._where} has no {name!r}, which its class needs")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The setting, or `default` where it is missing."""
        self._read.add(name)
        return self._config.get(name, default)

    def first(self, *names: str, default: Any = None) -> Any:
        """The first of several spellings that is there and not null."""
        values = [self.get(name) for name in names]
        return next((value for value in values if value is not None), default)

    def expect(self, name: str, *allowed: Any) -> None:
        """Takes a setting of which only the `allowed` values are supported; the first is its default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UsageError(f"{self._where} has {name}={value!r}, and only {' or '.join(map(repr, allowed))} works")

    def choice(self, name: str, known: dict[str, str], default: str | None = None) -> str:
        """Our name for the setting's value."""
        value = self[name] if default is None else self.get(name, default)
        if value not in known:
            raise UsageError(f"{self._where} has {name}={value!r}, and only {', '.join(known)} are known")
        return known[value]

    def finish(self) -> None:
        """Raises UsageError for the first setting that was neither read nor is known to change no number."""
        for name, value in sorted(self._config.items()):
            if name not in self._read and not _HARMLESS.fullmatch(name):
                raise UsageError(
                    f"{self._where} has {name}={value!r}, which may change the numbers and is not supported: "
                    "remove it if it changes none"
                )
