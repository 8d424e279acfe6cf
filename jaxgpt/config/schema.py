"""Every setting of a run: its name, type, default and meaning. Nothing here reads a file or imports jax.

One file describes one assistant, from raw text to the RL model; each verb reads the sections it needs. In any path,
``{run}`` stands for the run's own folder (``<runs>/<name>``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    """true and false are no numbers, though Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _whole(value: Any) -> Any:
    """YAML reads 1e3 as a float; where a whole number is meant, it is one. true is not."""
    value = _number(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# Bounds stand before the validator, which then runs first and leaves them in the JSON schema.
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0.0), BeforeValidator(_number)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_number)]
FolderName = Annotated[str, Field(pattern=r"^[^/\\\x00]*[^/\\\x00.\s][^/\\\x00]*$")]


class Section(BaseModel):
    """A group of settings; unknown keys are errors and values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    ABSENT: ClassVar[Mapping[str, str]] = {}
    """Settings that other programs have and this section has not, and why."""


class MeshConfig(Section):
    """How the devices are laid out; the product of the axes is the number of devices used."""

    data: Count | Literal["auto"] = 1
    """Copies of the whole model, each on its share of the batch."""
    fsdp: Count | Literal["auto"] = "auto"
    """Shards of the parameters and of the batch; auto takes the devices that are left."""
    context: Count | Literal["auto"] = 1
    """Shards of each sequence, for long ones; parameters are split over them too."""
    tensor: Count | Literal["auto"] = 1
    """Shards of heads, feed-forward width and vocabulary."""

    @model_validator(mode="after")
    def _one_auto(self) -> MeshConfig:
        if [self.data, self.fsdp, self.context, self.tensor].count("auto") > 1:
            raise ValueError("only one axis can be auto")
        return self


class HostsConfig(Section):
    """How the processes of a run on several hosts wait for each other. Changes nothing of what comes out."""

    start_timeout: Count = 300
    """Seconds until all hosts are there."""
    barrier_timeout: Count = 1800
    """Seconds until all hosts come to where they meet, before and after each stage."""
    heartbeat_timeout: Count = 100
    """Seconds without a sign of life after which a host counts as dead and the others end."""
    profile_port: Annotated[int, Field(ge=1024, le=65535), BeforeValidator(_whole)] | None = None
    """Port on which the first host answers jax's profiler while it runs."""


class NormConfig(Section):
    """Normalisation before each sub-layer and before the output."""

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """rmsnorm divides by the root mean square (LLaMA); layernorm also removes the mean (GPT-2)."""
    eps: Positive = 1e-6
    """Added to the variance."""
    scale: bool = True
    """Learn a factor for each channel."""
    bias: bool = False
    """Learn an offset for each channel."""


class RopeScaling(Section):
    """Stretching of rotary frequencies to contexts longer than those of pretraining."""

    type: Literal["linear", "llama3"] = "linear"
    """linear divides every frequency; llama3 divides the low ones and blends between (Llama 3.1)."""
    factor: Positive = 8.0
    """How many times longer the context becomes."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above original_context / this are divided."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below original_context / this are kept."""
    original_context: Count = 8192
    """llama3: context of pretraining, in tokens."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )
        return self


class RopePositions(Section):
    """Rotary position embedding (arXiv 2104.09864)."""

    type: Literal["rope"] = "rope"
    """Rotate queries and keys by their position."""
    base: Positive = 10000.0
    """Wavelengths run from 2 pi to 2 pi times this."""
    fraction: Share = 1.0
    """Share of each head's dimensions that is rotated, from the first (GPT-NeoX: 0.25)."""
    pairing: Literal["half", "interleaved"] = "half"
    """Which dimensions rotate together: i with i + d/2 (LLaMA in transformers), or 2i with 2i + 1 (PaLM, GPT-J)."""
    scaling: RopeScaling | None = None
    """Stretching for long contexts."""


class LearnedPositions(Section):
    """A learned vector for each position (GPT-2)."""

    type: Literal["learned"] = "learned"
    """Add a learned vector to the token embedding; positions end at model.context."""


class NoPositions(Section):
    """No position information beyond the causal mask."""

    type: Literal["none"] = "none"
    """Add nothing."""


Positions = Annotated[RopePositions | LearnedPositions | NoPositions, Field(discriminator="type")]


class MlpConfig(Section):
    """The feed-forward sub-layer."""

    type: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] = "swiglu"
    """gelu is exact, gelu_tanh its approximation (GPT-2); swiglu and geglu have a gate (arXiv 2002.05202)."""
    width: Count | None = None
    """Hidden width; unset means 4 model widths, or 8/3 rounded up to a multiple of 64 where gated."""
    bias: bool = False
    """Learn offsets."""


