"""The verbs that work from a config, on one host or many, and how they end when they are asked to stop."""

from __future__ import annotations

import signal
import types

import jax
from rich.console import Console

from jaxgpt import hosts
from jaxgpt.api import keep_compiled
from jaxgpt.config.schema import Config
from jaxgpt.launch import Start
from jaxgpt.overopt import Study
from jaxgpt.pipeline import Pipeline
from jaxgpt.places import place
from jaxgpt.report import write_report
from jaxgpt.train.loop import RESUMABLE, Preempted


def run_verb(verb: str, config: Config, start: Start | None = None) -> int:
    """Does what a verb of the command line asks for and returns its exit code: 75 where it was asked to stop.

    With `start`, together with the other processes that were started so.
    """
    with hosts.together(start, config.hosts):
        # Host 0 alone writes programs: among several, where all can read them.
        keep_compiled(place(config.runs) / "compiled" if hosts.count() > 1 else None)
        if config.hosts.profile_port is not None and hosts.first():
            jax.profiler.start_server(config.hosts.profile_port)
        return _stoppable(verb, config, Console(soft_wrap=True, quiet=not hosts.first()))


def _stoppable(verb: str, config: Config, console: Console) -> int:
    # Training has a handler of its own, which saves first. Among several hosts jax listens, and they stop in training.
    before = signal.signal(signal.SIGTERM, _preempt) if hosts.count() == 1 else None
    try:
        _do(verb, config, Pipeline(config, console), console)
    except Preempted as stopped:
        console.print(str(stopped), highlight=False)
        return RESUMABLE
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _do(verb: str, config: Config, pipeline: Pipeline, console: Console) -> None:
    match verb:
        case "run":
            pipeline.everything()
        case "prepare":
            pipeline.prepare()
        case "tokenizer":
            pipeline.prepare()
            pipeline.tokenizer()
        case "eval":
            pipeline.evaluate()
        case "overopt":
            Study(config, pipeline).run()
        case "report":
            hosts.lead(lambda: console.print(f"report  {write_report(pipeline.folder)}", highlight=False))
        case _:
            pipeline.one(verb)


def _preempt(number: int, frame: types.FrameType | None) -> None:
    raise Preempted("stopped between stages; the same command goes on")
