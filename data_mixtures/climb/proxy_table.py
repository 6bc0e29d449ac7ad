"""Tables of proxy runs: the mixture, model size and token count of each run, and its held-out losses.

Our own layout is CSV with a row per (run, checkpoint), in one file or many, such as a file per run:

    run,step,n_params,tokens,ratio/<language>...,loss/<target>...

Tables made elsewhere are read too: Olmix's pair of files, joined on `run`, and RegMix's pair, joined on `index`.
Nothing is dropped silently: a missing cell, a repeated run or ratios that do not sum to 1 are errors that name the file
and line.
"""

import concurrent.futures
import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence

import gin
import numpy as np
from etils import epath

from mlx_pretrain.errors import InputError

RATIO, LOSS = "ratio/", "loss/"
_SUM_TOLERANCE = 0.01
_COMPARED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class ProxyRuns:
    """Proxy runs as arrays; a row is one run at one token count.

        runs = proxy_runs("runs/sample/proxies")
        runs.rows(runs.tokens >= 1e6)       # a table of some of the rows
        fitted = default_law(runs).fit(runs)

    Attributes:
      languages: names of the ratio columns, the parts of the mixture.
      targets: names of the loss columns; often, but not always, the languages.
      run: `[rows]` strings; rows of one run share its name.
      n_params: float64 `[rows]`, parameters of the model.
      tokens: float64 `[rows]`, training tokens D seen, all languages together.
      ratios: float64 `[rows, languages]`, shares of the training tokens, rows sum to 1.
      losses: float64 `[rows, targets]`, nats per token on held-out text.
    """

    languages: tuple[str, ...]
    targets: tuple[str, ...]
    run: np.ndarray
    n_params: np.ndarray
    tokens: np.ndarray
    ratios: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.run)

    def rows(self, selected: np.ndarray) -> "ProxyRuns":
        """Returns the table of the selected rows, by a mask or indices."""
        fields = ("run", "n_params", "tokens", "ratios", "losses")
        return dataclasses.replace(self, **{name: getattr(self, name)[selected] for name in fields})

    @property
    def own_columns(self) -> np.ndarray:
        """Int `[targets]`: the column of `ratios` with each target's own language; -1 without one."""
        return np.array([self.languages.index(t) if t in self.languages else -1 for t in self.targets])

    @property
    def has_own(self) -> np.ndarray:
        """Bool `[rows, targets]`: the run has some of the target's own language, or no column has that language."""
        return np.where(self.own_columns >= 0, self.ratios[:, self.own_columns] > 0, True)

    @property
    def varies(self) -> bool:
        """True if N or D differ between rows, so that a law can extrapolate in them."""
        return len(np.unique(self.n_params)) > 1 or len(np.unique(self.tokens)) > 1


def make_runs(
    where: str,
    languages: Sequence[str],
    targets: Sequence[str],
    run: Sequence[str],
    n_params: Sequence[float],
    tokens: Sequence[float],
    ratios: np.ndarray,
    losses: np.ndarray,
    sources: Sequence[str] | None = None,
) -> ProxyRuns:
    """Returns a table after checking it and normalising its ratios.

    Args:
      where: name of the table in errors.
      languages, targets, run, n_params, tokens, ratios, losses: see `ProxyRuns`.
      sources: file and line that each row comes from; None: rows are counted from 1.

    Raises:
      InputError: no rows; a value that is not finite; a negative ratio; ratios whose sum is not within 0.01 of 1; a
        loss, size or token count that is not positive; two rows of the same run and token count; a name twice.
    """
    n_params, tokens = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
    ratios, losses = np.asarray(ratios, np.float64), np.asarray(losses, np.float64)
    sources = [f"{where}:{row}" for row in range(1, len(run) + 1)] if sources is None else sources
    if not len(run):
        raise InputError(f"{where}: no runs")
    for column, names in (("ratio", languages), ("loss", targets)):
        if not names:
            raise InputError(f"{where}: no {column} columns")
        if repeated := sorted({name for name in names if list(names).count(name) > 1}):
            raise InputError(f"{where}: {column} column {repeated[0]!r} appears twice")
    first_sources: dict[tuple[str, float], str] = {}
    for row, source in enumerate(sources):
        place = f"{source}: run {run[row]!r}"
        for name, value in (("n_params", n_params[row]), ("tokens", tokens[row])):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{place}: {name} is {value}, not a positive number")
        for column, names, values in (("ratio", languages, ratios[row]), ("loss", targets, losses[row])):
            if not np.isfinite(values).all():
                raise InputError(f"{place}: the {column} of {names[int(np.argmin(np.isfinite(values)))]!r} is missing")
        if (ratios[row] < 0).any():
            raise InputError(f"{place}: the ratio of {languages[int(np.argmin(ratios[row]))]!r} is negative")
        if abs(ratios[row].sum() - 1) > _SUM_TOLERANCE:
            raise InputError(f"{place}: the ratios sum to {ratios[row].sum():.4f}, not to 1 within {_SUM_TOLERANCE}")
        if (losses[row] <= 0).any():
            raise InputError(f"{place}: the loss of {targets[int(np.argmin(losses[row]))]!r} is not positive")
        key = (str(run[row]), float(tokens[row]))
        if key in first_sources:
            raise InputError(f"{place}: appears twice with {tokens[row]:.0f} tokens ({first_sources[key]} too)")
        first_sources[key] = source
    ratios = ratios / ratios.sum(axis=1, keepdims=True)
    names = np.array([str(name) for name in run])
    return ProxyRuns(tuple(languages), tuple(targets), names, n_params, tokens, ratios, losses)


