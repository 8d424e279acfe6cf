"""A model of ours as a Hugging Face folder.

Writes files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxgpt.config.schema import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.families import family_for
from jaxgpt.interop.family import Family
from jaxgpt.interop.folder import CONFIG, write_json
from jaxgpt.interop.settings import Json
from jaxgpt.interop.tokenizer_files import tokenizer_files, with_pad
from jaxgpt.interop.weights import OFFSET, write_weights
from jaxgpt.models.net import Params

TORCH = {"F32": "float32", "BF16": "bfloat16"}
CARD = "README.md"


def choose_family(model: ModelConfig, kind: str) -> Family:
    """The family that a model leaves as. Raises UserError where there is none, or it has no class for a score."""
    family = family_for(model)
    if kind == "scalar" and family.classifier is None:
        missing = f"{family.causal.removesuffix('ForCausalLM')}ForSequenceClassification"
        raise UserError(
            f"this reward model is built as {family.causal}, and transformers has no {missing}; only "
            "language models of this family can be exported"
        )
    return family


def write_folder(
    folder: Path,
    kind: str,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str,
    largest: int,
    gain: float = 1.0,
) -> Family:
    """Writes the folder, whole or not at all. `model` has its vocabulary set; `dtype` is "F32" or "BF16"; `largest` is
    the size of one file of weights, in bytes; `gain` is what a reward model's scores were multiplied by.

    Raises UserError where transformers has no class for the model, or would tokenize differently.
    """
    family = choose_family(model, kind)
    if kind == "scalar":
        tokenizer = with_pad(tokenizer)
        assert model.vocab is not None
        model = model.model_copy(update={"vocab": max(model.vocab, tokenizer.pad + 1)})
    files = tokenizer_files(tokenizer, model.context, family.type)
    with whole(folder) as part:
        for name, content in files.items():
            (part / name).write_bytes(content)
        config = _config(family, kind, model, params, tokenizer, dtype)
        write_json(part / CONFIG, config | ({"score_gain": gain} if kind == "scalar" else {}))
        if kind == "language":
            write_json(part / "generation_config.json", _ids(tokenizer))
        (part / CARD).write_text(_card(family, kind, params, tokenizer), encoding="utf-8")
        write_weights(part, family, model, params, dtype, largest)
    return family


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Gives a folder beside `folder` to write into, which takes its name at the end and is removed on any error.

    Raises UserError where `folder` is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name another folder, or remove it")
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir():
        raise UserError(f"{folder}: {above} is a file, and a folder is needed there")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _config(family: Family, kind: str, model: ModelConfig, params: Params, tokenizer: Tokenizer, dtype: str) -> Json:
    config: Json = {
        "architectures": [family.causal if kind == "language" else family.classifier],
        "model_type": family.type,
        **family.write(model),
        **_ids(tokenizer),
        "dtype": TORCH[dtype],
        "torch_dtype": TORCH[dtype],
        "use_cache": True,
    }
    if kind == "scalar":
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config |= {"score_bias": float(params[OFFSET])}
    return config


def _ids(tokenizer: Tokenizer) -> Json:
    ends = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.eos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.pad}


def _card(family: Family, kind: str, params: Params, tokenizer: Tokenizer) -> str:
    """What one has to know to use the folder."""
    name = family.causal if kind == "language" else family.classifier
    control = ", ".join(f"`{piece}`" for piece in tokenizer.control)
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if kind == 'language' else 'text-classification'}",
        "---",
        "",
        f"A model trained with jaxgpt, as `{name}`.",
        "",
    ]
    if kind == "scalar":
        lines += [
            f"Its score is `model(**batch).logits[:, 0] + model.config.score_bias`: transformers' classifiers have no "
            f"bias, and the reward model has {float(params[OFFSET]):.6g}. It takes a response of score a to be better "
            "than one of score b with probability sigmoid((a - b) / config.score_gain).",
            "",
        ]
    lines += [
        f"Control tokens: {control}. jaxgpt never makes one of them from what a user writes; the tokenizers of "
        "transformers do wherever their text stands in the input, unless they are called with "
        "`split_special_tokens=True`. Take these texts out of messages of people you do not trust.",
        "",
    ]
    return "\n".join(lines)
