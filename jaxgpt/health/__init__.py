"""Is a run healthy? Its figures are watched as they come, and what looks wrong is said in words.

Pure: what is said of a line of metrics.jsonl depends on the lines before it alone, so a resumed run says what an
undisturbed one says. Nothing here needs jax.
"""

from jaxgpt.health.record import Limits
from jaxgpt.health.watch import Health, Notice

__all__ = ["Health", "Limits", "Notice"]
