"""The verbs that work from a config, and how they end when they are asked to stop."""

from __future__ import annotations

import signal
import types

from rich.console import Console

from jaxgpt.api import keep_compiled
from jaxgpt.config.schema import Config
from jaxgpt.overopt import Study
from jaxgpt.pipeline import Pipeline
from jaxgpt.report import write_report
from jaxgpt.train.loop import RESUMABLE, Preempted


def run_verb(verb: str, config: Config) -> int:
    """Does what a verb of the command line asks for and returns its exit code: 75 where it was asked to stop."""
    keep_compiled()
    console = Console(soft_wrap=True)
    pipeline = Pipeline(config, console)
    before = signal.signal(signal.SIGTERM, _preempt)  # training has a handler of its own, which saves first
    try:
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
                console.print(f"report  {write_report(pipeline.folder)}", highlight=False)
            case _:
                pipeline.one(verb)
    except Preempted as stopped:
        console.print(str(stopped), highlight=False)
        return RESUMABLE
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _preempt(number: int, frame: types.FrameType | None) -> None:
    raise Preempted("stopped between stages; the same command goes on")
