"""Text goes through the tokenizer without loss, and never becomes a control piece."""

import io
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.errors import UserError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "42",
    "dogs",
    "ran,",
    "then",
    "slept;",
    "中文",
    "naïve",
    "café\tend",
]


def texts(count=300, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)) + rng.choice(["\n", "\n\n", "."]) for _ in range(count)]


CONFIGS = {kind: TokenizerConfig(model_type=kind, vocab=340) for kind in ("bpe", "unigram", "char")}
TOKENIZERS = {kind: train_tokenizer(texts(), config) for kind, config in CONFIGS.items()}

AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n a\r\n\tb\x00",
    "1234567890",
    "🙂👩‍👩‍👧 中文字 e\u0301 \ufeff",
    "\u2581 \u2581\u2581x \u2047 \u2585",
    "</s><|user|><s><pad><unk><0x41>",
    "\U0010ffff\ue000",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips_without_control_ids(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode_visible(ids) == text
    assert not set(ids) & {*tokenizer.control.values(), tokenizer.unk}
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())


pieces = st.sampled_from(["</s>", "<|user|>", "\u2581", " ", "\n", "7", "cat", "<0x0A>"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), pieces), max_size=8).map("".join))
def test_any_text_round_trips_without_control_ids(text):
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.control.values())


def test_several_texts_encode_as_each_does():
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.encode(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_control_pieces_have_their_places():
    for tokenizer in TOKENIZERS.values():
        assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)
        assert tokenizer.control == {
            "<s>": 1,
            "</s>": 2,
            "<pad>": 3,
            "<|system|>": 4,
            "<|user|>": 5,
            "<|assistant|>": 6,
        }
    tokenizer = TOKENIZERS["bpe"]
    ids = [1, 5, *tokenizer.encode("the cat"), 2, 3, tokenizer.size + 7]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode_visible(ids) == f"<s><|user|>the cat</s><pad><{tokenizer.size + 7}>"


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_texts_give_the_same_model(kind):
    again = train_tokenizer(iter(texts()), CONFIGS[kind])
    assert again.engine.data == TOKENIZERS[kind].engine.data
    assert again.hash == TOKENIZERS[kind].hash
    assert train_tokenizer(texts(seed=1), CONFIGS[kind]).hash != again.hash


def test_digits_are_split_where_asked():
    lines = ["in 1234 and 1234\n"] * 50
    split = train_tokenizer(lines, TokenizerConfig(vocab=300))
    whole = train_tokenizer(lines, TokenizerConfig(vocab=300, split_digits=False))
    assert len(split.encode("1234")) == 4
    assert len(whole.encode("1234")) == 1


def test_a_character_tokenizer_has_one_token_for_each_character():
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
    tokenizer = train_tokenizer([text], TokenizerConfig(model_type="char", byte_fallback=False))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.size == len(set(text)) + 7
    assert tokenizer.unk not in ids


def test_learning_takes_a_sample_of_the_size_asked_wherever_it_stands():
    long = "".join(f"line {i} of the book\n" for i in range(20_000))
    config = TokenizerConfig(vocab=300, sample_bytes=50_000)
    tokenizer = train_tokenizer([long], config)
    assert train_tokenizer([long], config).model_hash == tokenizer.model_hash
    assert train_tokenizer([long], TokenizerConfig(vocab=300)).model_hash != tokenizer.model_hash
    assert len(tokenizer.encode(" of the book")) < 8


def test_a_vocabulary_beyond_the_text_is_cut_and_one_too_small_is_explained():
    assert train_tokenizer(["hello world\n"], TokenizerConfig(vocab=8192)).size < 320
    with pytest.raises(UserError, match=r"tokenizer\.vocab is 100, .* are already 2\d\d; set tokenizer\.vocab higher"):
        train_tokenizer(["hello world\n"], TokenizerConfig(vocab=100))
    with pytest.raises(UserError, match="no text to learn"):
        train_tokenizer([""], TokenizerConfig())


def test_a_folder_holds_model_template_and_hash(tmp_path):
    tokenizer = TOKENIZERS["bpe"]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.hash, again.engine.data, again.template) == (
        tokenizer.hash,
        tokenizer.engine.data,
        tokenizer.template,
    )
    other = tmp_path / "other.jinja"
    other.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    changed = Tokenizer.load(tmp_path / "tokenizer.model", template=str(other))
    assert changed.model_hash == tokenizer.model_hash
    assert changed.hash != tokenizer.hash


def test_wrong_files_are_named(tmp_path):
    TOKENIZERS["bpe"].save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizr\.model does not exist\. Did you mean 'tokenizer\.model'"):
        Tokenizer.load(tmp_path / "tokenizr.model")
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(UserError, match=r"chat template .*none\.jinja does not exist"):
        Tokenizer.load(tmp_path, template=str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("\n{% for %}")
    with pytest.raises(UserError, match=r"chat template .*bad\.jinja, line 2: "):
        Tokenizer.load(tmp_path, template=str(tmp_path / "bad.jinja"))


def foreign(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return SentencePieceModel(model.getvalue(), name="mine.model")


def test_a_model_of_the_users_may_lack_pad_and_roles_but_not_the_ends():
    tokenizer = Tokenizer(foreign())
    assert tokenizer.pad == tokenizer.unk == 0
    assert tokenizer.control == {"<s>": 1, "</s>": 2}
    assert tokenizer.template_name == "vicuna"
    assert Tokenizer(foreign(bos_id=-1)).bos is None
    with pytest.raises(UserError, match=r"mine\.model: the model has no eos \(</s>\) piece"):
        foreign(eos_id=-1)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_spans_say_where_tokens_begin(rule):
    tokenizer = Tokenizer(foreign(normalization_rule_name=rule, remove_extra_whitespaces=rule != "identity"))
    for text in [*AWKWARD, "the  cat 🙂中ﬁ\n"]:
        ids, starts = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        assert starts == sorted(starts) and all(0 <= start < len(text) for start in starts)
    ids, starts = tokenizer.encode_spans("the  🙂 cat")
    assert tokenizer.decode(ids[-1:]).strip() == "cat"
    assert starts[-1] == len("the  🙂")
