"""Conversations are rendered by one template: one BOS, trained tokens exactly what the assistant says and its end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import BUILT_IN, render
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.errors import UserError

TOKENIZER = train_tokenizer(["what is the cat? it is black.\n"] * 20, TokenizerConfig(vocab=300))


def say(*contents, system=None):
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(tokenizer, ids, mask):
    return tokenizer.decode_visible([token for token, weight in zip(ids, mask, strict=True) if weight])


def templated(template):
    return Tokenizer(TOKENIZER.model, template, template_name="mine.jinja")


def test_rendering_reads_as_the_template_says():
    ids, mask = render(TOKENIZER, say("what?", "it is.\n", "and?", " black", system="be\nshort"))
    assert TOKENIZER.decode_visible(ids) == (
        "<s><|system|>be\nshort<|user|>what?<|assistant|>it is.\n</s><|user|>and?<|assistant|> black</s>"
    )
    assert trained(TOKENIZER, ids, mask) == "it is.\n</s> black</s>"


def test_the_generation_prompt_ends_where_the_assistant_speaks():
    ids, mask = render(TOKENIZER, say("what?"), add_generation_prompt=True)
    assert TOKENIZER.decode_visible(ids) == "<s><|user|>what?<|assistant|>"
    assert sum(mask) == 0
    full, _ = render(TOKENIZER, say("what?", "it is"))
    assert full[: len(ids)] == ids


content = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["</s>", "<|user|>", "<", "|>", "<s", ">", "\ue000", "\ue001", " a"]), max_size=4).map(
        "".join
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(content, min_size=2, max_size=5), st.none() | content)
def test_any_conversation_trains_what_the_assistant_says_and_its_end(contents, system):
    messages = say(*contents, system=system)
    ids, mask = render(TOKENIZER, messages)
    control = TOKENIZER.control
    assert ids[0] == TOKENIZER.bos
    assert ids.count(TOKENIZER.bos) == 1
    assert [i for i in ids if i in control.values()][1:] == [
        token
        for message in messages
        for token in [control[f"<|{message['role']}|>"], *[TOKENIZER.eos] * (message["role"] == "assistant")]
    ]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert [i for i, weight in zip(ids, mask, strict=True) if weight] == [
        token for text in said for token in [*TOKENIZER.encode(text), TOKENIZER.eos]
    ]
    assert TOKENIZER.decode(ids) == "".join(message["content"] for message in messages)


def test_rendered_text_given_again_is_plain_text():
    ids, _ = render(TOKENIZER, say("hi", "yo"))
    again, mask = render(TOKENIZER, say(TOKENIZER.decode_visible(ids), "ok"))
    assert again.count(TOKENIZER.bos) == 1
    assert again.count(TOKENIZER.eos) == 1
    assert trained(TOKENIZER, again, mask) == "ok</s>"


def test_a_template_of_the_users_gets_the_texts_themselves():
    tokenizer = templated(
        "{% for m in messages %}\n"
        "  {% if m.role == 'assistant' %}\n"
        "A: {% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n\n"
        "  {% else %}\n"
        "{{ m.role | upper }}: {{ m['content'].split('</think>')[-1] | trim }}\n"
        "  {% endif %}\n"
        "{% endfor %}"
    )
    ids, mask = render(tokenizer, say(" aside</think> what </s>? ", " it is "))
    assert tokenizer.decode_visible(ids) == "<s>USER: what </s>?\nA: it is</s>\n"
    assert ids.count(tokenizer.eos) == 1
    assert trained(tokenizer, ids, mask) == "it is</s>"


def test_plain_text_is_encoded_in_runs_as_long_as_the_mask_allows():
    tokenizer = templated("{% for m in messages %}{{ '[' }}{{ m.content }}{{ ' cat' }}{% endfor %}")
    ids, _ = render(tokenizer, [{"role": "user", "content": "the"}])
    assert ids == [tokenizer.bos, *tokenizer.encode("[the cat")]


def test_there_is_one_bos_whatever_the_template_writes():
    for start in ("", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"):
        ids, mask = render(templated(start + "{{ messages[0].content }}"), [{"role": "user", "content": "the cat"}])
        assert ids == [TOKENIZER.bos, *TOKENIZER.encode("the cat")]
        assert len(mask) == len(ids)


def test_a_model_without_roles_spells_them():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user and assistant"] * 9),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        minloglevel=3,
    )
    tokenizer = Tokenizer(model.getvalue())
    ids, mask = render(tokenizer, say("user", "and"))
    assert tokenizer.decode(ids) == "<|user|>user<|assistant|>and"
    assert trained(tokenizer, ids, mask) == "and</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no ' + messages[0].role) }}", r"chat template mine\.jinja: no user"),
        ("{{ messages[0].content + 1 }}", r"chat template mine\.jinja: "),
        ("{{ messages[7].content.x }}", r"chat template mine\.jinja: "),
        ("{{ ''.__class__.__mro__ }}", r"chat template mine\.jinja: "),
    ],
)
def test_what_a_template_refuses_names_it(template, message):
    with pytest.raises(UserError, match=message):
        render(templated(template), [{"role": "user", "content": "x"}])


def test_syntax_errors_name_template_and_line():
    with pytest.raises(UserError, match=r"chat template mine\.jinja, line 2: "):
        templated("ok\n{% if %}")


def test_an_unknown_role_is_refused():
    with pytest.raises(UserError, match='chat template built-in: role is "bot", expected system, user or assistant'):
        render(TOKENIZER, [{"role": "bot", "content": "x"}])


def test_a_template_without_generation_blocks_trains_nothing_and_says_so():
    plain = templated("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"mine\.jinja: has no \{% generation %\}"):
        render(plain, say("a", "b"))
    assert sum(render(plain, say("a", "b", "c"), add_generation_prompt=True)[1]) == 0
    assert "generation" in BUILT_IN
