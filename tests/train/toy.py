"""A stage small enough to run many times: a two-layer regression, its batches a function of the step."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from rich.console import Console

from jaxgpt.config.schema import CheckpointConfig, MeshConfig, PretrainConfig
from jaxgpt.losses import Ratio
from jaxgpt.mesh import make_mesh, put_batch
from jaxgpt.train.loop import Drawn, Stage, train
from jaxgpt.train.state import State, initial_state

ROWS, WIDTH, HIDDEN = 8, 4, 8
TX = optax.adamw(1e-2)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    """Of (data, fsdp, tensor), and context where it is not 1."""
    data, fsdp, tensor, context = (*shape, 1)[:4]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor))


def init(hidden: int = HIDDEN) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return {
        "up_DF": jax.random.normal(keys[0], (WIDTH, hidden), out_sharding=P("fsdp", "tensor")),
        "down_F": jax.random.normal(keys[1], (hidden,), out_sharding=P("tensor")),
    }


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[Ratio, dict[str, Ratio]]:
    whole = {name: jax.sharding.reshard(leaf, P(*(None,) * leaf.ndim)) for name, leaf in params.items()}
    guess_B = jnp.tanh(batch["x"] @ whole["up_DF"]) @ whole["down_F"]
    error = Ratio.of(jnp.square(guess_B - batch["y"]), batch["weight"])
    return error, {"error": error}


def rows(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(1)), "weight": rng.integers(0, 3, ROWS).astype(np.float32)}


def state_on(mesh: jax.sharding.Mesh, hidden: int = HIDDEN, tx: optax.GradientTransformation = TX) -> State:
    with jax.set_mesh(mesh):
        extras = {"kl_coef": jnp.float32(0.1)}
        return jax.jit(lambda: initial_state(init(hidden), tx, extras))()


def target_on(mesh: jax.sharding.Mesh, hidden: int = HIDDEN) -> State:
    with jax.set_mesh(mesh):
        return jax.eval_shape(lambda: initial_state(init(hidden), TX, {"kl_coef": jnp.float32(0.1)}))


def stage(mesh: jax.sharding.Mesh, steps: int = 9, **changes: Any) -> Stage:
    """Call under `jax.set_mesh(mesh)`."""

    def source(step: int, state: State) -> Drawn:
        coef = state.extras["kl_coef"] * 1.5
        return Drawn(put_batch(rows(step), mesh), {"kl_coef": coef}, {"coef": coef + 0})

    whole = put_batch(rows(999), mesh)
    measure = jax.jit(lambda params: loss(params, whole)[0].mean)
    value = Stage(
        name="toy",
        init=jax.jit(init),
        abstract=jax.eval_shape(init),
        loss=loss,
        source=source,
        tx=TX,
        schedule=lambda count: jnp.float32(1e-2) / (1 + count),
        steps=steps,
        tokens_per_step=ROWS,
        evaluate=lambda params: {"error": float(measure(params))},
        quality=lambda figures: -figures["error"],
        extras={"kl_coef": 0.1},
    )
    return dataclasses.replace(value, **changes)


def settings(every: int = 3, keep: int = 2, **changes: Any) -> PretrainConfig:
    checkpoint = CheckpointConfig(every=every, keep=keep)
    return PretrainConfig(**{"checkpoint": checkpoint, "eval_every": 4, "log_every": 2} | changes)


def run(folder: Path, shape: tuple[int, ...] = (1, 1, 1), config: PretrainConfig | None = None, **changes: Any) -> str:
    """Trains the toy to its end; what it printed."""
    mesh, out = mesh_of(*shape), io.StringIO()
    with jax.set_mesh(mesh):
        train(stage(mesh, **changes), folder, config or settings(), {"kind": "toy"}, Console(file=out, width=200))
    return out.getvalue()


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without the times."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in read]


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())
