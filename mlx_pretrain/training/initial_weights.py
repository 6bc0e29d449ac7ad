"""Reads the weights that a new run starts from: another run's or a Hugging Face model's (continued pretraining).

    weights = InitialWeights("runs/demo/pretrain", config, "tokens/tokenizer.model")  # or its checkpoints/300, hf/demo
    params = weights.load(mesh)

The optimizer and the data start from their beginning.
"""

import hashlib
import json
from typing import Any

import jax
import tokenizers
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.convert.decoders import CONFIG, open_decoder, read_config
from mlx_pretrain.convert.tokenizer import tokenizer_json
from mlx_pretrain.data.token_store import TOKENIZER
from mlx_pretrain.data.tokenizers import SubwordTokenizer, Tokenizer
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, sha256
from mlx_pretrain.inference.language_model import HF_TOKENIZER
from mlx_pretrain.models.decoder import DecoderConfig
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.checksums import checksums
from mlx_pretrain.training.train_state import abstract_params


class InitialWeights:
    """The weights in a folder, checked to fit a model and a tokenizer."""

    def __init__(self, path: epath.PathLike, config: DecoderConfig, tokenizer: epath.PathLike):
        """Reads the folder's descriptions; the weights are read by `load`.

        Args:
          path: folder of a training run, for its latest checkpoint, or RUN/checkpoints/<step>; or a folder with
            config.json, safetensors and tokenizer.json, local or gs://.
          config: configuration of the model to train; may differ from the folder's in `checkpoints.COMPUTE_FIELDS`.
          tokenizer: the SentencePiece model of the token store.

        Raises:
          InputError: the folder is none of these, or its model or tokenizer is another.
        """
        self._path, self._config, self._step = epath.Path(path), config, None
        if self._path.parent.name == "checkpoints" and self._path.name.isdigit():
            self._path, self._step = self._path.parent.parent, int(self._path.name)
        self._is_run = (self._path / checkpoints.MODEL).exists()
        if self._is_run:
            described = self._path / checkpoints.MODEL
            saved = checkpoints.load_model(self._path, DecoderConfig)
            self._check_run_tokenizer(described, tokenizer)
            self._step = checkpoints.find_step(self._path, self._step)
        elif (self._path / CONFIG).exists():
            described, saved = self._path / CONFIG, read_config(self._path, config.dtype)
            self._check_pretrained_tokenizer(Tokenizer(tokenizer))
        else:
            raise InputError(f"{self._path}: neither a training run (no {checkpoints.MODEL}) nor a Hugging Face folder "
                             f"(no {CONFIG}): there are no weights to start from")
        if different := checkpoints.different_field(saved, config):
            name, old, new = different
            raise InputError(f"{described}: these weights are of a model with {name}={old}, the configuration has "
                             f"{new}; a run starts from weights of its own architecture")

    def _check_run_tokenizer(self, described: epath.Path, tokenizer: epath.PathLike) -> None:
        trained_with = read_json(described, "model description").get("tokenizer_sha256")
        if trained_with != (configured := sha256(tokenizer)):
            raise InputError(f"{described}: trained with another tokenizer (sha256 {str(trained_with)[:12]}) than that "
                             f"of the token store ({tokenizer}, {configured[:12]})")

    def _check_pretrained_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that the folder has the tokenizer itself, or a tokenizer.json with the same pieces and ids."""
        own, converted = self._path / TOKENIZER, self._path / HF_TOKENIZER
        if own.exists() and sha256(own) == tokenizer.sha256:
            return
        if not converted.exists():
            raise InputError(f"{self._path}: no {HF_TOKENIZER}, and no {TOKENIZER} that is the token store's: nothing "
                             "says that the weights were trained with its tokenizer")
        expected = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer)[0]).get_vocab(with_added_tokens=True)
        if SubwordTokenizer(converted).vocabulary() != expected:
            raise InputError(f"{converted}: another tokenizer than that of the token store ({tokenizer.path}, sha256 "
                             f"{tokenizer.sha256[:12]}): its pieces or their ids differ")

    def load(self, mesh: Mesh) -> Any:
        """Reads the parameters, each process the parts of its devices; a host holds the part of one device at a time.

        Returns:
          Parameters of `Decoder`, laid out as `train_state.abstract_params(config, mesh)`.

        Raises:
          InputError: a checkpoint or a tensor is missing, damaged or of another shape.
        """
        abstract = abstract_params(self._config, mesh)
        if self._is_run:
            params, _ = checkpoints.restore_params(self._path, abstract, self._step)
        else:
            with open_decoder(self._path, self._config) as stored:
                params = jax.tree.map(partitioning.put_parts, stored, abstract)
        self._checksum = hashlib.sha256(json.dumps(checksums(params), sort_keys=True).encode()).hexdigest()
        return params

    def metadata(self) -> dict[str, Any]:
        """Returns what run.json says of the weights that were loaded; `checksum` is that of the parameters' values."""
        source = "run" if self._is_run else "hugging_face"
        return {"path": str(self._path), "kind": source, "step": self._step, "checksum": self._checksum}