class AttentionConfig(Section):
    """The attention sub-layer."""

    heads: Count = 4
    """Query heads."""
    kv_heads: Count | None = None
    """Key and value heads, shared by equal groups of query heads; unset means one each, 1 is multi-query."""
    head_dim: Count | None = None
    """Width of a head; unset means width / heads."""
    qkv_bias: bool = False
    """Learn offsets of queries, keys and values."""
    out_bias: bool = False
    """Learn an offset of the output."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (RMS, learned scale) before positions are applied."""
    windows: Annotated[tuple[Count | None, ...], Field(min_length=1)] = (None,)
    """Tokens each layer looks back over, itself included, repeated over the depth; null means all. [null, 256]
    alternates dense and banded layers as GPT-3 does."""
    softcap: Positive | None = None
    """Bound scores smoothly to +-this by tanh (Gemma 2)."""
    scale: Positive | None = None
    """Factor of the scores; unset means head_dim ** -0.5."""
    kernel: Literal["auto", "reference", "splash"] = "auto"
    """auto: splash attention on TPUs, cuDNN's on GPUs where it runs, the reference elsewhere; splash away from a TPU is
    interpreted, which is slow."""


class ModelConfig(Section):
    """A decoder-only Transformer; GPT-2, GPT-3, LLaMA and PaLM are settings of it."""

    vocab: Count | None = None
    """Rows of the embedding; unset means the tokenizer's size rounded up to a multiple of 128."""
    width: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Number of blocks."""
    context: Count = 256
    """Longest sequence, in tokens."""
    norm: NormConfig = NormConfig()
    """Normalisation."""
    positions: Positions = RopePositions()
    """How the model knows order."""
    attention: AttentionConfig = AttentionConfig()
    """Attention."""
    mlp: MlpConfig = MlpConfig()
    """Feed-forward."""
    residual: Literal["sequential", "parallel"] = "sequential"
    """parallel adds attention and feed-forward of one shared input at once (PaLM, GPT-NeoX)."""
    shared_norm: bool = True
    """parallel only: one norm feeds both sub-layers (PaLM, GPT-J); false gives each its own (GPT-NeoX)."""
    tied: bool = True
    """Use the embedding matrix as the output matrix."""
    embedding_scale: Positive = 1.0
    """Factor of the token embeddings."""
    logit_scale: Positive = 1.0
    """Factor of the logits."""
    logit_softcap: Positive | None = None
    """Bound logits smoothly to +-this by tanh."""
    init_std: Positive | Literal["fan_in"] = 0.02
    """Standard deviation of the initial weights; matrices that write to the residual stream get / sqrt(2 layers).
    fan_in is 1 / sqrt(inputs) for every matrix (PaLM)."""
    embedding_std: Positive | None = None
    """Standard deviation of the initial embeddings; unset means init_std, or 1 with fan_in."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the blocks; parameters, softmax and losses stay float32. auto: bfloat16 on accelerators."""
    scan_layers: bool = True
    """Compile one block and loop over it; false unrolls (longer compile, sometimes faster steps)."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products and attention, all but attention, or whole
    blocks; offload keeps what dots does, in the host's memory."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        a = self.attention
        if a.head_dim is None and self.width % a.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of attention.heads {a.heads}; set attention.head_dim"
            )
        if a.kv_heads is not None and a.heads % a.kv_heads:
            raise ValueError(f"attention.heads {a.heads} is not a multiple of attention.kv_heads {a.kv_heads}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.attention.kv_heads or self.attention.heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate matrix."""
        return self.mlp.type in ("swiglu", "geglu")

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer."""
        if self.mlp.width is not None:
            return self.mlp.width
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width


class TextSource(Section):
    """Text files and their weight in the mixture."""

    path: str | tuple[str, ...]
    """Files or glob patterns: .txt (one document a file), .jsonl, either with .gz or .zst."""
    weight: Positive = 1.0
    """Share of the training tokens, relative to the other sources."""
    field: str = "text"
    """Key of the text in JSONL records."""


class DataConfig(Section):
    """Pretraining text: one path, or several named sources with weights."""

    path: str | tuple[str, ...] | None = None
    """Files of a single source; use sources for a mixture."""
    field: str = "text"
    """Key of the text in JSONL records of path."""
    sources: dict[str, TextSource] = {}
    """Named sources; training rows are drawn in exact proportion to their weights."""
    val_fraction: Share = 0.01
    """Share held out for validation."""
    val_split: Literal["document", "tail"] = "document"
    """Hold out whole documents by their hash, or the last part of each source's tokens."""

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if self.path is not None and self.sources:
            raise ValueError("set path or sources, not both")
        return self

    @property
    def named(self) -> dict[str, TextSource]:
        """All sources by name; a lone path is called text."""
        if self.path is not None:
            return {"text": TextSource(path=self.path, field=self.field)}
        return self.sources


