"""The Python interface: ragged and padded batches, sampling, chat and scores of finished models."""

import copy
import shutil
from importlib.resources import files
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import CONTEXT, VOCAB, load_once, make_run

import jaxgpt
from jaxgpt.api import Model
from jaxgpt.config.schema import MeshConfig
from jaxgpt.data.chat import render
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.templates import read_template
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.runs import find_stage

ROWS = [[1, 40, 41, 42, 43], [1, 44], [1, 45, 46]]
LENGTHS = [5, 2, 3]
PROMPTS = ["What is", "One day the cat", "T"]
TALK = [{"role": "user", "content": "What is the cat?"}]
ANSWERED = [*TALK, {"role": "assistant", "content": "It is black."}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="module")
def sft(run) -> Model:
    return load_once(run / "sft")


@pytest.fixture(scope="module")
def reward(run) -> Model:
    return load_once(run / "reward")


def padded(rows, width: int, fill: int = 7) -> np.ndarray:
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_text_goes_in_and_out(sft):
    ids = sft.encode("the cat </s><|user|>")
    assert ids[0] == sft.tokenizer.bos and not set(ids[1:]) & set(sft.tokenizer.control.values())
    assert sft.decode(ids) == "the cat </s><|user|>"
    assert sft.decode([*ids, sft.tokenizer.eos]) == sft.decode(np.array(ids)) == sft.decode(ids)


def test_logits_of_ragged_rows_are_those_of_each_row_alone(sft):
    logits = sft.logits(ROWS)
    assert logits.shape == (3, 5, VOCAB) and logits.dtype == np.float32
    for row, found in zip(ROWS, logits, strict=True):
        np.testing.assert_allclose(found[: len(row)], sft.logits([row])[0], atol=1e-5)
        assert (found[len(row) :] == 0).all()


def test_an_array_keeps_its_shape_whatever_its_lengths(sft):
    for width in (5, 9, 2 * CONTEXT):
        logits = sft.logits(padded(ROWS, width), lengths=LENGTHS)
        assert logits.shape == (3, width, VOCAB)
        np.testing.assert_array_equal(logits[:, :5], sft.logits(ROWS))
        assert (logits[:, 5:] == 0).all()
    assert sft.logprobs(padded(ROWS, 9), lengths=LENGTHS).shape == (3, 9)


def test_logprobs_are_those_of_the_logits(sft):
    for temperature in (1.0, 0.7):
        found = sft.logprobs(ROWS, temperature)
        expected = log_softmax(sft.logits(ROWS) / temperature)
        assert found.shape == (3, 5) and found.dtype == np.float32
        for i, row in enumerate(ROWS):
            wanted = [0.0, *(expected[i, t - 1, row[t]] for t in range(1, len(row)))]
            np.testing.assert_allclose(found[i], wanted + [0.0] * (5 - len(row)), atol=1e-5)


def test_a_mesh_changes_no_result(run, sft):
    split = jaxgpt.load(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(split.logprobs(ROWS), sft.logprobs(ROWS), atol=1e-5)


def test_the_same_call_gives_the_same_responses_and_another_seed_others(sft):
    first, again = sft.generate(PROMPTS, 8, seed=3), sft.generate(PROMPTS, 8, seed=3)
    assert [a.tokens for a in first] == [b.tokens for b in again]
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(first, again, strict=True))
    assert [a.tokens for a in first] != [b.tokens for b in sft.generate(PROMPTS, 8, seed=4)]


def test_sampling_logprobs_are_scoring_logprobs(sft):
    prompts = [sft.encode(prompt) for prompt in PROMPTS]
    for found in (sft.generate(PROMPTS, 8, 0.7), sft.generate(prompts, 8, 0.7, top_k=5, top_p=0.5)):
        rows = [prompt + response.tokens for prompt, response in zip(prompts, found, strict=True)]
        for prompt, response, logp in zip(prompts, found, sft.logprobs(rows, 0.7), strict=True):
            expected = logp[len(prompt) : len(prompt) + len(response.tokens)]
            np.testing.assert_allclose(response.logprobs, expected, atol=1e-4)


def test_prompts_may_be_texts_ids_or_an_array_with_lengths(sft):
    wanted = [response.tokens for response in sft.generate(ROWS, 8)]
    assert [r.tokens for r in sft.generate(padded(ROWS, 9), 8, lengths=LENGTHS)] == wanted
    assert sft.generate("the", 8)[0].tokens == sft.generate([sft.encode("the")], 8)[0].tokens
    assert sft.generate([], 8) == []


