"""The published models under configs/model are checkably the published ones: parameter for parameter.

Exact counts are those of the published weights, as their files or model cards give them (the sum of the shapes in
their safetensors headers). GPT-3 and PaLM were never published: theirs are compared within the rounding of the papers'
tables. Every count is also compared with a closed form that is written here from the dimensions of the paper.
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.config.schema import LearnedPositions, MeshConfig, ModelConfig
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import count

ROOT = Path(__file__).parents[2]


def gpt(vocab: int, width: int, layers: int, context: int) -> int:
    """GPT-2 and GPT-3: 12 D^2 + 13 D a block, positions, one matrix for input and output."""
    return vocab * width + context * width + layers * (12 * width**2 + 13 * width) + 2 * width


def llama(vocab: int, width: int, layers: int, groups: int, ff: int) -> int:
    """LLaMA: four attention matrices (two of them of groups * 128), three of the feed-forward, no biases."""
    block = 2 * width**2 + 2 * width * groups * 128 + 3 * width * ff + 2 * width
    return 2 * vocab * width + layers * block + width


def qwen(vocab: int, width: int, layers: int, shared: int, ff: int, matrices: int) -> int:
    """Qwen2: LLaMA with biases on queries, keys and values; `shared` is the width of all keys."""
    block = 2 * width**2 + 2 * width * shared + width + 2 * shared + 3 * width * ff + 2 * width
    return matrices * vocab * width + layers * block + width


def palm(vocab: int, width: int, layers: int, heads: int) -> int:
    """PaLM: queries and output of heads * 256, one key and one value head, SwiGLU of 4 D, one norm, no biases."""
    block = 2 * width * heads * 256 + 2 * width * 256 + 3 * width * 4 * width + width
    return vocab * width + layers * block + width


def neox(vocab: int, width: int, layers: int) -> int:
    """GPT-NeoX: GPT-2's block without positions, input and output matrices apart."""
    return 2 * vocab * width + layers * (12 * width**2 + 13 * width) + 2 * width


EXACT = {
    # openai-community on the Hugging Face hub
    "gpt2": (124_439_808, gpt(50257, 768, 12, 1024)),
    "gpt2-medium": (354_823_168, gpt(50257, 1024, 24, 1024)),
    "gpt2-large": (774_030_080, gpt(50257, 1280, 36, 1024)),
    "gpt2-xl": (1_557_611_200, gpt(50257, 1600, 48, 1024)),
    # huggyllama
    "llama-7b": (6_738_415_616, llama(32000, 4096, 32, 32, 11008)),
    "llama-13b": (13_015_864_320, llama(32000, 5120, 40, 40, 13824)),
    "llama-33b": (32_528_943_616, llama(32000, 6656, 60, 52, 17920)),
    "llama-65b": (65_285_660_672, llama(32000, 8192, 80, 64, 22016)),
    # meta-llama
    "llama2-7b": (6_738_415_616, llama(32000, 4096, 32, 32, 11008)),
    "llama2-13b": (13_015_864_320, llama(32000, 5120, 40, 40, 13824)),
    "llama2-70b": (68_976_648_192, llama(32000, 8192, 80, 8, 28672)),
    "llama3-8b": (8_030_261_248, llama(128256, 4096, 32, 8, 14336)),
    "llama3-70b": (70_553_706_496, llama(128256, 8192, 80, 8, 28672)),
    "llama3.1-8b": (8_030_261_248, llama(128256, 4096, 32, 8, 14336)),
    "llama3.1-70b": (70_553_706_496, llama(128256, 8192, 80, 8, 28672)),
    # lmsys
    "vicuna-7b": (6_738_415_616, llama(32000, 4096, 32, 32, 11008)),
    "vicuna-13b": (13_015_864_320, llama(32000, 5120, 40, 40, 13824)),
    # Qwen
    "qwen2-0.5b": (494_032_768, qwen(151936, 896, 24, 2 * 64, 4864, 1)),
    "qwen2-1.5b": (1_543_714_304, qwen(151936, 1536, 28, 2 * 128, 8960, 1)),
    "qwen2-7b": (7_615_616_512, qwen(152064, 3584, 28, 4 * 128, 18944, 2)),
    # EleutherAI; the totals are also in the tables of the Pythia repository and of GPT-NeoX-20B's model card
    "pythia-70m": (70_426_624, neox(50304, 512, 6)),
    "pythia-160m": (162_322_944, neox(50304, 768, 12)),
    "pythia-410m": (405_334_016, neox(50304, 1024, 24)),
    "pythia-1.4b": (1_414_647_808, neox(50304, 2048, 24)),
    "pythia-6.9b": (6_857_302_016, neox(50432, 4096, 32)),
    "gpt-neox-20b": (20_554_567_680, neox(50432, 6144, 44)),
}
ROUNDED = {
    # arXiv 2005.14165, table D.1, in millions: four digits at most, the last one of 760 and less is a unit
    "gpt3-125m": (125e6, 0.5e6, gpt(50257, 768, 12, 2048)),
    "gpt3-350m": (356e6, 0.5e6, gpt(50257, 1024, 24, 2048)),
    "gpt3-760m": (760e6, 0.5e6, gpt(50257, 1536, 24, 2048)),
    "gpt3-1.3b": (1320e6, 5e6, gpt(50257, 2048, 24, 2048)),
    "gpt3-2.7b": (2650e6, 5e6, gpt(50257, 2560, 32, 2048)),
    "gpt3-6.7b": (6660e6, 5e6, gpt(50257, 4096, 32, 2048)),
    "gpt3-13b": (12850e6, 5e6, gpt(50257, 5120, 40, 2048)),
    "gpt3-175b": (174600e6, 50e6, gpt(50257, 12288, 96, 2048)),
    # arXiv 2204.02311, table 1, in units of 1e9 with two decimals; 540.356 is printed as 540.35
    "palm-8b": (8.63e9, 0.005e9, palm(256_000, 4096, 32, 16)),
    "palm-62b": (62.50e9, 0.005e9, palm(256_000, 8192, 64, 32)),
    "palm-540b": (540.35e9, 0.01e9, palm(256_000, 18432, 118, 48)),
}
NON_EMBEDDING = {  # arXiv 2304.01373, table 1
    "pythia-70m": 18_915_328,
    "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424,
    "pythia-1.4b": 1_208_602_624,
    "pythia-6.9b": 6_444_163_072,
}


