"""README.md and docs/ name files, modules and commands that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PACKAGES = ("mlx_pretrain", "data_mixtures", "raters", "evals", "video", "pipeline")
PREFIXES = ("", "data_mixtures/climb/", "raters/", "evals/", "video/")  # a section of the glossary names its package


def is_module(name: str, prefixes: tuple[str, ...] = ("",)) -> bool:
    paths = [ROOT / prefix / name.replace(".", "/") for prefix in prefixes]
    return any(path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() for path in paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_commands_and_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / link).exists()]
    assert not links
    commands = re.findall(rf"python -m ((?:{'|'.join(PACKAGES)})[\w.]*\w)", text)
    assert not [name for name in commands if not is_module(name)]
    files = re.findall(rf"(?<![\w/])((?:{'|'.join(PACKAGES)}|gin|benchmarks|tests|scripts)/[\w/]+\.(?:py|gin))", text)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_modules_of_the_glossary_exist():
    page = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| `([\w.]+)` \|$", page, re.MULTILINE)
    assert len(rows) > 40
    assert not [name for name in rows if not is_module(name, PREFIXES)]


def test_the_names_in_the_page_on_extending_exist():
    """Files and folders named in the documents, and constants and classes in them."""
    text = (ROOT / "docs" / "extending.md").read_text()
    for row in re.findall(r"^\| (?!---)[^|]+ \| ([^|]+) \|", text, re.MULTILINE):
        paths = [ROOT / name for name in re.findall(r"`(\w+/[\w/.]*)`", row)]
        assert all(path.exists() for path in paths), row
        sources = "".join(file.read_text() for path in paths
                          for file in (path.glob("*.py") if path.is_dir() else [path]))
        for name in re.findall(r"`([A-Z]\w+|warmup_cosine|adamw|solve_joint)`", row):
            assert not paths or re.search(rf"^(?:class |def )?{name}\b", sources, re.MULTILINE), (row, name)
