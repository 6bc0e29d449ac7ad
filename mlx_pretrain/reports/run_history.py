"""The records of a pretraining run in its folder, checked and summed up.

    run.json       the run: version, started (ISO), device, command, model, parameters, sequence_length,
                   batch_size (sequences per step), steps, rates, train_sequences, token_store, tokenizer_sha256, seed;
                   changes, optional: settings that were changed when the run was resumed, see `data.loader`;
                   stopped, optional: step and reason of the stop rule that ended the run
    metrics.jsonl  one object per line, with step, "kind" ("train", "eval", "eval_ema" or "tasks"), time (Unix seconds);
                   null stands for a number that is not finite
                   train: loss (nats/token), learning_rate, grad_norm, tokens_per_s, mfu (0 to 1),
                     seconds/step, seconds/data (the part of it spent waiting for data), seconds/checkpoint and
                     seconds/eval (in addition to it), means per step since the line before; tokens/<language> so far
                   eval: loss, bits_per_byte (mean over languages), loss/<language>, bits_per_byte/<language>
                   eval_ema: the same of the average of the weights
    samples.jsonl  optional; per line language, prompt, completion, temperature, top_p
"""

import collections
import dataclasses
import datetime
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlx_pretrain.data.rates import normalise_rates
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, read_jsonl
from mlx_pretrain.languages import LANGUAGES

_METRIC = re.compile(
    "(loss|bits_per_byte|tokens|seconds)/.*|.*/(acc|acc_norm|mlc|chance)(/.*)?|loss|bits_per_byte|time|learning_rate|grad_norm|tokens_per_s|mfu"
)


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """The lines of metrics.jsonl in order of steps; of steps repeated after a restart the last.

    Attributes:
      train: lines of training steps, at least one.
      evals: lines of evaluations on held-out text.
      averages: such lines of the average of the weights.
      tasks: lines of evaluations on tasks.
    """

    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    averages: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]


def read_history(path: epath.Path) -> RunHistory:
    """Reads metrics.jsonl.

    Raises:
      InputError: a line, which the message names, is malformed, or none is a training step.
    """
    by_event: dict[str, list] = {"train": [], "eval": [], "eval_ema": [], "tasks": []}
    for number, line in read_jsonl(path):
        if (event := line.get("kind")) not in by_event:
            continue
        for name, value in line.items():
            if _METRIC.fullmatch(name) and not isinstance(value, int | float | None):
                raise InputError(f"{path}:{number}: {name!r} is {value!r}, not a number")
        line = {name: math.nan if value is None else value for name, value in line.items()}
        if not isinstance(line.get("step"), int) or ("loss" not in line and event != "tasks"):
            raise InputError(f"{path}:{number}: a {event} line needs an integer 'step' and a 'loss'")
        # After a restart from a checkpoint the steps since then come again, and the later line counts.
        for name, lines in by_event.items():
            while lines and (lines[-1]["step"] > line["step"] or (name == event and lines[-1]["step"] == line["step"])):
                lines.pop()
        by_event[event].append(line)
    if not by_event["train"]:
        raise InputError(f"{path}: no training step recorded yet")
    return RunHistory(by_event["train"], by_event["eval"], by_event["eval_ema"], by_event["tasks"])


def read_run(path: epath.Path) -> dict[str, Any]:
    """Reads run.json.

    Raises:
      InputError: the file is missing or malformed, or lacks a field that the report needs.
    """
    facts = read_json(path, "description of a run")
    if not isinstance(facts, dict):
        raise InputError(f"{path}: not a JSON object")
    for name in ("parameters", "sequence_length", "batch_size", "steps"):
        if isinstance(facts.get(name), bool) or not isinstance(facts.get(name), int) or facts[name] <= 0:
            raise InputError(f"{path}: {name!r} is {facts.get(name)!r}, not a positive integer")
    for name in ("model", "rates", "train_sequences"):
        if not isinstance(facts.get(name), dict):
            raise InputError(f"{path}: {name!r} is {facts.get(name)!r}, not an object")
    for name, count in facts["train_sequences"].items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise InputError(f"{path}: train_sequences of {name!r} is {count!r}, not a count")
    facts["changes"] = [_change(f"{path}: 'changes'", change) for change in facts.get("changes") or ()]
    stopped = facts.setdefault("stopped", None)
    if stopped is not None and not (isinstance(stopped, dict) and isinstance(stopped.get("step"), int)
                                    and isinstance(stopped.get("reason"), str)):
        raise InputError(f"{path}: 'stopped' is {stopped!r}, no object with 'step' and 'reason'")
    for name in ("version", "started", "device", "command", "token_store", "tokenizer_sha256", "seed"):
        facts.setdefault(name, None)
    return {**facts, "rates": normalise_rates(facts["rates"], str(path))}


