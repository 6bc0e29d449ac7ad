"""The stages of the pipeline: which command each is, and with which settings.

A stage is one command with its gin files and parameters. Stages meet in files alone, so each of these commands may be
given by hand, or be replaced by another program that writes the same file.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mlx_pretrain.errors import InputError, similar
from mlx_pretrain.files import read_json
from pipeline.settings import PipelineConfig

Settings = Mapping[str, Any]
_PROXY_TOKENS, _PROXY_EPOCHS = 98_304, 4  # most tokens of a proxy run, and most epochs over the text of a language


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of the pipeline.

    Attributes:
      name: name in `pipeline.settings`, `pipeline.gin_files` and `pipeline.only`.
      title: what the stage does, for people.
      module: the command is `python -m module`.
      output: path below the pipeline's folder that is there once the stage is done.
      settings: returns parameters and macros. Called when the stage begins, as some follow from earlier outputs.
      gin_files: gin files that come before the settings.
      overwrite: the parameter that lets the command replace an output of other settings; None: it never does.
      run_folder: path below the pipeline's folder of a run that its command goes on with and never replaces; None:
        there is none. `pipeline.overwrite` moves a run with other settings or inputs aside.
      demo_seconds: seconds that the stage took in `make demo` on two CPU cores.
      grows: "text" if the time grows with the bytes of the documents, "training" with the FLOPs of the run; None: not.
    """

    name: str
    title: str
    module: str
    output: str
    settings: Callable[[], Settings]
    gin_files: tuple[str, ...] = ()
    overwrite: str | None = None
    demo_seconds: float = 5.0
    grows: str | None = None
    run_folder: str | None = None


def all_stages(config: PipelineConfig) -> list[Stage]:
    """Returns the stages that the settings ask for, in order.

    Raises:
      InputError: the documents are not there, or a setting names an unknown stage.
    """
    groups = [*_Stages(config).groups()]
    every = [stage.name for _, stages in groups for stage in stages]
    wanted = [stage for is_wanted, stages in groups if is_wanted for stage in stages]
    for field, names in (("settings", every), ("gin_files", every), ("only", [stage.name for stage in wanted])):
        for name in getattr(config, field) or ():
            if name not in names:
                raise InputError(f"pipeline.{field}: no stage {name!r}{similar(name, names)}; there is "
                                 f"{', '.join(names)}")
    return wanted


