"""Stop rules: when they fire, what a stopped run leaves, and that a restart stays stopped."""

import dataclasses
import json
import math
import shutil
import signal

import jax.numpy as jnp
import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.train import Pretraining, TrainConfig, train
from mlx_pretrain.training import optimizers
from mlx_pretrain.training.checkpoints import saved_steps
from mlx_pretrain.training.evaluation import Evaluator
from mlx_pretrain.training.metric_writer import METRICS, read_metrics
from mlx_pretrain.training.stop_rules import EarlyStopping, StopRules
from mlx_pretrain.training.trainer import Trainer


@pytest.mark.parametrize("losses, stops", [
    ([3.0, 2.0, 2.1, 2.2], True),
    ([3.0, 2.0, 2.1, 1.9, 2.0], False),  # better once more
    ([3.0, 2.0, math.nan, math.nan], True),
    ([3.0, 2.0, 1.9995, 1.999], True),  # by too little
    ([], False),
])
def test_early_stopping(losses, stops):
    history = {"eval/loss": list(enumerate(losses))}
    reason = EarlyStopping(patience=2, min_improvement=0.01)(history)
    assert bool(reason) == stops
    if stops:
        assert reason == "eval/loss has not improved on 2.0000 at step 1 for 2 evaluations"


def test_a_metric_that_is_not_there_is_refused(tmp_path):
    rules = StopRules([EarlyStopping(patience=2, metric="eval/los")], tmp_path, -1, ["train", "eval"])
    rules.write(0, "eval", {"loss": 1.0, "bits_per_byte": 2.0})
    with pytest.raises(InputError, match=r"EarlyStopping\.metric = 'eval/los': no such metric of 'eval'"):
        rules.reason()
    with pytest.raises(InputError, match=r"metric = 'evla/loss': no event 'evla'; there are train, eval$"):
        StopRules([EarlyStopping(patience=2, metric="evla/loss")], tmp_path, -1, ["train", "eval"])
    with pytest.raises(InputError, match=r"EarlyStopping\.patience = 0: must be a positive integer"):
        EarlyStopping(patience=0)


def test_a_metric_may_be_new_in_a_resumed_run(tmp_path):
    """A language that was added has no loss in the lines of earlier processes."""
    lines = [{"step": step, "kind": "eval", "time": 0.0, "loss": 1.0} for step in (0, 2, 4)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rules = StopRules([EarlyStopping(patience=1, metric="eval/loss/sw")], tmp_path, 2, ["train", "eval", "norm"])
    assert rules.reason() is None
    rules.write(3, "norm", {"embedding": 1.0})
    assert rules.reason() is None
    rules.write(4, "eval", {"loss": 1.0, "loss/sw": 2.0})
    assert rules.reason() is None
    rules.write(6, "eval", {"loss": 1.0, "loss/sw": 2.0})
    assert rules.reason() == "eval/loss/sw has not improved on 2.0000 at step 4 for 1 evaluations"


class WithNorm(Pretraining):
    """Evaluates a norm before the first and after the last step."""

    def evaluators(self, mesh):
        norm = lambda params, check: {"embedding": float(jnp.linalg.norm(params["embedding"]))}  # noqa: E731
        return [*super().evaluators(mesh), Evaluator("norm", None, norm)]


def test_a_stopped_run_stays_stopped(tiny_config, store_dir, tmp_path, capsys):
    """The learning rate is 0: no evaluation is better than the first."""
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), model=tiny_config, token_store=store_dir, rates=f"{store_dir}/rates.json",
        steps=8, batch_size=8, learning_rate=optimizers.constant(0.0), eval_batch_size=8, compilation_cache=None,
        eval_every=2, stop_rules=[EarlyStopping(patience=2)],
    )  # fmt: skip
    metrics = Trainer(config, WithNorm(config)).run()
    reason = f"eval/loss has not improved on {metrics['loss']:.4f} at step 0 for 2 evaluations"
    assert f"step 4: {reason}\nstep 4: embedding " in capsys.readouterr().out
    assert saved_steps(config.run_dir) == [4]
    run = tmp_path / "run" / "run.json"
    assert json.loads(run.read_text())["stopped"] == {"step": 4, "reason": reason}
    events = [(line["step"], line["kind"]) for line in read_metrics(config.run_dir)]
    assert events == [(0, "eval"), (0, "norm"), (2, "eval"), (4, "eval"), (4, "norm")]

    before = run.read_bytes()
    assert train(config) == {}
    assert f"nothing left to do, stopped after step 4: {reason}" in capsys.readouterr().out
    assert run.read_bytes() == before

    # A process that died between that evaluation and the checkpoint comes to the same end.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    Trainer(config, WithNorm(config)).run()
    assert [(line["step"], line["kind"]) for line in read_metrics(config.run_dir)] == events

    train(dataclasses.replace(config, stop_rules=[EarlyStopping(patience=3)]))
    assert saved_steps(config.run_dir) == [4, 6] and json.loads(run.read_text())["stopped"]["step"] == 6
    train(dataclasses.replace(config, stop_rules=[]))
    assert saved_steps(config.run_dir) == [4, 6, 8] and "stopped" not in json.loads(run.read_text())


def test_a_rule_that_fires_after_an_interrupted_evaluation_ends_with_all_evaluations(tiny_config, store_dir, tmp_path):
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), model=tiny_config, token_store=store_dir, rates=f"{store_dir}/rates.json",
        steps=8, batch_size=8, learning_rate=optimizers.constant(0.0), eval_batch_size=8, compilation_cache=None,
        stop_rules=[EarlyStopping(patience=1)],
    )  # fmt: skip
    interrupted = [False, True]

    class Interrupted(WithNorm):
        """Gets SIGTERM in the second evaluation on held-out data, after that of another evaluator."""

        def evaluators(self, mesh):
            _, norm = super().evaluators(mesh)

            def held_out(params, check):
                if interrupted and interrupted.pop(0):
                    signal.raise_signal(signal.SIGTERM)
                check()
                return {"loss": 1.0}

            return [dataclasses.replace(norm, name="first", period=2), Evaluator("eval", 2, held_out), norm]

    with pytest.raises(SystemExit):
        Trainer(config, Interrupted(config)).run()
    before = [(0, "first"), (0, "eval"), (0, "norm"), (2, "first")]
    assert [(line["step"], line["kind"]) for line in read_metrics(config.run_dir)] == before
    assert Trainer(config, Interrupted(config)).run() == {"loss": 1.0}
    events = [(line["step"], line["kind"]) for line in read_metrics(config.run_dir)]
    assert events == [*before, (2, "eval"), (2, "norm")]
    assert saved_steps(config.run_dir) == [2]
