"""`--help` of every command describes all its parameters, whose names are unique over all packages."""

import ast
import collections
import importlib
import pathlib
import re

import gin
import pytest

from mlx_pretrain import command_line, compile
from mlx_pretrain.configuration.command_help import command_help, field_classes, gin_name, parameters
from mlx_pretrain.configuration.gin_files import parse_gin
from mlx_pretrain.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("mlx_pretrain", "data_mixtures", "raters", "evals", "video", "pipeline")
OWN_FLAGS = {"mlx_pretrain.compile", "evals.harness"}  # commands that are not configured by gin alone
PLUGINS = {"video.lmms_eval_plugin"}  # imports a program that is no requirement, and has nothing for gin


def modules() -> dict[str, pathlib.Path]:
    """Returns module -> file, of all modules but plug-ins."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: path for name, path in found.items() if name not in PLUGINS}


def commands() -> dict[str, ast.Call]:
    """Returns module -> its call of `command_line.run`."""
    calls = {}
    for name, path in modules().items():
        for block in ast.parse(path.read_text()).body:
            if isinstance(block, ast.If) and "__main__" in ast.unparse(block.test):
                calls[name] = next((call for call in ast.walk(block) if isinstance(call, ast.Call)
                                    and ast.unparse(call.func) in ("run", "command_line.run")), None)
    return calls


COMMANDS = commands()


def test_all_commands_run_the_same_way():
    assert len(COMMANDS) > 30
    assert {name for name, call in COMMANDS.items() if call is None} == OWN_FLAGS
    assert all(ast.literal_eval(call.args[-1]) == name.removesuffix(".__main__")
               for name, call in COMMANDS.items() if call)


@pytest.fixture(params=sorted(COMMANDS.keys() - OWN_FLAGS))
def command(request):
    """Returns (name, main, class of the configuration) of each command."""
    module = importlib.import_module(request.param)
    return request.param, *(eval(ast.unparse(argument), vars(module)) for argument in COMMANDS[request.param].args[:2])


def test_help_describes_every_parameter(command):
    name, main, config = command
    text = command_help(main, config, name, {}, width=100)
    assert text.startswith(main.__doc__.split()[0])
    for configurable in (config, *field_classes(config)):
        for parameter in parameters(configurable):
            assert parameter.name in text
            assert parameter.description, f"{parameter.name} is not described"


def test_help_of_compile_describes_every_flag(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compile", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        command_line.help_if_wanted(compile.main, None, "mlx_pretrain.compile", compile.flag_descriptions())
    text = capsys.readouterr().out
    assert text.startswith("Compiles a run's programs")
    for name in ("topology", "slices", "length", "program", "json", "gin_file", "gin.NAME"):
        assert f"  --{name}=" in text
    assert all(compile.flag_descriptions().values())


def test_every_command_is_configured_by_a_frozen_dataclass(command):
    config = command[-1]
    assert config.__dataclass_params__.frozen and gin_name(config)


def test_a_value_of_a_wrong_type_names_the_parameter(command):
    for configurable in (command[-1], *field_classes(command[-1])):
        for parameter in parameters(configurable):
            if parameter.type in ("int", "float", "bool", "str", "path", "int | None", "str | None"):
                try:
                    with pytest.raises(InputError, match=f"^{re.escape(parameter.name)} = .*: must be "):
                        parse_gin([], [f"{parameter.name} = ['a', 1]"])
                finally:
                    gin.clear_config()


def test_no_two_configurables_share_a_name():
    """`select.output` in a gin file is never ambiguous, whatever modules it imports."""
    for name in modules():
        importlib.import_module(name)
    selectors = collections.defaultdict(set)
    for selector, entry in gin.config._REGISTRY.items():
        if selector.split(".")[0] in PACKAGES:
            selectors[entry.name].add(selector)
    assert len(selectors) > 60
    assert {name: listed for name, listed in selectors.items() if len(listed) > 1} == {}
