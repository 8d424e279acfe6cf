"""An exported folder through llama.cpp: its tokenizer gives the same ids, its greedy answers are
the same tokens.

Needs `pip install llama-cpp-python torch` and JAXGPT_LLAMA_CPP, the folder of llama.cpp's convert_hf_to_gguf.py (in
the source package of llama-cpp-python: vendor/llama.cpp). JAXGPT_LLAMA_CPP_RUN may name a trained run's stage.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_run

import jaxgpt
from jaxgpt.config.options import Export
from jaxgpt.data.chat import render_text
from jaxgpt.exchange import export

pytestmark = pytest.mark.peers
llama_cpp = pytest.importorskip("llama_cpp")
CONVERTER = Path(os.environ.get("JAXGPT_LLAMA_CPP", "/nowhere")) / "convert_hf_to_gguf.py"
CHARACTERS = "abc ABC  \n\t0123 éßñ中文字日本 😀👩‍👩‍👧 .,!?'\"-_()[]{}<>/|\\"
QUESTIONS = ["What does a fox eat?", "What is 3 + 4?", "Tell me a story about a bear and a drum.", "Who are you?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(our model, llama.cpp's of the exported folder)."""
    if not CONVERTER.is_file():
        pytest.skip("JAXGPT_LLAMA_CPP does not name the folder of convert_hf_to_gguf.py")
    home = tmp_path_factory.mktemp("llama_cpp")
    named = os.environ.get("JAXGPT_LLAMA_CPP_RUN")
    stage = Path(named) if named else make_run(tmp_path_factory.getbasetemp() / "llama_cpp_run") / "sft"
    export(stage, home / "folder", Export())
    command = [
        sys.executable,
        str(CONVERTER),
        str(home / "folder"),
        "--outfile",
        str(home / "x.gguf"),
        "--outtype",
        "f32",
    ]
    path = f"{CONVERTER.parent / 'gguf-py'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    made = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ours = jaxgpt.load(stage)
    return ours, llama_cpp.Llama(str(home / "x.gguf"), verbose=False, n_ctx=ours.config.context, n_threads=1)


def test_texts_become_the_same_ids(models):
    ours, theirs = models
    draw = random.Random(0)
    texts = ["".join(draw.choices(CHARACTERS, k=draw.randrange(1, 40))) for _ in range(500)]
    for text in [*QUESTIONS, *texts]:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours.encode(text), text


def test_conversations_keep_their_control_tokens_and_get_the_same_answers(models):
    ours, theirs = models
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = ours.chat_tokens(messages)
        assert (
            theirs.tokenize(render_text(ours.tokenizer, messages, True).encode(), add_bos=False, special=True) == prompt
        )
        theirs.reset()
        answer: list[int] = []
        for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if token == theirs.token_eos() or len(answer) == 24:
                break
        assert answer == ours.generate([prompt], max_tokens=24, temperature=0)[0].tokens