class _Stages:
    """Makes the stages; paths of outputs are said once."""

    def __init__(self, config: PipelineConfig):
        self._config = config
        out = config.output.rstrip("/")
        self.out = out
        self.tokenizer = f"{out}/tokenizer.model"
        self.rater = config.rater or f"{out}/rater/run"
        self.scores, self.selected = f"{out}/scores", f"{out}/selected"
        self.tokens, self.proxies, self.climb = f"{out}/tokens", f"{out}/proxies", f"{out}/climb"
        self.run, self.evals = f"{out}/pretrain", f"{out}/evals"
        self.control, self.video = f"{out}/control", f"{out}/video"

    def groups(self) -> Iterator[tuple[bool, list[Stage]]]:
        """Yields all stages in order, in groups, each with whether the settings ask for it."""
        config = self._config
        tasks = bool(config.tasks)
        yield config.holds_out, [self._hold_out()]
        yield True, [self._tokenizer()]
        yield config.rater is None, [*self._rater()]
        yield True, [*self._filters()]
        yield tasks, [self._removal("decontaminate", "Find evaluation items in the documents", {
            "CONTAMINATED": f"{self.out}/removed/decontaminate", "ITEMS": config.task_files,
            "decontaminate.item_fields": ["prompt", "choices"], "decontaminate.item_id": "_id"})]
        yield True, [
            self._select("select", "Keep the best documents of every language and source", self.selected),
            Stage("selection_report", "Report on what was kept", "raters.selection_report", "selected/report.html",
                  lambda: {"selection_report.folder": self.selected}, demo_seconds=2),
            self._export("export", "Turn the text kept into tokens", self.selected, self.tokens, "tokens")]
        yield config.uses_climb, [*self._climb()]
        rates = f"{self.climb}/rates.json"
        yield not config.uses_climb, [self._baseline("rates", "Take the languages' natural shares, small ones raised",
                                                self.tokens, rates, "climb/rates.json", 3.33)]
        yield True, [self._train("pretrain", "Pretrain on the text kept", self.tokens, rates, self.run, "pretrain")]
        yield config.control, [*self._control()]
        evaluates = tasks and bool(config.task_languages)
        yield evaluates, [self._evaluate("evaluate", "Evaluate on aligned tasks", self.run, self.evals, "evals")]
        yield evaluates and config.control, [self._evaluate(
            "control_evaluate", "Evaluate the comparison", f"{self.control}/run", f"{self.control}/evals",
            "control/evals")]
        yield config.videos, [*self._videos()]
        # Last, so that other prompts make nothing else run again.
        yield bool(config.prompts), [self._generate()]
        yield True, [Stage("report", "Report on the training", "mlx_pretrain.report", "pretrain/report.html",
                           lambda: {"report.run_dir": self.run}, demo_seconds=5)]

    def _corpus(self, text: tuple[str, list[str]], name: str = "Corpus") -> Settings:
        folder, patterns = text
        return {f"{name}.root": folder, f"{name}.files": patterns[0] if len(patterns) == 1 else patterns,
                **self._reading(text, name)}

    def _reading(self, text: tuple[str, list[str]], name: str = "Corpus") -> Settings:
        """Returns the languages to take, and the keys of the records in the user's own files.

        Commands write theirs with the usual keys, and what was kept may lack a language.
        """
        folder, patterns = text
        settings: dict[str, Any] = {}
        if folder == self._config.documents:
            settings = {f"{name}.{field}": value for field, value in self._config.record_settings.items()}
        if (self._config.languages is not None and folder in (self._config.documents, self._config.text[0])
                and all("{language}" in pattern for pattern in patterns)):
            settings[f"{name}.languages"] = list(self._config.languages)
        return settings

    def _hold_out(self) -> Stage:
        return Stage("hold_out", "Hold documents out for evaluation", "data_mixtures.hold_out",
                     "documents/held_out.json", lambda: {
                         **self._corpus((self._config.documents, self._config.patterns)),
                         "hold_out.corpus": "@Corpus()", "hold_out.output": f"{self.out}/documents"},
                     overwrite="hold_out.overwrite", grows="text")

    def _tokenizer(self) -> Stage:
        return Stage("tokenizer", "Train a tokenizer", "data_mixtures.tokenizer", "tokenizer.model", lambda: {
            **self._corpus(self._config.text), "train_tokenizer.corpus": "@Corpus()",
            "train_tokenizer.output": self.tokenizer, "train_tokenizer.vocab_size": self._config.model.vocab_size,
            "train_tokenizer.allow_fewer": True,
        }, overwrite="train_tokenizer.overwrite", demo_seconds=8, grows="text")

    def _rater(self) -> Iterator[Stage]:
        documents = self._config.rated_text
        folder = f"{self.out}/rater"
        macros = {"ENGLISH": documents.replace("{language}", "en"), "NGRAMS": f"{folder}/ngrams.npz"}
        pairs = {**macros, "DOCUMENTS": documents.replace("{language}", "*"), "PAIRS": f"{folder}/pairs.jsonl",
                 "VALIDATION_PAIRS": f"{folder}/validation_pairs.jsonl"}
        yield Stage("ngrams", "Train a rater of English on n-grams", "raters.ngrams", "rater/ngrams.npz",
                    lambda: pairs, ("gin/raters/pairs.gin",), "train_ngrams.overwrite", 4)
        yield Stage("pairs", "Carry English preferences to all languages", "raters.pairs", "rater/pairs.jsonl",
                    lambda: pairs, ("gin/raters/pairs.gin",), "pairs.overwrite", 5)
        yield Stage("rater", "Train a multilingual rater", "raters.train", "rater/run/checkpoints", lambda: {
            "RUN_DIR": self.rater, "STEPS": 200, "train_rater.pairs": f"{folder}/pairs.jsonl",
            "train_rater.validation": f"{folder}/validation_pairs.jsonl", "train_rater.tokenizer": self.tokenizer,
            "QualityConfig.vocab_size": self._config.model.vocab_size,
        }, ("gin/raters/train.gin",), None, 85, run_folder="rater/run")

    def _filters(self) -> Iterator[Stage]:
        documents = self._training_text()
        yield Stage("score", "Rate the documents", "raters.score", "scores", lambda: {
            **documents, "RATER_DIR": self.rater, "SCORES": self.scores,
        }, ("gin/raters/score.gin",), "score.overwrite", 90, "text")
        yield self._removal("languages", "Find documents in another language than declared",
                            {"MISLABELLED": f"{self.out}/removed/languages"})
        yield self._removal("duplicates", "Find duplicates, of which the best-rated stays",
                            {"DUPLICATES": f"{self.out}/removed/duplicates", "duplicates.scores": self.scores})

    def _training_text(self) -> Settings:
        """Returns the macros of the training documents, the same for all, so that all lists mean the same documents."""
        folder, patterns = self._config.training_text
        return {"ROOT": folder, "DOCUMENTS": patterns, **self._reading((folder, patterns))}

    def _removal(self, name: str, title: str, macros: Settings) -> Stage:
        return Stage(name, title, f"raters.{name}", f"removed/{name}/report.json",
                     lambda: {**self._training_text(), **macros}, (f"gin/raters/{name}.gin",), f"{name}.overwrite", 8,
                     "text")

    def _select(self, name: str, title: str, output: str, more: Callable[[], Settings] | None = None) -> Stage:
        lists = ("languages", "duplicates", *(["decontaminate"] if self._config.tasks else []))
        removed = [f"{self.out}/removed/{stage}" for stage in lists]
        best = {"select.fraction": self._config.keep, "select.per_source": True, "select.exclude": removed}
        return Stage(name, title, "raters.select", f"{output.removeprefix(self.out)[1:]}/selection.json", lambda: {
            **self._training_text(), "SCORES": self.scores, "SELECTED": output, **(more() if more else best),
        }, ("gin/raters/select.gin",), "select.overwrite", 2, "text")

    def _export(self, name: str, title: str, selected: str, store: str, output: str) -> Stage:
        return Stage(name, title, "data_mixtures.export", f"{output}/manifest.json", lambda: {
            **self._corpus((selected, ["{split}/{language}/*"]), "kept/Corpus"),
            **self._corpus(self._config.text, "heldout/Corpus"),
            "export_tokens.corpus": "@kept/Corpus()", "export_tokens.heldout": "@heldout/Corpus()",
            "export_tokens.tokenizer": self.tokenizer, "export_tokens.store": store,
            "export_tokens.sequence_length": self._config.sequence_length,
        }, overwrite="export_tokens.overwrite", demo_seconds=2, grows="text")

    def _climb(self) -> Iterator[Stage]:
        config = self._config
        shape = {"VOCAB_SIZE": config.model.vocab_size, "SEQUENCE_LENGTH": config.sequence_length,
                 "TOKEN_STORE": self.tokens, "PROXIES": self.proxies}
        yield Stage("proxies", "Train tiny models on mixtures", "data_mixtures.climb.proxies", "proxies/settings.json",
                    lambda: {**shape, "proxies.tokens": self._proxy_tokens()}, ("gin/pipeline/proxies.gin",), None, 115,
                    run_folder="proxies")
        yield Stage("allocate", "Choose the languages' shares", "data_mixtures.climb.allocate", "climb/rates.json",
                    lambda: {"TOKEN_STORE": self.tokens, "PROXIES": self.proxies, "ALLOCATION": self.climb,
                             "N_PARAMS": config.model.parameters(), "TOKENS": config.tokens},
                    ("gin/pipeline/allocate.gin",), "allocate.overwrite", 100)
        yield Stage("climb_report", "Report on the shares", "data_mixtures.climb.report", "climb/report.html",
                    lambda: {"climb_report.folder": self.climb}, demo_seconds=5)

    def _proxy_tokens(self) -> list[int]:
        """Returns the token counts at which proxy runs are evaluated: as many as most languages have text for."""
        unique = sorted(self._config.unique_tokens.values())
        longest = min(_PROXY_TOKENS, _PROXY_EPOCHS * unique[len(unique) // 4])
        step = 4 * self._config.sequence_length  # of the batch size in gin/pipeline/proxies.gin
        return [step * max(round(longest * part / 3 / step), part) for part in (1, 2, 3)]

    def _baseline(self, name: str, title: str, store: str, rates: str, output: str, temperature: float) -> Stage:
        return Stage(name, title, "data_mixtures.baselines", output, lambda: {
            "write_baseline.store": store, "write_baseline.output": rates, "write_baseline.temperature": temperature,
        }, overwrite="write_baseline.overwrite", demo_seconds=3)

    def _train(self, name: str, title: str, store: str, rates: str, run_dir: str, output: str) -> Stage:
        config = self._config
        return Stage(name, title, "mlx_pretrain.train", f"{output}/checkpoints", lambda: {
            "RUN_DIR": run_dir, "TOKEN_STORE": store, "RATES": rates, "STEPS": config.training_steps,
            "train.batch_size": config.batch_size,
            "warmup_cosine.warmup_steps": max(config.training_steps // 12, 1),
            **{f"DecoderConfig.{field.name}": getattr(config.model, field.name)
               for field in dataclasses.fields(config.model) if getattr(config.model, field.name) != field.default},
        }, ("gin/pipeline/train.gin",), None, 145, "training", output)

    def _generate(self) -> Stage:
        prompts = self._config.prompts
        return Stage("generate", "Generate text", "mlx_pretrain.generate", "pretrain/samples.jsonl", lambda: {
            "generate.run_dir": self.run, "generate.output": f"{self.run}/samples.jsonl",
            "generate.languages": list(prompts), "generate.prompts": list(prompts.values()),
            "generate.max_new_tokens": min(64, self._config.model.max_length // 2), "generate.temperature": 0.5,
            "generate.top_p": 0.9,
        }, overwrite="generate.overwrite", demo_seconds=15)

    def _control(self) -> Iterator[Stage]:
        """The same model on as much text, chosen at random, with the languages in their natural shares."""

        def at_random() -> Settings:
            random = {"select.temperature": 1e9}  # almost equal probabilities, whatever the scores
            kept = epath.Path(self.selected) / "selection.json"
            if not kept.exists():  # in a dry run
                return random
            return {**random, "select.tokens": {
                language["language"]: language["kept_tokens"] for language in read_json(kept)["languages"]}}

        yield self._select("control_select", "Choose as much text at random", f"{self.control}/selected", at_random)
        store = f"{self.control}/tokens"
        yield self._export("control_export", "Turn the random text into tokens", f"{self.control}/selected", store,
                           "control/tokens")
        yield self._baseline("control_rates", "Take its languages' natural shares", store,
                             f"{self.control}/rates.json", "control/rates.json", 1.0)
        yield self._train("control_pretrain", "Pretrain on the random text at natural weights", store,
                          f"{self.control}/rates.json", f"{self.control}/run", "control/run")

    def _evaluate(self, name: str, title: str, run_dir: str, folder: str, output: str) -> Stage:
        return Stage(name, title, "evals.run", f"{output}/report.html", lambda: {
            "MODEL": run_dir, "TASKS": self._config.task_files, "OUTPUT": folder,
            "evaluate.languages": self._config.task_languages,
        }, ("gin/evals/run.gin",), "evaluate.overwrite", 25)

    def _videos(self) -> Iterator[Stage]:
        """Frame-Voyager on short rendered videos: it shows that everything works, and learns next to nothing."""
        macros = {
            "VIDEOS": "", "LLM_QUESTIONS": "llm.jsonl", "LLM_CAPTIONS": "llm_captions.jsonl",
            "LABEL_QUESTIONS": "labels.jsonl", "VALIDATION": "validation.jsonl",
            "VALIDATION_CAPTIONS": "validation_captions.jsonl", "TEST": "test.jsonl", "TOKENIZER": "tokenizer.model",
            "FRAMES": "frames", "VIDEO_LLM": "llm", "LABELS": "labels", "VALIDATION_LABELS": "validation_labels",
            "VOYAGER": "voyager", "TOWERS": "towers", "SELECTED": "selected"}
        paths = {macro: f"{self.video}/{name}".rstrip("/") for macro, name in macros.items()}
        short = {"STEPS": 30, "warmup_cosine.warmup_steps": 10}
        labels = {"label.candidates": 16, "label.num_frames": 4}
        for name, module, title, output, settings, seconds in (
            ("videos", "synthetic", "Render short videos with questions", "test.jsonl",
             {"synthetic.llm_videos": 60, "synthetic.label_videos": 60, "synthetic.validation_videos": 10,
              "synthetic.test_videos": 16}, 20),
            ("frames", "decode", "Decode their frames", "frames/manifest.json", {"CANDIDATES": 32}, 8),
            ("video_llm", "train", "Train a small Video-LLM", "llm/checkpoints",
             {**short, "train_video.towers": None, "train_video.eval_questions": 40}, 35),
            ("labels", "label", "Compute its losses on combinations of frames", "labels/losses",
             {**labels, "label.max_combinations": 48}, 20),
            ("validation_labels", "label", "Compute them on held-out videos", "validation_labels/losses",
             {**labels, "label.max_combinations": 128, "LABEL_QUESTIONS": paths["VALIDATION"],
              "LABELS": paths["VALIDATION_LABELS"]}, 12),
            ("voyager", "train_voyager", "Train Frame-Voyager on these losses", "voyager/checkpoints", short, 20),
            ("frame_choice", "select", "Choose 4 of 32 frames for every question", "selected/selected.json",
             {"Selector.candidates": 32, "Selector.num_frames": 4, "select_frames.sheets": 4}, 10),
        ):
            yield Stage(name, title, f"video.{module}", f"video/{output}",
                        lambda settings=settings: {**paths, **settings}, (f"gin/video/{module}.gin",),
                        "select_frames.overwrite" if module == "select" else None, seconds)
