"""Tables of proxy runs: mixture, model size and token count of each, and the held-out losses it reached.

Our own layout is CSV with a row per (run, checkpoint), in one file or many, such as a file per run:

    run,step,n_params,tokens,ratio/<language>...,loss/<target>...

Tables made elsewhere are read too: Olmix's pair of files, joined on `run`, and RegMix's pair, joined on `index`.
Nothing is dropped silently: a missing cell, a repeated run or ratios that do not sum to 1 end with the file and line.
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

    Attributes:
      languages: names of the ratio columns: what the mixture is made of.
      targets: names of the loss columns; often, but not always, the same.
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

    def rows(self, which: np.ndarray) -> "ProxyRuns":
        """The rows that `which` (a mask or indices) selects."""
        fields = ("run", "n_params", "tokens", "ratios", "losses")
        return dataclasses.replace(self, **{name: getattr(self, name)[which] for name in fields})

    @property
    def own_columns(self) -> np.ndarray:
        """Int `[targets]`: the column of `ratios` with each target's own language; -1 where there is none."""
        return np.array([self.languages.index(t) if t in self.languages else -1 for t in self.targets])

    @property
    def has_own(self) -> np.ndarray:
        """Bool `[rows, targets]`: the run has some of the target's own language, or no column has that language."""
        return np.where(self.own_columns >= 0, self.ratios[:, self.own_columns] > 0, True)

    @property
    def varies(self) -> bool:
        """Whether N or D differ between rows, so that a law can extrapolate in them."""
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
    places: Sequence[str] | None = None,
) -> ProxyRuns:
    """Checks a table and normalises its ratios.

    Args:
      where: names the table in errors.
      languages, targets, run, n_params, tokens, ratios, losses: see `ProxyRuns`.
      places: the file and line each row comes from; None: rows are counted from 1.

    Raises:
      InputError: no rows; a value that is not finite; a negative ratio; ratios whose sum is not within 0.01 of 1; a
        loss, size or token count that is not positive; two rows of the same run and token count; a name twice.
    """
    n_params, tokens = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
    ratios, losses = np.asarray(ratios, np.float64), np.asarray(losses, np.float64)
    places = [f"{where}:{row}" for row in range(1, len(run) + 1)] if places is None else places
    if not len(run):
        raise InputError(f"{where}: no runs")
    for kind, names in (("ratio", languages), ("loss", targets)):
        if not names:
            raise InputError(f"{where}: no {kind} columns")
        if repeated := sorted({name for name in names if list(names).count(name) > 1}):
            raise InputError(f"{where}: {kind} column {repeated[0]!r} stands twice")
    seen: dict[tuple[str, float], str] = {}
    for row, source in enumerate(places):
        place = f"{source}: run {run[row]!r}"
        for name, value in (("n_params", n_params[row]), ("tokens", tokens[row])):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{place}: {name} is {value}, not a positive number")
        for kind, names, values in (("ratio", languages, ratios[row]), ("loss", targets, losses[row])):
            if not np.isfinite(values).all():
                raise InputError(f"{place}: the {kind} of {names[int(np.argmin(np.isfinite(values)))]!r} is missing")
        if (ratios[row] < 0).any():
            raise InputError(f"{place}: the ratio of {languages[int(np.argmin(ratios[row]))]!r} is negative")
        if abs(ratios[row].sum() - 1) > _SUM_TOLERANCE:
            raise InputError(f"{place}: the ratios sum to {ratios[row].sum():.4f}, not to 1 within {_SUM_TOLERANCE}")
        if (losses[row] <= 0).any():
            raise InputError(f"{place}: the loss of {targets[int(np.argmin(losses[row]))]!r} is not positive")
        key = (str(run[row]), float(tokens[row]))
        if key in seen:
            raise InputError(f"{place}: stands twice with {tokens[row]:.0f} tokens ({seen[key]} too)")
        seen[key] = source
    ratios = ratios / ratios.sum(axis=1, keepdims=True)
    names = np.array([str(name) for name in run])
    return ProxyRuns(tuple(languages), tuple(targets), names, n_params, tokens, ratios, losses)


def outliers(runs: ProxyRuns) -> list[str]:
    """Rows whose loss is far outside the range of the others, each with its run, tokens, target and loss.

    A loss is compared with those of the same target in rows that have some of its language, or none, as it does: it is
    far outside where it is more than 3 times as large or as small as their median, and further from it, in logarithms,
    than 5 standard deviations as the median absolute deviation tells them. One diverged run does not move either.
    """
    found = []
    for target, has_own, losses in zip(runs.targets, runs.has_own.T, np.log(runs.losses.T)):
        for group in (has_own, ~has_own):
            # Where few rows compare, all do.
            others = losses[group] if group.sum() >= _COMPARED_ROWS else losses
            distance = np.abs(losses - np.median(others))
            deviation = 1.4826 * np.median(np.abs(others - np.median(others)))
            for row in np.flatnonzero(group & (distance > max(np.log(3), 5 * deviation))):
                found.append(f"run {str(runs.run[row])!r} at {runs.tokens[row]:,.0f} tokens: the loss of {target!r} is "
                             f"{runs.losses[row, runs.targets.index(target)]:.4g}, far outside the others' range "
                             f"(median {np.exp(np.median(others)):.4g})")
    return found


