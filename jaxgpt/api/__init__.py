"""Finished models in Python: `jaxgpt.load("runs/meadow/sft")` gives one that encodes, generates, chats or scores.

Results are NumPy arrays, strings and lists. Token batches are lists of lists, or [B, T] arrays with the lengths of
their rows. Sizes are rounded up inside, so that few programs are compiled.
"""

from jaxgpt.api.find import keep_compiled, load
from jaxgpt.api.model import Generation, Messages, Model, Tokens

__all__ = ["Generation", "Messages", "Model", "Tokens", "keep_compiled", "load"]
