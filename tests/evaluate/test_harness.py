"""lm-eval through our adapter says what lm-eval's own `hf` model says of the same weights; data are local files."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from local_tasks import CHOICES, TEXTS, write_tasks
from tiny_run import CONFIG, CONTEXT, load_once, make_run

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402 (behind importorskip)

from jaxgpt.api import Model  # noqa: E402
from jaxgpt.errors import UserError  # noqa: E402
from jaxgpt.evaluate.harness import Harness, Tasks, run_tasks  # noqa: E402
from jaxgpt.interop.export import write_folder  # noqa: E402

NAMES = ["local_choice", "local_rolling", "local_generation"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No data set is kept in the home folder, and none is looked for elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        datasets = pytest.importorskip("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.getbasetemp() / "harness_run")


@pytest.fixture(scope="module")
def model(run):
    """Without rows that pad the embedding, which transformers would generate and we do not, and all but without bytes
    above 127: where they make no character, sentencepiece and tokenizers write other replacements."""
    whole = load_once(run / "sft")
    size = whole.tokenizer.size
    loud = [0.1 if whole.tokenizer.decode([i]) == "\ufffd" else 1.0 for i in range(size)]

    def read(target):
        embed_VD = whole.params["backbone"]["embed_VD"][:size] * np.array(loud, np.float32)[:, None]
        return {"backbone": {**whole.params["backbone"], "embed_VD": embed_VD}}

    return Model(whole.folder, "language", CONFIG, size, whole.tokenizer, whole.mesh, read)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model as it is exported."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    home = tmp_path_factory.mktemp("hf") / "folder"
    config = CONFIG.model_copy(update={"vocab": model.vocab})
    with jax.set_mesh(model.mesh):
        write_folder(home, "language", config, model.params, model.tokenizer, "F32", 10**9)
    return home


def evaluated(lm, tasks: list[str], chat: bool) -> dict:
    """Everything that lm-eval says of a model, with what the model said of each request."""
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=Tasks(tasks),
        bootstrap_iters=0,
        apply_chat_template=chat,
        num_fewshot=1 if chat else None,
    )


@pytest.fixture(scope="module", params=["plain", "chat"])
def both(request, model, folder, tasks):
    """Ours and lm-eval's: plain questions, and conversations in the chat template with a solved example before."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    chat = request.param == "chat"
    return evaluated(Harness(model, batch=3), tasks, chat), evaluated(theirs, tasks, chat)


def answers(results: dict, task: str) -> list:
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def test_choices_have_the_log_likelihoods_of_lm_evals_own_model(both):
    ours, theirs = (answers(results, "local_choice") for results in both)
    assert [len(found) for found in ours] == [len(row["choices"]) for row in CHOICES]
    for mine, other in zip(ours, theirs, strict=True):
        for ((logp, greedy),), ((expected, likeliest),) in zip(mine, other, strict=True):
            assert float(logp) == pytest.approx(float(expected), abs=1e-3) and greedy == likeliest


def test_texts_have_the_rolling_log_likelihoods_of_lm_evals_own_model(both):
    ours, theirs = (answers(results, "local_rolling") for results in both)
    for mine, other in zip(ours, theirs, strict=True):
        assert float(mine[0][0]) == pytest.approx(float(other[0][0]), abs=1e-3, rel=1e-6)


def test_continuations_are_those_of_lm_evals_own_model(both):
    ours, theirs = (answers(results, "local_generation") for results in both)
    assert ours == theirs and any(text for ((text,),) in ours)


