"""LLaMA decoders from GGUF files, dequantised, with their tokenizer, through the `gguf` library."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers

from mlx_pretrain.convert.decoders import stored_params
from mlx_pretrain.convert.special_ids import SpecialIds
from mlx_pretrain.convert.weights import read_all
from mlx_pretrain.errors import InputError
from mlx_pretrain.models.decoder import DecoderConfig

# Hugging Face's names, without "model." and the layer's number -> names in GGUF.
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
# Factors of the rotary frequencies' wave lengths (LLaMA-3's scaling): read only where all of them are one.
ROPE_FACTORS = "rope_freqs.weight"
# Settings of `llama.*` that are read, and others that change no computation.
FIELDS = ("embedding_length", "block_count", "attention.head_count", "attention.head_count_kv", "attention.key_length",
          "attention.value_length", "feed_forward_length", "context_length", "rope.dimension_count", "rope.freq_base",
          "rope.scaling.type", "attention.layer_norm_rms_epsilon")  # fmt: skip
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()]),
    "gpt-2": lambda: _bytes(),
}
CONTROL, USER_DEFINED = 3, 4  # token types


def _bytes() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _decimal(value: float) -> float:
    """Returns the shortest decimal of a number of the file's float32: 1e-5, not 9.99999975e-06."""
    return float(str(np.float32(value)))


