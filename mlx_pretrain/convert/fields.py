"""The fields of a config.json: each is read, known to be harmless, or refused because it changes the computation."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError

# Fields that change no computation here, for any type of model.
HARMLESS = re.compile("|".join((
    r"\w+_token_(id|index)|eos_token_ids",
    # Names and versions.
    r"_(model_)?name_or_path|name_or_path|architectures|auto_map|is_llama_config|tokenizer_class|_commit_hash|\w+_version"
    r"|transformers\.js_config|unsloth_\w+|sentence_transformers",
    # Implementation and outputs.
    r"dtype|torch_dtype|use_cache|output_past|pretraining_tp|chunk_size_feed_forward|gradient_checkpointing|torchscript"
    r"|use_bfloat16|_?attn_implementation\w*|_flash_attn_2_enabled|output_attentions|output_hidden_states|return_dict",
    # Training.
    r"initializer_(range|factor)|\w+_dropout(_prob)?|neftune_noise_alpha|max_sequence_length|model_max_length"
    r"|tf_legacy_loss",
    # Heads for other tasks, and a decoder beside an encoder.
    r"id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|prefix|tie_encoder_decoder",
    # Sampling, which has its own settings here.
    r"do_sample|temperature|top_[kp]|typical_p|num_beams|num_beam_groups|diversity_penalty|num_return_sequences"
    r"|max_length|min_length|max_new_tokens|early_stopping|length_penalty|repetition_penalty|no_repeat_ngram_size"
    r"|encoder_no_repeat_ngram_size|bad_words_ids|suppress_tokens|begin_suppress_tokens|output_scores"
    r"|return_dict_in_generate|remove_invalid_values|exponential_decay_length_penalty",
)))
# Fields that any type of model may have, with the values that describe all models here.
COMMON = {"is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},)}


def check_fields(
    path: epath.PathLike, raw: Mapping[str, Any], model: str, *, read: Collection[str],
    needed: Mapping[str, tuple[Any, ...]], harmless: str = "", part: str = "",
) -> None:
    """Checks that a configuration has only features that the models here support.

    Fields that are null are not set; only "model_type" must be.

    Args:
      path: path of the config.json, for errors.
      raw: the object in it, or an object inside that.
      model: name of the model here, for errors: "a decoder".
      read: fields that the caller reads.
      needed: field -> values that describe the model, "model_type" among them; COMMON is added.
      harmless: pattern of further fields that change no computation.
      part: name of an object inside config.json, for errors: " of the vision tower".

    Raises:
      InputError: a field is unknown or has another value; the message names the first.
    """
    needed = {**COMMON, **needed}
    for key, value in {"model_type": None, **raw}.items():
        if (value is None and key != "model_type") or key in read:
            continue
        if key in needed:
            if value not in needed[key]:
                others = f" (or {', '.join(map(repr, needed[key][1:]))})" if len(needed[key]) > 1 else ""
                raise InputError(f"{path}: {key}{part} is {value!r}; {model} here has {needed[key][0]!r}{others}")
        elif not HARMLESS.fullmatch(key) and not re.fullmatch(harmless, key):
            raise InputError(f"{path}: {key}{part} is {value!r}; {model} here has no such setting (if the model "
                             "computes the same without it, take it out)")
