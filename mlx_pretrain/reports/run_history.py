"""What a pretraining run left in its folder, checked and summed up.

    run.json       what was run: version, started (ISO), device, command, model, parameters, sequence_length,
                   batch_size (sequences per step), steps, rates, train_sequences, token_store, tokenizer_sha256, seed;
                   changes, optional: what was changed when the run went on, see `data.loader.Mixture`
    metrics.jsonl  one object per line, with step, "kind" "train", "eval" or "tasks", time (Unix seconds); null is not
                   finite
                   train: loss (nats/token), learning_rate, grad_norm, tokens_per_s, mfu (0 to 1),
                     seconds/step, seconds/data (the part of it spent waiting for data), seconds/checkpoint and
                     seconds/eval (beside it), means per step since the line before, tokens/<language> delivered so far
                   eval: loss, bits_per_byte (mean over languages), loss/<language>, bits_per_byte/<language>
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
class History:
    """metrics.jsonl in order of steps, without what a restart did over.

    Attributes:
      train, evals, tasks: the lines of each kind, steps increasing; tasks may be empty, as evals.
    """

    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]


def read_history(path: epath.Path) -> History:
    """Reads metrics.jsonl. Raises InputError naming the line when it is malformed, or has no training step."""
    kinds: dict[str, list] = {"train": [], "eval": [], "tasks": []}
    for number, line in read_jsonl(path):
        if (kind := line.get("kind")) not in kinds:
            continue
        for name, value in line.items():
            if _METRIC.fullmatch(name) and not isinstance(value, int | float | None):
                raise InputError(f"{path}:{number}: {name!r} is {value!r}, not a number")
        line = {name: math.nan if value is None else value for name, value in line.items()}
        if not isinstance(line.get("step"), int) or ("loss" not in line and kind != "tasks"):
            raise InputError(f"{path}:{number}: a {kind} line needs an integer 'step' and a 'loss'")
        # After a restart from a checkpoint the steps since then come again: the later line counts.
        for name, lines in kinds.items():
            while lines and (lines[-1]["step"] > line["step"] or (name == kind and lines[-1]["step"] == line["step"])):
                lines.pop()
        kinds[kind].append(line)
    if not kinds["train"]:
        raise InputError(f"{path}: no training step recorded yet")
    return History(kinds["train"], kinds["eval"], kinds["tasks"])


def read_run(path: epath.Path) -> dict[str, Any]:
    """Reads run.json. Raises InputError naming it when it is missing, malformed or lacks what the report needs."""
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
    for name in ("version", "started", "device", "command", "token_store", "tokenizer_sha256", "seed"):
        facts.setdefault(name, None)
    return {**facts, "rates": normalise_rates(facts["rates"], str(path))}


def _change(where: str, change: Any) -> dict[str, Any]:
    """A checked change of a run. One of the rates has "rates" and "sequences"; earlier versions did not record them."""
    if not isinstance(change, dict) or not isinstance(change.get("step"), int):
        raise InputError(f"{where}: {change!r} is no object with a 'step'")
    if "rates" not in change:
        return change
    if not isinstance(change["rates"], dict) or not isinstance(change.get("sequences"), int):
        raise InputError(f"{where}: after step {change['step']}: no 'rates' object, or no count of 'sequences'")
    return {**change, "rates": normalise_rates(change["rates"], f"{where}: after step {change['step']}")}


def read_samples(path: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """language -> samples of samples.jsonl; empty without that file. Raises InputError when it is malformed."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for number, line in read_jsonl(path) if path.exists() else []:
        for name in ("language", "prompt", "completion"):
            if not isinstance(line.get(name), str):
                raise InputError(f"{path}:{number}: a sample needs the text {name!r}")
        samples.setdefault(line["language"], []).append(line)
    return samples