class GGUF:
    """A GGUF file.

    Attributes:
      path: path of the file.
    """

    def __init__(self, path: epath.PathLike):
        """Maps the file.

        Raises:
          InputError: the file is missing or no GGUF file, or the `gguf` library is not installed.
        """
        try:
            import gguf
        except ImportError:
            raise InputError(f"{path}: reading GGUF needs the package gguf (extra evals)") from None
        self.path = epath.Path(path)
        if not self.path.exists():
            raise InputError(f"{path}: no such file")
        try:
            self._reader = gguf.GGUFReader(str(path))
        # The library raises errors of any type.
        except Exception as error:
            raise InputError(f"{path}: not a GGUF file ({error})") from None
        self._dequantize = gguf.dequantize

    def load_decoder(self, dtype: str = "float32") -> tuple[DecoderConfig, dict[str, Any]]:
        """Reads the configuration, and the parameters of `Decoder` as numpy float32 arrays.

        Raises:
          InputError: the architecture is another, or a tensor is missing, has another shape, or is not used.
        """
        config = self.decoder_config(dtype)
        with self.open_decoder(config) as params:
            return config, read_all(params)

    @contextlib.contextmanager
    def open_decoder(self, config: DecoderConfig) -> Iterator[dict[str, Any]]:
        """Opens the weights for the configuration of the file, as `decoders.open_decoder`; errors of `load_decoder`."""
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        used = set()

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            part = name.removeprefix("model.")
            prefix = ""
            if part.startswith("layers."):
                _, number, part = part.split(".", 2)
                prefix = f"blk.{number}."
            stored = prefix + NAMES[part]
            if stored not in tensors:
                raise InputError(f"{self.path}: no tensor {stored}")
            used.add(stored)
            tensor = tensors[stored]
            values = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
            if values.shape != shape:
                raise InputError(f"{self.path}: tensor {stored} has shape {list(values.shape)}, the metadata say "
                                 f"{list(shape)}")
            if part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                # llama.cpp rotates pairs (2i, 2i + 1) and permutes the rows for it.
                pairs = values.reshape(-1, config.head_dim // 2, 2, shape[1])
                values = pairs.swapaxes(1, 2).reshape(shape)
            return values

        if ROPE_FACTORS in tensors:
            factors = tensors[ROPE_FACTORS]
            if not (np.asarray(self._dequantize(factors.data, factors.tensor_type)) == 1).all():
                raise InputError(f"{self.path}: {ROPE_FACTORS} scales the rotary positions; a decoder here does not")
        yield stored_params(config, read)
        unknown = sorted(set(tensors) - used - {ROPE_FACTORS})
        if unknown:
            raise InputError(f"{self.path}: tensor {unknown[0]} has no place in this model ({len(unknown)} such)")

    def tokenizer(self) -> bytes:
        """Returns the tokenizer.json that the file's metadata describe.

        Raises:
          InputError: the type of tokenizer is not known here.
        """
        model, pre = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre", "gpt-2")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise InputError(f"{self.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; known is 'gpt2' with "
                             f"{', '.join(PRE_TOKENIZERS)}")
        tokens = self._get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._get("tokenizer.ggml.merges")]
        tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
        token_types = self._get("tokenizer.ggml.token_type", [])
        special = [tokenizers.AddedToken(token, special=token_type == CONTROL, normalized=False)
                   for token, token_type in zip(tokens, token_types) if token_type in (CONTROL, USER_DEFINED)]
        tokenizer.add_special_tokens([token for token in special if token.special])
        tokenizer.add_tokens([token for token in special if not token.special])
        bos = self._get("tokenizer.ggml.bos_token_id", None)
        if bos is not None and self._get("tokenizer.ggml.add_bos_token", False):
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], int(bos))])
        return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode()

    def chat_template(self) -> dict[str, Any]:
        """Returns the templates as tokenizer_config.json has them: {"chat_template": ...}, or {}."""
        named = {name: self._get(f"tokenizer.chat_template.{name}")
                 for name in self._get("tokenizer.chat_templates", [])}
        default = self._get("tokenizer.chat_template", None)
        if not named:
            return {} if default is None else {"chat_template": default}
        named = ({} if default is None else {"default": default}) | named
        return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}

    def special_ids(self) -> SpecialIds:
        """Returns the ids that begin and end a document; ends of turns and messages end it too, as in llama.cpp."""
        bos_id, *eos_ids = (self._get(f"tokenizer.ggml.{name}_token_id", None) for name in ("bos", "eos", "eot", "eom"))
        return SpecialIds(bos_id, tuple(dict.fromkeys(token for token in eos_ids if token is not None)),
                          pad_id=self._get("tokenizer.ggml.padding_token_id", None))

    def decoder_config(self, dtype: str = "float32") -> DecoderConfig:
        """Returns the configuration; raises InputError for another architecture."""
        if (architecture := self._get("general.architecture")) != "llama":
            raise InputError(f"{self.path}: architecture {architecture!r}; a decoder here has 'llama'")
        if (scaling := self._get("llama.rope.scaling.type", "none")) != "none":
            raise InputError(f"{self.path}: llama.rope.scaling.type is {scaling!r}; a decoder here has 'none'")
        known = set(FIELDS + HARMLESS)
        for name in self._reader.fields:
            if name.startswith("llama.") and name.removeprefix("llama.") not in known and self._get(name):
                raise InputError(f"{self.path}: {name} is {self._get(name)!r}; a decoder here has no such setting")
        get = lambda name, *default: self._get(f"llama.{name}", *default)  # noqa: E731
        embed, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", get("rope.dimension_count", embed // heads))
        for name in ("attention.value_length", "rope.dimension_count"):
            if (value := get(name, head_dim)) != head_dim:
                raise InputError(f"{self.path}: llama.{name} is {value}; a decoder here has its head's {head_dim}")
        try:
            return DecoderConfig(
                vocab_size=len(self._get("tokenizer.ggml.tokens")),
                embed_dim=embed,
                n_layers=get("block_count"),
                n_heads=heads,
                n_kv_heads=get("attention.head_count_kv", heads),
                head_dim=head_dim,
                mlp_dim=get("feed_forward_length"),
                max_length=get("context_length"),
                rope_theta=_decimal(get("rope.freq_base", 10_000.0)),
                norm_epsilon=_decimal(get("attention.layer_norm_rms_epsilon")),
                tie_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
                dtype=dtype,
            )
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _get(self, name: str, *default: Any) -> Any:
        field = self._reader.get_field(name)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise InputError(f"{self.path}: no {name} in its metadata")
