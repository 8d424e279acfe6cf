"""Where finished models lie, and how they are loaded.

Reads files.
"""

from __future__ import annotations

from pathlib import Path

import jax

from jaxgpt.api.model import Model
from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, nearest
from jaxgpt.mesh import make_mesh
from jaxgpt.models.net import Params
from jaxgpt.stages.run import STAGES
from jaxgpt.train.checkpoint import abstract, load_checkpoint, load_params, params_meta

BASE = {"base": "pretrain"}
"""Another name of a stage."""


def finished(run: Path) -> list[str]:
    """Names of the stages of a run that have reached their end, in order."""
    return [name for name in STAGES if (run / name / "done.json").is_file()]


def find_stage(path: Path, stage: str | None = None) -> Path:
    """The folder of a finished stage: `path` itself, one named ("base" is pretrain), or the run's last language model.

    Raises UserError where there is none.
    """
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such folder.{nearest(path.name, siblings)}")
    trained = (path / "params").is_dir()
    if stage is None and trained:
        return path
    begun = (path / "checkpoints").is_dir()
    if stage is None and begun:
        raise UserError(f"{path} is not finished; the command that began it goes on with it")
    run = path.parent if trained or begun else path
    done = finished(run)
    if stage is None:
        speaking = [name for name in done if name != "reward"] or done
        if speaking:
            return run / speaking[-1]
        raise UserError(f"{run}: no finished stage there; expected the folder of a run, such as runs/meadow")
    name = BASE.get(stage, stage)
    if name in done:
        return run / name
    known = f"Finished there: {', '.join(done) or 'nothing'}"
    if name not in STAGES:
        raise UserError(f"'{stage}': no such stage.{nearest(stage, (*STAGES, *BASE))} {known}")
    raise UserError(f"{run}: stage {name} is not finished. {known}")


def load(path: str | Path, stage: str | None = None, mesh: MeshConfig | None = None) -> Model:
    """Loads a model: a finished stage's folder (runs/meadow/sft), a run's, whose last language model is taken, or one
    checkpoint of a stage, finished or not (runs/meadow/sft/checkpoints/100).

    The mesh defaults to one device. Raises UserError where there is no such model, or it is damaged.
    """
    devices, path = make_mesh(mesh or MeshConfig(data=1, fsdp=1, tensor=1)), Path(path)
    if path.parent.name == "checkpoints" and path.is_dir() and stage is None:
        folder, home = path, path.parent.parent.parent / "tokenizer"
        with jax.set_mesh(devices):
            tree, host = load_checkpoint(path)
        meta, params = host.get("model", {}), tree["params"].get("policy", tree["params"])

        def read(target: Params) -> Params:
            return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, abstract(target))

    else:
        folder = find_stage(path, stage)
        meta, home = params_meta(folder / "params"), folder.parent / "tokenizer"

        def read(target: Params) -> Params:
            return load_params(folder / "params", target)

    lacking = [key for key in ("kind", "model", "vocab", "tokenizer") if key not in meta]
    if lacking:
        raise UserError(f"{folder}: not written by jaxgpt (no {', '.join(lacking)} beside the arrays)")
    tokenizer = Tokenizer.load(home)
    if tokenizer.hash != meta["tokenizer"]:
        raise UserError(f"{home} is not the tokenizer that {folder} was trained with")
    return Model(folder, meta["kind"], ModelConfig(**meta["model"]), meta["vocab"], tokenizer, devices, read)


def keep_compiled() -> None:
    """Keeps compiled programs between processes, unless the environment of jax already says where."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxgpt" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