class TokenizerConfig(Section):
    """A tokenizer: files of the user's, or a SentencePiece model trained here."""

    path: str | None = None
    """An existing .model, tokenizer.json, vocab.json (with merges.txt) or Hugging Face folder; unset trains one."""
    model_type: Literal["bpe", "unigram", "char"] = "bpe"
    """What SentencePiece trains."""
    vocab: Count = 8192
    """Pieces to learn, control pieces and bytes included; fewer when the text has no more."""
    byte_fallback: bool = True
    """Spell unknown characters as bytes, so that no text is ever lost."""
    split_digits: bool = True
    """One piece for each digit."""
    path_text: str | tuple[str, ...] | None = None
    """Files to learn from; unset means the sources of data."""
    fields: tuple[str, ...] = ("text",)
    """Keys of path_text's JSONL records whose strings are learned from (lists and messages are walked)."""
    sample_bytes: Count = 50_000_000
    """Text used for learning, at most, in bytes."""
    template: str | None = None
    """A Jinja chat template file, or `roles` or `vicuna`; unset takes the folder's own, else the one that suits."""


class MeadowConfig(Section):
    """A small invented world: text, instructions, rankings and prompts."""

    type: Literal["meadow"] = "meadow"
    """Animals with facts, stories with moods, sums, opposites."""
    seed: Seed = 0
    """Seed of the world's texts (its facts are always the same)."""
    documents: Count = 30_000
    """Pretraining documents."""
    instructions: Count = 4_000
    """Prompt/response pairs for fine-tuning."""
    rankings: Count = 3_000
    """Prompts with four ranked responses."""
    prompts: Count = 4_000
    """Prompts for RL."""
    held_out: Count = 192
    """Held-out prompts and rankings each, for evaluation."""
    noise: NonNegative = 0.25
    """Standard deviation of the labellers' noise, in units of the gold score."""


class ArithmeticConfig(Section):
    """Problems with numbers and in words, whose answers can be verified; the demonstrations are good and bad."""

    type: Literal["arithmetic"] = "arithmetic"
    """Sums, differences, products, and stories of two steps; a fifth of the problems is held out."""
    seed: Seed = 0
    """Seed of the problems that are drawn (which ones are held out is always the same)."""
    documents: Count = 30_000
    """Pretraining documents."""
    instructions: Count = 6_000
    """Prompt/response pairs for fine-tuning."""
    at_once: Share = 0.7
    """Share of them that give the answer without working it out; of the stories half as many."""
    careless: Share = 0.15
    """Share of them that are worked out with a slip, unfinished, or with another number at the end."""
    prompts: Count = 6_000
    """Prompts for RL, with their answers."""
    held_out: Count = 400
    """Held-out problems, for evaluation."""

    @model_validator(mode="after")
    def _shares(self) -> ArithmeticConfig:
        if self.at_once + self.careless > 1:
            raise ValueError(f"at_once {self.at_once} and careless {self.careless} are more than 1 together")
        return self


Prepare = Annotated[MeadowConfig | ArithmeticConfig, Field(discriminator="type")]


class OptimizerConfig(Section):
    """AdamW with a learning-rate schedule."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from the peak to final over the stage."""
    warmup: Share = 0.05
    """Share of the stage over which the rate rises to the peak."""
    final: Share = 0.1
    """Rate at the end, as a share of the peak."""
    b1: Below1 = 0.9
    """Decay of the first moment."""
    b2: Below1 = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    eps_form: Literal["optax", "tf"] = "optax"
    """Whether eps stands outside the bias-corrected root (torch, optax), or beside the uncorrected one (TensorFlow)."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices and embeddings; scales and biases are left alone."""
    clip: Positive | None = 1.0
    """Largest global gradient norm."""


class CheckpointConfig(Section):
    """When a stage's state is saved, and which copies stay."""

    every: Count = 100
    """Steps between checkpoints."""
    keep: Count = 2
    """How many of the latest stay; the best stays beside them."""


class StageConfig(Section):
    """What every training stage has."""

    init: str | None = None
    """Where the parameters start: a stage of this run, the folder of another run's stage, or random; unset means the
    stage before this one."""
    batch: Count = 32
    """Rows in one update, over all devices."""
    accumulate: Count = 1
    """Parts a batch is cut into to save memory; the result is the same."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    eval_every: Count = 100
    """Steps between evaluations; there is always one at the end."""
    eval_batches: Count = 16
    """Batches in one evaluation, at most."""
    best: Literal["last", "best"] = "last"
    """Which parameters the stage hands on: its last, or those with the best validation metric."""
    log_every: Count = 10
    """Steps between console lines; metrics.jsonl has every step."""

    @model_validator(mode="after")
    def _cut(self) -> StageConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulate {self.accumulate}")
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): the parameters stay as they are, and small products beside them learn."""

    rank: Count = 8
    """Inner width of a product."""
    alpha: Positive = 16.0
    """The products are added times alpha / rank."""
    targets: Annotated[tuple[Literal["q", "k", "v", "o", "up", "gate", "down"], ...], Field(min_length=1)] = ("q", "v")
    """Matrices that get one: queries, keys, values and output of attention; up, gate and down of the feed-forward."""

    @property
    def scale(self) -> float:
        """Factor of the products."""
        return self.alpha / self.rank


class SupervisedConfig(StageConfig):
    """What the stages that learn from files have."""

    steps: Count = 300
    """Optimizer updates."""
    context: Count = 128
    """Tokens in one row."""


