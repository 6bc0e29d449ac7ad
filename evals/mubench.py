"""Downloads MuBench's files from the Hugging Face Hub through `datasets`.

    python -m evals.mubench --gin.mubench.output=mubench --gin.mubench.languages='["en", "de", "sw"]'

Files that exist are not downloaded again. Without a network, `repository` can be a folder with the same files.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import datasets
import gin
from etils import epath

from evals.tasks.language_families import LANGUAGES
from evals.tasks.task_files import MODES, Task, file_name, is_current, write_rows
from mlx_pretrain.artifacts import provenance
from mlx_pretrain.command_line import run
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import sha256
from mlx_pretrain.parallel.cluster import log

REPOSITORY = "aialt/MuBench"
DATASETS = ("ARCChallengeDataset", "ARCEasyDataset", "BMLAMADataset", "GPQADataset", "HellaswagDataset", "MMLUDataset",
            "MMLUProDataset", "MNLIDataset", "SNLIDataset", "StoryClozeDataset", "TruthfulQADataset",
            "WinoGrandeDataset")  # fmt: skip


@gin.configurable("mubench")
@dataclasses.dataclass(frozen=True)
class MubenchConfig:
    """Settings of the download.

    Attributes:
      output: folder of the tasks.
      repository: repository on the Hub, or local folder.
      names: datasets to download.
      modes: e.g. "lighteval", "local_template", "mix_2" (code-switched, at most two other languages).
      languages: languages to download; None: all 61.
      splits: "test", "dev".
      revision: revision of the repository, for results that can be repeated; None: the newest.
      overwrite: replaces files of another repository or revision.
    """

    output: str = gin.REQUIRED
    repository: str = REPOSITORY
    names: Sequence[str] = DATASETS
    modes: Sequence[str] = ("lighteval",)
    languages: Sequence[str] | None = None
    splits: Sequence[str] = ("test",)
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        plain_modes = [Task("", mode).plain_mode for mode in self.modes]
        for parameter, values, known in (("names", self.names, DATASETS), ("modes", plain_modes, MODES),
                                         ("languages", self.languages or (), LANGUAGES)):
            if unknown := [value for value in values if value not in known]:
                raise InputError(f"mubench.{parameter}: {', '.join(unknown)}: not one of {', '.join(known)}")


def main(config: MubenchConfig) -> int:
    """Downloads MuBench's files to OUTPUT/<dataset>/<mode>_<language>_<split>.jsonl, for `evals.run`.

    Returns:
      The number of files written.

    Raises:
      InputError: a file is missing or cannot be read, or a file comes from another repository or revision.
    """
    datasets.disable_progress_bars()
    settings = {"repository": config.repository, "revision": config.revision}
    wanted = {}
    for name, mode, language, split in itertools.product(
            config.names, config.modes, config.languages or LANGUAGES, config.splits):
        file = file_name(Task(name, mode), language, split)
        local = epath.Path(config.repository) / file
        made_from = provenance("evals.mubench", settings, {file: sha256(local)} if local.exists() else {})
        if not is_current(epath.Path(config.output) / file, made_from, overwrite=config.overwrite):
            wanted[file] = made_from
    for file, made_from in wanted.items():
        path, rows = epath.Path(config.output) / file, _read(config.repository, file, config.revision)
        write_rows(path, rows, made_from)
        log(f"{path}: {len(rows):,} items")
    log(f"{config.output}: {len(wanted)} files written")
    return len(wanted)


def _read(repository: str, file: str, revision: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(repository, data_files=file, split="train", revision=revision)
    # Errors of the network, the Hub, files and their formats have no common type.
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repository}/{file}: cannot be read through `datasets` ({cause[:300]})") from None


if __name__ == "__main__":
    run(main, MubenchConfig, "evals.mubench")
