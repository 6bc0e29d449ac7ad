"""The programs that commands run on devices, described without data, for compilation ahead of time.

A command registers a function that lists its programs, and names the parameter whose binding shows that it is meant:

    @programs.register("train.steps")
    def train_programs(mesh, length):
        config = TrainConfig()
        ...
        return [programs.training_step(config, computation, mesh, "3072 x 4096 tokens")]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
from jax.sharding import Mesh

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import partitioning
from mlx_pretrain.training import losses
from mlx_pretrain.training.train_module import Computation, jitted_step
from mlx_pretrain.training.train_state import abstract_state
from mlx_pretrain.training.trainer_config import TrainerConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a command.

    Attributes:
      name: e.g. "training step".
      function: the jitted function.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, to call it with.
      mesh: the mesh it runs on.
      batch: its batch in words, e.g. "3072 x 4096 tokens".
      parameters: number of the model's parameters.
      tokens: tokens of one batch, over all devices.
      model_flops: FLOPs of the model's own operations, without recomputation, over all devices.
      remedies: lists changes that reduce its memory, the cheapest first; called with the ratio of the memory needed
        besides its arguments to the memory left for it.
    """

    name: str
    function: Any
    arguments: Sequence[Any]
    _: dataclasses.KW_ONLY
    mesh: Mesh
    batch: str
    parameters: int
    tokens: int
    model_flops: float
    remedies: Callable[[float], Sequence[str]]

    def lower(self) -> jax.stages.Lowered:
        """Traces the program for the devices of its mesh, which may be absent."""
        with partitioning.use(self.mesh):
            return self.function.lower(*self.arguments)

    def argument_bytes(self) -> int:
        """Returns the bytes of the arguments on one device."""
        leaves = jax.tree.leaves(self.arguments)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


Lister = Callable[[Mesh, int | None], list[Program]]
_LISTERS: dict[str, Lister] = {}


def register(parameter: str) -> Callable[[Lister], Lister]:
    """Registers `list_programs(mesh, length)` for configurations that bind a parameter such as "train.steps".

    `length` is the length of sequences where no data determine it; None stands for the model's maximum.
    """

    def add(lister: Lister) -> Lister:
        _LISTERS[parameter] = lister
        return lister

    return add


def configured(mesh: Mesh, length: int | None = None) -> list[Program]:
    """Returns the programs of all commands that the gin files read so far configure.

    Raises:
      InputError: there is none, or its settings are wrong.
    """
    listers = [lister for parameter, lister in _LISTERS.items() if is_bound(parameter)]
    if not listers:
        raise InputError(f"the gin files configure no program: none of {', '.join(_LISTERS)} is set")
    return [program for lister in listers for program in lister(mesh, length)]


def is_bound(parameter: str) -> bool:
    """Returns whether the gin files read so far set a parameter such as "train.steps"."""
    try:
        gin.query_parameter(parameter)
    except ValueError:
        return False
    return True


def training_step(config: TrainerConfig, computation: Computation, mesh: Mesh, batch: str) -> Program:
    """Returns the training step of a run; `batch` is its batch in words."""
    optimizer, model = config.make_optimizer(), computation.model
    tokens = config.batch_size * computation.tokens_per_sequence
    return Program(
        "training step",
        *jitted_step(config, computation, optimizer, abstract_state(model, optimizer, mesh), mesh),
        mesh=mesh,
        batch=batch + (f" in {config.microbatches} microbatches" if config.microbatches > 1 else ""),
        parameters=model.parameters(),
        tokens=tokens,
        model_flops=tokens * computation.flops_per_token,
        remedies=_training_remedies(config, model, mesh),
    )


def smaller(rows: int, mesh: Mesh, excess: float) -> int:
    """Returns a batch size that divides over the mesh, smaller than `rows` by a factor of at least `excess` and 2."""
    shards = partitioning.shards(mesh, "batch")
    return max(1, int(rows / max(excess, 2)) // shards) * shards


def _training_remedies(config: TrainerConfig, model: Any, mesh: Mesh) -> Callable[[float], list[str]]:
    """Returns `Program.remedies` of the training step of `model`."""
    rows = config.batch_size // config.microbatches // partitioning.shards(mesh, "batch")

    def remedies(excess: float) -> list[str]:
        name, listed = type(model).__name__, []
        remat = getattr(model, "remat", None)
        if remat is False or remat == "none":
            listed.append(f"{name}.remat={True if remat is False else 'full'!r} (the backward pass computes layers "
                          "again)")
        elif remat in ("dots", "attention"):
            listed.append(f"{name}.remat='full' (keeps only the layers' inputs)")
        if rows > 1:
            parts = next(n for n in range(2, rows + 1) if rows % n == 0 and (n >= excess or n == rows))
            listed.append(f"{config.name}.microbatches={config.microbatches * parts} (a device holds {rows // parts} "
                          f"rows at a time instead of {rows})")
        if partitioning.shards(mesh, "embed") * partitioning.shards(mesh, "mlp") < mesh.size:
            listed.append("make_mesh.fsdp=-1 with make_mesh.data=1, or the number of slices (parameters and optimizer "
                          "state over all devices of a slice)")
        if hasattr(config, "chunk_tokens"):
            chunk = config.chunk_tokens or losses.CHUNK_TOKENS["tpu"]
            if chunk > 256:
                listed.append(f"{config.name}.chunk_tokens={chunk // 2} (logits of fewer tokens at once)")
        if rows <= 1:
            listed.append(f"make_mesh.tensor={2 * mesh.shape['tensor']} (each row over more devices)")
        return [*listed, "more devices, or devices with more memory"]

    return remedies
