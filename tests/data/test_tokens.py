"""Shards hold every document as BOS + text + EOS; rows cut them so that every token is a target once."""

import hashlib
import json

import numpy as np
import pytest

from jaxgpt.config.schema import DataConfig, TokenizerConfig
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.data.tokens import Rows, Shard, is_current, write_tokens
from jaxgpt.errors import UserError

TOKENIZER = train_tokenizer(["the cat sat on the mat.\n"] * 20, TokenizerConfig(vocab=300))
DOCUMENTS = [f"the cat {i}\n sat " + "on the mat " * (i % 7) for i in range(200)]


def stream(documents):
    return [i for text in documents for i in [TOKENIZER.bos, *TOKENIZER.encode(text), TOKENIZER.eos]]


def held_out(text, fraction):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def test_documents_are_held_out_by_their_hash(tmp_path):
    write_tokens([*DOCUMENTS, "", " \n"], TOKENIZER, tmp_path / "web", 0.2, "document")
    train, val = (Shard.open(tmp_path / "web", split) for split in ("train", "val"))
    inside = [[text for text in DOCUMENTS if held_out(text, 0.2) == want] for want in (False, True)]
    for shard, documents in zip((train, val), inside, strict=True):
        assert 20 < len(documents) < 180
        assert shard.tokens.tolist() == stream(documents)
        assert [shard.tokens[start] for start in shard.starts] == [TOKENIZER.bos] * len(documents)
        assert shard.bytes == sum(len(text.encode()) for text in documents)
    index = json.loads((tmp_path / "web" / "index.json").read_text())
    assert (index["dtype"], index["empty_documents"], index["unknown_tokens"]) == ("uint16", 2, 0)
    assert not (tmp_path / "web.part").exists()


def test_the_split_does_not_depend_on_order_or_neighbours(tmp_path):
    write_tokens(DOCUMENTS[::-1][:100], TOKENIZER, tmp_path / "web", 0.2, "document")
    wanted = [text for text in DOCUMENTS[::-1][:100] if held_out(text, 0.2)]
    assert Shard.open(tmp_path / "web", "val").tokens.tolist() == stream(wanted)


def test_a_lone_document_is_trained_on(tmp_path):
    write_tokens(DOCUMENTS[:1], TOKENIZER, tmp_path / "web", 1.0, "document")
    assert Shard.open(tmp_path / "web", "train").starts.size == 1


@pytest.mark.parametrize(("fraction", "train", "val"), [(0.0, 3, 0), (1e-9, 2, 1), (1 - 1e-9, 1, 2)])
def test_few_documents_still_give_both_splits(tmp_path, fraction, train, val):
    write_tokens(DOCUMENTS[:3], TOKENIZER, tmp_path / "web", fraction, "document")
    assert Shard.open(tmp_path / "web", "train").starts.size == train
    assert Shard.open(tmp_path / "web", "val").starts.size == val


def test_the_tail_is_the_last_tokens(tmp_path):
    write_tokens(DOCUMENTS, TOKENIZER, tmp_path / "web", 0.1, "tail")
    whole = stream(DOCUMENTS)
    cut = len(whole) - round(len(whole) * 0.1)
    train, val = (Shard.open(tmp_path / "web", split) for split in ("train", "val"))
    assert (train.tokens.tolist(), val.tokens.tolist()) == (whole[:cut], whole[cut:])
    assert val.bytes == len(TOKENIZER.decode(whole[cut:]).encode())
    assert train.bytes + val.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert val.starts[0] == 0
    assert [val.tokens[start] for start in val.starts[1:]] == [TOKENIZER.bos] * (len(val.starts) - 1)


def test_a_long_document_is_encoded_in_blocks_and_stays_one(tmp_path):
    book = "".join(f"the cat {i} sat\n" for i in range(150_000))
    write_tokens([book, "the mat"], TOKENIZER, tmp_path / "book", 0.0, "tail")
    shard = Shard.open(tmp_path / "book", "train")
    assert len(shard.starts) == 2
    assert TOKENIZER.decode(shard.tokens[: shard.starts[1]]) == book
    assert (shard.tokens == TOKENIZER.bos).sum() == (shard.tokens == TOKENIZER.eos).sum() == 2


def test_is_current_only_for_the_same_inputs_undamaged(tmp_path):
    folder = tmp_path / "web"
    config = DataConfig(val_fraction=0.2)
    assert not is_current(folder, TOKENIZER, "h", config)
    write_tokens(DOCUMENTS, TOKENIZER, folder, 0.2, "document", source_hash="h")
    assert is_current(folder, TOKENIZER, "h", config)
    assert not is_current(folder, TOKENIZER, "other", config)
    assert not is_current(folder, TOKENIZER, "h", DataConfig(val_fraction=0.3))
    assert not is_current(folder, TOKENIZER, "h", DataConfig(val_fraction=0.2, val_split="tail"))
    assert not is_current(folder, train_tokenizer(["other text\n"], TokenizerConfig(vocab=290)), "h", config)
    with (folder / "val.bin").open("r+b") as file:
        file.truncate(10)
    assert not is_current(folder, TOKENIZER, "h", config)


