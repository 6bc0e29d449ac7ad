"""Loads Video-LLMs: runs of `video.train`, and LLaVA and LLaVA-OneVision folders of Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gin
import jax
from etils import epath
from jax.sharding import Mesh

from mlx_pretrain.convert.decoders import CONFIG
from mlx_pretrain.convert.special_ids import read_special_ids
from mlx_pretrain.convert.weights import read_object
from mlx_pretrain.data.token_store import TOKENIZER
from mlx_pretrain.data.tokenizers import SubwordTokenizer, Tokenizer
from mlx_pretrain.inference.language_model import (
    HF_TOKENIZER,
    NOT_DIGESTED,
    LanguageModel,
    fingerprint,
    from_pretrained,
    from_run,
)
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import checkpoints
from mlx_pretrain.training.optimizers import decay_mask
from mlx_pretrain.training.train_state import abstract_params
from video.llm.llava import open_llava
from video.llm.model import VideoLLMConfig
from video.llm.parts import read_parts, read_stored_parts
from video.llm.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class VideoLLM:
    """A Video-LLM with its tokenizer.

        llm = load_video_llm("runs/video/llm")
        scorer = AnswerScorer(llm.config, llm.params, llm.mesh, llm.prompts)
        llm.language_model.generate(["Which"], max_new_tokens=8)   # its decoder by itself

    Attributes:
      path: folder it was read from.
      step: step of the checkpoint; None for a LLaVA.
      config: shape of the model.
      params: its parameters, on `mesh`, or those that were asked for.
      mesh: the devices.
      language_model: its decoder, with the tokenizer; of use for texts only where not all layers were loaded.
      saved: checksums of all parameters where only some were loaded, otherwise None.
    """

    path: str
    step: int | None
    config: VideoLLMConfig
    params: Any
    mesh: Mesh
    language_model: LanguageModel
    saved: Mapping[str, str] | None = None

    @property
    def tokenizer_path(self) -> epath.Path:
        """The tokenizer's file."""
        return epath.Path(self.path) / (TOKENIZER if self.step is not None else HF_TOKENIZER)

    @property
    def prompts(self) -> Prompts:
        """Builder of the sequences that its decoder reads."""
        return Prompts.from_language_model(self.config, self.language_model)

    def fingerprint(self) -> str:
        """Digest of configuration, tokenizer, special ids and the parameters' bytes, the same on any mesh."""
        content = dataclasses.asdict(self.config)
        del content["variant"], content["frame_times"]  # the parameters show them
        for part in ("vision", "decoder"):
            content[part] = {name: value for name, value in content[part].items() if name not in NOT_DIGESTED}
        model = self.language_model
        return fingerprint(self.params, content, model.tokenizer.sha256, [model.prefix_ids, model.eos_ids],
                           saved=self.saved)


@gin.configurable(denylist=["mesh", "layers", "frames"])
def load_video_llm(
    path: epath.PathLike = gin.REQUIRED,
    mesh: Mesh | None = None,
    step: int | None = None,
    dtype: str | None = None,
    pooled_side: int | None = None,
    prompt: str | None = None,
    layers: int | None = None,
    frames: bool = True,
) -> VideoLLM:
    """Loads a Video-LLM.

    Args:
      path: folder of a run of `video.train`; or local folder of a LLaVA or LLaVA-OneVision: config.json, safetensors,
        tokenizer.json.
      mesh: devices for the parameters; None: all devices, replicated.
      step: checkpoint of a run; None: the latest.
      dtype: compute dtype, "float32" or "bfloat16"; None: the run's, float32 for a LLaVA, whose matrices are then kept
        in this dtype too: they are read tensor by tensor, each device its own parts.
      pooled_side, prompt: see `VideoLLMConfig`; None: the run's, or those of the LLaVA, see `open_llava`.
      layers: number of the decoder's bottom layers that are needed, with its embedding and final norm; 0: the embedding
        alone; None: the whole decoder. Other layers of a run are not read, those of a LLaVA one by one for their
        digest.
      frames: False: the vision tower and the projector are not needed either.

    Raises:
      InputError: the folder holds neither of them, or a file cannot be read.
    """
    path, mesh = epath.Path(path), partitioning.make_mesh() if mesh is None else mesh
    changes = {name: value for name, value in (("pooled_side", pooled_side), ("prompt", prompt)) if value is not None}
    if (path / CONFIG).exists():
        with open_llava(path, dtype or "float32", **changes) as (config, stored), partitioning.use(mesh):
            layout, saved = _compute_layout(abstract_params(config, mesh), config.dtype), None
            if layers is None and frames:
                params = jax.tree.map(
                    lambda x, like: partitioning.put_parts(x.astype(like.dtype), like), stored, layout)
            else:
                params, saved = read_stored_parts(stored, layout, layers, frames)
        raw = read_object(path / CONFIG)
        stated = {name: value for name, value in raw.items() if value is not None}
        tokenizer = SubwordTokenizer(path / HF_TOKENIZER)
        ids = read_special_ids(path, {**raw["text_config"], **stated}, tokenizer)
        decoder = from_pretrained(path, config.decoder, params.get("decoder"), mesh, tokenizer, ids)
        return VideoLLM(str(path), None, config, params, mesh, decoder, saved)
    config = checkpoints.load_model(path, VideoLLMConfig)
    if dtype is not None:
        changes |= {part: dataclasses.replace(getattr(config, part), dtype=dtype) for part in ("vision", "decoder")}
    config = dataclasses.replace(config, **changes)
    step, saved = checkpoints.find_step(path, step), None
    if layers is not None or not frames:
        saved = checkpoints.saved_checksums(path, step)
    if saved is None:
        with partitioning.use(mesh):
            params, _ = checkpoints.restore_params(path, abstract_params(config, mesh), step)
    else:
        params = read_parts(path, config, mesh, step, layers, frames)
    tokenizer = Tokenizer(path / TOKENIZER)
    return VideoLLM(str(path), step, config, params, mesh,
                    from_run(path, step, config.decoder, params.get("decoder"), mesh, tokenizer), saved)


def _compute_layout(layout: Any, dtype: str) -> Any:
    """Returns shapes and layouts with matrices in the compute dtype, which they are cast to where they are used.

    Scales and biases, which are added and multiplied in float32, stay as they are.
    """
    return jax.tree.map(lambda like, is_matrix: jax.ShapeDtypeStruct(
        like.shape, dtype if is_matrix else like.dtype, sharding=like.sharding), layout, decay_mask(layout))
