"""One loop for all stages: interrupted anywhere and repeated, a run is bit for bit the run that was not."""

import io
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from toy import ROWS, done, lines, mesh_of, rows, run, settings, stage

from jaxgpt.health import Limits
from jaxgpt.mesh import put_batch
from jaxgpt.train.checkpoint import Checkpoints, load_params, params_meta
from jaxgpt.train.loop import Drawn, Preempted, train
from jaxgpt.train.metrics import Clock

STEPS = 9


class Cut(Exception):
    """The power goes."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


def cut_at(step, what, shape=(1, 1, 1)):
    """A change of the stage: `what()` happens while the batch of this step is drawn."""
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        source = stage(mesh).source

    def broken(n, state):
        if n == step:
            what()
        return source(n, state)

    return {"source": broken}


def power_goes():
    raise Cut


def test_every_step_has_one_line_and_every_evaluation(undisturbed):
    found = lines(undisturbed)
    assert [(line["step"], "eval" in line) for line in found] == [
        (1, False), (2, False), (3, False), (4, False), (4, True), (5, False), (6, False), (7, False), (8, False),
        (8, True), (9, False), (9, True),
    ]  # fmt: skip
    for line in found:
        if "eval" not in line:
            assert line.keys() == {"step", "loss", "error", "lr", "grad_norm", "skipped", "idle", "coef", "tokens"}
            assert line["tokens"] == line["step"] * ROWS
            assert line["lr"] == pytest.approx(0.01 / line["step"], rel=1e-6)
            assert line["coef"] == pytest.approx(0.1 * 1.5 ** line["step"], rel=1e-5)  # each line has its own step's
    finished = done(undisturbed)
    assert (finished["step"], finished["tokens"], finished["params"], finished["skipped"]) == (9, 72, 40, 0)
    meta = params_meta(undisturbed / "params")
    assert (meta["kind"], meta["fingerprint"]) == ("toy", finished["fingerprint"])


def test_no_iteration_measures_two_laps(tmp_path, monkeypatch):
    """Steps fetched in one iteration share a lap: a lap of its own would be of next to no time."""
    laps, lap = [], Clock.lap
    monkeypatch.setattr(Clock, "lap", lambda clock, steps: laps.append(steps) or lap(clock, steps))
    run(tmp_path, config=settings(every=8))
    assert laps == [1, 1, 2, 1, 1, 2, 1]  # evaluations after steps 4 and 8; 9 is the last
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in found if "eval" not in line]
    assert times[2] == times[3] and times[6] == times[7]


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_cut_at_any_step_goes_on_bit_for_bit(undisturbed, tmp_path, step):
    with pytest.raises(Cut):
        run(tmp_path, **cut_at(step, power_goes))
    assert not (tmp_path / "done.json").exists()
    run(tmp_path)
    assert lines(tmp_path) == lines(undisturbed)
    assert done(tmp_path)["fingerprint"] == done(undisturbed)["fingerprint"]


def test_a_run_that_only_lacks_its_end_is_not_trained_again(undisturbed, tmp_path):
    run(tmp_path)
    (tmp_path / "done.json").unlink()
    run(tmp_path, **{"source": power_goes})
    assert lines(tmp_path) == lines(undisturbed)
    assert done(tmp_path)["fingerprint"] == done(undisturbed)["fingerprint"]


def test_other_meshes_and_accumulation_go_on_to_the_same_numbers(undisturbed, tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, shape=(2, 2, 2), **cut_at(4, power_goes, (2, 2, 2)))
    run(tmp_path, shape=(1, 4, 1), config=settings(accumulate=2))
    for one, other in zip(lines(tmp_path), lines(undisturbed), strict=True):
        assert one["step"] == other["step"]
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_the_run_goes_on(undisturbed, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="toy: stopped after step 5 of 9; the same command goes on"):
        run(tmp_path, **cut_at(4, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path) == [3, 5]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4, 5]
    run(tmp_path)
    assert lines(tmp_path) == lines(undisturbed)
    assert done(tmp_path)["fingerprint"] == done(undisturbed)["fingerprint"]


def test_a_signal_in_the_last_step_ends_the_stage_and_is_not_lost(undisturbed, tmp_path):
    with pytest.raises(Preempted, match="toy: finished"):
        run(tmp_path, **cut_at(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert done(tmp_path)["fingerprint"] == done(undisturbed)["fingerprint"]


def saved_steps(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def rollouts(mesh, made):
    """A source with a rollout of three steps in hand, made from the parameters there were; none is ever saved."""
    held = {}

    def source(n, state):
        if n % 3 == 0:
            made.append(n)
            shift = float(jnp.sum(state.params["down_F"]))
            held["y"], held["coef"] = rows(n)["y"] + np.float32(shift), state.extras["kl_coef"] * 1.1
        return Drawn(put_batch(rows(n) | {"y": held["y"]}, mesh), {"kl_coef": held["coef"] + 0})

    return {"source": source, "boundary": lambda n: n % 3 == 0}


def test_checkpoints_of_a_source_with_a_rollout_in_hand_stand_between_rollouts(tmp_path):
    mesh, made = mesh_of(1, 1, 1), []
    config = settings(every=2, keep=9)
    run(tmp_path / "whole", config=config, steps=8, **rollouts(mesh, made))
    assert saved_steps(tmp_path / "whole") == [3, 6, 8] and made == [0, 3, 6]

    changes, folder = rollouts(mesh, made), tmp_path / "cut"

    def stopped(n, state):
        if n == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return changes["source"](n, state)

    with pytest.raises(Preempted, match="after step 6 of 8"):
        run(folder, config=config, steps=8, **(changes | {"source": stopped}))
    made.clear()
    run(folder, config=config, steps=8, **rollouts(mesh, made))
    assert made == [6] and lines(folder) == lines(tmp_path / "whole")
    assert done(folder)["fingerprint"] == done(tmp_path / "whole")["fingerprint"]


def measured(values):
    """Evaluations that say what they are told to, one after the other."""
    left = iter(values)
    return {"evaluate": lambda params: {"error": next(left)}}


@pytest.mark.parametrize(("values", "step"), [((2.0, 1.0, 3.0, 4.0), 8), ((2.0, 2.0, 2.0, 2.0), 4)])
def test_best_hands_over_the_best_evaluation_however_old(tmp_path, values, step):
    config = settings(every=1, keep=1, best="best")
    run(tmp_path / "best", config=config, steps=15, **measured(values))
    assert saved_steps(tmp_path / "best") == [step, 15]
    finished = done(tmp_path / "best")
    assert (finished["trained"], finished["tokens"]) == (15, 15 * ROWS)  # not those of the best step alone
    run(tmp_path / "short", steps=step)
    assert finished["step"] == step and finished["fingerprint"] == done(tmp_path / "short")["fingerprint"]
    run(tmp_path / "last", config=settings(), steps=15, **measured(values))
    assert done(tmp_path / "last")["step"] == 15


def test_an_evaluation_that_is_not_finite_is_null_and_never_the_best(tmp_path):
    said = run(
        tmp_path,
        config=settings(best="best"),
        steps=12,
        **measured((math.nan, 3.0, math.inf)),
    )
    assert "toy step 4/12  eval  error not finite" in said
    evals = {line["step"]: line["eval"] for line in lines(tmp_path) if "eval" in line}
    assert evals == {4: {"error": None}, 8: {"error": 3.0}, 12: {"error": None}}
    assert done(tmp_path)["step"] == 8


def test_bad_batches_are_null_in_the_log_and_counted_in_the_end(tmp_path):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        source = stage(mesh).source

    def bad(n, state):
        drawn = source(n, state)
        return drawn._replace(batch={**drawn.batch, "y": drawn.batch["y"] * jnp.nan}) if n in (2, 5) else drawn

    with pytest.raises(Cut):
        run(tmp_path, source=lambda n, state: power_goes() if n == 7 else bad(n, state))
    run(tmp_path, source=bad)
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["loss"] is None for line in found] == [n in (2, 5) for n in range(STEPS)]
    assert [line["skipped"] for line in found] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert done(tmp_path)["skipped"] == 2 and done(tmp_path)["step"] == 9


def test_a_damaged_checkpoint_costs_its_steps_and_is_told(undisturbed, tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, **cut_at(7, power_goes))
    for file in (tmp_path / "checkpoints" / "6").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert "damaged checkpoint, now called damaged-6" in run(tmp_path)
    assert lines(tmp_path) == lines(undisturbed)
    assert done(tmp_path)["fingerprint"] == done(undisturbed)["fingerprint"]


def test_finish_is_the_last_word_on_the_parameters(tmp_path):
    mesh = mesh_of(2, 2, 2)
    run(tmp_path, shape=(2, 2, 2), steps=2, finish=lambda state: {"down_F": state.params["down_F"] * 0})
    with jax.set_mesh(mesh):
        target = {"down_F": stage(mesh).abstract["down_F"]}
        assert float(jnp.sum(load_params(tmp_path / "params", target)["down_F"])) == 0.0
    assert done(tmp_path)["params"] == 8


def test_a_save_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "wait", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert not (tmp_path / "done.json").exists()


def test_the_step_is_called_without_copies_from_the_host(tmp_path):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        plain = stage(mesh, source=lambda n, state: Drawn(rows(n), state.extras))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            train(plain, tmp_path, settings(), {}, Console(file=io.StringIO()))


def test_warnings_are_told_once_whatever_interrupts_the_run(tmp_path):
    """A limit that most of the toy's gradients pass: the resumed run goes on where the watch was."""
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        source = stage(mesh).source

    def spoilt(n, state):
        drawn = source(n, state)
        return drawn._replace(batch={**drawn.batch, "y": drawn.batch["y"] * jnp.nan}) if n in (2, 5) else drawn

    def cut(n, state):
        return power_goes() if n == 7 else spoilt(n, state)

    limits = Limits(updates=2, calm=1, loss=0.9)
    said = run(tmp_path / "whole", source=spoilt, limits=limits)
    kept = (tmp_path / "whole" / "warnings.jsonl").read_text()
    notices = [json.loads(line) for line in kept.splitlines()]
    assert [notice["step"] for notice in notices if notice["warning"] == "not finite"] == [3]
    assert all(f"warning: {notice['text']}" in said for notice in notices)
    assert notices[0].keys() == {"step", "warning", "value", "limit", "text"}
    with pytest.raises(Cut):
        run(tmp_path / "cut", source=cut, limits=limits)
    said = run(tmp_path / "cut", source=spoilt, limits=limits)
    assert (tmp_path / "cut" / "warnings.jsonl").read_text() == kept
    assert "step 3:" not in said  # of before the checkpoint
