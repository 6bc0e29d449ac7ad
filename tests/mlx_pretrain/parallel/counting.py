"""A command in three phases: counts the words of files, by file, by first letter, and in all."""

import collections
import dataclasses
import json
import pathlib

from etils import epath

from mlx_pretrain.artifacts import provenance
from mlx_pretrain.errors import InputError
from mlx_pretrain.files import write_json
from mlx_pretrain.parallel.phases import OUTPUT, Phase, Plan, complete

LETTERS = "abc"
done: list[str] = []  # tasks that this process has done


@dataclasses.dataclass(frozen=True)
class CountConfig:
    """`fails` names a task that fails."""

    folder: str
    output: str
    fails: str = ""
    overwrite: bool = False


def make_plan(config: CountConfig) -> Plan:
    names = sorted(path.name for path in pathlib.Path(config.folder).iterdir())

    def start(task: str) -> None:
        done.append(task)
        if task == config.fails:
            raise InputError(f"{task} fails")

    def count(name: str, folder: epath.Path) -> int:
        words = pathlib.Path(config.folder, name).read_text().split()
        write_json(folder / "counts" / f"{name}.json", collections.Counter(words))
        write_json(folder / OUTPUT / "words" / f"{name}.json", words)
        start(name)
        return len(words)

    def letter(which: str, folder: epath.Path) -> dict[str, int]:
        start(which)
        total: collections.Counter[str] = collections.Counter()
        for name in names:
            total.update({word: n for word, n in json.loads((plan.files / f"counts/{name}.json").read_text()).items()
                          if word[0] == which})
        write_json(folder / OUTPUT / f"letters/{which}.json", dict(sorted(total.items())))
        return dict(total)

    def add(task: str, folder: epath.Path) -> int:
        start(task)
        assert sum(plan.results("count")) >= sum(sum(result.values()) for result in plan.results("letters"))
        return sum(plan.results("count"))

    plan = Plan(config.output, "report.json", ("report.json", "words", "letters"),
                provenance("tests.count", {"letters": LETTERS}, {}),
                [Phase("count", names, count, lambda name: {name: pathlib.Path(config.folder, name)}),
                 Phase("letters", list(LETTERS), letter), Phase("add", ["all"], add)], config.overwrite)
    return plan


def main(config: CountConfig, workers: int = 1) -> bool:
    """Returns whether it has made the output."""
    plan = complete(make_plan, config, workers)
    if plan is not None:
        [total] = plan.results("add")
        plan.finish({"words": total})
    return plan is not None
