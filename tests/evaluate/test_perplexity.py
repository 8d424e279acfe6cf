"""Perplexity of text: every token predicted once with enough context, and the same however it is batched."""

from __future__ import annotations

import copy
import gzip
import json
import math

import jax
import numpy as np
import pytest
from tiny_run import CONTEXT, load_once, make_run

from jaxgpt.api import Model, load
from jaxgpt.config.schema import MeshConfig
from jaxgpt.data.records import read_texts
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.evaluate.perplexity import TextScore, score_texts, windows
from jaxgpt.train.checkpoint import abstract


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.getbasetemp() / "perplexity_run")


@pytest.fixture(scope="module")
def model(run):
    return load_once(run / "pretrain")


def test_every_token_is_predicted_once_with_half_a_context_before_it_where_there_is_that_much():
    for context in range(1, 12):
        for length in range(1, 4 * context + 3):
            found = list(windows(length, context))
            scored = [at for window in found for at in range(window.scored, window.end)]
            assert scored == list(range(1, length))
            for first, begins, end in found:
                assert 0 <= first < begins < end <= length and end - first <= context + 1
                assert begins - first >= min(begins, context / 2)
            assert len(found) <= math.ceil(length / ((context + 1) // 2))


def test_a_document_that_fits_costs_what_one_pass_says(model):
    text = "The cat met a dog. It is black.\n"
    tokens = model.encode(text)
    assert len(tokens) <= CONTEXT
    found = score_texts(model, [text], batch=4)
    assert found.nats == pytest.approx(-float(model.logprobs([tokens])[0].sum()), rel=1e-5)
    assert (found.documents, found.tokens, found.bytes) == (1, len(tokens) - 1, len(text))
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / len(text))


def test_a_longer_document_costs_what_a_loop_over_its_tokens_says(model):
    """Token by token, from the definition of the convention."""
    text = "Tell me a story. One day the cat met a dog. " * 12
    tokens = model.encode(text)
    assert len(tokens) > 2.5 * CONTEXT
    reach, half = CONTEXT + 1, (CONTEXT + 1) // 2
    expected = 0.0
    for at in range(1, len(tokens)):
        if at < reach:
            first = 0
        else:  # the window that ends with this half context, or with the document
            first = min(reach + (at - reach) // half * half + half, len(tokens)) - reach
        assert at - first >= CONTEXT / 2 or first == 0
        row = model.logits([tokens[first:at]])[0, -1].astype(np.float64)
        expected += row.max() + np.log(np.exp(row - row.max()).sum()) - row[tokens[at]]
    whole = score_texts(model, [text], batch=3)
    assert whole.nats == pytest.approx(expected, rel=1e-5)
    assert whole.tokens == len(tokens) - 1 and whole.bytes == len(text)


def test_batches_and_order_change_nothing(model):
    texts = [f"{'The cat is black. ' * n}{n}" for n in (1, 30, 2, 7, 0, 12, 3)]
    alone = sum((score_texts(model, [text], batch=1) for text in texts), TextScore())
    for batch, order in ((1, 1), (3, -1), (16, 1)):
        found = score_texts(model, texts[::order], batch)
        assert found.values() == pytest.approx(alone.values(), rel=1e-5)


def test_the_mesh_changes_nothing(run, model):
    texts = ["The cat met a dog. " * n for n in (1, 9, 20)]
    wide = load(run / "pretrain", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert score_texts(wide, texts, 5).values() == pytest.approx(score_texts(model, texts, 5).values(), rel=1e-5)


def test_without_a_bos_the_end_token_stands_in_front(model):
    text = "The cat met a dog."
    other = copy.copy(model)
    other.tokenizer = Tokenizer(SentencePieceModel(model.tokenizer.engine.data, {"add_bos_token": False}))
    ids = [model.tokenizer.eos, *model.tokenizer.encode(text)]
    found = score_texts(other, [text], batch=4)
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(-float(model.logprobs([ids])[0].sum()), rel=1e-5)


def test_bytes_are_those_of_utf8_and_unknown_characters_are_counted(model):
    found = score_texts(model, ["naïve 猫 🐈"], 1)
    assert found.bytes == 5 + 1 + 1 + 3 + 1 + 4 and found.unknown == 0


def test_an_untrained_guess_costs_log_of_the_vocabulary(model):
    """Uniform logits: bits per byte follow from the number of tokens alone."""

    def read(target):
        placed = abstract(target)
        return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), placed)

    uniform = Model(model.folder, "language", model.config, model.vocab, model.tokenizer, model.mesh, read)
    found = score_texts(uniform, ["The cat is black."], 1)
    assert found.perplexity == pytest.approx(model.vocab, rel=1e-5)


def test_files_are_read_as_documents(model, tmp_path):
    (tmp_path / "a.txt").write_text("The cat is black.")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in ("One day.", "", "A dog.")))
    found = score_texts(model, read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"]), 2)
    assert found.documents == 3 and found.bytes == 17 + 8 + 6


def test_nothing_to_score_is_not_a_number_rather_than_perfect(model):
    found = score_texts(model, [], 2)
    assert found == TextScore() and np.isnan(found.perplexity) and np.isnan(found.bits_per_byte)
