"""From a table of proxy runs to rates: `python -m data_mixtures.climb.allocate --gin_file=...`.

    FOLDER/rates.json              the recommended mixture, for the SeqIO mixture and the token loader
    FOLDER/methods/<method>.json   the same file for every method: solvers and baselines
    FOLDER/allocation.json         all of it with the evidence; `data_mixtures.climb.report` shows it

Losses in all of them are what the recommended law predicts, so that methods can be compared.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import numpy as np
from etils import epath

from data_mixtures.baselines import temperature_rates, unimax_rates
from data_mixtures.climb import ALLOCATION_FORMAT, ALLOCATION_VERSION, solve
from data_mixtures.climb.constraints import Constraints
from data_mixtures.climb.laws import LAWS, default_law
from data_mixtures.climb.laws.base import FittedEffectiveLaw, FittedLaw, Law, float64
from data_mixtures.climb.laws.parametric import FittedEffectiveFormula, FittedFormula
from data_mixtures.climb.proxy_table import ProxyRuns, outliers
from data_mixtures.climb.validation import CrossValidation, cross_validate, measured_effective_ratios
from mlx_pretrain import __version__
from mlx_pretrain.command_line import run
from mlx_pretrain.data.rates import save_rates
from mlx_pretrain.data.token_store import TokenStore
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import read_json, write_json

_INTERVAL = (0.05, 0.95)
_WEIGHTS = ("reference", "natural", "uniform")


@gin.configurable("allocate")
@dataclasses.dataclass(frozen=True)
class AllocateConfig:
    """What to decide, from what.

    Attributes:
      runs: the table, e.g. @proxy_runs(), @regmix_runs() or @olmix_runs().
      output: folder for the results.
      n_params: parameters N of the model to pretrain.
      tokens: its training tokens D.
      token_store: store whose training tokens are the natural ratios and the unique text; or `unique_tokens`.
      unique_tokens: language -> tokens of text there are, in place of a store.
      law: a law, e.g. @Climb(); None: the default for the table (`laws.default_law`).
      weights: of the losses to minimise: "reference" (1 / loss at the natural mixture, so that the mean ratio of losses
        is minimised), "natural", "uniform", or language -> weight.
      floor: least ratio, for all or language -> ratio.
      max_epochs: most often that a text may be repeated.
      fixed: language -> ratio it must have.
      solver: of the recommended mixture: "joint", or "two-step" for laws with effective ratios (then both are solved).
      compared: laws that are cross-validated beside the recommended one, and whose mixtures are given where they are
        baselines of the paper or of RegMix.
      temperature: of the temperature baseline.
      replicates: of the law, behind the intervals (see `FittedLaw.replicates`); 0: no intervals.
      folds: of the cross-validation, by run.
      seed: of everything drawn.
      allow_poor_law: writes the recommendation of a law that predicts held-out runs worse than their mean does, and
        notes it; otherwise that is an error and nothing is written.
    """

    runs: ProxyRuns = gin.REQUIRED
    output: str = gin.REQUIRED
    n_params: float = gin.REQUIRED
    tokens: float = gin.REQUIRED
    token_store: str | None = None
    unique_tokens: Mapping[str, float] | None = None
    law: Law | None = None
    weights: str | Mapping[str, float] = "reference"
    floor: float | Mapping[str, float] = 0.0
    max_epochs: float | None = None
    fixed: Mapping[str, float] | None = None
    solver: str = "joint"
    compared: Sequence[str] = ("isolated", "msl", "mixing_law", "lightgbm")
    temperature: float = 3.33
    replicates: int = 100
    folds: int = 5
    seed: int = 0
    allow_poor_law: bool = False

    def __post_init__(self):
        if not isinstance(self.runs, ProxyRuns):
            raise InputError(f"allocate.runs = {self.runs!r}: must be a table, e.g. @proxy_runs()")
        for name in ("n_params", "tokens"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"allocate.{name} = {value!r}: must be a positive number")
        if self.solver not in ("two-step", "joint"):
            raise InputError(f"allocate.solver = {self.solver!r}: must be 'two-step' or 'joint'")
        if isinstance(self.weights, str) and self.weights not in _WEIGHTS:
            raise InputError(f"allocate.weights = {self.weights!r}: not one of {', '.join(_WEIGHTS)}, nor a mapping")
        if self.token_store is not None and self.unique_tokens is not None:
            raise InputError("allocate: token_store and unique_tokens say the same; give one of them")
        if unknown := [name for name in self.compared if name not in LAWS]:
            raise InputError(f"allocate.compared: no law {unknown[0]!r}; there is {', '.join(LAWS)}")


class Allocator:
    """Fits, solves, compares."""

    def __init__(self, config: AllocateConfig):
        """Fits the recommended law.

        Raises:
          InputError: the table and the text do not fit each other, or the law cannot be fitted.
        """
        self.config, self.runs = config, config.runs
        if unseen := [l for l, ratios in zip(self.runs.languages, self.runs.ratios.T) if not ratios.any()]:
            raise InputError(f"allocate.runs: no run has any {', '.join(unseen)}: nothing says what a share is worth")
        self.unique = _unique_tokens(config)
        self.law = config.law or default_law(self.runs)
        self.constraints = Constraints(config.floor, config.max_epochs, self.unique, config.fixed)
        self.constraints.bounds(self.runs.languages, config.tokens)  # says early what is infeasible
        weights = self._given_weights()
        self.fitted = self.law.fit(self.runs, config.seed)
        self.replicates = self.fitted.replicates(self.runs, config.replicates, config.seed) if config.replicates else ()
        if weights is None:
            weights = solve.reference_weights(self.fitted, config.n_params, config.tokens, self.unique)
        self.weights = weights / weights.sum()  # [targets]

    def _given_weights(self) -> np.ndarray | None:
        """`[targets]`; None for those that follow from the fitted law."""
        weights, targets = self.config.weights, self.runs.targets
        if isinstance(weights, Mapping):
            if differ := sorted(set(weights) ^ set(targets)):
                raise InputError(f"allocate.weights: {', '.join(differ)} stand in the weights or the table's losses, "
                                 "not in both")
            return np.array([weights[target] for target in targets], np.float64)
        if weights == "reference":
            return None
        if weights == "uniform":
            return np.ones(len(targets))
        if self.unique is None or not set(targets) <= set(self.unique):
            raise InputError("allocate.weights = 'natural' needs the tokens of every target's text: "
                             "allocate.token_store or allocate.unique_tokens")
        return np.array([self.unique[target] for target in targets], np.float64)

    def solved(self, fitted: FittedLaw, solver: str = "joint") -> solve.Allocation:
        """The best mixture by a law; a law without gradients is searched, as RegMix does."""
        arguments = (fitted, self.config.n_params, self.config.tokens, self.weights, self.constraints)
        if not fitted.differentiable:
            return solve.solve_by_sampling(*arguments, centre=self.unique, seed=self.config.seed)
        two_step = solver == "two-step" and solve.has_effective_ratios(fitted)
        return (solve.solve_two_step if two_step else solve.solve_joint)(*arguments, seed=self.config.seed)

    def predict(self, fitted: FittedLaw, ratios: np.ndarray) -> np.ndarray:
        """Losses `[targets]` of a mixture at the target N and D."""
        return fitted.at(ratios, self.config.n_params, self.config.tokens)

    def method(self, ratios: np.ndarray, allocation: solve.Allocation | None = None) -> dict[str, Any]:
        """A mixture as it stands in allocation.json."""
        config, unique = self.config, self.unique
        losses = self.predict(self.fitted, ratios)
        low = high = None
        if self.replicates:
            low, high = np.quantile([self.predict(fitted, ratios) for fitted in self.replicates], _INTERVAL, axis=0)
        effective = None
        if isinstance(self.fitted, FittedEffectiveLaw):
            with float64():
                effective = np.asarray(
                    self.fitted.effective_ratios(ratios, float(config.n_params), float(config.tokens)))
        epochs = None
        if unique is not None:
            epochs = [r * config.tokens / unique[l] if unique[l] else 0.0
                      for l, r in zip(self.runs.languages, ratios)]
        return {
            "ratios": ratios.tolist(),
            "ratio_low": None,
            "ratio_high": None,
            "losses": losses.tolist(),
            "loss_low": None if low is None else low.tolist(),
            "loss_high": None if high is None else high.tolist(),
            "effective": None if effective is None else effective.tolist(),
            "epochs": epochs,
            "weighted_loss": float(self.weights @ losses),
            "mean_loss": float(losses.mean()),
            "kkt": allocation and allocation.kkt,
            "joint_gap": allocation and allocation.joint_gap,
            "binding": [list(pair) for pair in allocation.binding] if allocation else [],
        }

    def recommended(self) -> tuple[str, dict[str, dict[str, Any]]]:
        """(name of the recommended method, it and the other solver's answer)."""
        two_step = self.solved(self.fitted, "two-step")
        answers = {a.method: a for a in (two_step.joint, two_step) if a is not None}
        solver = self.config.solver if self.config.solver in answers else two_step.method
        found = {f"{self.law.name}-{name}": self.method(a.ratios, a) for name, a in answers.items()}
        chosen = f"{self.law.name}-{solver}"
        if self.replicates:
            # Every replicate's own answer: how far the data determine the ratios.
            ratios = [self.solved(fitted, solver).ratios for fitted in self.replicates]
            low, high = np.quantile(ratios, _INTERVAL, axis=0)
            found[chosen] |= {"ratio_low": low.tolist(), "ratio_high": high.tolist()}
        return chosen, found

    def baselines(self, fitted: Mapping[str, FittedLaw]) -> dict[str, dict[str, Any]]:
        """Rule-of-thumb mixtures, and those of other laws; none of the former knows the constraints but UniMax."""
        config, languages = self.config, self.runs.languages
        found = {"uniform": np.full(len(languages), 1 / len(languages))}
        if self.unique is not None and all(self.unique[l] > 0 for l in languages):
            counts = {l: self.unique[l] for l in languages}
            found["natural"] = _array(temperature_rates(counts), languages)
            found["temperature"] = _array(temperature_rates(counts, config.temperature), languages)
            epochs = config.max_epochs or 4.0
            if epochs * sum(counts.values()) >= config.tokens:
                found["unimax"] = _array(unimax_rates(counts, config.tokens, epochs), languages)
        methods = {name: self.method(ratios) for name, ratios in found.items()}
        for name, law in fitted.items():
            allocation = self.solved(law)
            methods["regmix" if name == "lightgbm" else name] = self.method(allocation.ratios, allocation)
        return methods


def _array(rates: Mapping[str, float], languages: Sequence[str]) -> np.ndarray:
    return np.array([rates.get(language, 0.0) for language in languages])


def _unique_tokens(config: AllocateConfig) -> dict[str, float] | None:
    """language -> tokens of text, for the table's languages.

    Raises:
      InputError: a language of the table has no entry.
    """
    if config.token_store is not None:
        parts = TokenStore(config.token_store).parts("train")
        text, where = {language: float(part.tokens) for language, part in parts.items()}, config.token_store
    elif config.unique_tokens is not None:
        text, where = dict(config.unique_tokens), "allocate.unique_tokens"
    else:
        return None
    if missing := [language for language in config.runs.languages if language not in text]:
        raise InputError(f"{where}: no text in {', '.join(missing)}, which the proxy runs have")
    return {language: text[language] for language in config.runs.languages}


def _validation(config: AllocateConfig, law: Law, laws: Mapping[str, Law]) -> dict[str, CrossValidation]:
    """Cross-validation by name of the law, the recommended one first; others that cannot be fitted are left out."""
    found: dict[str, CrossValidation] = {}
    for name, other in {law.name: law, **laws}.items():
        try:
            found[name] = cross_validate(other, config.runs, config.folds, config.seed)
        except InputError as error:
            if other is law:
                raise
            _say(f"note: left out of the comparison: {error}")
            continue
        mean = found[name].scores.mean
        _say(f"{name}: cross-validated R2 {mean['r2']:.4f}, MAE {mean['mae']:.4f}, Spearman {mean['spearman']:.4f}")
    return found


def _poor(name: str, validation: CrossValidation, targets: Sequence[str]) -> str | None:
    """What is wrong with a law that predicts held-out runs no better than their mean; None for a better one."""
    scores = validation.scores
    if scores.mean["r2"] >= 0 and scores.pooled_r2 >= 0:
        return None
    if np.isnan(scores.pooled_r2):
        return f"cross-validation cannot judge {name}: the losses to compare do not vary"
    worst = int(np.nanargmin(scores.r2))
    return (f"{name} predicts held-out runs worse than their mean does: cross-validated R2 {scores.mean['r2']:.2f} "
            f"({scores.pooled_r2:.2f} with all losses together; {targets[worst]}: {scores.r2[worst]:.2f})")


def _transfer(fitted: FittedLaw, replicates: Sequence[FittedFormula]) -> dict[str, Any] | None:
    """The transfer matrix with intervals, None for laws without transfer."""
    if not isinstance(fitted, FittedEffectiveFormula) or fitted.identified is None:
        return None
    low = high = None
    if replicates:
        low, high = np.quantile([replicate.transfer_matrix for replicate in replicates], _INTERVAL, axis=0)
    blank = lambda x: np.where(fitted.is_own, None, x.astype(object)).tolist()  # noqa: E731
    return {
        "values": blank(fitted.transfer_matrix),
        "low": None if low is None else blank(low),
        "high": None if high is None else blank(high),
        "identified": fitted.identified.tolist(),
        "meaning": "tokens of its own that one more token of the other language is worth to a language, at the proxy "
                   "runs' mean mixture and token count",
    }


def _effective(fitted: FittedLaw, runs: ProxyRuns) -> dict[str, Any] | None:
    """Measured effective ratios beside the law's, None for laws without them."""
    if not isinstance(fitted, FittedEffectiveLaw):
        return None
    measured = measured_effective_ratios(fitted, runs)
    with float64():
        predicted = np.asarray(fitted.effective_ratios(runs.ratios, runs.n_params, runs.tokens))
    return {
        "ratio": runs.ratios[:, runs.own_columns].tolist(),
        "effective": _gaps(measured),
        "predicted": predicted.tolist(),
        "tokens": runs.tokens.tolist(),
    }


def _parameters(fitted: FittedLaw) -> dict[str, Any] | None:
    """The fitted parameters by name, `[targets, size]` each; None for laws that are no formula."""
    if not isinstance(fitted, FittedFormula):
        return None
    return {name: np.asarray(fitted[name]).tolist() for name in fitted.formula.sizes}


def _fingerprint(runs: ProxyRuns) -> str:
    """SHA-256 of the table as it was used."""
    digest = hashlib.sha256(repr((runs.languages, runs.targets, runs.run.tolist())).encode())
    for values in (runs.n_params, runs.tokens, runs.ratios, runs.losses):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _made_from(config: AllocateConfig) -> dict[str, Any]:
    """All that the result follows from, as JSON has it."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("runs", "output")}
    if config.law is not None:
        settings["law"] = {"name": config.law.name, **vars(config.law)}
    text = _unique_tokens(config)
    made_from = {"program": "data_mixtures.climb.allocate", "version": __version__,
                 "table_sha256": _fingerprint(config.runs), "settings": settings, "unique_tokens": text}
    return json.loads(json.dumps(made_from))


def _is_made(output: str, made_from: Mapping[str, Any]) -> bool:
    """Whether `output` holds the allocation made from the same, whole: allocation.json is written last."""
    path = epath.Path(output) / "allocation.json"
    if not path.exists():
        return False
    found = read_json(path, "allocation").get("provenance", {})
    return all(found.get(name) == value for name, value in made_from.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def allocate() -> None:
    """Decides the mixture from proxy runs. Parameters: allocate.* (see AllocateConfig), proxy_runs.*, Climb.*."""
    config = AllocateConfig()
    runs = config.runs
    made_from = _made_from(config)
    if _is_made(config.output, made_from):
        _say(f"{config.output}: made before from the same runs and settings, kept")
        return
    _say(f"{len(np.unique(runs.run))} runs, {len(runs)} rows, {len(runs.languages)} languages -> {len(runs.targets)} "
         "losses")
    allocator = Allocator(config)
    notes = [*outliers(runs), *allocator.fitted.notes]
    for note in notes:
        _say(f"note: {note}")
    laws, fitted = {}, {}
    for name in config.compared:
        if name == allocator.law.name:
            continue
        try:
            fitted[name] = LAWS[name]().fit(runs, config.seed)
            laws[name] = LAWS[name]()
        except InputError as error:
            _say(f"note: left out of the comparison: {error}")
    validation = _validation(config, allocator.law, laws)
    judged = validation[allocator.law.name]
    for note in judged.notes:
        _say(f"note: {note}")
    notes += judged.notes
    if poor := _poor(allocator.law.name, judged, runs.targets):
        if not config.allow_poor_law:
            raise InputError(f"{config.output}: nothing is written: {poor}; look at the rows named above, choose "
                             "another allocate.law, or set allocate.allow_poor_law = True")
        _say(f"WARNING: {poor}; its recommendation is written because allocate.allow_poor_law is True")
        notes.append(poor)
    chosen, methods = allocator.recommended()
    methods |= allocator.baselines(fitted)
    _write(allocator, made_from, chosen, methods, validation, notes)
    best = methods[chosen]
    _say(f"{config.output}/rates.json: {chosen} for N = {config.n_params:.3g}, D = {config.tokens:.3g}, KKT residual "
         f"{best['kkt']:.1e}" if best["kkt"] is not None else f"{config.output}/rates.json: {chosen}")
    for i in np.argsort(best["ratios"])[::-1]:
        _say(f"{runs.languages[i]:<8} {best['ratios'][i]:8.4%}")


def _write(
    allocator: Allocator,
    made_from: Mapping[str, Any],
    chosen: str,
    methods: Mapping[str, Mapping[str, Any]],
    validation: Mapping[str, CrossValidation],
    notes: Sequence[str],
) -> None:
    """Writes the rates files and, last, allocation.json."""
    config, runs, fitted = allocator.config, allocator.runs, allocator.fitted
    folder = epath.Path(config.output)
    law = {"name": allocator.law.name, "family": getattr(fitted, "transfer_family", None), "notes": list(notes),
           "parameters": _parameters(fitted)}
    provenance = {**made_from, "runs": len(np.unique(runs.run)), "rows": len(runs),
                  "law": {k: law[k] for k in ("name", "family", "notes")}}
    named = lambda names, values: None if values is None else dict(zip(names, values))  # noqa: E731
    for name, method in methods.items():
        more = {
            "expected_loss": named(runs.targets, method["losses"]),
            "expected_loss_interval": named(runs.targets, _pairs(method["loss_low"], method["loss_high"])),
            "rates_interval": named(runs.languages, _pairs(method["ratio_low"], method["ratio_high"])),
            "epochs": named(runs.languages, method["epochs"]),
            "interval": list(_INTERVAL),
        }
        more = {key: value for key, value in more.items() if value is not None}
        paths = [folder / "methods" / f"{name}.json"] + [folder / "rates.json"] * (name == chosen)
        for path in paths:
            save_rates(path, named(runs.languages, method["ratios"]), {**provenance, "method": name}, **more)
    counts = allocator.unique
    natural = None
    if counts is not None:
        natural = (np.array(list(counts.values())) / sum(counts.values())).tolist()
    write_json(folder / "allocation.json", {
        "format": ALLOCATION_FORMAT,
        "version": ALLOCATION_VERSION,
        "languages": list(runs.languages),
        "targets": list(runs.targets),
        "n_params": config.n_params,
        "tokens": config.tokens,
        "unique_tokens": counts,
        "natural": natural,
        "weights": allocator.weights.tolist(),
        "interval": list(_INTERVAL),
        "weights_name": config.weights if isinstance(config.weights, str) else "given",
        "constraints": {"floor": config.floor, "max_epochs": config.max_epochs, "fixed": dict(config.fixed or {})},
        "law": law,
        "method": chosen,
        "methods": methods,
        "transfer": _transfer(fitted, allocator.replicates),
        "validation": {name: {score: _gaps(getattr(one.scores, score)) for score in ("r2", "mae", "spearman")}
                       | {"seconds": one.seconds / config.folds} for name, one in validation.items()},
        "predictions": {"run": runs.run.tolist(), "n_params": runs.n_params.tolist(), "tokens": runs.tokens.tolist(),
                        "measured": runs.losses.tolist(), "predicted": _gaps(validation[law["name"]].predicted)},
        "effective": _effective(fitted, runs),
        "proxies": {"runs": len(np.unique(runs.run)), "rows": len(runs)},
        "provenance": provenance,
    })


def _gaps(values: np.ndarray) -> list[Any]:
    """The values as JSON has them: None for those that are not finite."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


def _pairs(low: Sequence[float] | None, high: Sequence[float] | None) -> list[list[float]] | None:
    return None if low is None or high is None else [list(pair) for pair in zip(low, high)]


if __name__ == "__main__":
    run(allocate, "data_mixtures.climb.allocate")
