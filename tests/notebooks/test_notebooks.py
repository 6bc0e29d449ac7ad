"""The notebooks run from top to bottom, here with small settings, and hold what a clean file on Colab needs."""

import ast
import base64
import importlib
import importlib.util
import inspect
import io
import os
import pathlib
import re

import matplotlib.image
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from sklearn.metrics import roc_auc_score

from mlx_pretrain.convert.export import ExportConfig, export_model
from mlx_pretrain.files import read_json, read_jsonl
from tests.e2e.conftest import environment
from video.frame_choice.rules import even
from video.frames.frame_store import FrameStore
from video.questions import read_questions

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

# Put into a cell after the one with the settings, as papermill does.
SMALL = {
    "train_and_sample": "LANGUAGES, STEPS, BATCH_SIZE, EVAL_EVERY, TOKENIZER_BYTES = ['de', 'zh'], 12, 4, 12, 200_000",
    "climb": """
from data_mixtures.climb.laws.climb import Climb
LAW, COMPARED, REPLICATES, FOLDS = Climb("saturating_fading", starts=1), [], 2, 2
""",
    "rate_documents": "LANGUAGES, DOCUMENTS, STEPS, TOKENIZER_BYTES = ['en', 'it'], 60, 6, 200_000",
    "consistency": "LANGUAGES, ITEMS = ['en', 'de', 'es'], 8",
    "frame_voyager": """
LLM_VIDEOS, LABEL_VIDEOS, VALIDATION_VIDEOS, TEST_VIDEOS = 4, 2, 2, 3
LLM_STEPS, COMBINATIONS, VOYAGER_STEPS = 2, 8, 2
""",
}
PICTURES = {"train_and_sample": 1, "climb": 5, "rate_documents": 3, "consistency": 2, "frame_voyager": 4}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def cells(notebook: nbformat.NotebookNode, cell_type: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == cell_type]


def setup_constants(notebook: nbformat.NotebookNode) -> dict[str, object]:
    """Returns the constants that the first code cell sets."""
    tree = ast.parse(cells(notebook, "code")[0])
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.List)}


