"""Commands that README.md, docs/ and gin/ show are accepted as they stand there: flags, gin files and parameters.

A command line is read as the command reads it, up to the point where its work would begin.
"""

import ast
import dataclasses
import importlib
import itertools
import pathlib
import re
import shlex

import gin
import pytest

from mlx_pretrain import compile as aot
from mlx_pretrain.command_line import parse_flags
from mlx_pretrain.configuration.command_help import gin_name
from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.data.documents import Document
from mlx_pretrain.errors import InputError
from tests.test_command_help import COMMANDS, PACKAGES, modules

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("notebooks/*.md"))]
GIN_FILES = sorted(ROOT.glob("gin/**/*.gin"))
MADE = "runs/"  # gin files that a command makes
LOOP = re.compile(r"^for (\w+) in ([^;\n]+); do\n(.*?)^done", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"`(?:--gin\.)?((?:\w+/)?\w+)\.(\w+) ?=[^`]*`")
MAKEFILE = (ROOT / "Makefile").read_text()
SETUP = (ROOT / "setup.py").read_text()


def blocks(page: pathlib.Path) -> list[str]:
    """Returns the parts of a page that hold shell commands."""
    text = page.read_text()
    if page.suffix == ".gin":
        return ["\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE))]
    fenced = re.findall(r"^ *```(?:sh|bash|console)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`((?:python|make|pip) [^`]+)`", re.sub(r"(?ms)^ *```.*?^ *```", "", text))]


def command_lines(page: pathlib.Path) -> list[list[str]]:
    """Returns the words of every command on a page; loops are unrolled."""
    lines = []
    for block in blocks(page):
        block = block.replace("\\\n", " ")
        for loop in LOOP.finditer(block):
            turns = [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()]
            block = block.replace(loop[0], "".join(turns))
        for line in block.splitlines():
            if re.match(r" *(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:python|make|pip)\d? ", line):
                lines.append(shlex.split(line, comments=True))
    return lines


def check(words: list[str]) -> None:
    """Raises if a command line would be refused."""
    words = list(itertools.dropwhile(lambda word: "=" in word or word == "$", words))
    program, rest = words[0].rpartition("/")[2], words[1:]
    if program == "make":
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), f"make {target}"
    elif rest[:1] == ["install"]:
        for extra in re.findall(r"(?:mlx-pretrain|\.)\[([\w,]+)\]", " ".join(rest)):
            assert all(f'"{name}"' in SETUP for name in extra.split(",")), extra
        assert all((ROOT / file).is_file() for flag, file in itertools.pairwise(rest) if flag == "-r")
    elif rest[0] == "-m":
        if rest[1].partition(".")[0] in PACKAGES and len(rest) > 2 and rest[2] != "--help":
            check_module(rest[1], [word.rstrip(",;") for word in rest[2:] if word != "&"])
    elif not rest[0].startswith("-"):
        own, launched = split_at(rest, "--")
        folder = (ROOT / own[0]).parent.rglob("*.py") if own[0].startswith("scripts/") else [ROOT / own[0]]
        source = "".join(file.read_text() for file in folder)
        for flag in (word.partition("=")[0] for word in own[1:] if word.startswith("--") and word != "--help"):
            assert f'"{flag}"' in source, f"{own[0]} has no {flag}"
        if launched:
            check(launched)


def split_at(words: list[str], separator: str) -> tuple[list[str], list[str]]:
    at = words.index(separator) if separator in words else len(words)
    return words[:at], words[at + 1 :]


def check_module(module: str, arguments: list[str]) -> None:
    """Reads a command line as `command_line.run` does, and looks for required parameters that nothing sets."""
    copied = "gin/pipeline/own.gin" if module == "pipeline" else "gin/mixtures/sample.gin"  # to my.gin, by readers
    module = module if module in COMMANDS else f"{module}.__main__"
    imported, call = importlib.import_module(module), COMMANDS[module]
    if module == "evals.harness":
        return  # its arguments are those of lm_eval
    if module == "mlx_pretrain.compile":
        importlib.import_module("mlx_pretrain.train")
        arguments = aot.parse_arguments(arguments).gin
    options = {} if call is None else {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    flags = parse_flags(arguments, **options)
    if any(file.startswith(MADE) for file in flags.files):
        return
    try:
        parse_gin([copied if file == "my.gin" else file for file in flags.files], flags.bindings, flags.search,
                  fill_macros=module == "mlx_pretrain.compile")
        if call is not None:
            config = eval(ast.unparse(call.args[1]), vars(imported))
            required = [field.name for field in dataclasses.fields(config) if field.default is gin.REQUIRED]
            assert not [name for name in required if not bound(f"{gin_name(config)}.{name}")]
    finally:
        gin.clear_config()


def bound(parameter: str) -> bool:
    try:
        gin.query_parameter(parameter)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("page", [*PAGES, *GIN_FILES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page):
    wrong = []
    for words in command_lines(page):
        try:
            check(words)
        except (InputError, AssertionError, OSError, KeyError) as error:
            wrong.append(f"{shlex.join(words)}: {type(error).__name__} {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def everything_imported():
    for module in modules():
        importlib.import_module(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page, everything_imported):
    """`train.microbatches=4` in a text names a parameter."""
    wrong = []
    for name, parameter in SETTING.findall(page.read_text()):
        selector = name.rpartition("/")[2]
        try:
            gin.bind_parameter(f"{selector}.{parameter}", None)
        except ValueError as error:
            wrong.append(f"{name}.{parameter}: {error}")
        finally:
            gin.clear_config()
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def recipes(everything_imported) -> dict:
    """The classes and functions that the examples of docs/recipes.md define."""
    names = {"__name__": "recipes"}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL):
        exec(compile(code, "recipes.md", "exec"), names)
    return names


def test_the_recipes_work(recipes):
    documents = [Document(text, text, "en", "") for text in ("a bb", "dddd", "")]
    assert recipes["LongWords"]().score(documents).tolist() == [1.5, 4.0, 0.0]
    schedule = recipes["inverse_square_root"](1e-3, 100)
    assert [round(float(schedule(step)), 9) for step in (0, 49, 99, 399)] == [1e-5, 5e-4, 1e-3, 5e-4]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_gin_examples_are_accepted(page, recipes):
    try:
        for example in re.findall(r"```gin\n(.*?)```", page.read_text(), re.DOTALL):
            gin.add_config_file_search_path(str(ROOT))
            gin.parse_config(example)
            gin.clear_config()
    finally:
        gin.clear_config()
