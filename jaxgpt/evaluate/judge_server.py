"""A judge behind an OpenAI-compatible server: which of two responses is better, in words over HTTP.

Needs the network, nothing beside the standard library, and no jax.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from jaxgpt.data.chat import Message
from jaxgpt.errors import UserError

Verdict = Literal["first", "second", "tie", "unreadable"]
VERDICTS: Mapping[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
ATTEMPTS = 5
"""How often one question is asked while the server is busy or cannot be reached."""
PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled for each one more; and the most that is waited, even where the server asks
for more."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be another one a moment later."""
INSTRUCTION = (
    "You compare two responses, A and B, to the last message of the same conversation. Say which one serves the user "
    "better: it is correct, it does what was asked, and it says so clearly. Do not favour the longer one, nor the one "
    "that is shown first. Give your reason in a sentence or two, then the verdict on a line of its own: [[A]] if A is "
    "better, [[B]] if B is better, [[C]] if neither is."
)


class Question(NamedTuple):
    """Two responses to one prompt."""

    messages: Sequence[Message]
    """The conversation up to where the assistant is to speak."""
    first: str
    second: str
    answer: str | None = None
    """What is known to be right, for the judge to compare with."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to no address but the one that was named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class JudgeServer:
    """An OpenAI-compatible server and one of its models, as a judge; safe to use from several threads."""

    def __init__(
        self,
        base: str,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        parallel: int = 4,
        pause: float = PAUSE,
    ):
        """`base` is the address before "/chat/completions"; `model` may be left out where the server has one alone;
        `key` is sent as a bearer token; `timeout` is in seconds, for each attempt; `parallel` questions are under way
        at once. Nothing is sent yet."""
        self.base, self.model, self.timeout, self.parallel = base.rstrip("/"), model, timeout, parallel
        self._pause = pause
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        direct = [urllib.request.ProxyHandler({})] if _is_here(self.base) else []
        self._opener = urllib.request.build_opener(_NoRedirect(), *direct)

    def check(self) -> None:
        """Asks the server for its models: it answers, and there is a model to ask.

        Raises UserError where it cannot be reached, and where `model` is to be found and is not one.
        """
        try:
            known = self._models()
        except urllib.error.HTTPError as error:  # it is there; not every server lists its models
            if error.code in (401, 403):
                raise self._refused(error) from error
            known = []
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        if self.model is None and len(known) == 1:
            self.model = known[0]
        if self.model is None:
            listed = f"it has {', '.join(known[:8])}" if known else f"{self.base}/models lists none"
            raise UserError(f"judge_model: must be set, the name of a model that {self.base} serves; {listed}")

    def _models(self) -> list[str]:
        request = urllib.request.Request(f"{self.base}/models", headers=self._headers)
        with self._opener.open(request, timeout=min(self.timeout, 10.0)) as response:
            found = json.loads(response.read())
        listed = found.get("data") if isinstance(found, dict) else None
        return [str(one["id"]) for one in listed or () if isinstance(one, dict) and "id" in one]

    def verdicts(self, questions: Sequence[Question]) -> Iterator[Verdict]:
        """A verdict on each question, in order, as they come. Raises UserError where the server gives none."""
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="judge")
        try:
            yield from pool.map(self.verdict, questions)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def verdict(self, question: Question) -> Verdict:
        """The verdict on one question; "unreadable" where the reply has none. Raises UserError as `verdicts` does."""
        found = re.findall(r"\[\[([ABC])\]\]", self._reply(question))
        return VERDICTS[found[-1]] if found else "unreadable"

    def _reply(self, question: Question) -> str:
        asked = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _written(question)}]
        body = json.dumps({"model": self.model, "messages": asked, "temperature": 0}).encode("utf-8")
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            request = urllib.request.Request(f"{self.base}/chat/completions", body, self._headers, method="POST")
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                if error.code not in BUSY or last:
                    raise self._refused(error) from error
                self._wait(attempt, error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                if last:
                    raise self._unreachable(error) from error
                self._wait(attempt, None)
            except ValueError as error:
                raise UserError(f"judge: {self.base} answered what no chat completion is: {error}") from error
        raise AssertionError("every attempt returns or raises")

    def _wait(self, attempt: int, asked: str | None) -> None:
        """Longer each time, and not all threads at once; as long as the server asks for, where it does in seconds."""
        pause = self._pause * 2**attempt * random.uniform(1.0, 1.5)
        if asked is not None and asked.strip().isdigit():
            pause = max(pause, float(asked))
        time.sleep(min(pause, LONGEST_PAUSE))

    def _refused(self, error: urllib.error.HTTPError) -> UserError:
        with error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())
        hint = {
            401: " judge_key names the environment variable with the server's key.",
            404: " The address goes up to /v1, as in http://127.0.0.1:8000/v1, and judge_model is a model it serves.",
        }
        code = error.code
        told = f"{code} {error.reason}{said and f' ({said[:300]})'}"
        again = f" after {ATTEMPTS} attempts" if code in BUSY else ""
        moved = f" It points to {error.headers.get('Location')}: name that address." if 300 <= code < 400 else ""
        return UserError(f"judge: {self.base} answered {told}{again}.{moved}{hint.get(code, '')}")

    def _unreachable(self, error: Exception) -> UserError:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            reason = f"no answer in {self.timeout:g} s; judge_timeout is how long to wait"
        return UserError(f"judge: {self.base} cannot be used: {reason}")


def _written(question: Question) -> str:
    """A question as the judge reads it."""
    talk = "\n\n".join(f"{message['role']}: {message['content']}" for message in question.messages)
    known = "" if question.answer is None else f"\n\n<known to be right>\n{question.answer}\n</known to be right>"
    return (
        f"<conversation>\n{talk}\n</conversation>{known}\n\n"
        f"<response A>\n{question.first}\n</response A>\n\n<response B>\n{question.second}\n</response B>"
    )


def _content(body: bytes) -> str:
    """The text of a chat completion. Raises ValueError where there is none."""
    try:
        found = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, ValueError):
        found = None
    if not isinstance(found, str):
        raise ValueError(" ".join(body[:300].decode("utf-8", "replace").split()))
    return found


def _is_here(base: str) -> bool:
    """Whether an address is this machine's own, which no proxy is asked for."""
    host = urllib.parse.urlsplit(base).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