def test_each_notebook_is_run_here():
    assert set(NAMES) == set(SMALL) == set(PICTURES)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_valid_and_hold_no_output(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
        assert not re.search(r"(?<![\w/.])/(?:home|root|tmp|mnt|work|content|Users)\b|[A-Z]:\\\\", cell.source)
    assert [cell.metadata.get("tags") for cell in notebook.cells].count(["parameters"]) == 1
    assert cells(notebook, "markdown")[0].startswith("# ")
    assert "## What to change next" in cells(notebook, "markdown")[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_badge_opens_this_notebook_of_the_repository_that_is_installed(name):
    notebook = read(name)
    owner_and_name = setup_constants(notebook)["REPOSITORY"].removeprefix("https://github.com/")
    badge = f"(https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{name}.ipynb)"
    assert badge in cells(notebook, "markdown")[0]
    assert badge in (FOLDER / "README.md").read_text()


def test_the_installing_cells_differ_in_what_they_install_alone():
    packages = {re.sub(r"^(EXTRAS|LIBRARIES) = .*$", "", cells(read(name), "code")[0], flags=re.M) for name in NAMES}
    assert len(packages) == 1
    for name in NAMES:
        constants = setup_constants(read(name))
        for extra in constants["EXTRAS"]:
            assert "tensorflow" not in (ROOT / f"requirements/{extra}.in").read_text()
        direct = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.in"))
        assert all(re.search(rf"^{library}\b", direct, re.M) for library in constants["LIBRARIES"])


@pytest.mark.parametrize("name", NAMES)
def test_links_commands_and_files_in_the_prose_exist(name):
    text = "\n".join(cells(read(name), "markdown"))
    assert not [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (FOLDER / link).exists()]
    commands = re.findall(r"python -m ([\w.]*\w)", text)
    assert not [command for command in commands if importlib.util.find_spec(command) is None]
    files = re.findall(r"(?<![\w/])((?:docs|gin|samples|benchmarks)/[\w/]+\.\w+)", text)
    assert not [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_calls_what_there_is_with_arguments_that_it_takes(name):
    tree = ast.parse("\n".join(re.sub(r"^[%!].*$", "", cell, flags=re.M) for cell in cells(read(name), "code")))
    imported = {alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
                for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    own = [value for value in imported.values()
           if callable(value) and (ROOT / value.__module__.split(".")[0] / "__init__.py").exists()]
    called = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and imported.get(node.func.id) in own:
            called.append(imported[node.func.id])
            inspect.signature(called[-1]).bind_partial(*node.args, **{
                keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
    assert len(called) > 3


class Executed:
    """A notebook after it has run in a folder of its own.

    Attributes:
      folder: the folder WORK of its results.
      text: all that it printed, without what it logged.
      pictures: `[height, width, channels]` each.
    """

    def __init__(self, name: str, folder: pathlib.Path, settings: str = ""):
        self.folder = folder / "work"
        notebook = read(name)
        at = [cell.metadata.get("tags") for cell in notebook.cells].index(["parameters"])
        settings = f"{SMALL[name]}\n{settings}\nWORK = 'work'"
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(settings))
        notebook.cells.append(nbformat.v4.new_code_cell(
            "import sys; print('heavy:', sorted({'tensorflow', 'seqio', 'torch'} & set(sys.modules)))"))
        variables = os.environ | environment() | {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(folder / "ipython")}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                                resources={"metadata": {"path": str(folder)}})
        try:
            client.execute(env=variables)
        finally:
            nbformat.write(notebook, folder / "executed.ipynb")  # to look at
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        self.text = "".join(output.text for output in outputs if output.get("name") == "stdout")
        pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        self.pictures = [matplotlib.image.imread(io.BytesIO(base64.b64decode(png))) for png in pictures]

    def check(self, name: str) -> None:
        """Checks that no heavy library was loaded, and that the pictures are there and show something."""
        assert self.text.endswith("heavy: []\n")
        assert len(self.pictures) == PICTURES[name]
        for picture in self.pictures:
            assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Executed:
    return Executed("train_and_sample", tmp_path_factory.mktemp("train_and_sample"))


def test_train_and_sample(trained):
    trained.check("train_and_sample")
    lines = [line for _, line in read_jsonl(trained.folder / "run/metrics.jsonl") if line["kind"] == "eval"]
    first, last = (lines[at]["bits_per_byte"] for at in (0, -1))
    assert last < 0.95 * first
    assert f"{first:.2f} before, {last:.2f} after" in trained.text
    assert trained.text.count("Um eine Datei zu öffnen,\033[1m") == 2  # two temperatures


def test_climb(tmp_path):
    executed = Executed("climb", tmp_path)
    executed.check("climb")
    content = read_json(executed.folder / "climb/rates.json")
    rates = content["rates"]
    assert sum(rates.values()) == pytest.approx(1) and min(rates.values()) >= 0.02 - 1e-9
    assert all(rates[language] <= 4 * 30_000 / 1_000_000 + 1e-9 for language in ("nl", "pt"))
    for language, rate in rates.items():
        assert re.search(rf"^{language} +{100 * rate:.1f}%", executed.text, re.M)
    methods = read_json(executed.folder / "climb/allocation.json")["methods"]
    best, natural = methods["climb-joint"]["mean_loss"], methods["natural"]["mean_loss"]
    assert best < natural
    assert f"{best:.3f} with this mixture, {natural:.3f} with the natural one" in executed.text


def test_rate_documents(tmp_path):
    executed = Executed("rate_documents", tmp_path)
    executed.check("rate_documents")
    for language in ("en", "it"):
        table = pq.read_table(executed.folder / f"scores/{language}.jsonl.scores.parquet")
        damaged = np.array(["#" in id for id in table["id"].to_pylist()])
        assert 0.2 < damaged.mean() < 0.6
        above = roc_auc_score(~damaged, table["quality_score"].to_numpy())
        assert f"{language}: an intact document is scored above a damaged one in {above:.0%} of pairs" in executed.text
    for language in read_json(executed.folder / "selected/selection.json")["languages"]:
        assert language["quota"] == pytest.approx(0.6 * language["tokens"], abs=1)
        table = pq.read_table(executed.folder / f"scores/{language['language']}.jsonl.scores.parquet")
        # Whole documents, the nearer side of the quota.
        assert abs(language["kept_tokens"] - language["quota"]) <= max(table["n_tokens"].to_pylist()) / 2


def test_consistency(trained, tmp_path):
    export_model(ExportConfig(str(trained.folder / "run"), str(tmp_path / "model")))
    executed = Executed("consistency", tmp_path, "MODEL = 'model'")
    executed.check("consistency")
    choices = []
    for language in ("en", "de", "es"):
        (path,) = (executed.folder / "evals").glob(f"samples_*_{language}_*.jsonl")
        choices.append([line["chosen"]["acc_norm"] for _, line in read_jsonl(path)])
    choices = np.array(choices)
    assert choices.shape == (3, 8)
    mlc = np.mean([(choices[a] == choices[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert re.search(rf"^MLC, mean over the pairs +{mlc:.2f} ", executed.text, re.M)


@pytest.mark.slow
def test_frame_voyager(tmp_path):
    executed = Executed("frame_voyager", tmp_path)
    executed.check("frame_voyager")
    store, questions = FrameStore(executed.folder / "frames"), read_questions(executed.folder / "videos/test.jsonl")
    spread = sum(any(start <= time <= end for time in store.times[store.row(question.video)][even(16, 4)]
                     for start, end in question.evidence) for question in questions)
    assert f"evenly spread  {spread} of {len(questions)} questions" in executed.text
    last = [line for _, line in read_jsonl(executed.folder / "voyager/metrics.jsonl") if line["kind"] == "eval"][-1]
    assert f"in the right order: {last['ranking_accuracy']:.1%}" in executed.text