def _read_csv(path: epath.PathLike) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header and (line number, row) of a CSV file; every row has a non-empty cell in every named column."""
    try:
        text = epath.Path(path).read_text()
    except FileNotFoundError:
        raise InputError(f"{path}: no such table of proxy runs") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a CSV file: {error}") from None
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) != len(header):
        raise InputError(f"{path}:1: column {next(n for n in header if header.count(n) > 1)!r} stands twice")
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
    """Header and (file, line number, row) of a CSV file in our layout, or of many.

    Args:
      path: a file, a folder (every .csv in it), or a pattern of file names (proxies/mix-*.csv).

    Raises:
      InputError: there is no such file; one has not the ratio and loss columns of the others.
    """
    path = epath.Path(path)
    pattern = any(wildcard in path.name for wildcard in "*?[") and not path.exists()
    paths = [path]
    if pattern or path.is_dir():
        found = path.parent.glob(path.name) if pattern else path.glob("*.csv")
        paths = sorted(each for each in found if not each.name.startswith("."))
        if not paths:
            raise InputError(f"{path}: no such table of proxy runs: no CSV file {'matches' if pattern else 'in it'}")
    with concurrent.futures.ThreadPoolExecutor(min(16, len(paths))) as pool:
        tables = list(pool.map(_read_csv, paths))
    header, rows = tables[0][0], []
    for file, (columns, read) in zip(paths, tables):
        if missing := [name for name in ("run", "n_params", "tokens") if name not in columns]:
            raise InputError(f"{file}:1: no column {missing[0]!r}")
        for one, other, there in ((header, columns, paths[0]), (columns, header, file)):
            if differ := [name for name in one if name.startswith((RATIO, LOSS)) and name not in other]:
                raise InputError(f"{file}:1: its columns are not those of {paths[0]}: only {there} has {differ[0]!r}")
        rows += [(file, line, row) for line, row in read]
    return header, rows


@gin.configurable
def proxy_runs(path: epath.PathLike = gin.REQUIRED, min_tokens: float = 0) -> ProxyRuns:
    """Reads tables in our layout (written by `data_mixtures.climb.proxies`).

    Args:
      path: the folder of CSV files, one of them, or a pattern of file names; see `read_tables`.
      min_tokens: rows of fewer training tokens are left out: models that have just begun, and are still learning how
        frequent each token is, follow no power law.

    Raises:
      InputError: see `make_runs` and `read_tables`; a column is missing or a cell is empty or no number; `min_tokens`
        leaves no row.
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
        raise InputError(f"{path}: no row has min_tokens={min_tokens:,}; the most are {runs.tokens.max():,.0f}")
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
    """Joins two tables on `key`; `ratio_name` and `loss_name` turn a column's name into a language, or None."""
    ratio_header, ratio_rows = _read_csv(ratios_path)
    loss_header, loss_rows = _read_csv(losses_path)
    for path, header, rows in ((ratios_path, ratio_header, ratio_rows), (losses_path, loss_header, loss_rows)):
        if key not in header:
            raise InputError(f"{path}:1: no column {key!r}")
        seen: dict[str, int] = {}
        for line, row in rows:
            if row[key] in seen:
                raise InputError(f"{path}:{line}: {key} {row[key]!r} stands on line {seen[row[key]]} already")
            seen[row[key]] = line
    ratio_columns = {name: ratio_name(name) for name in ratio_header if name != key and ratio_name(name)}
    loss_columns = {name: loss_name(name) for name in loss_header if name != key and loss_name(name)}
    measured = {row[key]: (line, row) for line, row in loss_rows}
    mixed = {row[key] for _, row in ratio_rows}
    for path, other, keys in ((losses_path, ratios_path, mixed - set(measured)),
                              (ratios_path, losses_path, set(measured) - mixed)):
        if keys:
            raise InputError(f"{path}: no {key} {sorted(keys)[0]!r}, which {other} has ({len(keys)} such rows)")
    ratios = [_numbers(ratios_path, line, row, ratio_columns) for line, row in ratio_rows]
    losses = [_numbers(losses_path, *measured[row[key]], loss_columns) for _, row in ratio_rows]
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
      ratios: ratios.csv.
      metrics: metrics.csv: losses, lower is better.
      n_params, tokens: of every run; the files do not say.

    Raises:
      InputError: see `make_runs`; a run stands in one of the files only, or twice.
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

    `train_<name>` in the one and `metric/<name>_val_loss` in the other become language and target `<name>`.

    Args:
      mixtures: train_mixture_1m.csv or its like.
      losses: train_pile_loss_1m.csv or its like.
      n_params, tokens: of every run; the files do not say.

    Raises:
      InputError: see `make_runs`; an index stands in one of the files only, or twice.
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
