"""Decoders ready to use, wherever they come from: a run of ours, a Hugging Face folder, a GGUF file."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain import checkpoints, partitioning
from mlx_pretrain.checkpoints import COMPUTE_FIELDS
from mlx_pretrain.convert.decoders import CONFIG, load_decoder, read_config
from mlx_pretrain.convert.gguf import GGUF
from mlx_pretrain.convert.weights import read_object
from mlx_pretrain.data.store import BOS_ID, EOS_ID, PAD_ID, TOKENIZER, UNK_ID
from mlx_pretrain.data.subword import SubwordTokenizer
from mlx_pretrain.data.tokenizer import Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.inference.generation import generate
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.train_state import abstract_params

HF_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its tokenizer.

    Attributes:
      path: where it was read from.
      step: of the checkpoint; None for models that are no run of ours.
      config, params: of the decoder; `params` on `mesh`.
      mesh: its devices.
      tokenizer: ours or Hugging Face's.
      before: ids put before every text, BOS where the model was trained with one.
      start: id to predict the first token from where nothing is before it: BOS, or else what ends documents.
      end: id that ends documents.
      never: ids that are in no text.
    """

    path: str
    step: int | None
    config: DecoderConfig
    params: Any
    mesh: Mesh
    tokenizer: Tokenizer | SubwordTokenizer
    before: tuple[int, ...]
    start: int
    end: int
    never: tuple[int, ...] = ()

    def fingerprint(self) -> str:
        """Of configuration, tokenizer and parameters (through their sums), the same on any mesh up to rounding."""
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in COMPUTE_FIELDS}
        return fingerprint(self.params, config, self.tokenizer.sha256)

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """Continuations of texts; `settings` as in `generation.generate`, which does it."""
        return self.generate_tokens(self.tokenizer.encode_batch(list(prompts)), **settings)

    def generate_tokens(self, prompts: Sequence[np.ndarray], **settings: Any) -> list[str]:
        """Continuations of token ids, without `before`."""
        prompts = [ids if len(ids) + len(self.before) else [self.start] for ids in prompts]
        with partitioning.use(self.mesh):
            new = generate(
                self.config, self.params, prompts, before=self.before, end=self.end, never=self.never,
                vocab_size=self.tokenizer.vocab_size, **settings,
            )
        return [self.tokenizer.decode(tokens) for tokens in new]


def fingerprint(params: Any, *facts: Any) -> str:
    """Of parameters (through their sums) and facts in JSON, the same on any mesh up to rounding."""
    shardings = jax.tree.map(lambda x: partitioning.replicated(x.sharding.mesh), params)
    sums = jax.device_get(jax.jit(lambda params: jax.tree.map(_sums, params), out_shardings=shardings)(params))
    rounded = [f"{x:.4g}" for leaf in jax.tree.leaves(sums) for x in leaf]
    return hashlib.sha256(json.dumps([*facts, rounded], sort_keys=True).encode()).hexdigest()


def _sums(x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(x, dtype=jnp.float32), jnp.sum(jnp.abs(x), dtype=jnp.float32)])


def load_language_model(
    path: epath.PathLike, mesh: Mesh | None = None, *, step: int | None = None, dtype: str | None = None
) -> LanguageModel:
    """Reads a decoder.

    Args:
      path: folder of a training run; or local folder with config.json, safetensors and tokenizer.json; or a .gguf file.
      mesh: where to put the parameters; None: all devices, replicated.
      step: which checkpoint of a run; None: the latest.
      dtype: compute dtype, "float32" or "bfloat16"; None: that of the run, float32 for other models.

    Raises:
      InputError: none of these is there, or it cannot be read, or the tokenizer's ids exceed the vocabulary.
    """
    path, mesh = epath.Path(path), partitioning.make_mesh() if mesh is None else mesh
    if path.suffix != ".gguf" and not (path / CONFIG).exists():
        config = checkpoints.load_model(path)
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        tokenizer = Tokenizer(path / TOKENIZER)
        with partitioning.use(mesh):
            params, step = checkpoints.restore_params(path, abstract_params(config, mesh), step)
        return own_model(path, step, config, params, mesh, tokenizer)
    if step is not None:
        raise InputError(f"{path}: step = {step}, but this is no training run")
    if path.suffix == ".gguf":
        file = GGUF(path)
        config, params = file.load_decoder(dtype or "float32")
        tokenizer, ids = SubwordTokenizer(path, file.tokenizer()), file.special_ids()
    else:
        config, params = load_decoder(path, dtype or "float32")
        tokenizer, ids = SubwordTokenizer(path / HF_TOKENIZER), special_ids(path / CONFIG, read_object(path / CONFIG))
    return foreign_model(path, config, params, mesh, tokenizer, ids)


def described_model(path: epath.PathLike) -> DecoderConfig:
    """The decoder that `load_language_model` would read, without its parameters.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    path = epath.Path(path)
    if path.suffix == ".gguf":
        return GGUF(path).decoder_config()
    return read_config(path) if (path / CONFIG).exists() else checkpoints.load_model(path)


def foreign_model(
    path: epath.PathLike,
    config: DecoderConfig,
    params: Any,
    mesh: Mesh,
    tokenizer: SubwordTokenizer,
    ids: tuple[int | None, int | None],
) -> LanguageModel:
    """A model with somebody else's tokenizer; `params`, where in host memory, are put on `mesh`; `ids` begin and end a
    document.

    Raises:
      InputError: the tokenizer's ids exceed the vocabulary, or no id ends a document.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    bos, eos = ids
    start, end = bos if bos is not None else eos, eos if eos is not None else bos
    if start is None:
        raise InputError(f"{path}: neither a bos_token_id nor an eos_token_id")
    with partitioning.use(mesh):
        params = jax.tree.map(lambda x, like: x if isinstance(x, jax.Array) else partitioning.put(x, like.sharding),
                              params, abstract_params(config, mesh))
    before = tuple(tokenizer.before.tolist())
    return LanguageModel(str(path), None, config, params, mesh, tokenizer, before, start, end)


def own_model(
    path: epath.PathLike, step: int | None, config: DecoderConfig, params: Any, mesh: Mesh, tokenizer: Tokenizer
) -> LanguageModel:
    """A model with one of our own tokenizers; `params` may be None where only texts are encoded."""
    return LanguageModel(str(path), step, config, params, mesh, tokenizer, (BOS_ID,), BOS_ID, EOS_ID,
                         (PAD_ID, UNK_ID, BOS_ID))


def special_ids(path: epath.Path, raw: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Ids that begin and end a document in an object of the config.json at `path`; of several ends, the first."""
    ids = [raw.get(f"{name}_token_id") for name in ("bos", "eos")]
    ids = [found[0] if isinstance(found, list) and found else found for found in ids]
    for found in ids:
        if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
            raise InputError(f"{path}: bos_token_id and eos_token_id must be numbers")
    return tuple(ids)