class PretrainConfig(SupervisedConfig):
    """Next-token prediction on the text mixture."""


class Conversations(Section):
    """Prompt/response files: {"messages"}, {"conversations"} (ShareGPT), {"prompt", "completion"}, or other keys."""

    path: str | tuple[str, ...]
    """JSONL files, .json files of one array, or glob patterns."""
    eval_path: str | tuple[str, ...] | None = None
    """Held-out files for the validation loss."""
    prompt_field: str = "prompt"
    """Key of the prompt where a record has no messages."""
    completion_field: str = "completion"
    """Key of the response where a record has no messages."""


class SftConfig(SupervisedConfig):
    """Supervised fine-tuning: next-token prediction on the assistant's tokens alone."""

    data: Conversations | None = None
    """Conversations to learn."""
    dropout: Below1 = 0.0
    """Residual dropout (InstructGPT used 0.2)."""
    lora: LoraConfig | None = None
    """Train adapters alone; they are merged into what is handed on."""


class Rankings(Section):
    """Ranking files: {"prompt", "responses", "ranks"} or {"prompt", "chosen", "rejected"}."""

    path: str | tuple[str, ...]
    """JSONL files or glob patterns."""
    eval_path: str | tuple[str, ...] | None = None
    """Held-out rankings; no prompt may stand in both."""
    val_fraction: Below1 = 0.0
    """Share of path's prompts that is held out instead, by their hash; all rankings of a prompt stay on one side."""

    @model_validator(mode="after")
    def _one_way(self) -> Rankings:
        if self.eval_path is not None and self.val_fraction > 0:
            raise ValueError("set eval_path or val_fraction, not both")
        return self

    @property
    def measured(self) -> bool:
        """Whether there are held-out rankings."""
        return self.eval_path is not None or self.val_fraction > 0


class RewardConfig(StageConfig):
    """Reward model: scores learned from rankings (Bradley-Terry over all pairs of each, as InstructGPT)."""

    epochs: Count = 1
    """Passes over the rankings, each ranking once in every one; more than one soon learns them by heart."""
    steps: Count | None = None
    """Optimizer updates in place of epochs; unset means as many as those take."""
    context: Count = 128
    """Tokens in one row: the longest prompt with its response."""
    data: Rankings | None = None
    """Rankings to learn."""
    responses: Annotated[int, Field(ge=2, le=64), BeforeValidator(_whole)] = 9
    """Most responses in one ranking."""
    loss: Literal["ranking", "best_of_k", "plackett_luce"] = "ranking"
    """ranking is Bradley-Terry over all pairs (InstructGPT); best_of_k the softmax of the best response (Ziegler et al.
    2019); plackett_luce the likelihood of the whole order."""
    margin: NonNegative = 0.0
    """ranking: by how much a winner's score has to win, added to a record's own margin (Llama 2)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5), BeforeValidator(_number)] = 0.0
    """ranking: share of preferences taken to be the wrong way round."""
    ties: Literal["drop", "half"] = "drop"
    """ranking: what responses of equal rank are, no pair, or half a win for each."""
    weighting: Literal["prompt", "pair"] = "prompt"
    """ranking: what counts as one in the mean, a prompt with all its pairs (InstructGPT) or a pair."""
    centring: NonNegative = 0.0
    """Weight of the mean squared sum of the two scores of a pair, which draws scores to 0 (TRL; 0.01 is usual)."""
    normalize: Literal["none", "responses", "demonstrations", "policy"] = "responses"
    """Shift and scale of the finished model's scores: mean 0 and deviation 1 over training responses, or over samples
    of the model that training starts from (policy; Ziegler et al. 2019); or mean 0 over demonstrations, with the scale
    as it is (InstructGPT)."""
    normalize_over: Count = 512
    """Rankings, demonstrations or samples that this is measured on, at most (Ziegler et al. took 256)."""
    demonstrations: Conversations | None = None
    """normalize=demonstrations: conversations that end with a good response; unset means those of sft."""
    lora: LoraConfig | None = None
    """Train adapters and the head alone; they are merged into what is handed on."""

    @model_validator(mode="after")
    def _of_ranking(self) -> RewardConfig:
        if self.loss != "ranking":
            given = ("margin", "label_smoothing", "ties", "weighting")
            for name in given:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {getattr(self, name)} is for loss ranking; {self.loss} has none")
        if self.demonstrations is not None and self.normalize != "demonstrations":
            raise ValueError(f"demonstrations are for normalize demonstrations, which is {self.normalize}")
        return self


class DpoConfig(SupervisedConfig):
    """Direct preference optimization: the policy from rankings, without a reward model (arXiv 2305.18290)."""

    data: Rankings | None = None
    """Rankings to learn."""
    responses: Annotated[int, Field(ge=2, le=64), BeforeValidator(_whole)] = 9
    """Most responses in one ranking."""
    pairs: Literal["all", "extremes"] = "all"
    """Pairs made of a ranking: every one that is not a tie, or the best with the worst."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO's; ipo is the squared loss of arXiv 2310.12036."""
    beta: Positive = 0.1
    """Strength of the tie to the reference."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5), BeforeValidator(_number)] = 0.0
    """Share of preferences taken to be the wrong way round (cDPO)."""
    length_normalized: bool = True
    """ipo: log-ratios are means over a response's tokens instead of sums."""
    sft_coef: NonNegative = 0.0
    """Weight of the best response's negative log-likelihood, nats per token."""
    lora: LoraConfig | None = None
    """Train adapters alone; the reference is the model without them."""

    @model_validator(mode="after")
    def _smoothed(self) -> DpoConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing {self.label_smoothing} is for loss sigmoid; ipo has none, set it to 0")
        return self


