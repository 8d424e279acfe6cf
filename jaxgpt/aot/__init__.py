"""Programs of a config compiled ahead of time for machines that are not there, and what the compiler made of them."""

from jaxgpt.aot.compiled import Compiled, compile_program, target_devices
from jaxgpt.aot.hlo import Collective
from jaxgpt.aot.programs import Program, programs

__all__ = ["Collective", "Compiled", "Program", "compile_program", "programs", "target_devices"]