def _change(where: str, change: Any) -> dict[str, Any]:
    """Checks a change of a run; earlier versions recorded no "rates" and "sequences" for a change of the rates."""
    if not isinstance(change, dict) or not isinstance(change.get("step"), int):
        raise InputError(f"{where}: {change!r} is no object with a 'step'")
    if "rates" not in change:
        return change
    if not isinstance(change["rates"], dict) or not isinstance(change.get("sequences"), int):
        raise InputError(f"{where}: after step {change['step']}: no 'rates' object, or no count of 'sequences'")
    return {**change, "rates": normalise_rates(change["rates"], f"{where}: after step {change['step']}")}


def read_samples(path: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """Returns language -> samples of samples.jsonl; empty without the file. Raises InputError if it is malformed."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for number, line in read_jsonl(path) if path.exists() else []:
        for name in ("language", "prompt", "completion"):
            if not isinstance(line.get(name), str):
                raise InputError(f"{path}:{number}: a sample needs the text {name!r}")
        samples.setdefault(line["language"], []).append(line)
    return samples


def column(lines: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """Returns one metric over lines, NaN where it is absent: float64 [n_lines]."""
    return np.array([line.get(name, np.nan) for line in lines], np.float64)


def parts_of_time(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns part of the work -> seconds per step, float64 [n_lines]; parts that were never recorded count 0."""
    step, data, checkpoint, evaluation = (
        np.nan_to_num(column(lines, f"seconds/{name}")) for name in ("step", "data", "checkpoint", "eval"))
    return {"compute": step - data, "data": data, "checkpoint": checkpoint, "eval": evaluation}


def per_language(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns language -> value of a metric, e.g. "en" -> the value of "loss/en" for the prefix "loss"."""
    return {name[len(prefix) + 1 :]: value for name, value in line.items() if name.startswith(f"{prefix}/")}


def mean_bits(line: Mapping[str, Any]) -> float | None:
    """Returns the bits per byte of an eval line, the unweighted mean over languages; None if it has none."""
    values = list(per_language(line, "bits_per_byte").values())
    return line.get("bits_per_byte", statistics.fmean(values) if values else None)


@dataclasses.dataclass(frozen=True)
class LanguageSummary:
    """One language's line of the report; None for numbers that the run did not record.

    Attributes:
      code: its code.
      target_share, actual_share: share of the training tokens over the whole run, 0 to 1, set by the rates and read.
      tokens: tokens read.
      epochs: tokens read over tokens of unique text.
      loss, bits: (before, after) training; nats per token, bits per byte.
    """

    code: str
    target_share: float
    actual_share: float | None
    tokens: int | None
    epochs: float | None
    loss: tuple[float | None, float | None]
    bits: tuple[float | None, float | None]

    @property
    def native(self) -> str:
        """Name of the language in itself."""
        return LANGUAGES.get(self.code, (self.code,))[0]

    @property
    def english(self) -> str:
        """English name of the language."""
        return LANGUAGES.get(self.code, (self.code,))[-1]

    @property
    def group(self) -> int:
        """Key of GROUPS."""
        letters = [len(letter.encode()) for letter in self.native if letter.isalpha()]
        return int(statistics.median_low(letters)) if self.code in LANGUAGES else 0

    @property
    def measured(self) -> bool:
        """True if the run evaluated it."""
        return any(value is not None for value in self.bits)

    @property
    def change(self) -> float | None:
        """Bits per byte after training over before, minus 1; None if one is missing."""
        before, after = self.bits
        return after / before - 1 if before and after is not None else None

    @property
    def label(self) -> str:
        """The code in characters that the plots' font has."""
        return self.code.encode("ascii", "replace").decode()


class RunSummary:
    """The numbers of a run.

    Args:
      facts: the run, see `read_run`.
      history: its metrics, see `read_history`.

    Attributes:
      tokens: training tokens in all.
      before, after: eval lines that are compared; None without any.
      average: the last eval and eval_ema lines of one step; None if there are none.
      languages: lowest final bits per byte first, then by target share.
      deviation: largest deviation: (language, actual minus target share, the same in sequences); None without counts.
      wall_s: seconds from the start to the last line, pauses included; None if unknown.
      training_s: seconds in training steps; None if unknown.
      tokens_per_s, mfu: medians over the run; None if unknown.
      changed: steps after which the rates were changed.
      unrecorded: steps after which an earlier version changed the rates without a record of the former ones, which the
        target shares leave out.
      time_shares: part of `parts_of_time` -> share of the time of all parts; empty if unknown.
    """

    def __init__(self, facts: Mapping[str, Any], history: RunHistory):
        self._facts, self._history = facts, history
        per_step = facts["batch_size"] * facts["sequence_length"]
        totals = [sum(per_language(line, "tokens").values()) or line["step"] * per_step for line in history.train]
        self._steps = np.array([0, *(line["step"] for line in history.train)], np.float64)
        self._tokens = np.array([0, *totals], np.float64)
        self.tokens = int(totals[-1])
        evals = history.evals
        self.before = evals[0] if len(evals) > 1 or (evals and evals[0]["step"] == 0) else None
        self.after = evals[-1] if evals and evals[-1]["step"] > 0 else None
        by_step = {line["step"]: line for line in evals}
        pairs = [(by_step[line["step"]], line) for line in history.averages if line["step"] in by_step]
        self.average = pairs[-1] if pairs else None
        self.changed = [change["step"] for change in facts["changes"] if "rates" in change]
        self.unrecorded = [change["step"] for change in facts["changes"]
                           if "rates" not in change and str(change.get("change")).startswith("rates ")]
        self.languages = self._languages()
        self.deviation = self._deviation()
        self.wall_s = self._wall_s()
        speed = column(history.train, "tokens_per_s")
        usable = np.isfinite(speed) & (speed > 0)
        self.training_s = float(np.sum(np.diff(self._tokens)[usable] / speed[usable])) or None
        self.tokens_per_s = float(np.median(speed[usable])) if usable.any() else None
        mfu = column(history.train, "mfu")
        self.mfu = float(np.nanmedian(mfu)) if np.isfinite(mfu).any() else None
        seconds = {name: float(values @ np.diff(self._steps)) for name, values in parts_of_time(history.train).items()}
        total = sum(seconds.values())
        self.time_shares = {name: value / total for name, value in seconds.items()} if total > 0 else {}

    def tokens_at(self, steps: Sequence[float] | np.ndarray) -> np.ndarray:
        """Returns the training tokens after each of `steps`: float64 [n]."""
        return np.interp(steps, self._steps, self._tokens)

    def _target_shares(self) -> dict[str, float]:
        """Returns language -> target share over the whole run: the rates of its sections, weighted by their tokens."""
        ends = [(change["sequences"] * self._facts["sequence_length"], change["rates"])
                for change in self._facts["changes"] if "rates" in change]
        amounts, start = collections.Counter(), 0
        for end, rates in (*ends, (self.tokens, self._facts["rates"])):
            end = min(end, self.tokens)  # the last steps before a change may have no line yet
            for language, rate in rates.items():
                amounts[language] += rate * (end - start)
            start = end
        return {language: amount / self.tokens for language, amount in amounts.items()}

    def _languages(self) -> list[LanguageSummary]:
        targets, length = self._target_shares(), self._facts["sequence_length"]
        tokens = per_language(self._history.train[-1], "tokens")
        ends = [line or {} for line in (self.before, self.after)]
        measured = [code for line in ends for code in per_language(line, "bits_per_byte")]
        summaries = []
        for code in dict.fromkeys([*targets, *tokens, *measured]):
            seen, unique = tokens.get(code), self._facts["train_sequences"].get(code, 0) * length
            summaries.append(LanguageSummary(
                code=code, target_share=targets.get(code, 0.0), tokens=seen,
                actual_share=None if seen is None or not self.tokens else seen / self.tokens,
                epochs=None if seen is None or not unique else seen / unique,
                loss=tuple(line.get(f"loss/{code}") for line in ends),
                bits=tuple(line.get(f"bits_per_byte/{code}") for line in ends)))

        def order(language: LanguageSummary) -> tuple:
            final = next((v for v in reversed(language.bits) if v is not None and math.isfinite(v)), math.inf)
            return final, -language.target_share, language.code

        return sorted(summaries, key=order)

    def _deviation(self) -> tuple[LanguageSummary, float, float] | None:
        counted = [language for language in self.languages if language.actual_share is not None]
        if len(counted) < 2:
            return None
        worst = max(counted, key=lambda language: abs(language.actual_share - language.target_share))
        difference = worst.actual_share - worst.target_share
        return worst, difference, difference * self.tokens / self._facts["sequence_length"]

    def _wall_s(self) -> float | None:
        times = [line["time"] for line in (*self._history.train, *self._history.evals) if "time" in line]
        if not times:
            return None
        # A resumed run may have started long before the start in run.json, which is that of the last process.
        started = parse_time(self._facts["started"])
        return max(times) - min(times + ([started.timestamp()] if started else []))


def parse_time(text: str | None) -> datetime.datetime | None:
    """Parses an ISO date and time, in UTC if it names no zone; None for other texts."""
    try:
        time = datetime.datetime.fromisoformat(text or "")
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
