"""The folder of proxy runs: a CSV file per run, and the settings that all of them share.

    FOLDER/<run>.csv            a row per evaluation, in the layout of `data_mixtures.climb.proxy_table`
    FOLDER/settings.json        settings of all runs
    FOLDER/model-<size>.json    settings of each model
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data_mixtures.climb.proxy_plan import ProxyRun
from data_mixtures.climb.proxy_table import LOSS, RATIO, proxy_runs, read_tables
from mlx_pretrain.artifacts import check_settings
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_atomic, write_json
from mlx_pretrain.parallel import cluster

SETTINGS = "settings.json"
_LATER_SETTINGS = ("optimizer_settings",)  # not recorded by earlier versions
_REMEDY = "choose another proxies.output"


class ProxyFolder:
    """A folder with a CSV file per run; each file is whole after every row, so a killed command leaves no part of one.

    Commands that share the folder never write the same file, unless they train the same run. In a job of several
    processes, process 0 alone reads and writes.

    Attributes:
      path: the folder.
      targets: languages whose losses are recorded.
    """

    def __init__(
        self, path: epath.PathLike, settings: Mapping[str, Any], languages: Sequence[str], targets: Sequence[str]
    ):
        """Reads the rows that are in the folder.

        Raises:
          InputError: the runs in it were made with other settings, or cannot be read.
        """
        self.path, self.targets = epath.Path(path), targets
        self._header = ["run", "step", "n_params", "tokens", "epochs"]
        self._header += [RATIO + language for language in languages] + [LOSS + target for target in targets]
        self._languages, self._settings = languages, settings
        self._read: dict[str, dict[int, tuple[epath.Path, list[float]]]] = {}  # run -> step -> file, ratios
        if not cluster.is_main():
            return
        if self.path.is_file():
            raise InputError(f"{path}: a single table; proxies.output is a folder: to add to this table, move it into "
                             f"a folder, with its settings as {SETTINGS}")
        if not any(self.path.glob("*.csv")):
            write_json(self.path / SETTINGS, settings)
            return
        self._check_settings()
        runs = proxy_runs(self.path)  # checks every row
        if differ := set(runs.languages) ^ set(languages) or set(runs.targets) ^ set(targets):
            raise InputError(f"{self.path}: these runs were made with other languages "
                             f"({', '.join(sorted(differ))}); {_REMEDY}")
        for file, line, row in read_tables(self.path)[1]:
            if not row.get("step", "").isdecimal():
                raise InputError(f"{file}:{line}: no whole number under 'step', after which a run goes on")
            ratios = [float(row[RATIO + language]) for language in languages]
            self._read.setdefault(row["run"], {})[int(row["step"])] = file, ratios

    def _check_settings(self) -> None:
        check_settings(self.path, SETTINGS, self._settings, remedy=_REMEDY, later=_LATER_SETTINGS)

    def _model_file(self, proxy: ProxyRun) -> str:
        return f"model-{proxy.size}.json"

    def _check_model(self, proxy: ProxyRun) -> None:
        check_settings(self.path, self._model_file(proxy), proxy.model_settings, remedy=_REMEDY)

    def done_steps(self, proxy: ProxyRun) -> set[int]:
        """Returns the steps at which a run had been evaluated when the command began.

        Raises:
          InputError: a run of that name had another mixture or model.
        """
        steps = self._read.get(proxy.name, {})
        if steps and (self.path / self._model_file(proxy)).exists():  # earlier versions did not record it
            self._check_model(proxy)
        for step, (file, ratios) in steps.items():
            if not np.allclose(ratios, [proxy.rates.get(l, 0.0) for l in self._languages], atol=1e-6):
                raise InputError(f"{file}: run {proxy.name!r} at step {step} had another mixture than the plan has; "
                                 f"{_REMEDY}")
        return set(steps)

    def _checkpoint_settings(self, pack: Sequence[ProxyRun]) -> dict[str, Any]:
        """Returns all that a checkpoint of runs that are trained together depends on."""
        rates = {proxy.name: {l: round(float(rate), 6) for l, rate in proxy.rates.items()} for proxy in pack}
        return {**self._settings, **pack[0].model_settings, "rates": rates}

    def record_checkpoint(self, folder: epath.Path, pack: Sequence[ProxyRun]) -> None:
        """Records the settings of a checkpoint in the folder that holds it."""
        if cluster.is_main():
            write_json(folder / SETTINGS, self._checkpoint_settings(pack))

    def check_checkpoint(self, folder: epath.Path, pack: Sequence[ProxyRun]) -> None:
        """Checks that a folder has no checkpoint of runs of other settings, which must not be continued.

        Raises:
          InputError: it has one.
        """
        if cluster.is_main() and (folder / SETTINGS).exists():
            check_settings(folder, SETTINGS, self._checkpoint_settings(pack), later=_LATER_SETTINGS,
                           remedy=f"{_REMEDY}, or delete this checkpoint")

    def add(self, proxy: ProxyRun, step: int, tokens: int, losses: Mapping[str, float]) -> None:
        """Adds one row, in place of an earlier one of the same run and step.

        Raises:
          InputError: another command has begun to fill the folder with runs of other settings.
        """
        if not cluster.is_main():
            return
        self._check_settings()
        if (self.path / self._model_file(proxy)).exists():
            self._check_model(proxy)
        else:
            write_json(self.path / self._model_file(proxy), proxy.model_settings)
        values = [proxy.name, step, proxy.model.parameters(), tokens, f"{tokens * proxy.epochs_per_token:.4g}",
                  *(repr(float(proxy.rates.get(l, 0.0))) for l in self._languages), *(repr(x) for x in losses.values())]
        path = self.path / f"{proxy.name}.csv"
        if self._read.get(proxy.name, {}).get(step, (path,))[0] != path:
            return  # the row is in a file of several runs, which stays as it is
        rows = read_tables(path)[1] if path.exists() else []
        rows = [row for _, _, row in rows if int(row["step"]) != step] + [dict(zip(self._header, map(str, values)))]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._header, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
        write_atomic(path, text.getvalue())
