"""Hook of mkdocs: the site's pages lie where they lie in the repository.

So README.md and the measurements are pages too, and a link that is right on a code host is right on the site.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/**/*.md", "benchmarks/*.md", "notebooks/*.md", "samples/*/README.md")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def linked_files(page: pathlib.Path) -> set[pathlib.Path]:
    """Returns the files of the repository that a page links to."""
    paths = {(page.parent / link).resolve() for link in LINK.findall(page.read_text())}
    return {path for path in paths if path.is_file() and path.is_relative_to(ROOT)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the pages of the whole repository and the files that they link to."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    others = set().union(*map(linked_files, pages)) | {ROOT / "docs" / "site.css"}
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls)
                            for path in sorted(pages | others))])
