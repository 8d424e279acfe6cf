"""Finished models in the Language Model Evaluation Harness (lm-eval 0.4.13 and later): an adapter, and running tasks.

Importing this needs the extra `eval`. Texts become tokens as in lm-eval's own `hf` model, so that numbers compare:
every context begins with BOS, and rolling log-likelihoods count that BOS once more, as a first prediction. For the
perplexity of a text without that oddity there is jaxgpt.evaluate.perplexity.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxgpt.api import Model
from jaxgpt.errors import UserError, nearest
from jaxgpt.evaluate.continuations import Continuation, Scorer

LOG = logging.getLogger(__name__)
MAX_NEW = 256
"""Tokens generated where a task names no number, as in lm-eval."""
CONTROL = 0xF0000
"""Private-use characters from here on stand for control tokens in a rendered conversation, which is a string to
lm-eval: no other text of theirs becomes a control token."""


class Harness(TemplateLM):
    """A model of ours as lm-eval's evaluator takes it."""

    def __init__(self, model: Model, batch: int = 8, bos: bool = True):
        """`bos` puts BOS in front of every context, for tokenizers that have one (GPT-2's has none)."""
        super().__init__()
        self.model, self.batch, self.bos = model, batch, bos
        self._scorer = Scorer(model, batch)
        control = sorted(model.tokenizer.control.values())
        self._control = {chr(CONTROL + i): token for i, token in enumerate(control)}
        self._marks = {token: mark for mark, token in self._control.items()}
        self._split = re.compile(f"([{chr(CONTROL)}-{chr(CONTROL + len(control))}])")
        self._rendered = False

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.model.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end token for tokenizers without one."""
        return self.model.tokenizer.start

    @property
    def max_length(self) -> int:
        """Tokens that the model predicts from, at most."""
        return self.model.config.context

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches know the tokenizer and its template by."""
        return f"jaxgpt-{self.model.tokenizer.hash[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, where conversations are asked for."""
        return self.model.tokenizer.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a string: control tokens are private-use characters, which `tok_encode` knows.

        Without a generation prompt the last message is the beginning of the assistant's answer.
        """
        self._rendered = True
        messages = [{**m, "content": self._split.sub("\ufffd", m["content"])} for m in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        ids, text, run = self.model.chat_tokens(messages), "", list[int]()
        for token in ids:
            if token in self._marks:
                text, run = text + self.model.decode(run) + self._marks[token], []
            else:
                run.append(token)
        return text + self.model.decode(run) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; BOS in front where that is asked for, or by the adapter's own setting, and not yet there."""
        parts = self._split.split(string) if self._rendered else [string]
        ids: list[int] = []
        for part in parts:
            ids += [self._control[part]] if part in self._control else self.model.tokenizer.encode(part) if part else []
        wanted = self.bos if add_special_tokens is None else add_special_tokens
        prefix = self.model.tokenizer.prefix if wanted else []
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log p, greedy) of each continuation; contexts that are too long lose their beginning."""
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        found = [(scored.logp, scored.greedy) for scored in self._scorer(asked)]
        for (key, _, _), result in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> Continuation:
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task asks for the probability of {len(continuation)} tokens at once, and the model's context is "
                f"{self.max_length}"
            )
        room = self.max_length + 1 - len(continuation)
        return Continuation(context[-room:] or [self.prefix_token_id], continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token once, in windows that do not overlap but for the last (lm-eval's way)."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end token or the task's number of tokens: greedy unless it samples."""
        groups: dict[str, list[tuple[int, list[int], dict[str, Any]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            context, settings = request.args
            groups[repr(settings)].append((i, self.tok_encode(context), settings))
        found = [""] * len(requests)
        for group in groups.values():
            group.sort(key=lambda one: -len(one[1]))
            for at in range(0, len(group), self.batch):
                part = group[at : at + self.batch]
                texts = self._generate([context for _, context, _ in part], part[0][2], seed=at)
                for (i, _, _), text in zip(part, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _generate(self, contexts: list[list[int]], settings: Mapping[str, Any], seed: int) -> list[str]:
        asked = normalize_gen_kwargs(dict(settings), MAX_NEW)
        new = min(asked["max_gen_toks"], max(self.max_length // 2, 1))
        if new < asked["max_gen_toks"]:
            LOG.warning("at most %d new tokens, half of the model's context, for %d", new, asked["max_gen_toks"])
        room = self.max_length - new
        prompts = [context[-room:] or [self.prefix_token_id] for context in contexts]
        filled = [*prompts, *prompts[:1] * (self.batch - len(prompts))]
        responses = self.model.generate(
            filled,
            max_tokens=new,
            temperature=float(asked.get("temperature") or 0.0) if asked["do_sample"] else 0.0,
            seed=seed,
            top_k=asked.get("top_k") or None,
            top_p=asked.get("top_p"),
            stop=[word for word in handle_stop_sequences(asked["until"], eos=None) if word],
        )
        return [response.text for response in responses[: len(prompts)]]


class Tasks(TaskManager):
    """Tasks that are loaded once: before the model, so that mistakes in them are told early."""

    def __init__(self, names: Sequence[str]):
        """Reads the tasks and their data sets. Raises UserError for a name that lm-eval does not know, with the
        nearest, and for a task that cannot be loaded."""
        files = [Path(name) for name in names if is_file_name(name)]
        refers = any(re.search(r"^(group:|task:\s*(\[|$))", path.read_text(encoding="utf-8"), re.M) for path in files)
        super().__init__(include_defaults=refers or len(files) < len(names))
        self.names, self._loaded = list(names), {}
        for name in self.names:
            if not is_file_name(name) and name not in self.task_index:
                raise UserError(f"'{name}': lm-eval has no such task.{nearest(name, self.all_tasks)}")
        try:
            self._loaded = super().load(self.names)
        except Exception as error:  # whatever the code of a task, or the reader of its data, ran into
            what = " ".join(str(error).split()) or "no reason given"
            raise UserError(f"{', '.join(names)}: lm-eval cannot load it ({type(error).__name__}: {what})") from error

    def load(self, task_list: Any) -> Any:
        """What was loaded."""
        return self._loaded


def is_file_name(task: str) -> bool:
    """Whether a task is named by its own YAML file."""
    return Path(task).suffix in (".yaml", ".yml")


def run_tasks(
    model: Model, tasks: Tasks, batch: int, limit: int | None = None, few_shot: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """Results of each task and group, lm-eval's own: {"results": {task: {"acc,none": ..}}, "n-samples": ..., ...}.

    `chat` puts the questions through the model's chat template.
    """
    results = simple_evaluate(
        model=Harness(model, batch),
        tasks=tasks.names,
        num_fewshot=few_shot,
        batch_size=batch,
        limit=limit,
        task_manager=tasks,
        apply_chat_template=chat,
        log_samples=False,
    )
    kept = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")
    return {key: results[key] for key in kept if key in results}