def outliers(runs: ProxyRuns) -> list[str]:
    """Returns a line for each loss far outside the range of the others, with its run, tokens, target and value.

    A loss is compared with those of the same target in rows that have some of its language, if its row does, else in
    rows that have none. It is far outside if it differs from their median by more than a factor of 3 and, in
    logarithms, by more than 5 standard deviations, estimated from the median absolute deviation. One diverged run moves
    neither.
    """
    lines = []
    for target, has_own, losses in zip(runs.targets, runs.has_own.T, np.log(runs.losses.T)):
        for group in (has_own, ~has_own):
            # With few such rows, all rows are compared.
            others = losses[group] if group.sum() >= _COMPARED_ROWS else losses
            distance = np.abs(losses - np.median(others))
            deviation = 1.4826 * np.median(np.abs(others - np.median(others)))
            for row in np.flatnonzero(group & (distance > max(np.log(3), 5 * deviation))):
                lines.append(f"run {str(runs.run[row])!r} at {runs.tokens[row]:,.0f} tokens: the loss of {target!r} is "
                             f"{runs.losses[row, runs.targets.index(target)]:.4g}, far outside the others' range "
                             f"(median {np.exp(np.median(others)):.4g})")
    return lines


def _read_csv(path: epath.PathLike) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Returns the header and the (line number, row) pairs of a CSV file; raises InputError where a cell is empty."""
    try:
        text = epath.Path(path).read_text()
    except FileNotFoundError:
        raise InputError(f"{path}: no such table of proxy runs") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a CSV file: {error}") from None
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) != len(header):
        raise InputError(f"{path}:1: column {next(n for n in header if header.count(n) > 1)!r} appears twice")
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError(f"{path}:{reader.line_num}: {len(cells)} cells where the header has {len(header)}")
        row = dict(zip(header, (cell.strip() for cell in cells)))
        if empty := [name for name in header if name and not row[name]]:
            raise InputError(f"{path}:{reader.line_num}: no value for {empty[0]!r}")
        rows.append((reader.line_num, row))
    return header, rows


def _number(path: epath.PathLike, line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{path}:{line}: {name} is {text!r}, not a number") from None
    if not math.isfinite(value):
        raise InputError(f"{path}:{line}: {name} is {text}, not a finite number")
    return value


def _numbers(path: epath.PathLike, line: int, row: dict[str, str], columns: Iterable[str]) -> list[float]:
    return [_number(path, line, column, row[column]) for column in columns]


def read_tables(path: epath.PathLike) -> tuple[list[str], list[tuple[epath.Path, int, dict[str, str]]]]:
    """Returns the header and the (file, line number, row) triples of one CSV file in our layout, or of many.

    Args:
      path: a file, a folder (every .csv in it), or a pattern of file names (proxies/mix-*.csv).

    Raises:
      InputError: the file is missing, or the ratio and loss columns of two files differ.
    """
    path = epath.Path(path)
    pattern = any(wildcard in path.name for wildcard in "*?[") and not path.exists()
    paths = [path]
    if pattern or path.is_dir():
        matching = path.parent.glob(path.name) if pattern else path.glob("*.csv")
        paths = sorted(file for file in matching if not file.name.startswith("."))
        if not paths:
            raise InputError(f"{path}: no such table of proxy runs: no CSV file {'matches' if pattern else 'in it'}")
    with concurrent.futures.ThreadPoolExecutor(min(16, len(paths))) as pool:
        tables = list(pool.map(_read_csv, paths))
    header, rows = tables[0][0], []
    for file, (columns, file_rows) in zip(paths, tables):
        if missing := [name for name in ("run", "n_params", "tokens") if name not in columns]:
            raise InputError(f"{file}:1: no column {missing[0]!r}")
        for names, other_names, named_in in ((header, columns, paths[0]), (columns, header, file)):
            if extra := [name for name in names if name.startswith((RATIO, LOSS)) and name not in other_names]:
                raise InputError(f"{file}:1: its columns are not those of {paths[0]}: only {named_in} has {extra[0]!r}")
        rows += [(file, line, row) for line, row in file_rows]
    return header, rows


@gin.configurable
def proxy_runs(path: epath.PathLike = gin.REQUIRED, min_tokens: float = 0) -> ProxyRuns:
    """Reads tables in our layout (written by `data_mixtures.climb.proxies`).

    Args:
      path: the folder of CSV files, one of them, or a pattern of file names; see `read_tables`.
      min_tokens: lowest number of training tokens of a row; rows of fewer are left out: models that have just begun,
        and are still learning how frequent each token is, follow no power law.

    Raises:
      InputError: see `make_runs` and `read_tables`; a cell is no number; `min_tokens` leaves no row.
    """
    header, rows = read_tables(path)
    ratio = [name for name in header if name.startswith(RATIO)]
    loss = [name for name in header if name.startswith(LOSS)]
    values = [_numbers(file, line, row, ["n_params", "tokens", *ratio, *loss]) for file, line, row in rows]
    values = np.array(values).reshape(len(rows), 2 + len(ratio) + len(loss))
    runs = make_runs(
        str(path),
        [name.removeprefix(RATIO) for name in ratio],
        [name.removeprefix(LOSS) for name in loss],
        [row["run"] for _, _, row in rows],
        values[:, 0],
        values[:, 1],
        values[:, 2 : 2 + len(ratio)],
        values[:, 2 + len(ratio) :],
        [f"{file}:{line}" for file, line, _ in rows],
    )
    late = runs.tokens >= min_tokens
    if not late.any():
        raise InputError(f"{path}: no row has min_tokens = {min_tokens:,}; the largest has {runs.tokens.max():,.0f}")
    return runs.rows(late)


def _joined(
    ratios_path: epath.PathLike,
    losses_path: epath.PathLike,
    key: str,
    ratio_name,
    loss_name,
    n_params: float,
    tokens: float,
) -> ProxyRuns:
    """Joins two tables on `key`; `ratio_name` and `loss_name` turn a column's name into a language, or into None."""
    ratio_header, ratio_rows = _read_csv(ratios_path)
    loss_header, loss_rows = _read_csv(losses_path)
    for path, header, rows in ((ratios_path, ratio_header, ratio_rows), (losses_path, loss_header, loss_rows)):
        if key not in header:
            raise InputError(f"{path}:1: no column {key!r}")
        first_lines: dict[str, int] = {}
        for line, row in rows:
            if row[key] in first_lines:
                raise InputError(f"{path}:{line}: {key} {row[key]!r} is on line {first_lines[row[key]]} already")
            first_lines[row[key]] = line
    ratio_columns = {name: ratio_name(name) for name in ratio_header if name != key and ratio_name(name)}
    loss_columns = {name: loss_name(name) for name in loss_header if name != key and loss_name(name)}
    loss_row_of = {row[key]: (line, row) for line, row in loss_rows}
    ratio_keys = {row[key] for _, row in ratio_rows}
    for path, other_path, missing in ((losses_path, ratios_path, ratio_keys - set(loss_row_of)),
                                      (ratios_path, losses_path, set(loss_row_of) - ratio_keys)):
        if missing:
            raise InputError(
                f"{path}: no {key} {sorted(missing)[0]!r}, which {other_path} has ({len(missing)} such rows)")
    ratios = [_numbers(ratios_path, line, row, ratio_columns) for line, row in ratio_rows]
    losses = [_numbers(losses_path, *loss_row_of[row[key]], loss_columns) for _, row in ratio_rows]
    return make_runs(
        str(ratios_path),
        list(ratio_columns.values()),
        list(loss_columns.values()),
        [row[key] for _, row in ratio_rows],
        [n_params] * len(ratio_rows),
        [tokens] * len(ratio_rows),
        np.array(ratios).reshape(len(ratio_rows), len(ratio_columns)),
        np.array(losses).reshape(len(ratio_rows), len(loss_columns)),
        [f"{ratios_path}:{line}" for line, _ in ratio_rows],
    )