def config(name: str, *changes: str) -> ModelConfig:
    return load(ROOT / "configs" / "shakespeare.yaml", [f"model={name}", *changes]).config.model


def parameters(c: ModelConfig) -> int:
    """Parameters of our model, from shapes alone."""
    assert c.vocab is not None, "a published model has a published vocabulary"
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))):
        return count(language_model(c, c.vocab).abstract)


def test_every_file_but_tiny_is_compared():
    files = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    assert files - {"tiny"} == EXACT.keys() | ROUNDED.keys()


@pytest.mark.parametrize("name", EXACT)
def test_the_count_is_that_of_the_published_weights(name):
    published, formula = EXACT[name]
    assert parameters(config(name)) == published == formula


@pytest.mark.parametrize("name", ROUNDED)
def test_the_count_is_that_of_the_papers_table_within_its_rounding(name):
    table, rounding, formula = ROUNDED[name]
    found = parameters(config(name))
    assert abs(found - table) <= rounding and found == formula


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_pythia_has_the_papers_count_without_its_matrices(name):
    c = config(name)
    assert parameters(c) - 2 * c.vocab * c.width == NON_EMBEDDING[name]


def test_the_dimensions_that_gpt3s_table_prints_contradict_its_own_counts():
    """What the comments of gpt3-1.3b and gpt3-13b say."""
    heads = parameters(config("gpt3-1.3b", "model.attention.heads=24"))
    width = parameters(config("gpt3-13b", "model.width=5140"))
    assert round(heads / 1e9, 2) == 1.52 and round(width / 1e6) == 12_936


def test_gpt3_alternates_dense_and_banded_layers_and_keeps_gpt2s_block():
    for name in (name for name in ROUNDED if name.startswith("gpt3")):
        c, small = config(name), config("gpt2")
        assert c.attention.windows == (None, 256) and c.layers % 2 == 0 and c.context == 2048
        assert c.head_dim * c.attention.heads == c.width
        assert (c.norm, c.mlp, c.positions, c.tied) == (small.norm, small.mlp, small.positions, True)


def test_palm_is_the_papers_section_2():
    for name in (name for name in ROUNDED if name.startswith("palm")):
        c = config(name)
        assert (c.residual, c.shared_norm, c.tied, c.kv_heads, c.head_dim) == ("parallel", True, True, 1, 256)
        assert c.hidden == 4 * c.width and c.mlp.type == "swiglu" and c.norm.type == "layernorm"
        assert not (c.norm.bias or c.mlp.bias or c.attention.qkv_bias or c.attention.out_bias)
        assert (c.init_std, c.embedding_std) == ("fan_in", 1.0)
        assert c.logit_scale == pytest.approx(c.width**-0.5, rel=1e-12)


def test_what_counts_do_not_show_is_that_of_the_published_configs():
    assert [config(f"llama-{size}").norm.eps for size in ("7b", "13b", "33b", "65b")] == [1e-6, 1e-6, 1e-6, 1e-5]
    assert config("llama2-70b").norm.eps == config("llama3-70b").norm.eps == 1e-5
    assert [config(name).context for name in ("llama-65b", "llama2-13b", "llama3-8b", "llama3.1-8b")] == [
        2048,
        4096,
        8192,
        131072,
    ]
    scaling = config("llama3.1-70b").positions.scaling
    assert (scaling.type, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == ("llama3", 8, 1, 4)
    assert scaling.original_context == 8192 and config("llama3-70b").positions.scaling is None
    assert config("llama3-8b").positions.base == 500_000 and config("qwen2-7b").positions.base == 1_000_000
    assert config("vicuna-13b") == config("llama-13b")
    for name in NON_EMBEDDING:
        c = config(name)
        assert (c.residual, c.shared_norm, c.positions.fraction, c.mlp.type) == ("parallel", False, 0.25, "gelu")
    assert config("gpt-neox-20b").mlp.type == "gelu_tanh"


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_transformers_own_class_has_as_many_parameters(name):
    """The same dimensions given to transformers, on a device without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = config(name)
    shared = {"vocab_size": c.vocab, "tie_word_embeddings": c.tied}
    plain = shared | {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.attention.heads,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.context,
    }
    if isinstance(c.positions, LearnedPositions):
        sizes = {"n_embd": c.width, "n_layer": c.layers, "n_head": c.attention.heads, "n_positions": c.context}
        theirs = transformers.GPT2Config(**shared, **sizes)
    elif name.startswith("palm"):
        # queries of heads * 256 where that is not the width: Cohere takes head_dim as an attribute
        theirs = transformers.CohereConfig(**plain, num_key_value_heads=1, head_dim=c.head_dim)
    elif c.residual == "parallel":
        theirs = transformers.GPTNeoXConfig(**plain, rotary_pct=c.positions.fraction)
    elif c.attention.qkv_bias:
        theirs = transformers.Qwen2Config(**plain, num_key_value_heads=c.kv_heads)
    else:
        theirs = transformers.LlamaConfig(**plain, num_key_value_heads=c.kv_heads)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters(c)
