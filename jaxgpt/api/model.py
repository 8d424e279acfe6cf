"""A finished model: text and token ids in, NumPy arrays and text out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.config.schema import ModelConfig
from jaxgpt.data.chat import answer_lead, render
from jaxgpt.data.conversations import check_messages
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.mesh import BATCH, check_model, fetch, put_whole
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Params
from jaxgpt.runs import KINDS
from jaxgpt.sampling import Decoding, Filter, advance, bucket, left_padded, ragged, right_padded, start
from jaxgpt.stages.reward import score_rows

Messages = Sequence[Mapping[str, str]]
Tokens = Sequence[Sequence[int]] | np.ndarray
SCORED, SAMPLED = 32, 64
"""Units of the row lengths that programs are compiled for: of one forward pass; of prompts and of responses."""
STOP_EVERY = 8
"""Tokens decoded between two looks for a stop string."""


class Generation(NamedTuple):
    """One response."""

    text: str
    """Without the end token and the stop string."""
    tokens: list[int]
    """With the end token, or the tokens that completed the stop string, where there are such."""
    logprobs: np.ndarray
    """Of each token at the sampling temperature (at 1 where that is 0), before top-k and top-p, nats, float32."""
    ended: bool
    """Whether the end token or a stop string came before max_tokens."""


class _Sampling(NamedTuple):
    """Checked settings of one generation."""

    max_tokens: int
    temperature: float
    seed: int
    top_k: int | None
    top_p: float | None
    stop: Sequence[str]
    every: int


class Model:
    """A finished stage on the devices: a language model, or a reward model. Made by `load`."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        config: ModelConfig,
        vocab: int,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        read: Callable[[Params], Params],
        gain: float = 1.0,
    ):
        """`read` gives the parameters, for their shapes and shardings; `gain` is what a reward model's scores were
        multiplied by after training: it takes a to be better than b with probability sigmoid((a - b) / gain)."""
        self.folder, self.kind, self.config, self.tokenizer, self.mesh = folder, kind, config, tokenizer, mesh
        self.vocab, self.gain = vocab, gain
        check_model(mesh, config, vocab)
        with jax.set_mesh(mesh):
            self.net = (language_model if kind == "language" else scalar_model)(config, vocab)
            self.params: Params = read(self.net.abstract)
        self._logits = jax.jit(self._all_logits)
        self._logprobs = jax.jit(self._token_logprobs)
        self._scores = jax.jit(lambda params, rows: score_rows(self.net.bind(params), rows["tokens"], rows["lengths"]))
        self._start = jax.jit(self._prefill, static_argnums=2)
        self._advance = jax.jit(self._decode, donate_argnums=1)

    def sharing(self, other: Model) -> Model:
        """This model, from now on with the compiled programs of `other` where they differ in their parameters alone."""
        ours, theirs = ((m.kind, m.config, m.vocab, m.mesh, m.tokenizer.hash) for m in (self, other))
        if ours == theirs:
            self._logits, self._logprobs, self._scores = other._logits, other._logprobs, other._scores
            self._start, self._advance = other._start, other._advance
        return self

    def encode(self, text: str) -> list[int]:
        """Token ids of a text: BOS, for tokenizers that have one, and the text. Control pieces in it are plain text."""
        return [*self.tokenizer.prefix, *self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; control tokens give nothing."""
        return self.tokenizer.decode(tokens)

    def logits(self, tokens: Tokens, lengths: Sequence[int] | None = None) -> np.ndarray:
        """Logits of the token after each given one, [B, T, V] float32, 0 beyond a row's length.

        V is `model.vocab`: the ids from `tokenizer.size` on only pad the embedding.
        """
        self.needs("language", "logits")
        return self._forward(self._logits, tokens, lengths)

    def logprobs(self, tokens: Tokens, temperature: float = 1.0, lengths: Sequence[int] | None = None) -> np.ndarray:
        """log p(token t | tokens before t), nats, [B, T] float32: 0 for the first token and beyond a row's length."""
        self.needs("language", "logprobs")
        if not 0.0 < temperature < math.inf:
            raise UserError(f"temperature is {temperature}; log-probabilities need one above 0")
        return self._forward(self._logprobs, tokens, lengths, jnp.float32(temperature))

    def generate(
        self,
        prompts: str | Sequence[str] | Tokens,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        lengths: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues each prompt, text or token ids, until its end token, a stop string or max_tokens.

        Temperature 0 takes the likeliest token; top_k applies before top_p, both from the first token on. A stop
        string is cut off the text. The same arguments give the same result. Raises UserError where a prompt and
        max_tokens do not fit the model's context.
        """
        last: list[Generation] = []
        every = STOP_EVERY if stop else max_tokens
        for responses in self.stream(prompts, max_tokens, temperature, seed, top_k, top_p, stop, lengths, every):
            last = responses
        return last

    def stream(
        self,
        prompts: str | Sequence[str] | Tokens,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
        lengths: Sequence[int] | None = None,
        every: int = 4,
    ) -> Iterator[list[Generation]]:
        """As `generate`, giving all responses so far after every few tokens; the last ones are those of `generate`.

        A text so far may end in half a character (U+FFFD) or in the beginning of a stop string.
        """
        self.needs("language", "generate")
        words = (stop,) if isinstance(stop, str) and stop else stop
        sampling = _checked(_Sampling(max_tokens, temperature, seed, top_k, top_p, words, every))
        texts = [prompts] if isinstance(prompts, str) else prompts
        given = [self.encode(p) or [self.tokenizer.start] if isinstance(p, str) else p for p in texts]
        rows = ragged(given, lengths, self.vocab, "prompt")
        longest = max(map(len, rows), default=0)
        if longest + sampling.max_tokens > self.config.context:
            at = next(i for i, row in enumerate(rows) if len(row) == longest)
            raise UserError(
                f"prompt {at} has {longest} tokens, which with max_tokens {max_tokens} exceeds the model's context of "
                f"{self.config.context}; shorten it or lower max_tokens to {max(self.config.context - longest, 0)}"
            )
        return self._decoded(rows, sampling) if rows else iter(())

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """The assistant's next message in one conversation, or in each of several; always a list of texts."""
        prompts = [self.chat_tokens(conversation) for conversation in _conversations(messages)]
        answers = self.generate(prompts, max_tokens, temperature, seed, top_k, top_p, stop)
        return [self.answer(answer.text) for answer in answers]

    def answer(self, text: str) -> str:
        """The assistant's words in a response to `chat_tokens`: without the space that some templates begin them with,
        where the tokenizer gives it."""
        return text.removeprefix(answer_lead(self.tokenizer))

    def chat_tokens(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant is to speak."""
        return render(self.tokenizer, *_conversations([messages]), add_generation_prompt=True)[0]

    def score(self, conversations: Messages | Sequence[Messages]) -> np.ndarray:
        """The reward of one conversation, or of each of several, ending in the assistant's response: [B] float32."""
        self.needs("scalar", "score")
        rows = []
        for i, messages in enumerate(_conversations(conversations)):
            if not messages or messages[-1].get("role") != "assistant":
                last = f"ends with role {messages[-1].get('role')!r}" if messages else "is empty"
                raise UserError(f"conversation {i} {last}; a reward model scores the assistant's response at its end")
            rows.append(render(self.tokenizer, messages)[0])
        return self.score_tokens(rows)

    def score_tokens(self, tokens: Tokens, lengths: Sequence[int] | None = None) -> np.ndarray:
        """The reward of each row of token ids, read at its last token, [B] float32."""
        self.needs("scalar", "score")
        return self._forward(self._scores, tokens, lengths)

    def needs(self, kind: str, what: str) -> None:
        """Raises UserError where the model is not of the kind, "language" or "scalar", that `what` is for."""
        if self.kind != kind:
            raise UserError(f"{self.folder} holds {KINDS[self.kind]}; {what} needs {KINDS[kind]}")

    def _forward(self, function: Any, tokens: Tokens, lengths: Sequence[int] | None, *more: jax.Array) -> np.ndarray:
        """What `function` gives for each row, [B, ...]; for each token, [B, T, ...] with the T that was given."""
        rows = ragged(tokens, lengths, self.vocab, "row")
        longest, context = max(map(len, rows), default=0), self.config.context
        if not rows or longest > context:
            found = f"a row has {longest} tokens, and the model's context is {context}" if rows else "there are no rows"
            raise UserError(found)
        batch = right_padded(rows, bucket(len(rows), self._ways), min(bucket(longest, SCORED), context))
        with jax.set_mesh(self.mesh):
            result = np.asarray(fetch(function(self.params, put_whole(batch, self.mesh), *more)))[: len(rows)]
        if result.ndim == 1:
            return result
        given = np.shape(tokens)[1] if isinstance(tokens, np.ndarray | jax.Array) else longest
        short = max(given - result.shape[1], 0)
        return np.pad(result, ((0, 0), (0, short), *((0, 0),) * (result.ndim - 2))) if short else result[:, :given]

    def _decoded(self, rows: list[np.ndarray], s: _Sampling) -> Iterator[list[Generation]]:
        """Responses so far. The mesh is set inside each call alone: between two, the caller runs."""
        count, width = bucket(len(rows), self._ways), bucket(max(map(len, rows)), SAMPLED)
        batch = left_padded(rows, count, width, self.tokenizer.pad)
        with jax.set_mesh(self.mesh):
            key, temperature, kept = jax.random.key(s.seed % 2**32), jnp.float32(s.temperature), self._filter(s)
            state = self._start(self.params, put_whole(batch, self.mesh), bucket(s.max_tokens, SAMPLED))
        stopped: dict[int, Generation] = {}
        for limit in (*range(s.every, s.max_tokens, s.every), s.max_tokens):
            with jax.set_mesh(self.mesh):
                state = self._advance(self.params, state, key, temperature, kept, jnp.int32(limit))
                found = fetch((state.tokens_BN, state.logp_BN, state.lengths_B, state.done_B))
            responses = []
            for i, (tokens, logp, length, done) in enumerate(zip(*(part[: len(rows)] for part in found), strict=True)):
                response, cut = self._response(tokens[:length].tolist(), logp[:length], bool(done), s.stop)
                if cut:
                    stopped.setdefault(i, response)
                responses.append(stopped.get(i, response))
            yield responses
            if all(response.ended for response in responses):
                return

    def _filter(self, s: _Sampling) -> Filter | None:
        if s.top_k is None and s.top_p is None:
            return None
        top_k = self.vocab if s.top_k is None else min(s.top_k, self.vocab)
        return Filter(jnp.int32(top_k), jnp.float32(1.0 if s.top_p is None else s.top_p))

    def _response(
        self, tokens: list[int], logp: np.ndarray, done: bool, stop: Sequence[str]
    ) -> tuple[Generation, bool]:
        """The response, and whether it met a stop string; it then ends with the token that completed that one."""
        text = self.decode(tokens[:-1] if done else tokens)
        if not any(word in text for word in stop):
            return Generation(text, tokens, logp.copy(), done), False
        prefixes = ((n, self.decode(tokens[:n])) for n in range(1, len(tokens) + 1))
        size, text = next((n, prefix) for n, prefix in prefixes if any(word in prefix for word in stop))
        cut = min(text.find(word) for word in stop if word in text)
        return Generation(text[:cut], tokens[:size], logp[:size].copy(), True), True

    @property
    def _ways(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _all_logits(self, params: Params, rows: dict[str, jax.Array]) -> jax.Array:
        lm = self.net.bind(params)
        logits_BTV = lm.logits(lm.hidden(rows["tokens"], rows["segments"], rows["positions"]))
        return jnp.where(rows["segments"][:, :, None] > 0, logits_BTV, 0.0)

    def _token_logprobs(self, params: Params, rows: dict[str, jax.Array], temperature: jax.Array) -> jax.Array:
        lm = self.net.bind(params)
        hidden_BTD = lm.hidden(rows["tokens"], rows["segments"], rows["positions"])
        (logp_BT,) = lm.predicted(hidden_BTD[:, :-1], rows["tokens"][:, 1:], temperature)
        return jnp.pad(jnp.where(rows["segments"][:, 1:] > 0, logp_BT, 0.0), ((0, 0), (1, 0)))

    def _prefill(self, params: Params, rows: dict[str, jax.Array], new: int) -> Decoding:
        state = start(self.net.bind(params), rows["tokens"], rows["segments"], new, self.tokenizer.pad)
        filling_B = rows["segments"][:, -1] == 0  # rows that fill up the batch
        return state.replace(done_B=jax.sharding.reshard(filling_B, P(BATCH)))  # one row: jax 0.12 forgets its sharding

    def _decode(
        self, params: Params, state: Decoding, key: jax.Array, temperature: jax.Array, kept: Any, limit: jax.Array
    ) -> Decoding:
        ends, pad = self.tokenizer.ends, self.tokenizer.pad
        # rows that the model's own settings ask for are sampled
        pieces = self.tokenizer.size if self.config.vocab is None else None
        return advance(self.net.bind(params), state, key, temperature, kept, ends, pad, limit, pieces)


def _conversations(given: Any) -> list[Messages]:
    """One conversation or several as several."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        alone = bool(given) and isinstance(given[0], Mapping)
        conversations = [given] if alone else list(given)
        if all(
            isinstance(conversation, Sequence) and not isinstance(conversation, str) for conversation in conversations
        ):
            for number, conversation in enumerate(conversations):
                check_messages(conversation, "messages" if alone else f"conversation {number}")
            return conversations
    raise UserError(f'found {given!r:.60}, expected messages: [{{"role": "user", "content": "Hello"}}]')


def _is_whole(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a whole number, of Python's or NumPy's, and not true or false."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checked(s: _Sampling) -> _Sampling:
    """The settings with Python's own numbers. Raises UserError for the first that cannot be used."""
    warm = _is_number(s.temperature) and 0.0 <= s.temperature < math.inf
    texts = isinstance(s.stop, Sequence) and all(isinstance(word, str) for word in s.stop)
    problems = {
        f"max_tokens is {s.max_tokens!r}; it must be at least 1, a whole number": not _is_whole(s.max_tokens, 1),
        f"temperature is {s.temperature!r}; it must be 0 (likeliest token) or more": not warm,
        f"seed is {s.seed!r}; it must be a whole number": not _is_whole(s.seed),
        f"top_k is {s.top_k!r}; it must be at least 1, a whole number, or None": s.top_k is not None
        and not _is_whole(s.top_k, 1),
        f"top_p is {s.top_p!r}; it must be above 0 and at most 1, or None": s.top_p is not None
        and not (_is_number(s.top_p) and 0.0 < s.top_p <= 1.0),
        f"stop is {s.stop!r:.40}; it must be a string or a list of strings, () for none": not texts,
        "a stop string is empty; leave stop out to stop at the end token alone": texts and not all(s.stop),
        f"every is {s.every!r}; it must be at least 1, a whole number": not _is_whole(s.every, 1),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(problem)
    top_k = None if s.top_k is None else int(s.top_k)
    return s._replace(max_tokens=int(s.max_tokens), seed=int(s.seed), top_k=top_k, every=int(s.every))
