"""The programs that commands run on devices, described without data, for compilation ahead of time.

A command registers a function that lists its programs; it is asked when the gin files bind the parameter it names:

    @programs.register("train.steps")
    def train_programs(mesh, length):
        config = TrainConfig()
        ...
        return [programs.Program("training step", *jitted_step(...), mesh=mesh, ...)]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
from jax.sharding import Mesh

from mlx_pretrain import partitioning
from mlx_pretrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a command.

    Attributes:
      name: e.g. "training step".
      function: jitted.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, to call it with.
      mesh: the mesh it runs on.
      batch: its batch in words, e.g. "3072 x 4096 tokens".
      parameters: number of the model's parameters.
      tokens: of one batch, over all devices.
      model_flops: FLOPs that the model asks for, without recomputation, over all devices.
      remedies: settings that make it need less memory, the cheapest first.
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
    remedies: Sequence[str] = ()

    def lower(self) -> jax.stages.Lowered:
        """Traces it for the devices of its mesh, which may be absent."""
        with partitioning.use(self.mesh):
            return self.function.lower(*self.arguments)

    def argument_bytes(self) -> int:
        """Bytes of the arguments on one device."""
        leaves = jax.tree.leaves(self.arguments)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


Lister = Callable[[Mesh, int | None], list[Program]]
_LISTERS: dict[str, Lister] = {}


def register(parameter: str) -> Callable[[Lister], Lister]:
    """Registers `list_programs(mesh, length)` for configurations that bind a parameter such as "train.steps".

    `length` is the length of sequences where no data tell it; None: what the model takes.
    """

    def add(lister: Lister) -> Lister:
        _LISTERS[parameter] = lister
        return lister

    return add


def configured(mesh: Mesh, length: int | None = None) -> list[Program]:
    """Programs of all commands that the gin files read so far configure.

    Raises:
      InputError: there is none, or its settings are wrong.
    """
    listers = [lister for parameter, lister in _LISTERS.items() if is_bound(parameter)]
    if not listers:
        raise InputError(f"the gin files configure no program: none of {', '.join(_LISTERS)} is set")
    return [program for lister in listers for program in lister(mesh, length)]


def is_bound(parameter: str) -> bool:
    """True if the gin files read so far set a parameter such as "train.steps"."""
    try:
        gin.query_parameter(parameter)
    except ValueError:
        return False
    return True


def in_microbatches(n: int) -> str:
    """What to say of a batch in slices."""
    return f" in {n} microbatches" if n > 1 else ""


def remedies_for_training(config, model, mesh: Mesh) -> list[str]:
    """What makes a training step need less memory; `config` is a LoopConfig, `model` what it trains."""
    name, remedies = type(model).__name__, []
    rows = config.batch_size // config.microbatches // partitioning.shards(mesh, "batch")
    remat = getattr(model, "remat", None)
    if remat is False or remat == "none":
        remedies.append(f"{name}.remat={True if remat is False else 'full'!r} (computes layers again in the backward "
                        "pass)")
    elif remat in ("dots", "attention"):
        remedies.append(f"{name}.remat='full' (keeps only the layers' inputs)")
    if rows > 1:
        remedies.append(f"{config.name}.microbatches={config.microbatches * rows} (a device holds 1 sequence at a time "
                        f"instead of {rows})")
    if partitioning.shards(mesh, "embed") * partitioning.shards(mesh, "mlp") < mesh.size:
        remedies.append("make_mesh.fsdp=-1 with make_mesh.data=1, or the number of slices (parameters and optimizer "
                        "state over all devices of a slice)")
    if getattr(config, "chunk_tokens", 0) > 256:
        remedies.append(f"{config.name}.chunk_tokens={config.chunk_tokens // 2} (logits of fewer tokens at once)")
    if rows <= 1:
        remedies.append(f"make_mesh.tensor={2 * mesh.shape['tensor']} (each sequence over more devices)")
    return [*remedies, "more devices, or devices with more memory"]