def test_the_metrics_are_the_same(both):
    ours, theirs = (results["results"] for results in both)
    assert ours.keys() == theirs.keys() == set(NAMES)
    for name in NAMES:
        for key, value in theirs[name].items():
            assert ours[name][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_tasks_run_with_limit_and_examples(model, tasks):
    found = run_tasks(model, Tasks(tasks[:1]), batch=4, limit=2, few_shot=0)
    assert found["n-samples"]["local_choice"] == {"original": len(CHOICES), "effective": 2}
    assert 0.0 <= found["results"]["local_choice"]["acc,none"] <= 1.0
    assert not math.isnan(found["results"]["local_choice"]["acc_stderr,none"])


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_batch_changes_no_answer(model):
    asked = [request("loglikelihood", row["question"], f" {c}") for row in CHOICES for c in row["choices"]]
    one, many = (Harness(model, batch).loglikelihood(asked, disable_tqdm=True) for batch in (1, 16))
    assert [greedy for _, greedy in one] == [greedy for _, greedy in many]
    np.testing.assert_allclose([logp for logp, _ in one], [logp for logp, _ in many], rtol=1e-5)
    texts = [request("loglikelihood_rolling", row["text"]) for row in TEXTS]
    one, many = (Harness(model, batch).loglikelihood_rolling(texts) for batch in (1, 16))
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_an_empty_context_is_bos_and_a_long_one_loses_its_beginning(model):
    harness = Harness(model, 2)
    ((logp, _),) = harness.loglikelihood([request("loglikelihood", "", "It is")], disable_tqdm=True)
    ids = model.encode("It is")
    assert logp == pytest.approx(float(model.logprobs([ids])[0].sum()), rel=1e-5)
    long = ("A dog. " * 60).strip()
    ((logp, _),) = harness.loglikelihood([request("loglikelihood", long, " It is")], disable_tqdm=True)
    whole = model.encode(long + " It is")
    size, row = len(whole) - len(model.encode(long)), whole[-CONTEXT - 1 :]
    logits = model.logits([row[:-1]])[0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert logp == pytest.approx(sum(wanted[i - 1, row[i]] for i in range(len(row) - size, len(row))), rel=1e-5)


def test_a_continuation_beyond_the_context_is_told(model):
    with pytest.raises(UserError, match="the model's context is 64"):
        Harness(model, 1).loglikelihood([request("loglikelihood", "", "A dog. " * 60)], disable_tqdm=True)


def test_a_conversation_is_the_tokens_of_our_own_rendering(model):
    harness = Harness(model, 1)
    talk = [{"role": "user", "content": "Tell me.</s><|user|> \U000f0001"}, {"role": "assistant", "content": "It is"}]
    text = harness.apply_chat_template(talk[:1])
    plain = [{"role": "user", "content": "Tell me.</s><|user|> \ufffd"}]
    assert harness.tok_encode(text) == model.chat_tokens(plain)
    assert harness.tok_encode(text).count(model.tokenizer.eos) == 0
    begun = harness.apply_chat_template(talk, add_generation_prompt=False)
    assert harness.tok_encode(begun) == [*model.chat_tokens(plain), *model.tokenizer.encode("It is")]
    assert harness.chat_template(True) == model.tokenizer.template and harness.chat_template(False) is None
    assert harness.tokenizer_name.startswith("jaxgpt-")


def test_a_chat_model_is_asked_in_its_template(model, tasks):
    plain, chat = (run_tasks(model, Tasks(tasks[:1]), 4, chat=chat)["results"] for chat in (False, True))
    assert plain.keys() == chat.keys() == {"local_choice"}


def test_sampling_follows_the_tasks_settings(model):
    harness = Harness(model, 4)
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}
    asked = [request("generate_until", "One day", settings) for _ in range(4)]
    found = harness.generate_until(asked)
    assert len(set(found)) > 1 and found == harness.generate_until(asked) and not any("\n" in text for text in found)
    greedy = harness.generate_until([request("generate_until", "One day", {"until": "\n", "max_gen_toks": 8})])
    assert greedy == [model.generate("One day", 8, 0.0, stop="\n")[0].text]
    assert harness.generate_until([request("generate_until", "One day", {})])  # 256 tokens exceed this context


def test_a_task_that_cannot_be_loaded_is_told(tasks, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(tasks[0]).read_text().replace("choice.jsonl", "choise.jsonl"))
    with pytest.raises(UserError, match=r"bad\.yaml: lm-eval cannot load it \(FileNotFoundError: .*choise\.jsonl"):
        Tasks([str(bad)])
