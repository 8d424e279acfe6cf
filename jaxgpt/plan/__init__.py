"""What a run will take, computed from its config alone: parameters, FLOPs, bytes per chip, meshes, days, cost.

Pure functions of settings and datasheets but for `verb`, which reads files and prints. Nothing here needs jax.
"""
