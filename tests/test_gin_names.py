"""No two gin configurables of the five packages have the same name: `--gin.select.output` would be ambiguous."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("mlx_pretrain", "data_mixtures", "raters", "evals", "video")


def configurables():
    """Yields (name, place) of every class and function decorated with `gin.configurable`."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", []):
                arguments = decorator.args if isinstance(decorator, ast.Call) else []
                if "gin.configurable" in ast.unparse(decorator):
                    name = ast.literal_eval(arguments[0]) if arguments else node.name
                    yield name, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_gin_names_are_unique():
    places = collections.defaultdict(list)
    for name, place in configurables():
        places[name].append(place)
    assert len(places) > 60
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