class Prompts(Section):
    """Prompt files: {"prompt"} or {"messages"}."""

    path: str | tuple[str, ...]
    """JSONL files or glob patterns."""


class ModelReward(Section):
    """The score of a reward model, or of several."""

    type: Literal["model"] = "model"
    """A trained reward model."""
    models: str | Annotated[tuple[str, ...], Field(min_length=1)] = "reward"
    """A stage of this run, the folder of another, or a Hugging Face folder (hf:FOLDER); several make an ensemble."""
    combine: Literal["mean", "worst"] = "mean"
    """The score of an ensemble: the mean, or the lowest (worst case, arXiv 2310.02743)."""
    weight: Number = 1.0
    """Factor of the score in the sum."""

    @property
    def folders(self) -> tuple[str, ...]:
        """The models."""
        return (self.models,) if isinstance(self.models, str) else self.models


class ExactReward(Section):
    """1 where the response is the record's answer."""

    type: Literal["exact"] = "exact"
    """Equal but for surrounding spaces."""
    field: str = "answer"
    """Key of the answer in the prompt's record."""
    weight: Number = 1.0
    """Factor in the sum."""


class NumberReward(Section):
    """1 where the response's final number is the answer's, as in GSM8K."""

    type: Literal["number"] = "number"
    """The number after ####, or the last one."""
    field: str = "answer"
    """Key of the answer in the prompt's record; its final number counts."""
    weight: Number = 1.0
    """Factor in the sum."""


class RegexReward(Section):
    """1 where the response has the pattern."""

    type: Literal["regex"] = "regex"
    """A regular expression of Python."""
    pattern: str
    """Looked for anywhere in the response; ^ and $ bind it to its ends."""
    weight: Number = 1.0
    """Factor in the sum."""

    @model_validator(mode="after")
    def _compiles(self) -> RegexReward:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern '{self.pattern}' is no regular expression: {error}") from error
        return self


class LengthReward(Section):
    """0 up to a length, then falling by 1 for each further stretch of that length."""

    type: Literal["length"] = "length"
    """Length in tokens."""
    target: Count = 128
    """Tokens that cost nothing."""
    weight: Number = 1.0
    """Factor in the sum."""


class FunctionReward(Section):
    """A function of yours."""

    type: Literal["function"] = "function"
    """Called once for each response."""
    function: str
    """module:function(record, response) -> float; the record is the prompt's JSON object."""
    weight: Number = 1.0
    """Factor in the sum."""


Verifiable = ExactReward | NumberReward | RegexReward | LengthReward | FunctionReward
"""Rewards that no model gives."""
Reward = Annotated[ModelReward | Verifiable, Field(discriminator="type")]


Gold = Annotated[ModelReward | FunctionReward, Field(discriminator="type")]


class MissingEosConfig(Section):
    """What a response scores that never ends."""

    how: Literal["replace", "subtract", "scale", "keep"] = "replace"
    """Put value in the score's place (lm-human-preferences), take it off (TRL), multiply by it, or leave the score."""
    value: Number = -1.0
    """The number that is put, taken off, or multiplied with."""

    @model_validator(mode="after")
    def _off(self) -> MissingEosConfig:
        if self.how == "subtract" and self.value < 0:
            raise ValueError(f"value {self.value} is taken off, which adds to the score; expected 0 or more")
        return self


class KlConfig(Section):
    """The penalty that keeps the policy near the SFT model."""

    coef: NonNegative = 0.05
    """Weight of the KL, nats."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the penalty for each token."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive steers coef towards target (Ziegler et al. 2019)."""
    target: Positive = 6.0
    """adaptive: wanted KL, nats summed over a response, mean over episodes."""
    measure: Literal["sum", "token-mean"] = "sum"
    """adaptive: what target is compared with, KL of a response or of a token (verl)."""
    horizon: Positive = 10_000.0
    """adaptive: episodes over which coef can double or so."""


class GoldConfig(Section):
    """A held-out evaluation by what the reward stands for, every eval_every updates: gold score, win rate, KL."""

    data: Prompts
    """Prompts that are not trained on."""
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    """The gold score of a response: the sum of these, each times its weight."""
    prompts: Count = 192
    """Prompts asked: the first of the files, at most so many."""
    responses: Count = 1
    """Responses to each of them."""


Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-norm"]


