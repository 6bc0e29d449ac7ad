"""No two configurables of the five packages share a name, so that `select.output` in a gin file is never ambiguous."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CODE = """
import importlib, json, sys
import gin
for module in sys.argv[1:]:
    importlib.import_module(module)
print(json.dumps([(entry.name, selector) for selector, entry in gin.config._REGISTRY.items()]))
"""


def test_every_configurable_has_a_name_of_its_own():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
               for package in ("mlx_pretrain", "data_mixtures", "raters", "evals", "video")
               for path in sorted((ROOT / package).rglob("*.py"))]
    done = subprocess.run([sys.executable, "-c", CODE, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    selectors: dict[str, list[str]] = {}
    for name, selector in json.loads(done.stdout.splitlines()[-1]):
        selectors.setdefault(name, []).append(selector)
    assert len(selectors) > 60
    assert {name: listed for name, listed in selectors.items() if len(listed) > 1} == {}
