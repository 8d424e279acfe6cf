"""Train a ChatGPT-like assistant end to end in JAX: pretraining, supervised fine-tuning, a reward model, PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.api import Generation, Model, load
    from jaxgpt.errors import UserError

__all__ = ["Generation", "Model", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Imports on first use: `import jaxgpt` alone does not load jax."""
    if name == "UserError":
        from jaxgpt.errors import UserError

        return UserError
    if name in __all__:
        from jaxgpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxgpt' has no attribute '{name}'")