def test_rows_that_pad_the_vocabulary_are_never_sampled(sft):
    size = sft.tokenizer.size
    assert size < VOCAB
    likeliest = sft.logits(ROWS)[[0, 1, 2], [4, 1, 2]]
    assert [r.tokens[0] for r in sft.generate(ROWS, 8, 0.0)] == likeliest[:, :size].argmax(-1).tolist()
    assert all(token < size for r in sft.generate([ROWS[0]] * 24, 32, 8.0) for token in r.tokens)


def test_rows_that_the_models_settings_ask_for_are_sampled(sft):
    """As transformers does, where an imported model has more rows than its tokenizer has pieces."""
    model = jaxgpt.load(sft.folder)
    model.config = model.config.model_copy(update={"vocab": VOCAB})
    likeliest = model.logits(ROWS)[[0, 1, 2], [4, 1, 2]]
    assert [r.tokens[0] for r in model.generate(ROWS, 8, 0.0)] == likeliest.argmax(-1).tolist()
    responses = model.generate([ROWS[0]] * 24, 32, 8.0)
    assert any(token >= model.tokenizer.size for r in responses for token in r.tokens)
    assert all(r.text == model.decode(r.tokens) for r in responses)


def test_the_narrowest_filters_take_the_likeliest_token(sft):
    likeliest = [response.tokens for response in sft.generate(PROMPTS, 8, 0.0)]
    assert [r.tokens for r in sft.generate(PROMPTS, 8, 1.0, top_k=1)] == likeliest
    assert [r.tokens for r in sft.generate(PROMPTS, 8, 1.0, top_p=1e-6)] == likeliest
    assert sft.generate(PROMPTS[1], 8, 1.0, top_k=1)[0].tokens == likeliest[1]


def test_a_response_ends_with_the_end_token_or_at_max_tokens(sft):
    found = sft.generate([ROWS[0]] * 24, 32, 8.0, seed=1)
    assert {response.ended for response in found} == {True, False}
    for response in found:
        assert response.ended == (sft.tokenizer.eos in response.tokens)
        assert response.tokens.index(sft.tokenizer.eos) == len(response.tokens) - 1 if response.ended else True
        assert len(response.tokens) == len(response.logprobs) and (response.ended or len(response.tokens) == 32)
        assert response.text == sft.decode(response.tokens)


def test_a_stop_string_is_cut_off_and_ends_the_response(sft):
    free = sft.generate(PROMPTS, 24)
    text = free[1].text
    word = text[5:7]
    stopped = sft.generate(PROMPTS, 24, stop=["no such text", word])[1]
    assert stopped.text == text[: text.index(word)] and stopped.ended
    assert word in sft.decode(stopped.tokens) and word not in sft.decode(stopped.tokens[:-1])
    assert stopped.tokens == free[1].tokens[: len(stopped.tokens)] and len(stopped.logprobs) == len(stopped.tokens)
    for every in (1, 5, 24):
        *_, last = sft.stream(PROMPTS, 24, stop=word, every=every)
        assert last[1].text == stopped.text and last[1].tokens == stopped.tokens


def test_a_stream_grows_into_what_generate_gives(sft):
    whole = sft.generate(PROMPTS, 10, seed=6)
    steps = list(sft.stream(PROMPTS, 10, seed=6, every=4))
    assert [len(step[0].tokens) for step in steps] == [4, 8, 10]
    for i, response in enumerate(whole):
        assert all(step[i].tokens == response.tokens[: len(step[i].tokens)] for step in steps)
        assert steps[-1][i].text == response.text and (steps[-1][i].logprobs == response.logprobs).all()


def test_streams_may_be_interleaved_and_leave_the_mesh_alone(sft):
    before = jax.sharding.get_mesh()
    one, two = sft.stream(PROMPTS, 8, seed=1), sft.stream(PROMPTS, 8, seed=2)
    pairs = []
    for a, b in zip(one, two, strict=True):
        assert jax.sharding.get_mesh() == before
        pairs.append((a, b))
    assert [r.tokens for r in pairs[-1][0]] == [r.tokens for r in sft.generate(PROMPTS, 8, seed=1)]
    assert [r.tokens for r in pairs[-1][1]] == [r.tokens for r in sft.generate(PROMPTS, 8, seed=2)]
    next(sft.stream(PROMPTS, 8)), sft.stream(PROMPTS, 8)
    assert jax.sharding.get_mesh() == before


def test_sizes_near_each_other_share_their_programs(run):
    model = jaxgpt.load(run)
    for prompts, most in ((ROWS, 3), ([*ROWS, ROWS[0]][1:], 40), ([ROWS[0] * 8] * 3, 24)):
        model.generate(prompts, most)
    assert model._start._cache_size() == model._advance._cache_size() == 1