_FILTERED = (
    "responses to learn from are drawn from exactly softmax(logits / temperature); of filtered ones the "
    "log-probabilities would be wrong, and with them ratio, KL and every update. Leave it out, or lower temperature"
)


class RolloutConfig(StageConfig):
    """What the stages have that learn from the policy's own responses."""

    ABSENT: ClassVar[Mapping[str, str]] = {"top_k": _FILTERED, "top_p": _FILTERED, "min_p": _FILTERED}

    data: Prompts | None = None
    """Prompts to respond to."""
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)] = (ModelReward(),)
    """What a response is worth: the sum of these, each times its weight."""
    iterations: Count = 60
    """Rollouts, each followed by updates on its episodes."""
    batch: Count = 32
    """Episodes in one update."""
    episodes: Count = 64
    """Episodes in one rollout."""
    responses: Count = 1
    """Episodes of one prompt."""
    rollout_batch: Count | None = None
    """Episodes generated and scored at a time, of similar prompt lengths; unset means all."""
    epochs: Count = 1
    """Passes over each rollout."""
    prompt_length: Count = 32
    """Longest prompt, in tokens."""
    response_length: Count = 64
    """Longest response, in tokens, end token included."""
    temperature: Positive = 1.0
    """Sampling temperature; all log-probabilities are taken at it."""
    stop: str | None = None
    """Text of one token at which a response ends; unset means the chat template's end of a turn."""
    stop_after: Whole = 0
    """Tokens of a response that come before an end counts."""
    missing_eos: MissingEosConfig = MissingEosConfig()
    """Responses that never end."""
    reward_clip: Positive | None = None
    """Scores are kept within +-this."""
    clip: Positive = 0.2
    """Clip range of the policy ratio."""
    aggregation: Aggregation = "token-mean"
    """How the tokens' losses become one: the mean of all; the mean over responses of a response's sum, or of its mean;
    or the sum over the longest response's length, mean over responses (Dr. GRPO)."""
    kl: KlConfig = KlConfig()
    """KL penalty."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the parameters of the reference and the reward models are kept."""
    lora: LoraConfig | None = None
    """Train adapters alone; the reference is the policy without them."""
    gold: GoldConfig | None = None
    """Held-out evaluation, beside the rewards; with it, best=best hands on the parameters of the highest gold score."""
    samples: Whole = 4
    """Episodes kept to be read, of every rollout that is written."""
    samples_every: Count = 10
    """Rollouts between two that are written to samples.jsonl."""

    @model_validator(mode="after")
    def _multiple(self) -> RolloutConfig:
        known = (("episodes", "responses"), ("episodes", "rollout_batch"), ("rollout_batch", "responses"))
        for name, unit in (("learned", "batch"), *known):
            size, divisor = getattr(self, name), getattr(self, unit)
            if size is not None and divisor is not None and size % divisor:
                shown = {"learned": "episodes / responses" if self.learned != self.episodes else "episodes"}
                raise ValueError(f"{shown.get(name, name)} {size} is not a multiple of {unit} {divisor}")
        if self.stop_after >= self.response_length:
            raise ValueError(f"stop_after {self.stop_after} is not below response_length {self.response_length}")
        return self

    @property
    def learned(self) -> int:
        """Episodes of a rollout that are learned from."""
        return self.episodes

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates between two rollouts."""
        return self.epochs * (self.learned // self.batch)

    @property
    def steps(self) -> int:
        """Optimizer updates in all."""
        return self.iterations * self.updates_per_rollout


class PtxConfig(Section):
    """Pretraining rows in every update (PPO-ptx, InstructGPT eq. 2); they come from the run's data."""

    coef: NonNegative = 1.0
    """Weight of the pretraining loss; InstructGPT has 27.8 for sums over a response's tokens."""
    batch: Count = 32
    """Rows of text in one update."""
    context: Count = 128
    """Tokens in one row."""


class PpoConfig(RolloutConfig):
    """PPO against the reward (Ouyang et al. 2022)."""

    epochs: Count = 2
    """Passes over each rollout."""
    critic: Literal["separate", "shared"] = "separate"
    """A model of its own that begins as the reward model, or a head on the policy's trunk."""
    critic_init: str | None = None
    """Where a separate critic begins; unset means the first reward model, or where there is none the policy's trunk."""
    critic_warmup: Whole = 0
    """Rollouts at the start that train the critic alone."""
    value_clip: Positive | None = 0.2
    """Clip range of the value around the rollout's; null does not clip."""
    value_coef: NonNegative = 1.0
    """Weight of the value loss (0.1 is usual where the trunk is shared)."""
    value_lr: Positive | None = None
    """Peak learning rate of a separate critic; unset means the policy's."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 0.95
    """GAE lambda."""
    score_at: Literal["last", "after"] = "last"
    """Token that gets the score: the response's last, or the one after it (TRL)."""
    whiten_rewards: bool = False
    """Scale rewards to deviation 1 over the rollout, keeping their mean."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and deviation 1 over the rollout."""
    whiten_variance: Literal["biased", "unbiased"] = "biased"
    """Variance that whitening divides by: over n (lm-human-preferences) or n - 1 (TRL)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy, to be raised."""
    stop_kl: Positive | None = None
    """Leaves out the rest of a rollout's epochs once the policy's k2 from the rollout's is above this, nats a token."""
    ema: Below1 | None = None
    """Decay of an average of the policy's parameters over updates, which is handed on in their place."""
    ptx: PtxConfig | None = None
    """Pretraining rows beside the episodes."""


