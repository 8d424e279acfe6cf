"""Every family computes what transformers computes, in both directions; and a round trip changes no bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from peers import CASES, TIME, VOCAB, loaded, mesh, our_logits, random_peer, read, saved, their_logits, torch

from jaxgpt.api import Model
from jaxgpt.interop.families import family_for
from jaxgpt.interop.folder import write_json
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import paths_of, read_params, write_weights

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, TIME))


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """(name, model of transformers, the folder it wrote)."""
    model = random_peer(request.param)
    return request.param, model, saved(model, tmp_path_factory.mktemp("theirs") / request.param)


def test_logits_are_those_of_transformers(case):
    _, model, folder = case
    with jax.set_mesh(mesh()):
        ours = our_logits(*read(folder), TOKENS)
    theirs = their_logits(model, TOKENS)
    assert np.abs(theirs).max() > 0.5, "logits near zero would prove nothing"
    assert np.abs(ours - theirs).max() < 5e-5


def test_a_round_trip_changes_no_bit(case, tmp_path):
    """transformers -> ours on eight devices -> files of at most 20 kB -> transformers and ours again."""
    _, model, folder = case
    sharded = mesh(data=2, fsdp=2, tensor=2 if Foreign.describe(folder).model.kv_heads % 2 == 0 else 1)
    with jax.set_mesh(sharded):
        ours, params = read(folder)
        family = family_for(ours)
        files = write_weights(tmp_path, family, ours, params, "F32", 20_000)
        written = {"architectures": [family.causal], "model_type": family.type, **family.write(ours)}
        write_json(tmp_path / "config.json", written)
        again, back = read(tmp_path)
    assert len(files) > 3 and (tmp_path / "model.safetensors.index.json").exists()
    assert Foreign.describe(tmp_path).model == again
    for path, array in paths_of(params).items():
        assert np.array_equal(array, paths_of(back)[path]), path
    theirs = loaded(tmp_path)
    assert type(theirs) is type(model)
    ours_there = theirs.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours_there[key]), key
    assert np.abs(their_logits(theirs, TOKENS) - their_logits(model, TOKENS)).max() < 1e-5  # gelu_fast is gelu_new


def test_greedy_continuations_of_ragged_prompts_are_those_of_transformers(case):
    """64 tokens behind prompts of different lengths, which both sides pad on the left."""
    _, model, folder = case
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :17].tolist(), TOKENS[2, :30].tolist()]
    foreign = Foreign.describe(folder)
    nothing = SimpleNamespace(ends=(), pad=3, size=VOCAB, decode=lambda tokens: "")  # no token ends a response
    ours = Model(
        folder, "language", foreign.model, VOCAB, nothing, mesh(), lambda target: read_params(foreign, target)
    ).generate(prompts, max_tokens=64, temperature=0)
    width = max(map(len, prompts))
    tokens = torch.tensor([[3] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    theirs = model.generate(tokens, attention_mask=mask, **how)[:, width:].tolist()
    assert [one.tokens for one in ours] == theirs
    assert len({token for row in theirs for token in row}) > 2


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2", "gpt-neox", "palm"])
def test_bfloat16_folders_are_read_as_the_numbers_they_hold(name, tmp_path):
    model = random_peer(name).to(torch.bfloat16)
    folder = saved(model, tmp_path / "theirs")
    with jax.set_mesh(mesh()):
        ours, params = read(folder)
        family = family_for(ours)
        write_weights(tmp_path, family, ours, params, "BF16", 10**9)
        assert np.abs(our_logits(ours, params, TOKENS) - their_logits(loaded(folder), TOKENS)).max() < 5e-5
    write_json(
        tmp_path / "config.json", {"model_type": family.type, "architectures": [family.causal], **family.write(ours)}
    )
    there = loaded(tmp_path).state_dict()  # in float32
    assert all(torch.equal(tensor.float(), there[key].float()) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_a_folder_of_the_inner_model_has_other_names(name, tmp_path):
    """GPT-2 is published as GPT2Model: without the prefix. Where the output matrix is not shared, it is missed."""
    model = random_peer(name)
    inner = model.base_model
    folder = saved(inner, tmp_path / "inner")
    assert json.loads((folder / "config.json").read_text())["architectures"][0].endswith("Model")
    with jax.set_mesh(mesh()):
        if name == "gpt2":
            assert np.abs(our_logits(*read(folder), TOKENS) - their_logits(model, TOKENS)).max() < 5e-5
        else:
            with pytest.raises(Exception, match=r"(lm_head|embed_out).weight is not there, expected \[96, 32\]"):
                read(folder)
