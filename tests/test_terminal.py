"""The terminal: text appears as it is decoded, and a conversation goes on over commands, stages and a full context."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import CONTEXT, load_once, make_run

from jaxgpt import terminal
from jaxgpt.config.options import SamplingOptions
from jaxgpt.errors import UserError
from jaxgpt.runs import find_stage
from jaxgpt.terminal import Chat, chat, sample, settled


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="module", autouse=True)
def models(run):
    """Each model is loaded once, and its compiled programs are not kept for later processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "load", lambda path, stage: load_once(find_stage(path, stage)))
        patch.setattr(terminal, "keep_compiled", lambda: None)
        yield


@pytest.fixture(scope="module")
def sft(run):
    return load_once(run / "sft")


class Screen(io.StringIO):
    """A terminal that presses Ctrl-C when `wish` says so of what is on it."""

    def __init__(self, text: str = "", wish=lambda text: False):
        super().__init__(text)
        self.wish = wish

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        size = super().write(text)
        if self.wish(self.getvalue()):
            self.wish = lambda text: False
            signal.raise_signal(signal.SIGINT)
        return size


def talk(capsys, monkeypatch, run, *lines, **options) -> tuple[list[str], list[str]]:
    """What a piped chat answers and notes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert chat(run, SamplingOptions(**{"max_tokens": 8, **options})) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def test_a_sample_is_the_text_and_what_generate_makes_of_it(run, sft, capsys):
    for options in ({"temperature": 0.0}, {"seed": 3, "top_k": 9}, {"stop": ("e",)}):
        assert sample(run, "One day ", SamplingOptions(max_tokens=12, **options)) == 0
        given = {name: value for name, value in options.items() if name != "seed"}
        expected = sft.generate("One day ", 12, seed=options.get("seed", 0), **given)[0].text
        assert capsys.readouterr().out == f"One day {expected}\n"


def test_a_sample_ends_at_the_context_and_says_so(run, sft, capsys):
    ids = sft.encode("the cat " * 7)
    assert sample(run, "the cat " * 7, SamplingOptions(max_tokens=500, temperature=0.0)) == 0
    expected = sft.generate([ids], CONTEXT - len(ids), 0.0)[0]
    out, err = capsys.readouterr()
    assert out == "the cat " * 7 + expected.text + "\n"
    assert err == ("" if expected.ended else "ended at the model's context of 64 tokens\n")
    with pytest.raises(UserError, match="holds a reward model, which scores and does not speak; see --stage"):
        sample(run, "the cat", SamplingOptions(stage="reward"))
    with pytest.raises(UserError, match=r"the text has .* tokens, and the model's context is 64; shorten it"):
        sample(run, "the cat " * 99, SamplingOptions())


def test_on_a_terminal_the_text_is_dim_and_escapes_are_not_obeyed(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    sample(run, "T\x1b[31m", SamplingOptions(max_tokens=2))
    assert screen.getvalue().startswith("\x1b[2mT\ufffd[31m\x1b[0m") and screen.getvalue().endswith("\n")


def test_half_characters_and_beginnings_of_stop_strings_wait():
    assert settled("a caf\ufffd\ufffd", ()) == "a caf"
    assert settled("a\ufffdb", ()) == "a\ufffdb"
    assert settled("yes\nQue", ("\nQuestion:", "e!")) == "yes"
    assert settled("yes", ("sy", "es.", "no")) == "y"
    assert settled("yes", ("yes",)) == "yes"


def test_answers_are_one_line_each_with_the_conversation_before_them(run, sft, capsys, monkeypatch):
    out, err = talk(capsys, monkeypatch, run, "the cat", "", "/system black", "a dog", "/reset", "the cat", seed=4)
    first = sft.chat([user("the cat")], 8, seed=4)[0]
    system = {"role": "system", "content": "black"}
    past = [system, user("the cat"), {"role": "assistant", "content": first}, user("a dog")]
    anew = sft.chat([system, user("the cat")], 8, seed=6)[0]
    assert out == [one_line(text) for text in (first, sft.chat(past, 8, seed=5)[0], anew)]
    assert err == ["the system message is: black", "the conversation begins anew"]


def test_commands_are_answered_beside_the_conversation(run, capsys, monkeypatch):
    out, err = talk(
        capsys, monkeypatch, run,
        "/stage", "/stge sft", "/stage ppo", "/stage reward", "/stage stf", "/help", "/exit", "the cat",
    )  # fmt: skip
    assert out == []
    assert err[:5] == [
        "now sft; finished: pretrain, sft, reward",
        "/stge: no such command. Did you mean '/stage'? Commands: /reset, /stage, /system, /help, /exit",
        f"{run}: stage ppo is not finished. Finished there: pretrain, sft, reward",
        f"{run / 'reward'} holds a reward model, which scores and does not speak; see --stage",
        "'stf': no such stage. Did you mean 'sft'? Finished there: pretrain, sft, reward",
    ]
    assert [line.split()[0] for line in err[5:]] == ["/reset", "/stage", "/system", "/help", "/exit"]


def test_a_base_model_continues_the_conversation_as_plain_lines(run, capsys, monkeypatch):
    out, err = talk(capsys, monkeypatch, run, "the cat", "/stage base", "a dog?", temperature=0.0)
    base = load_once(run / "pretrain")
    prompt = f"Question: the cat Answer: {out[0]}\nQuestion: a dog? Answer:"
    expected = base.generate(prompt, 8, 0.0, stop="\n")[0].text.strip()
    assert out[1:] == [one_line(expected)]
    assert err[0] == (
        f"{run / 'pretrain'} is a base model: it continues text, so the conversation is given to it as "
        "'Question: ... Answer: ...'"
    )
    assert err[1] == f"now {run / 'pretrain'}"


def test_a_full_context_forgets_the_oldest_turns(run, sft, capsys, monkeypatch):
    message = "the cat " * 4
    out, err = talk(capsys, monkeypatch, run, *[message] * 5, "the cat " * 99, "the cat", max_tokens=16)
    assert len(out) == 6
    assert err[0] == "the context of 64 tokens is full: dropped the oldest turns (1)"
    assert any(line.startswith("the message makes ") and "context is 64; shorten it" in line for line in err)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(run, sft, capsys, monkeypatch):
    first = terminal._visible(sft.chat([user("the cat")], 40, seed=3)[0])
    assert len(first) > 20
    pressed = Screen(wish=lambda text: len(text) > len("sft> ") + 5)
    monkeypatch.setattr(sys, "stdin", Screen("the cat\n/exit\n"))
    monkeypatch.setattr(sys, "stdout", pressed)
    assert chat(run, SamplingOptions(max_tokens=40, seed=3)) == 0
    shown = pressed.getvalue()
    assert shown.startswith("sft> ") and shown.endswith("\nsft> ")
    answer = shown.removeprefix("sft> ").removesuffix("\nsft> ")
    assert 0 < len(answer) < len(first) and first.startswith(answer)
    monkeypatch.undo()
    assert "/help lists the commands" in capsys.readouterr().err


def test_what_was_answered_before_ctrl_c_stays_in_the_conversation(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Screen(wish=lambda text: len(text) > 5))
    conversation = Chat(run, SamplingOptions(max_tokens=40, seed=3), live=True)
    conversation.say("the cat")
    assert [turn.user for turn in conversation.turns] == ["the cat"]
    assert sys.stdout.getvalue() == terminal._visible(conversation.turns[0].answer) + "\n"


def process(*words: str, given: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": "", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "jaxgpt", *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, env=environment)


def test_both_verbs_as_processes(run, sft, tmp_path):
    done = process("sample", str(run), "the cat", "--max-tokens", "8", "--temperature=0", given="", cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"the cat{sft.generate('the cat', 8, 0.0)[0].text}\n"
    words = ("chat", str(run), "--max-tokens", "8", "--temperature=0")
    done = process(*words, given="the cat\n/nonsense\n", cache=tmp_path)
    assert done.returncode == 0 and done.stdout == one_line(sft.chat([user("the cat")], 8, 0.0)[0]) + "\n"
    assert done.stderr.startswith("/nonsense: no such command.")
