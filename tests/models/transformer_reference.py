"""The Transformer written again from its formulas: NumPy, float64, loops over rows, heads, queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxgpt.config.schema import ModelConfig, RopePositions, RopeScaling


def normalise(x: np.ndarray, kind: str, eps: float, scale: np.ndarray | None, bias: np.ndarray | None) -> np.ndarray:
    y = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        v = x[place] - (x[place].mean() if kind == "layernorm" else 0.0)
        y[place] = v / math.sqrt((v @ v) / len(v) + eps)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def wavelength_stretch(scaling: RopeScaling | None, wavelength: float) -> float:
    """How many times longer a wave becomes; llama3 as in Meta's reference code, by cases on the wavelength."""
    if scaling is None:
        return 1.0
    if scaling.type == "linear":
        return scaling.factor
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_stretched = scaling.original_context / scaling.low_freq_factor
    if wavelength < longest_kept:
        return 1.0
    if wavelength > shortest_stretched:
        return scaling.factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)


def rotated(x: np.ndarray, position: int, rope: RopePositions) -> np.ndarray:
    """One head's vector with its pairs turned as complex numbers."""
    d = int(len(x) * rope.fraction) // 2 * 2
    y = x.copy()
    for i in range(d // 2):
        one, two = (i, i + d // 2) if rope.pairing == "half" else (2 * i, 2 * i + 1)
        wavelength = 2 * math.pi * rope.base ** (2 * i / d)
        wavelength *= wavelength_stretch(rope.scaling, wavelength)
        angle = 2 * math.pi * position / wavelength
        turned = complex(x[one], x[two]) * complex(math.cos(angle), math.sin(angle))
        y[one], y[two] = turned.real, turned.imag
    return y


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "swiglu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(c: ModelConfig, p: Mapping[str, Any], x, segments, positions, window: int | None) -> np.ndarray:
    """x is one row, [T, D]."""
    a, T, K = c.attention, len(x), c.head_dim
    scale = K**-0.5 if a.scale is None else a.scale
    y = np.zeros_like(x)
    for head in range(a.heads):
        group = head // (a.heads // c.kv_heads)
        q, k, v = x @ p["q_DHK"][:, head], x @ p["k_DGK"][:, group], x @ p["v_DGK"][:, group]
        if a.qkv_bias:
            q, k, v = q + p["q_bias_HK"][head], k + p["k_bias_GK"][group], v + p["v_bias_GK"][group]
        if a.qk_norm:
            q = normalise(q, "rmsnorm", c.norm.eps, p["q_scale_K"], None)
            k = normalise(k, "rmsnorm", c.norm.eps, p["k_scale_K"], None)
        if isinstance(c.positions, RopePositions):
            q = np.stack([rotated(q[t], positions[t], c.positions) for t in range(T)])
            k = np.stack([rotated(k[t], positions[t], c.positions) for t in range(T)])
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
            scores = np.array([q[t] @ k[s] * scale for s in seen])
            if a.softcap is not None:
                scores = a.softcap * np.tanh(scores / a.softcap)
            weights = np.exp(scores - scores.max())
            y[t] += sum(w * v[s] for w, s in zip(weights / weights.sum(), seen, strict=True)) @ p["o_HKD"][head]
    return y + p["o_bias_D"] if a.out_bias else y


def _mlp(c: ModelConfig, p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    bias = {name: p.get(name, 0.0) for name in ("up_bias_F", "gate_bias_F", "down_bias_D")}
    up = x @ p["up_DF"] + bias["up_bias_F"]
    if c.mlp.type in ("swiglu", "geglu"):
        inner = activation(c.mlp.type, x @ p["gate_DF"] + bias["gate_bias_F"]) * up
    else:
        inner = activation(c.mlp.type, up)
    return inner @ p["down_FD"] + bias["down_bias_D"]


def _norm(c: ModelConfig, p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    return normalise(x, c.norm.type, c.norm.eps, p.get("scale_D"), p.get("bias_D"))


def hidden(
    c: ModelConfig, p: Mapping[str, Any], tokens, segments, positions, drop: Callable = lambda y, site: y
) -> np.ndarray:
    """The backbone on one row: [T] -> [T, D]; `drop` is dropout at a site: 2i, 2i + 1 in layer i, 2N the embedding."""
    x = p["embed_VD"][tokens] * c.embedding_scale
    if c.positions.type == "learned":
        x = x + p["positions_TD"][positions]
    x = drop(x, 2 * c.layers)
    for i in range(c.layers):
        block = _layer(p["blocks"], i)
        window = c.attention.windows[i % len(c.attention.windows)]
        normed = _norm(c, block.get("attention_norm", {}), x)
        attended = drop(_attention(c, block["attention"], normed, segments, positions, window), 2 * i)
        if c.residual == "sequential":
            x = x + attended
            x = x + drop(_mlp(c, block["mlp"], _norm(c, block.get("mlp_norm", {}), x)), 2 * i + 1)
        else:
            inner = normed if c.shared_norm else _norm(c, block.get("mlp_norm", {}), x)
            x = x + attended + drop(_mlp(c, block["mlp"], inner), 2 * i + 1)
    return _norm(c, p.get("norm", {}), x)


def logits(c: ModelConfig, p: Mapping[str, Any], tokens, segments, positions) -> np.ndarray:
    """The language model on a batch: [B, T] -> [B, T, V]."""
    rows = zip(tokens, segments, positions, strict=True)
    h = np.stack([hidden(c, p["backbone"], *row) for row in rows])
    y = c.logit_scale * h @ (p["backbone"]["embed_VD"] if c.tied else p["unembed_VD"]).T
    return y if c.logit_softcap is None else c.logit_softcap * np.tanh(y / c.logit_softcap)


def scores(c: ModelConfig, p: Mapping[str, Any], tokens, segments, positions) -> np.ndarray:
    """The scalar model on a batch: [B, T] -> [B, T]."""
    rows = zip(tokens, segments, positions, strict=True)
    return np.stack([hidden(c, p["backbone"], *row) for row in rows]) @ p["head_D"] + p["bias"]


def _layer(stacked: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {k: _layer(v, i) if isinstance(v, Mapping) else v[i] for k, v in stacked.items()}
