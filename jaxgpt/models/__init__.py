"""The Transformer: NNX classes as notation, pure functions over plain nested dicts at run time."""