def column(lines: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """One metric over lines, NaN where it is absent: float64 [n_lines]."""
    return np.array([line.get(name, np.nan) for line in lines], np.float64)


def parts_of_time(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Seconds per step, float64 [n_lines] each; parts that were never recorded count 0."""
    step, data, checkpoint, evaluation = (
        np.nan_to_num(column(lines, f"seconds/{name}")) for name in ("step", "data", "checkpoint", "eval"))
    return {"compute": step - data, "data": data, "checkpoint": checkpoint, "eval": evaluation}


def per_language(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The per-language values of a metric: "loss/en" of prefix "loss" under "en"."""
    return {name[len(prefix) + 1 :]: value for name, value in line.items() if name.startswith(f"{prefix}/")}


def mean_bits(line: Mapping[str, Any]) -> float | None:
    """Bits per byte of an eval line, every language counting the same; None when it has none."""
    values = list(per_language(line, "bits_per_byte").values())
    return line.get("bits_per_byte", statistics.fmean(values) if values else None)


@dataclasses.dataclass(frozen=True)
class Language:
    """One language's line of the report; None where the run recorded nothing.

    Attributes:
      asked, delivered: share of the training tokens over the whole run, 0 to 1.
      tokens: tokens delivered.
      epochs: tokens delivered over tokens of unique text.
      loss, bits: (before, after) training; nats per token, bits per byte.
    """

    code: str
    asked: float
    delivered: float | None
    tokens: int | None
    epochs: float | None
    loss: tuple[float | None, float | None]
    bits: tuple[float | None, float | None]

    @property
    def native(self) -> str:
        return LANGUAGES.get(self.code, (self.code,))[0]

    @property
    def english(self) -> str:
        return LANGUAGES.get(self.code, (self.code,))[-1]

    @property
    def group(self) -> int:
        """Key of GROUPS."""
        letters = [len(letter.encode()) for letter in self.native if letter.isalpha()]
        return int(statistics.median_low(letters)) if self.code in LANGUAGES else 0

    @property
    def measured(self) -> bool:
        return any(value is not None for value in self.bits)

    @property
    def change(self) -> float | None:
        """Bits per byte after over before, minus 1; None when one is missing."""
        before, after = self.bits
        return after / before - 1 if before and after is not None else None

    @property
    def label(self) -> str:
        """The code in characters that the plots' font has."""
        return self.code.encode("ascii", "replace").decode()


class Summary:
    """The run in numbers.

    Attributes:
      tokens: tokens delivered in all.
      before, after: the eval lines the comparison is between, each None when there is none.
      languages: lowest final bits per byte first, then by share asked for.
      deviation: (language, delivered minus asked share, the same in sequences), the largest; None without counts.
      wall_s: seconds from the start to the last line, pauses included; None when unknown.
      training_s: seconds in training steps; None when unknown.
      tokens_per_s, mfu: medians over the run; None when unknown.
      changed: steps after which the rates were changed.
      unrecorded: the same, where an earlier version changed them, which did not record the former rates; they count as
        if they had been the later ones.
      time_shares: part of `parts_of_time` -> share of the time of all; empty when unknown.
    """

    def __init__(self, facts: Mapping[str, Any], history: History):
        """`facts` and `history` as `read_run` and `read_history` return them."""
        self._facts, self._history = facts, history
        per_step = facts["batch_size"] * facts["sequence_length"]
        delivered = [sum(per_language(line, "tokens").values()) or line["step"] * per_step for line in history.train]
        self._steps = np.array([0, *(line["step"] for line in history.train)], np.float64)
        self._tokens = np.array([0, *delivered], np.float64)
        self.tokens = int(delivered[-1])
        evals = history.evals
        self.before = evals[0] if len(evals) > 1 or (evals and evals[0]["step"] == 0) else None
        self.after = evals[-1] if evals and evals[-1]["step"] > 0 else None
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
        """Tokens delivered after each of `steps`: float64 [n]."""
        return np.interp(steps, self._steps, self._tokens)

    def _asked(self) -> dict[str, float]:
        """language -> share asked for over the whole run: the rates of its sections, weighted by their tokens."""
        ends = [(change["sequences"] * self._facts["sequence_length"], change["rates"])
                for change in self._facts["changes"] if "rates" in change]
        asked, start = collections.Counter(), 0
        for end, rates in (*ends, (self.tokens, self._facts["rates"])):
            end = min(end, self.tokens)  # the last steps before a change may have no line yet
            for language, rate in rates.items():
                asked[language] += rate * (end - start)
            start = end
        return {language: amount / self.tokens for language, amount in asked.items()}

    def _languages(self) -> list[Language]:
        asked, length = self._asked(), self._facts["sequence_length"]
        tokens = per_language(self._history.train[-1], "tokens")
        ends = [line or {} for line in (self.before, self.after)]
        measured = [code for line in ends for code in per_language(line, "bits_per_byte")]
        found = []
        for code in dict.fromkeys([*asked, *tokens, *measured]):
            seen, unique = tokens.get(code), self._facts["train_sequences"].get(code, 0) * length
            found.append(Language(
                code=code, asked=asked.get(code, 0.0), tokens=seen,
                delivered=None if seen is None or not self.tokens else seen / self.tokens,
                epochs=None if seen is None or not unique else seen / unique,
                loss=tuple(line.get(f"loss/{code}") for line in ends),
                bits=tuple(line.get(f"bits_per_byte/{code}") for line in ends)))

        def order(language: Language) -> tuple:
            final = next((v for v in reversed(language.bits) if v is not None and math.isfinite(v)), math.inf)
            return final, -language.asked, language.code

        return sorted(found, key=order)

    def _deviation(self) -> tuple[Language, float, float] | None:
        counted = [language for language in self.languages if language.delivered is not None]
        if len(counted) < 2:
            return None
        worst = max(counted, key=lambda language: abs(language.delivered - language.asked))
        difference = worst.delivered - worst.asked
        return worst, difference, difference * self.tokens / self._facts["sequence_length"]

    def _wall_s(self) -> float | None:
        times = [line["time"] for line in (*self._history.train, *self._history.evals) if "time" in line]
        if not times:
            return None
        # A run that was resumed may have started long before the start written down last.
        started = parse_time(self._facts["started"])
        return max(times) - min(times + ([started.timestamp()] if started else []))


def parse_time(text: str | None) -> datetime.datetime | None:
    """An ISO date and time, in UTC when it names no zone; None when it is not one."""
    try:
        time = datetime.datetime.fromisoformat(text or "")
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