class GrpoConfig(RolloutConfig):
    """GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783) and DAPO (2503.14476): advantages from groups, no critic."""

    responses: Annotated[int, Field(ge=2), BeforeValidator(_whole)] = 8
    """Episodes of one prompt: a group."""
    std: Literal["unbiased", "biased", "none"] = "unbiased"
    """What a group's centred scores are divided by; none is Dr. GRPO."""
    std_eps: NonNegative = 1e-4
    """Added to the deviation."""
    clip_high: Positive | None = None
    """Upper clip range; unset means clip (DAPO: 0.28 with clip 0.2)."""
    kl: KlConfig = KlConfig(coef=0.04, estimator="k3")
    """KL penalty, a term of the loss with a fixed coefficient; 0 needs no reference."""
    dynamic_sampling: Whole = 0
    """Further rollouts that may be drawn to replace groups whose scores are all equal (DAPO)."""
    overlong_buffer: Whole = 0
    """Last tokens of response_length over which a penalty grows to 1 (DAPO's soft punishment); 0 has none."""

    @model_validator(mode="after")
    def _fits(self) -> GrpoConfig:
        if self.kl.controller == "adaptive":
            raise ValueError("kl.controller adaptive steers a penalty in the reward, and here it is in the loss")
        if self.overlong_buffer > self.response_length:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} is longer than response_length {self.response_length}"
            )
        return self


class RlooConfig(RolloutConfig):
    """REINFORCE with leave-one-out baselines (arXiv 2402.14740): the KL is in the reward, a response is one action."""

    responses: Annotated[int, Field(ge=2), BeforeValidator(_whole)] = 4
    """Episodes of one prompt: each one's baseline is the mean reward of the others."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0 and deviation 1 over the rollout."""


class RejectionConfig(RolloutConfig):
    """Rejection sampling: fine-tuning on the best of n responses to each prompt."""

    responses: Annotated[int, Field(ge=2), BeforeValidator(_whole)] = 16
    """Responses to each prompt, of which the best is learned."""
    kl: KlConfig = KlConfig(coef=0.0)
    """KL penalty in the comparison of responses; 0 needs no reference."""

    @property
    def learned(self) -> int:
        """The best of each prompt."""
        return self.episodes // self.responses


class EvaluateConfig(Section):
    """What is asked of the finished models, for the report."""

    data: Prompts | None = None
    """Held-out prompts: {"prompt", "answer", "kind", ...}; what is right is counted by kind."""
    exact: Prompts | None = None
    """Other prompts for exact match; unset means those of data."""
    grade: Literal["exact", "number"] = "exact"
    """What makes an answer right: the same text, or the same final number, as in the reward of that type."""
    scorer: str | None = None
    """module:function(record, response) -> float, the gold score of a response."""
    temperature: NonNegative = 1.0
    """Sampling temperature of the scored responses; exact match is always greedy."""
    max_tokens: Count = 64
    """Longest response, in tokens."""
    batch: Count = 64
    """Prompts answered at a time."""
    samples: tuple[str, ...] = ()
    """Prompts whose responses the report shows side by side."""
    few_shot: tuple[tuple[str, str], ...] = ()
    """Question/answer pairs put before a prompt when the base model is asked."""


class StudyPrompts(Section):
    """Prompt files of a study: {"prompt"} or {"messages"}, with what the gold scorer reads."""

    path: str | tuple[str, ...]
    """JSONL files or glob patterns: prompts of the labels and of PPO."""
    eval_path: str | tuple[str, ...]
    """Held-out prompts, on which proxy and gold score are measured."""