@gin.configurable
def olmix_runs(
    ratios: epath.PathLike = gin.REQUIRED,
    metrics: epath.PathLike = gin.REQUIRED,
    n_params: float = gin.REQUIRED,
    tokens: float = gin.REQUIRED,
) -> ProxyRuns:
    """Reads Olmix's pair of files, joined on `run`; columns `name` and `index` are labels and left out.

    Args:
      ratios: path of ratios.csv.
      metrics: path of metrics.csv, which holds losses: lower is better.
      n_params, tokens: N and D of every run, which the files do not hold.

    Raises:
      InputError: see `make_runs`; a run is missing from one of the files or appears twice.
    """
    labels = ("name", "index", "")
    name = lambda column: None if column in labels else column  # noqa: E731
    return _joined(ratios, metrics, "run", name, name, n_params, tokens)


@gin.configurable
def regmix_runs(
    mixtures: epath.PathLike = gin.REQUIRED,
    losses: epath.PathLike = gin.REQUIRED,
    n_params: float = 1e6,
    tokens: float = 1e9,
) -> ProxyRuns:
    """Reads RegMix's pair of files (arXiv 2407.01492), joined on `index`.

    A column `train_<name>` becomes language `<name>`, a column `metric/<name>_val_loss` target `<name>`.

    Args:
      mixtures: path of train_mixture_1m.csv or its like.
      losses: path of train_pile_loss_1m.csv or its like.
      n_params, tokens: N and D of every run, which the files do not hold.

    Raises:
      InputError: see `make_runs`; an index is missing from one of the files or appears twice.
    """
    return _joined(
        mixtures,
        losses,
        "index",
        lambda column: column.removeprefix("train_"),
        lambda column: column.removeprefix("metric/").removesuffix("_val_loss"),
        n_params,
        tokens,
    )