def test_models_that_differ_in_their_parameters_alone_may_share_their_programs(run, sft, reward):
    other, shared = jaxgpt.load(run / "pretrain"), jaxgpt.load(run / "pretrain").sharing(sft)
    assert shared.folder == run / "pretrain" and shared._logits is sft._logits
    rows = [sft.encode("a cat"), sft.encode("the dog met a cat")]
    np.testing.assert_array_equal(shared.logits(rows), other.logits(rows))
    assert np.abs(shared.logits(rows) - sft.logits(rows)).max() > 0.1
    assert reward.sharing(sft) is reward


def test_chat_renders_the_template_and_answers_one_or_several(sft):
    ids = sft.chat_tokens(TALK)
    assert sft.tokenizer.decode_visible(ids) == "<s><|user|>What is the cat?<|assistant|>"
    more = [*ANSWERED, {"role": "user", "content": "And?"}]
    expected = [r.text for r in sft.generate([ids, sft.chat_tokens(more)], 8, seed=5)]
    assert sft.chat([TALK, more], 8, seed=5) == expected
    assert sft.chat(TALK, 8, 0.0) == [sft.generate([ids], 8, 0.0)[0].text]


def with_tokenizer(model: Model, **settings) -> Model:
    """The model with its pieces otherwise set, and the template that goes with plain text."""
    other = copy.copy(model)
    other.tokenizer = Tokenizer(SentencePieceModel(model.tokenizer.engine.data, settings), *read_template("vicuna"))
    return other


def test_an_answer_has_no_space_in_front_that_the_template_wrote(sft):
    model = with_tokenizer(sft)
    space = model.tokenizer.encode(" a")
    assert model.answer(model.decode(space)) == "a"
    assert model.answer("  a") == " a" and model.answer("a") == "a"
    assert sft.answer(" a") == " a"
    short = [{"role": "system", "content": "S"}, *TALK]
    texts = [response.text for response in model.generate([model.chat_tokens(short)] * 4, 8, seed=2)]
    assert model.chat([short] * 4, 8, seed=2) == [text.removeprefix(" ") for text in texts]


def test_without_a_bos_nothing_stands_in_front_and_an_empty_prompt_begins_at_the_end_token(sft):
    model = with_tokenizer(sft, add_bos_token=False)
    assert model.encode("the cat") == sft.encode("the cat")[1:]
    assert model.encode("") == []
    (found,) = model.generate("", 8, seed=1)
    (wanted,) = sft.generate([[sft.tokenizer.eos]], 8, seed=1)
    assert found.tokens == wanted.tokens