class ProxyConfig(Section):
    """A reward model learned from labels of the gold score."""

    width: Count | None = None
    """Width of the residual stream; unset means the policy's."""
    layers: Count | None = None
    """Number of blocks; unset means the policy's."""
    heads: Count | None = None
    """Attention heads; unset means the policy's."""
    hidden: Count | None = None
    """Feed-forward width; unset means the policy's, or where width is set 4 widths, 8/3 where gated."""
    labels: Count = 1000
    """Rankings it learns from."""
    noise: NonNegative = 0.0
    """Standard deviation of the labellers' noise, in units of the gold score."""
    epochs: Count | None = None
    """Passes over its rankings; unset means overopt.reward.epochs."""
    lr: Positive | None = None
    """Peak learning rate; unset means overopt.reward.optimizer.lr."""
    init: str | None = None
    """Where it starts: a stage of this run, the folder of another, or random; unset means the policy's trunk for a
    model of the policy's size, else random."""

    @property
    def resized(self) -> bool:
        """Whether its size is not the policy's."""
        return any(size is not None for size in (self.width, self.layers, self.heads, self.hidden))

    def model(self, policy: ModelConfig) -> ModelConfig:
        """Its architecture: the policy's in another size. Raises ValueError where the sizes do not fit each other."""
        width, heads = self.width or policy.width, self.heads or policy.attention.heads
        attention, mlp = policy.attention, policy.mlp
        if self.width is not None or self.heads is not None:
            if width % heads:
                raise ValueError(f"width {width} is not a multiple of heads {heads}")
            alone = heads != attention.heads and attention.kv_heads != 1
            kv_heads = None if alone else attention.kv_heads
            attention = attention.model_copy(update={"heads": heads, "kv_heads": kv_heads, "head_dim": None})
        if self.width is not None or self.hidden is not None:
            mlp = mlp.model_copy(update={"width": self.hidden})
        sizes = {"width": width, "layers": self.layers or policy.layers, "attention": attention, "mlp": mlp}
        return policy.model_copy(update=sizes)


class OveroptConfig(Section):
    """A study of over-optimisation (Gao et al. 2022, arXiv 2210.10760): a policy is optimised against proxies of a gold
    score, by best-of-n and by PPO, and both scores are measured over the KL from where it began."""

    policy: str = "sft"
    """The policy that is optimised: a stage of this run, or the folder of another."""
    gold: Gold
    """The score that counts: of a function of yours, or of a reward model."""
    data: StudyPrompts
    """Prompts."""
    kinds: tuple[str, ...] = ()
    """Only prompts whose record has one of these under "kind"; empty means all."""
    prompts: Annotated[int, Field(ge=2), BeforeValidator(_whole)] = 64
    """Held-out prompts that are used, the first ones."""
    responses: Annotated[int, Field(ge=2, le=64), BeforeValidator(_whole)] = 4
    """Responses in a label: the policy's own, ranked by gold score and noise."""
    proxies: Annotated[dict[FolderName, ProxyConfig], Field(min_length=1)]
    """Reward models to optimise against, by name."""
    best_of: Annotated[tuple[Count, ...], Field(min_length=2)] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Values of n for best-of-n."""
    samples: Count = 512
    """Responses to each held-out prompt from which best-of-n is estimated."""
    eval_samples: Count = 8
    """Responses to each held-out prompt at every measurement of PPO, overopt.ppo.eval_every updates apart."""
    batch: Count = 256
    """Responses generated and scored at a time."""
    reward: RewardConfig = RewardConfig()
    """How the proxies are trained; data, init and responses are the study's."""
    ppo: PpoConfig = PpoConfig()
    """How PPO is run against each; data, init, rewards and gold are the study's."""

    @model_validator(mode="after")
    def _fits(self) -> OveroptConfig:
        if max(self.best_of) > self.samples:
            raise ValueError(f"best_of goes up to {max(self.best_of)}, and samples is {self.samples}")
        taken = {
            "reward.data": self.reward.data,
            "reward.init": self.reward.init,
            "ppo.data": self.ppo.data,
            "ppo.init": self.ppo.init,
            "ppo.rewards": None if self.ppo.rewards == (ModelReward(),) else self.ppo.rewards,
            "ppo.gold": self.ppo.gold,
        }
        for setting, given in taken.items():
            if given is not None:
                raise ValueError(f"{setting} is set, and the study has its own; leave it out")
        if self.ppo.stop is not None or self.ppo.stop_after:
            raise ValueError(
                "ppo.stop or ppo.stop_after is set, and samples end as the chat template says; leave it out"
            )
        return self


class Config(Section):
    """A run: one assistant, from text to RL model."""

    name: FolderName = "run"
    """Name of the run and of its folder."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of every random choice but the prepared data's."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""
    hosts: HostsConfig = HostsConfig()
    """Time-outs between hosts, and a look into them."""
    prepare: Prepare | None = None
    """Makes data files first."""
    data: DataConfig = DataConfig()
    """Pretraining text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer."""
    model: ModelConfig = ModelConfig()
    """Transformer."""
    pretrain: PretrainConfig | None = None
    """Stage 1."""
    sft: SftConfig | None = None
    """Stage 2."""
    reward: RewardConfig | None = None
    """Stage 3."""
    ppo: PpoConfig | None = None
    """Stage 4."""
    dpo: DpoConfig | None = None
    """In place of stages 3 and 4."""
    grpo: GrpoConfig | None = None
    """In place of stage 4, without a critic."""
    rloo: RlooConfig | None = None
    """In place of stage 4, without a critic."""
    rejection: RejectionConfig | None = None
    """In place of stage 4, by fine-tuning."""
    evaluate: EvaluateConfig | None = None
    """Evaluation of the finished models."""
    overopt: OveroptConfig | None = None
    """Study of over-optimisation, by jaxgpt overopt."""
