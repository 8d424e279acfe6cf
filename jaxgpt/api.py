"""Finished models in Python: `jaxgpt.load("runs/meadow/sft")` gives one that encodes, generates, chats or scores.

Results are NumPy arrays, strings and lists; token batches may be ragged lists of lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.data.chat import render
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, nearest
from jaxgpt.losses import token_logp
from jaxgpt.mesh import check_model, make_mesh, put_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Params
from jaxgpt.sampling import Filter, advance, start
from jaxgpt.stages.reward import score_rows
from jaxgpt.stages.run import STAGES
from jaxgpt.train.checkpoint import load_params, params_meta

Messages = Sequence[Mapping[str, str]]
Tokens = Sequence[Sequence[int]] | np.ndarray
LENGTHS = 32
"""Row lengths are rounded up to a multiple of this, so that few programs are compiled."""


class Generation(NamedTuple):
    """One response."""

    text: str
    tokens: list[int]
    """With the end token, where there is one."""
    logprobs: np.ndarray
    """Of each token at the sampling temperature, before top-k and top-p, nats."""
    ended: bool
    """Whether the end token (or a stop string) came before max_tokens."""


class Model:
    """A finished stage on the devices: a language model, or a reward model. Made by `load`."""

    def __init__(
        self, folder: Path, kind: str, config: ModelConfig, vocab: int, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
    ):
        self.folder, self.kind, self.config, self.tokenizer, self.mesh = folder, kind, config, tokenizer, mesh
        self.vocab = vocab
        check_model(mesh, config, vocab)
        with jax.set_mesh(mesh):
            self.net = (language_model if kind == "language" else scalar_model)(config, vocab)
            self.params: Params = load_params(folder / "params", self.net.abstract)
        self._logits = jax.jit(self._all_logits)
        self._logprobs = jax.jit(self._token_logprobs)
        self._scores = jax.jit(lambda params, rows: score_rows(self.net.bind(params), rows["tokens"], rows["lengths"]))
        self._start = jax.jit(self._prefill, static_argnums=2)
        self._advance = jax.jit(self._decode, donate_argnums=1)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as a document begins: BOS and the text. Control pieces in it are plain text."""
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; control tokens give nothing."""
        return self.tokenizer.decode(tokens)

    def logits(self, tokens: Tokens, lengths: Sequence[int] | None = None) -> np.ndarray:
        """Logits of the token after each given one, [B, T, V] float32; rows beyond their length hold no meaning."""
        rows, width = self._rows(tokens, lengths)
        return self._call(self._logits, rows, len(rows["lengths"]))[: len(tokens), :width]

    def logprobs(self, tokens: Tokens, temperature: float = 1.0, lengths: Sequence[int] | None = None) -> np.ndarray:
        """log p(token t | tokens before t), nats, [B, T] float32: 0 for the first token and beyond a row's length."""
        rows, width = self._rows(tokens, lengths)
        with jax.set_mesh(self.mesh):
            found = self._logprobs(self.params, put_batch(rows, self.mesh), jnp.float32(temperature))
        return np.asarray(jax.device_get(found))[: len(tokens), :width]

    def generate(
        self,
        prompts: Sequence[str] | Tokens,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Continues each prompt, text or token ids, until its end token, a stop string or max_tokens.

        Temperature 0 takes the likeliest token. A stop string is cut off the text. The same arguments give the same
        result. Raises UserError where a prompt and max_tokens do not fit the model's context.
        """
        last: list[Generation] = []
        for responses in self.stream(prompts, max_tokens, temperature, seed, top_k, top_p, stop, every=max_tokens):
            last = responses
        return last

    def stream(
        self,
        prompts: Sequence[str] | Tokens,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        every: int = 4,
    ) -> Iterator[list[Generation]]:
        """As `generate`, giving all responses so far after every few tokens; the last ones are complete."""
        self._needs("language", "generate")
        _check_sampling(max_tokens, temperature, top_k, top_p)
        ids = [self.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        if not ids:
            return
        rows = self._left_padded(ids, max_tokens)
        every = every if not stop else min(every, 8)
        kept = None
        if top_k is not None or top_p is not None:
            top = self.vocab if top_k is None else min(top_k, self.vocab)
            kept = Filter(jnp.int32(top), jnp.float32(1.0 if top_p is None else top_p))
        with jax.set_mesh(self.mesh):
            key, warmth = jax.random.key(seed), jnp.float32(temperature)
            state = self._start(self.params, put_batch(rows, self.mesh), max_tokens)
            for limit in range(every, max_tokens + every, every):
                limit = min(limit, max_tokens)
                state = self._advance(self.params, state, key, warmth, kept, jnp.int32(limit))
                found = jax.device_get((state.tokens_BN, state.logp_BN, state.lengths_B, state.done_B))
                responses = [self._response(*(part[i] for part in found), stop=stop) for i in range(len(ids))]
                done = all(response.ended for response in responses) or limit == max_tokens
                yield responses
                if done:
                    return

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The assistant's next message in one conversation, or in each of several; always a list of texts."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_tokens(conversation) for conversation in conversations]
        answers = self.generate(prompts, max_tokens, temperature, seed, top_k, top_p, stop)
        return [answer.text for answer in answers]

    def chat_tokens(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant is to speak."""
        return render(self.tokenizer, messages, add_generation_prompt=True)[0]

    def score(self, conversations: Sequence[Messages]) -> np.ndarray:
        """The reward of each conversation that ends with the assistant's response, [B] float32."""
        self._needs("scalar", "score")
        rows, _ = self._rows([render(self.tokenizer, messages)[0] for messages in conversations], None)
        return self._call(self._scores, rows, len(conversations))

    def score_tokens(self, tokens: Tokens) -> np.ndarray:
        """The reward of each row of token ids, read at its last token, [B] float32."""
        self._needs("scalar", "score")
        rows, _ = self._rows(tokens, None)
        return self._call(self._scores, rows, len(tokens))

    def _call(self, function: Any, rows: dict[str, np.ndarray], count: int) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(jax.device_get(function(self.params, put_batch(rows, self.mesh))))[:count]

    def _needs(self, kind: str, what: str) -> None:
        if self.kind != kind:
            names = {"language": "a language model", "scalar": "a reward model"}
            raise UserError(f"{self.folder} holds {names[self.kind]}; {what} needs {names[kind]}")

    def _all_logits(self, params: Params, rows: dict[str, jax.Array]) -> jax.Array:
        lm = self.net.bind(params)
        return lm.logits(lm.hidden(rows["tokens"], rows["segments"], rows["positions"]))

    def _token_logprobs(self, params: Params, rows: dict[str, jax.Array], temperature: jax.Array) -> jax.Array:
        logp_BT = token_logp(self._all_logits(params, rows)[:, :-1], rows["tokens"][:, 1:], temperature)
        return jnp.pad(jnp.where(rows["segments"][:, 1:] > 0, logp_BT, 0.0), ((0, 0), (1, 0)))

    def _prefill(self, params: Params, rows: dict[str, jax.Array], new: int) -> Any:
        state = start(self.net.bind(params), rows["tokens"], rows["segments"], new, self.tokenizer.pad)
        return state.replace(done_B=rows["segments"][:, -1] == 0)

    def _decode(
        self, params: Params, state: Any, key: jax.Array, warmth: jax.Array, kept: Filter | None, limit: jax.Array
    ) -> Any:
        end, pad = self.tokenizer.eos, self.tokenizer.pad
        return advance(self.net.bind(params), state, key, warmth, kept, end, pad, limit)

    def _ways(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _rows(self, tokens: Tokens, lengths: Sequence[int] | None) -> tuple[dict[str, np.ndarray], int]:
        """Right-padded rows for the devices, and the longest row's length."""
        given = [list(row)[: None if lengths is None else lengths[i]] for i, row in enumerate(tokens)]
        longest = max((len(row) for row in given), default=0)
        if not longest or any(not row for row in given):
            raise UserError("every row needs at least one token")
        if longest > self.config.context:
            raise UserError(f"a row has {longest} tokens, and the model's context is {self.config.context}")
        width = min(-(-longest // LENGTHS) * LENGTHS, self.config.context)
        count = -(-len(given) // self._ways()) * self._ways()
        ids, size = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
        for i, row in enumerate(given):
            ids[i, : len(row)], size[i] = row, len(row)
        time = np.arange(width, dtype=np.int32)
        segments = (time < size[:, None]).astype(np.int32)
        positions = np.broadcast_to(time, ids.shape).copy()
        width = np.asarray(tokens).shape[1] if isinstance(tokens, np.ndarray) else longest
        return {"tokens": ids, "segments": segments, "positions": positions, "lengths": size}, width

    def _left_padded(self, ids: Sequence[Sequence[int]], new: int) -> dict[str, np.ndarray]:
        longest = max(map(len, ids))
        if not all(ids):
            raise UserError("every prompt needs at least one token")
        if longest + new > self.config.context:
            raise UserError(
                f"a prompt has {longest} tokens, which with max_tokens {new} exceeds the model's context of "
                f"{self.config.context}; shorten it or lower max_tokens to {max(self.config.context - longest, 0)}"
            )
        width = min(-(-longest // LENGTHS) * LENGTHS, self.config.context - new)
        count = -(-len(ids) // self._ways()) * self._ways()
        tokens = np.full((count, width), self.tokenizer.pad, np.int32)
        segments = np.zeros((count, width), np.int32)
        for i, row in enumerate(ids):
            tokens[i, width - len(row) :], segments[i, width - len(row) :] = row, 1
        return {"tokens": tokens, "segments": segments}

    def _response(
        self, tokens: np.ndarray, logp: np.ndarray, length: np.ndarray, done: np.ndarray, stop: Sequence[str]
    ) -> Generation:
        ids = tokens[: int(length)].tolist()
        text = self.decode(ids)
        cuts = [at for at in (text.find(word) for word in stop) if at >= 0]
        if cuts:
            text = text[: min(cuts)]
        return Generation(text, ids, logp[: int(length)], bool(done) or bool(cuts))


def _check_sampling(max_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def find_stage(path: Path, stage: str | None = None) -> Path:
    """The folder of a finished stage: `path` itself, one named, or the last finished one of the run there.

    Raises UserError where there is none.
    """
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such folder.{nearest(path.name, siblings)}")
    if stage is None and (path / "params").is_dir():
        return path
    run = path.parent if (path / "params").is_dir() else path
    finished = [name for name in STAGES if (run / name / "done.json").is_file()]
    if stage is None:
        speaking = [name for name in finished if name != "reward"] or finished
        if speaking:
            return run / speaking[-1]
    elif stage in finished:
        return run / stage
    known = f"finished there: {', '.join(finished)}" if finished else "nothing is finished there"
    raise UserError(f"{run}: no finished stage{f' {stage}' if stage else ''}; {known}")


def load(path: str | Path, stage: str | None = None, mesh: MeshConfig | None = None) -> Model:
    """Loads a finished model: a stage's folder (runs/meadow/sft), or a run's, whose last language model is taken.

    The mesh defaults to one device. Raises UserError where there is no such model, or it is damaged.
    """
    folder = find_stage(Path(path), stage)
    meta = params_meta(folder / "params")
    home = folder.parent / "tokenizer"
    tokenizer = Tokenizer.load(home)
    if tokenizer.hash != meta["tokenizer"]:
        raise UserError(f"{home} is not the tokenizer that {folder} was trained with")
    devices = make_mesh(mesh or MeshConfig(data=1, fsdp=1, tensor=1))
    return Model(folder, meta["kind"], ModelConfig(**meta["model"]), meta["vocab"], tokenizer, devices)
