"""What comes back from a checkpoint is what was saved, bit for bit and on any mesh, or it is not taken at all."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import mesh_of, state_on, target_on

from jaxgpt.errors import UserError
from jaxgpt.train.checkpoint import Checkpoints, load_params, params_meta, save_params
from jaxgpt.train.state import State, fingerprint

EIGHT, ONE = (2, 2, 2), (1, 1, 1)


@pytest.fixture(scope="module")
def state() -> State:
    return state_on(mesh_of(*EIGHT))


def at(state: State, step: int) -> State:
    """The same state at another step."""
    return state.replace(step=jax.numpy.int32(step), skipped=jax.numpy.int32(step // 2))


def saved(folder: Path, state: State, *steps: int, keep: int = 5, best: int | None = None) -> Path:
    with jax.set_mesh(mesh_of(*EIGHT)):
        checkpoints = Checkpoints(folder, keep)
        for step in steps:
            checkpoints.save(at(state, step), {"seconds": step / 7, "best": None}, best)
        checkpoints.close()
    return folder


def restored(folder: Path, hidden: int = 8, shape: tuple[int, ...] = ONE, step: int | None = None):
    """What a new process would find, and what it would say."""
    said: list[str] = []
    with jax.set_mesh(mesh_of(*shape)):
        checkpoints = Checkpoints(folder, 5, said.append)
        try:
            return checkpoints.restore(target_on(mesh_of(*shape), hidden), step), checkpoints.steps, said
        finally:
            checkpoints.close()


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1 << 4
        file.write_bytes(data)


@pytest.mark.parametrize("shape", [ONE, EIGHT, (1, 4, 2), (8, 1, 1)])
def test_any_mesh_restores_the_same_bits(tmp_path, state, shape):
    saved(tmp_path, state, 3)
    (found, host), steps, said = restored(tmp_path, shape=shape)
    assert (steps, said, host) == ([3], [], {"seconds": 3 / 7, "best": None})
    assert fingerprint(found) == fingerprint(at(state, 3))
    assert (int(found.step), int(found.skipped), float(found.extras["kl_coef"])) == (3, 1, np.float32(0.1))
    assert found.params["up_DF"].sharding.mesh.size == np.prod(shape)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restored(tmp_path / "new")[0] is None


def test_the_latest_stay_and_the_best_beside_them(tmp_path, state):
    assert restored(saved(tmp_path / "a", state, 1, 2, 3, 4, 5, keep=2))[1] == [4, 5]
    assert restored(saved(tmp_path / "b", state, 1, 2, 3, 4, 5, keep=2, best=2))[1] == [2, 4, 5]
    (found, _), _, _ = restored(tmp_path / "b", step=2)
    assert int(found.step) == 2


def every_file(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 0)


def arrays_in(folder: Path) -> Path:
    """The largest file of array data."""
    return max((f for f in every_file(folder) if f.parent.name == "d"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_damage_anywhere_is_seen_or_does_not_matter(tmp_path, state, how):
    whole = saved(tmp_path / "whole", state, 2, 4)
    size = len(every_file(whole / "4"))
    fallen = []
    for number in range(size):
        folder = shutil.copytree(whole, tmp_path / str(number))
        file = every_file(folder / "4")[number]
        damage(file, how)
        (found, host), steps, said = restored(folder)
        step = int(found.step)
        assert fingerprint(found) == fingerprint(at(state, step)) and host["seconds"] == step / 7
        if step == 2:
            fallen.append(file.relative_to(folder / "4").parts)
            assert steps == [2] and (folder / "damaged-4").is_dir() and not (folder / "4").exists()
            assert len(said) == 1 and "damaged-4" in said[0] and f"{folder}/4: " in said[0]
    hit = {"d" in parts or parts[-1] == "_CHECKPOINT_METADATA" for parts in fallen}
    assert True in hit  # the arrays and what was said of them
    assert any("d" in parts for parts in fallen)


def test_a_name_already_taken_is_not_written_over(tmp_path, state):
    saved(tmp_path, state, 2, 4)
    for _ in range(2):
        damage(arrays_in(tmp_path / "4"), "truncated")
        assert int(restored(tmp_path)[0][0].step) == 2
        saved(tmp_path, state, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4", "damaged-4", "damaged-4+"}
    assert int(restored(tmp_path)[0][0].step) == 4


def test_where_all_are_damaged_the_run_stops(tmp_path, state):
    saved(tmp_path, state, 2, 4)
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / step / "state")
    for _ in range(2):  # and it does not begin again by itself the next time either
        with pytest.raises(UserError, match=r"every checkpoint is damaged; remove it to begin again\n.*4: .*\n.*2: "):
            restored(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_another_architecture_is_refused_and_left_alone(tmp_path, state):
    saved(tmp_path, state, 2, 4)
    said = (
        r"4 is of another architecture: params/down_F is \(8,\) float32 there, \(16,\) float32 here; params/up_DF is "
    )
    with pytest.raises(UserError, match=said):
        restored(tmp_path, hidden=16)
    assert int(restored(tmp_path)[0][0].step) == 4


def test_finished_parameters_are_verified_too(tmp_path, state):
    folder, target = tmp_path / "params", target_on(mesh_of(*ONE)).params
    left = tmp_path / "params.orbax-checkpoint-tmp-1"
    left.mkdir()
    with jax.set_mesh(mesh_of(*EIGHT)):
        mark = save_params(folder, state.params, {"kind": "toy"})
        assert mark == fingerprint(state.params)
    meta = params_meta(folder)
    assert (meta["kind"], meta["fingerprint"]) == ("toy", mark) and not left.exists()
    with jax.set_mesh(mesh_of(*ONE)):
        assert fingerprint(load_params(folder, target)) == mark
        with pytest.raises(
            UserError, match=r"another architecture: down_F is \(8,\) float32 there, \(4,\) float32 here"
        ):
            load_params(folder, {**target, "down_F": jax.ShapeDtypeStruct((4,), np.float32, sharding=None)})
        data = arrays_in(folder)
        for how in ("flipped", "truncated", "deleted"):
            damage(data, how)
            with pytest.raises(UserError, match=r"damaged .*train that stage again"):
                load_params(folder, target)
    with pytest.raises(UserError, match="no parameters there"):
        params_meta(tmp_path / "nowhere")


def test_the_description_is_plain_json(tmp_path, state):
    saved(tmp_path, state, 2)
    meta = json.loads((tmp_path / "2" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert meta["host"] == {"seconds": 2 / 7, "best": None} and len(meta["seal"]) == len(meta["layout"]) == 16