def test_damage_names_the_file(tmp_path):
    folder = tmp_path / "web"
    write_tokens(DOCUMENTS, TOKENIZER, folder, 0.2, "document")
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"train\.bin has 100 bytes, expected \d+; remove"):
        Shard.open(folder, "train")
    (folder / "val.starts.bin").unlink()
    with pytest.raises(UserError, match=r"val\.starts\.bin is missing"):
        Shard.open(folder, "val")
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        Shard.open(folder, "val")
    with pytest.raises(UserError, match=r"none/index\.json does not exist"):
        Shard.open(tmp_path / "none", "val")


def test_a_write_that_fails_leaves_the_old_shards(tmp_path):
    folder = tmp_path / "web"
    write_tokens(DOCUMENTS, TOKENIZER, folder, 0.2, "document", source_hash="h")

    def broken():
        yield DOCUMENTS[0]
        raise UserError("web.jsonl:2: not JSON")

    with pytest.raises(UserError, match="web"):
        write_tokens(broken(), TOKENIZER, folder, 0.2, "document")
    with pytest.raises(UserError, match="source web: there is no text in its files"):
        write_tokens([""], TOKENIZER, folder, 0.2, "document")
    assert is_current(folder, TOKENIZER, "h", DataConfig(val_fraction=0.2))


def reference_row(shard, context, row):
    """One row by a plain loop."""
    starts = set(shard.starts.tolist())
    first = row * context
    out = {"tokens": [], "targets": [], "mask": [], "segments": [], "positions": []}
    segment, position = 0, 0
    for at in range(first, first + context):
        begins = at == first or at in starts
        segment += begins
        position = 0 if begins else position + 1
        out["tokens"].append(shard.tokens[at])
        out["targets"].append(shard.tokens[at + 1])
        out["mask"].append(float(at + 1 not in starts))
        out["segments"].append(segment)
        out["positions"].append(position)
    return out


@pytest.mark.parametrize("context", [1, 7, 64, 500])
def test_rows_agree_with_a_plain_loop(tmp_path, context):
    write_tokens(DOCUMENTS, TOKENIZER, tmp_path / "web", 0.0, "tail")
    shard = Shard.open(tmp_path / "web", "train")
    rows = Rows(shard, context)
    assert len(rows) == (len(shard) - 1) // context
    chosen = np.array([len(rows) - 1, 0, len(rows) // 2])
    for at, row in enumerate(chosen):
        for key, value in reference_row(shard, context, int(row)).items():
            assert rows.gather(chosen)[key][at].tolist() == value
            assert rows[row][key].dtype == (np.float32 if key == "mask" else np.int32)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_every_token_is_a_target_once(tmp_path):
    write_tokens(DOCUMENTS, TOKENIZER, tmp_path / "web", 0.0, "tail")
    shard = Shard.open(tmp_path / "web", "train")
    rows = Rows(shard, 64, partial=True)
    batch = rows.gather(np.arange(len(rows)))
    real = batch["segments"] > 0
    assert batch["targets"][real].tolist() == shard.tokens[1:].tolist()
    assert batch["mask"].sum() == len(shard) - len(shard.starts)
    assert not batch["mask"][~real].any()
    assert not batch["tokens"][~real].any()
    for key, value in Rows(shard, 64)[3].items():
        assert np.array_equal(rows[3][key], value)


def test_a_source_too_short_is_named_with_its_tokens(tmp_path):
    write_tokens(["the cat"], TOKENIZER, tmp_path / "tiny", 0.5, "document")
    shard = Shard.open(tmp_path / "tiny", "train")
    with pytest.raises(UserError, match=rf"source tiny \(train\) has {len(shard)} tokens, too few for one row of 64"):
        Rows(shard, 64)
    assert len(Rows(shard, 64, partial=True)) == 1
    with pytest.raises(UserError, match=r"source tiny \(val\) has 0 tokens"):
        Rows(Shard.open(tmp_path / "tiny", "val"), 64, partial=True)


def test_without_a_bos_documents_begin_with_the_end_token(tmp_path):
    plain = Tokenizer(SentencePieceModel(TOKENIZER.engine.data, {"add_bos_token": False}))
    write_tokens(["the cat", "the mat"], plain, tmp_path / "s", 0.0, "document")
    shard = Shard.open(tmp_path / "s", "train")
    eos = plain.eos
    assert shard.tokens.tolist() == [eos, *plain.encode("the cat"), eos, eos, *plain.encode("the mat"), eos]
    assert [shard.tokens[start] for start in shard.starts] == [eos, eos]
