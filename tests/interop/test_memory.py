"""A folder goes onto the devices array by array: beside the parameters themselves the host holds one array at most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxgpt.config.schema import MeshConfig
from jaxgpt.interop.folder import INDEX, write_json
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.layout import tensor_shape
from jaxgpt.interop.tensor_files import write_tensors
from jaxgpt.interop.weights import parts_of, sizes_of
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model

SHARDS = 6
LLAMA = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "intermediate_size": 1408,
    "max_position_embeddings": 512,
}
READ = """
import json, sys, jax
from jaxgpt.config.schema import MeshConfig
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import read_params
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model

def peak():  # of resident memory so far, bytes
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

with jax.set_mesh(make_mesh(MeshConfig())):
    foreign = Foreign.describe(sys.argv[1])
    target = language_model(foreign.model, foreign.model.vocab).abstract
    before = peak()
    params = read_params(foreign, target)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"devices": jax.device_count(), "arrays": arrays, "beside": peak() - before - arrays}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """55 million parameters in bfloat16, in six shards: 110 MB."""
    home = tmp_path_factory.mktemp("large")
    write_json(home / "config.json", LLAMA)
    foreign = Foreign.describe(home)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))):
        parts = parts_of(foreign.family, language_model(foreign.model, foreign.model.vocab).abstract)
    shapes = {name: tensor_shape(found[0].layout, sizes_of(foreign.model)) for name, found in parts.items()}
    where = {name: f"model-{1 + i % SHARDS:05d}-of-{SHARDS:05d}.safetensors" for i, name in enumerate(shapes)}
    for file in set(where.values()):
        inside = {name: shape for name, shape in shapes.items() if where[name] == file}
        write_tensors(home / file, inside, "BF16", lambda name: np.ones(shapes[name], ml_dtypes.bfloat16))
    write_json(home / INDEX, {"metadata": {}, "weight_map": where})
    return home


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("devices", [1, 8])
def test_the_host_never_holds_the_folder(folder, devices):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", READ, str(folder)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    read = json.loads(found.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert read["devices"] == devices and read["arrays"] == pytest.approx(2 * size, rel=0.01)
    assert read["beside"] < 0.7 * size, (
        f"{read['beside'] / 1e6:.0f} MB beside the arrays, of a folder of {size / 1e6:.0f}"
    )
