"""Conversations are rendered by one template that says all: trained is exactly what the assistant says and its end."""

import functools
import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import answer_lead, render, render_text
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.templates import BUILT_IN, read_template
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
    return Tokenizer(TOKENIZER.engine, template, template_name="mine.jinja")


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
    assert tokenizer.decode_visible(ids) == "USER: what </s>?\nA: it is</s>\n"
    assert ids.count(tokenizer.eos) == 1
    assert trained(tokenizer, ids, mask) == " it is</s>"  # the token " it" begins in front of the assistant's words


def test_plain_text_between_control_pieces_is_encoded_in_one_go():
    tokenizer = templated("{% for m in messages %}{{ '[' }}{{ m.content }}{{ ' cat' }}{% endfor %}")
    ids, _ = render(tokenizer, [{"role": "user", "content": "the"}])
    assert ids == tokenizer.encode("[the cat")


def test_there_is_a_bos_where_the_template_writes_one_and_never_two():
    for start, bos in (("", []), ("{{ bos_token }}", [TOKENIZER.bos]), ("{{ bos_token }}" * 2, [TOKENIZER.bos])):
        ids, mask = render(templated(start + "{{ messages[0].content }}"), [{"role": "user", "content": "the cat"}])
        assert ids == [*bos, *TOKENIZER.encode("the cat")]
        assert len(mask) == len(ids)


@functools.cache
def foreign(**options):
    """A model without roles, by the settings of LLaMA's: a space in front of every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is the cat? it is black. user and assistant."] * 9),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=3,
        **options,
    )
    return SentencePieceModel(model.getvalue())


def test_a_model_without_roles_spells_them():
    tokenizer = Tokenizer(foreign(add_dummy_prefix=False), *read_template("roles"))
    ids, mask = render(tokenizer, say("user", "and"))
    assert tokenizer.decode(ids) == "<|user|>user<|assistant|>and"
    assert trained(tokenizer, ids, mask) == "and</s>"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.mark.parametrize("dummy", [False, True])
def test_vicuna_reads_as_in_fastchat_and_is_the_template_of_models_without_roles(dummy):
    tokenizer = Tokenizer(foreign(add_dummy_prefix=dummy))
    assert tokenizer.template_name == "vicuna"
    text = render_text(tokenizer, say("what?", "it is", "and?", "black"))
    assert text == f"<s>{VICUNA}USER: what? ASSISTANT: it is</s>USER: and? ASSISTANT: black</s>"
    ids, mask = render(tokenizer, say("what?", "it is", "and?", "black"))
    assert trained(tokenizer, ids, mask) == ("it is</s>black</s>" if dummy else " it is</s> black</s>")
    assert ids[1 : ids.index(tokenizer.eos)] == tokenizer.encode(f"{VICUNA}USER: what? ASSISTANT: it is")
    asked = render_text(tokenizer, say("what?", system="be short"), add_generation_prompt=True)
    assert asked == "<s>be short USER: what? ASSISTANT:"
    prompt, _ = render(tokenizer, say("what?"), add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    with pytest.raises(UserError, match=r'chat template vicuna: role is "system", expected user or assistant'):
        render(tokenizer, [*say("what?"), {"role": "system", "content": "be short"}])


def test_an_answer_is_led_by_what_the_template_writes_before_it():
    assert answer_lead(Tokenizer(foreign(add_dummy_prefix=True))) == " "
    assert answer_lead(TOKENIZER) == ""
    assert answer_lead(templated("{{ raise_exception('no') }}")) == ""


def test_a_tokenizer_without_bos_puts_nothing_in_front():
    plain = SentencePieceModel(foreign(add_dummy_prefix=False).data, {"add_bos_token": False})
    tokenizer = Tokenizer(plain, "{{ messages[0].content }}")
    assert (tokenizer.bos, tokenizer.prefix, tokenizer.start) == (None, [], tokenizer.eos)
    ids, mask = render(tokenizer, [{"role": "user", "content": "the cat"}])
    assert ids == tokenizer.encode("the cat") and mask == [0] * len(ids)


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
    with pytest.raises(UserError, match='chat template roles: role is "bot", expected system, user or assistant'):
        render(TOKENIZER, [{"role": "bot", "content": "x"}])


def test_a_template_without_generation_blocks_trains_nothing_and_says_so():
    plain = templated("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"mine\.jinja: has no \{% generation %\}"):
        render(plain, say("a", "b"))
    assert sum(render(plain, say("a", "b", "c"), add_generation_prompt=True)[1]) == 0
    assert all("generation" in template for template in BUILT_IN.values())