def test_scores_are_read_at_the_last_token_alone_or_together(reward):
    other = [*TALK, {"role": "assistant", "content": "One day the cat met a dog."}]
    together = reward.score([ANSWERED, other])
    assert together.shape == (2,) and together.dtype == np.float32
    alone = [reward.score(ANSWERED)[0], reward.score([other])[0]]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    rows = [render(reward.tokenizer, talk)[0] for talk in (ANSWERED, other)]
    assert rows[0][-1] == reward.tokenizer.eos
    np.testing.assert_allclose(reward.score_tokens(rows), together, atol=1e-5)
    lengths = [len(row) for row in rows]
    np.testing.assert_allclose(reward.score_tokens(padded(rows, 50), lengths), together, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: m.generate(ROWS, 60),
            "prompt 0 has 5 tokens, which with max_tokens 60 exceeds the model's context of 64",
        ),
        (lambda m: m.stream(ROWS, 60), "lower max_tokens to 59"),
        (lambda m: m.generate([[1], []]), "prompt 1: length 0 of 0 tokens; it needs at least one"),
        (lambda m: m.generate([[1, VOCAB]]), "prompt 0: token 384 is outside the vocabulary of 384"),
        (lambda m: m.generate([1, 2]), "prompt 0: found 1, expected a list of token ids"),
        (lambda m: m.generate(ROWS, 0), "max_tokens is 0; it must be at least 1"),
        (lambda m: m.generate(ROWS, temperature=-1), "temperature is -1; it must be 0"),
        (lambda m: m.generate(ROWS, temperature=float("nan")), "temperature is nan"),
        (lambda m: m.generate(ROWS, top_k=0), "top_k is 0; it must be at least 1"),
        (lambda m: m.generate(ROWS, top_p=1.1), "top_p is 1.1; it must be above 0 and at most 1"),
        (lambda m: m.generate(ROWS, stop=["a", ""]), "a stop string is empty"),
        (lambda m: m.stream(ROWS, every=0), "every is 0; it must be at least 1"),
        (lambda m: m.generate(ROWS, max_tokens=2.5), "max_tokens is 2.5; it must be at least 1, a whole number"),
        (lambda m: m.generate(ROWS, max_tokens="2"), "max_tokens is '2'; it must be"),
        (lambda m: m.generate(ROWS, max_tokens=True), "max_tokens is True; it must be"),
        (lambda m: m.generate(ROWS, temperature="1"), "temperature is '1'; it must be"),
        (lambda m: m.generate(ROWS, seed=0.5), "seed is 0.5; it must be a whole number"),
        (lambda m: m.generate(ROWS, top_k=True), "top_k is True; it must be at least 1, a whole number, or None"),
        (lambda m: m.generate(ROWS, top_p="1"), "top_p is '1'; it must be above 0 and at most 1, or None"),
        (lambda m: m.generate(ROWS, stop=None), "stop is None; it must be a string or a list of strings"),
        (lambda m: m.generate(ROWS, stop=[1]), "stop is .1.; it must be a string or a list of strings"),
        (lambda m: m.chat([{"role": "user"}]), 'messages.0.: "content" is None, expected a string'),
        (
            lambda m: m.chat([TALK, [{"role": "user", "content": 3}]]),
            'conversation 1.0.: "content" is 3, expected a st',
        ),
        (lambda m: m.chat([{"rol": "user", "content": "a"}]), '"role" is None, expected a string. Did you mean .rol'),
        (lambda m: m.chat_tokens([{"role": "user"}]), 'conversation 0.0.: "content" is None, expected a string'),
        (lambda m: m.logprobs(ROWS, 0.0), "temperature is 0.0; log-probabilities need one above 0"),
        (lambda m: m.logits([[1] * 65]), "a row has 65 tokens, and the model's context is 64"),
        (lambda m: m.logits([]), "there are no rows"),
        (lambda m: m.logits(ROWS, lengths=[5, 2]), "there are 2 lengths for 3 rows"),
        (lambda m: m.chat("hello"), "found 'hello', expected messages"),
        (lambda m: m.chat([["hello"]]), "conversation 0.0. is 'hello', expected an object"),
        (lambda m: m.score(ANSWERED), "holds a language model; score needs a reward model"),
    ],
)
def test_mistakes_are_told_in_words(sft, call, said):
    with pytest.raises(UserError, match=said):
        call(sft)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.generate(["a"]), "holds a reward model; generate needs a language model"),
        (lambda m: m.chat(TALK), "holds a reward model"),
        (lambda m: m.logits(ROWS), "logits needs a language model"),
        (lambda m: m.logprobs(ROWS), "logprobs needs a language model"),
        (
            lambda m: m.score(TALK),
            "conversation 0 ends with role 'user'; a reward model scores the assistant's response",
        ),
        (lambda m: m.score([ANSWERED, []]), "conversation 1 is empty"),
        (lambda m: m.score([{"role": "assistant", "content": 3}]), 'messages.0.: "content" is 3, expected a string'),
    ],
)
def test_a_reward_model_says_what_it_cannot_do(reward, call, said):
    with pytest.raises(UserError, match=said):
        call(reward)


def test_a_run_gives_its_last_language_model_or_the_stage_asked_for(run, sft):
    assert jaxgpt.load(run).folder == find_stage(run) == run / "sft"
    assert (sft.kind, sft.vocab) == ("language", VOCAB)
    assert find_stage(run, "base") == find_stage(run / "sft", "pretrain") == run / "pretrain"
    assert find_stage(run, "reward") == find_stage(run / "reward") == run / "reward"


def test_what_cannot_be_loaded_is_named(run, tmp_path):
    (tmp_path / "empty" / "sft" / "checkpoints").mkdir(parents=True)
    for path, stage, said in [
        (run.with_name("tinny"), None, "tinny: no such folder. Did you mean 'tiny'?"),
        (run, "ppo", "tiny: stage ppo is not finished. Finished there: pretrain, sft, reward"),
        (run, "sfft", "'sfft': no such stage. Did you mean 'sft'\\? Finished there: pretrain, sft, reward"),
        (tmp_path / "empty", None, "empty: no finished stage there"),
        (tmp_path / "empty" / "sft", None, "sft is not finished; the command that began it goes on with it"),
    ]:
        with pytest.raises(UserError, match=said):
            jaxgpt.load(path, stage)


def test_another_tokenizer_is_refused(run, tmp_path):
    shutil.copytree(run / "sft", tmp_path / "sft")
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was trained with"):
        jaxgpt.load(tmp_path / "sft")


def test_numbers_may_be_those_of_numpy(sft):
    given = sft.generate(ROWS, np.int64(3), np.float32(0.0), np.uint32(1), np.int32(5), np.float64(0.5), ["zz"])
    assert [response.tokens for response in given] == [
        response.tokens for response in sft.generate(ROWS, 3, 0.0, 1, 5, 0.5, "zz")
    ]


def test_type_checkers_find_the_hints():
    assert (files("jaxgpt") / "py.typed").is_file()
