"""Weights & Biases as a sink of metrics: gin/runs/weights_and_biases.gin; needs the package `wandb`.

    RUN/wandb.json   id of the Weights & Biases run, with which a restart goes on
    RUN/wandb/       its files, unless RUN is on gs://; those of mode "offline" are uploaded by
                     `wandb sync RUN/wandb/offline-run-*`
"""

import tempfile
import uuid
from collections.abc import Mapping

import gin
from etils import epath

from mlx_pretrain import gcs
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_json

_ID = "wandb.json"


@gin.configurable(denylist=["run_dir", "step"])
class WeightsAndBiases:
    """Sends metrics to Weights & Biases, with the names that TensorBoard shows: `train/loss`, `eval/loss/en`.

        import mlx_pretrain.training.weights_and_biases
        train.sinks = [@WeightsAndBiases]
        WeightsAndBiases.project = 'pretraining'
        WeightsAndBiases.mode = 'offline'
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        step: int,
        project: str = "mlx_pretrain",
        entity: str | None = None,
        name: str | None = None,
        mode: str = "online",
    ):
        """Starts or resumes the run.

        Args:
          run_dir: the run's folder; its run.json becomes the configuration that Weights & Biases shows.
          step: that of the checkpoint resumed, -1 for a new run; Weights & Biases ignores steps that it has had before.
          project, entity: project and account there.
          name: name of the run there; None: that of the folder.
          mode: "online", or "offline" to write files only, to a local run folder.

        Raises:
          InputError: wandb is not installed, or cannot start; mode "offline" and a run folder on gs://.
        """
        if mode not in ("online", "offline"):
            raise InputError(f"WeightsAndBiases.mode = {mode!r}: must be 'online' or 'offline'")
        if mode == "offline" and gcs.is_gs(run_dir):
            raise InputError(f"WeightsAndBiases.mode = 'offline': writes to local run folders alone, not to {run_dir}")
        try:
            import wandb
        except ImportError:
            raise InputError("train.sinks: @WeightsAndBiases needs the package wandb: pip install "
                             "'mlx-pretrain[wandb]'") from None
        run_dir = epath.Path(run_dir)
        path = run_dir / _ID
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex[:8]})
        folder = tempfile.mkdtemp(prefix="wandb-") if gcs.is_gs(run_dir) else str(run_dir)
        try:
            self._run = wandb.init(
                id=read_json(path)["id"],
                resume="allow",
                project=project,
                entity=entity,
                name=name or run_dir.name,
                mode=mode,
                dir=folder,
                config=read_json(run_dir / "run.json"),
                allow_val_change=True,  # of the start and the command in run.json
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise InputError(f"train.sinks: Weights & Biases does not start: {str(error).splitlines()[0]}") from None

    def write(self, step: int, event: str, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{event}/{name}": value for name, value in metrics.items()}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb's own process writes what it was given."""

    def close(self) -> None:
        self._run.finish()
