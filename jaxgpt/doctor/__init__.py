"""Checks on the user's own models, tokenizer and data before a run is paid for."""

from jaxgpt.doctor.examine import examine

__all__ = ["examine"]
