"""The shape of the package: who may import whom, what the pure half may not touch, and how long things may grow.

To place a new module, add it to LAYERS. A name stands for a module, or for a whole package with all that is in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import jaxgpt

PURE = (
    ("errors",),
    ("config",),
    ("mesh",),
    ("models",),
    ("losses", "advantages", "sampling", "optim"),
    ("train.state",),
    ("train.step",),
)
EDGE = (
    ("places", "data", "recorded", "runs", "health", "launch", "hosts", "train.checkpoint", "train.metrics"),
    ("train.loop",),
    ("interop", "ready", "graders"),
    ("stages",),
    ("api",),
    ("evaluate", "report", "plan"),
    ("aot",),
    ("pipeline", "overopt", "doctor", "verbs", "terminal", "exchange", "jaxgpt"),
    ("cli",),
    ("__main__",),
)
LAYERS = PURE + EDGE
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALONE = ("train",)  # a package whose parts lie in several layers; its own __init__ imports nothing of ours

IMPURE = ("time", "datetime", "os", "logging", "pathlib", "subprocess", "socket")  # files, clock, log, environment
PURE_ROOMS = tuple(name for names in PURE[2:] for name in names)
WITHOUT_JAX = ("errors", "config", "data", "runs", "recorded", "health", "report", "ready", "plan", "launch", "places")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")

LONGEST_FILE, LONGEST_FUNCTION = 350, 80
DECLARATIONS = ("config.schema",)  # one long list of settings and their docs is easier to read than its parts


@dataclass(frozen=True)
class Module:
    """A module of the package: `name` is relative to it, "jaxgpt" for its __init__."""

    name: str
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str | None:
        """The entry of LAYERS it belongs to: the longest one that is its name or a package above it."""
        parts = self.name.split(".")
        names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((name for name in names if name in LEVEL), None)


def read_package(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        text = path.read_text()
        name = ".".join(parts) or "jaxgpt"
        modules[name] = Module(name, ast.parse(text, str(path)), len(text.splitlines()))
    return modules


def imported_names(module: Module, packages: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth, relative ones resolved; `from a import b` gives a.b."""
    parts = [] if module.name == "jaxgpt" else module.name.split(".")
    package = parts if module.name in packages or not parts else parts[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["jaxgpt", *package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def own_imports(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """(line, module of ours) for every import of the package's own modules."""
    packages = {name.rpartition(".")[0] for name in modules}
    for line, name in imported_names(module, packages):
        parts = name.split(".")
        if parts[0] != "jaxgpt":
            continue
        known = (".".join(parts[1:n]) for n in range(len(parts), 1, -1))
        yield line, next((found for found in known if found in modules), "jaxgpt")


def unplaced(modules: dict[str, Module]) -> list[str]:
    return [name for name, module in modules.items() if module.room is None and name not in ALONE]


def upward_imports(modules: dict[str, Module]) -> list[str]:
    """Imports of a higher layer; within one layer they are allowed, and `cycles` keeps them acyclic."""
    found = []
    for module in modules.values():
        for line, target in own_imports(module, modules):
            if target in ALONE:
                continue
            above = module.name in ALONE or (
                module.room is not None
                and modules[target].room is not None
                and LEVEL[modules[target].room] > LEVEL[module.room]
            )
            if above:
                found.append(f"{module.name}:{line} imports {target}")
    return found


class WithoutTyping(ast.NodeTransformer):
    """Drops what only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.If | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def cycles(modules: dict[str, Module]) -> list[str]:
    """Modules that import each other when the program runs, and those between them."""
    running = {name: replace(m, tree=WithoutTyping().visit(deepcopy(m.tree))) for name, m in modules.items()}
    graph = {
        name: {target for _, target in own_imports(module, running) if target != name}
        for name, module in running.items()
    }
    while ends := {n for n, targets in graph.items() if not targets or not any(n in g for g in graph.values())}:
        graph = {name: targets - ends for name, targets in graph.items() if name not in ends}
    return sorted(graph)


def jax_imports(modules: dict[str, Module]) -> list[str]:
    """Modules that must answer without jax, and reach it themselves or through another module of ours."""
    packages = {name.rpartition(".")[0] for name in modules}
    direct = {
        name: {target.split(".")[0] for _, target in imported_names(module, packages)} & set(JAX)
        for name, module in modules.items()
    }
    found = []
    for name, module in modules.items():
        if module.room not in WITHOUT_JAX:
            continue
        seen, queue = set(), [name]
        while queue:
            reached = queue.pop()
            if reached in seen:
                continue
            seen.add(reached)
            if direct[reached]:
                found.append(f"{name} reaches {min(direct[reached])} through {reached}")
            if reached != "jaxgpt":
                queue += [target for _, target in own_imports(modules[reached], modules)]
    return found


def impure_imports(modules: dict[str, Module]) -> list[str]:
    packages = {name.rpartition(".")[0] for name in modules}
    found = []
    for module in modules.values():
        if module.room not in PURE_ROOMS:
            continue
        found += [
            f"{module.name}:{line} imports {name}"
            for line, name in imported_names(module, packages)
            if name.split(".")[0] in IMPURE
        ]
        found += [
            f"{module.name}:{node.lineno} calls open"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "io.open")
        ]
    return found


def environment_reads(modules: dict[str, Module]) -> list[str]:
    """Uses of sys.argv and the environment, under any way of importing them, outside cli."""
    names = ("sys.argv", "os.environ", "os.environb", "os.getenv", "os.putenv", "sys.orig_argv")
    packages = {name.rpartition(".")[0] for name in modules}
    found = []
    for module in modules.values():
        if module.room == "cli":
            continue
        found += [f"{module.name}:{line} {name}" for line, name in imported_names(module, packages) if name in names]
        found += [
            f"{module.name}:{node.lineno} {ast.unparse(node)}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in names
        ]
    return found


def too_long(modules: dict[str, Module]) -> list[str]:
    found = [
        f"{name} has {module.lines} lines, at most {LONGEST_FILE}"
        for name, module in modules.items()
        if module.lines > LONGEST_FILE and name not in DECLARATIONS
    ]
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{name}:{node.lineno} {node.name} has {lines} lines, at most {LONGEST_FUNCTION}")
    return found


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    return read_package(Path(jaxgpt.__file__).parent)


def test_every_module_has_a_layer(package):
    assert unplaced(package) == []


def test_imports_point_down(package):
    assert upward_imports(package) == []


def test_no_module_imports_itself_through_others(package):
    assert cycles(package) == []


def test_nothing_but_main_imports_the_command_line(package):
    importers = {m.name for m in package.values() for _, target in own_imports(m, package) if target == "cli"}
    assert {name for name in importers if package[name].room != "cli"} <= {"__main__"}


def test_configs_data_and_reports_do_without_jax(package):
    assert jax_imports(package) == []


def test_the_numerical_half_touches_no_file_clock_or_log(package):
    assert impure_imports(package) == []


def test_only_the_command_line_reads_arguments_and_environment(package):
    assert environment_reads(package) == []


def test_files_and_functions_stay_short(package):
    assert too_long(package) == []


@pytest.fixture
def bad_package(tmp_path) -> dict[str, Module]:
    """A package with one offence of each kind."""
    files = {
        "__init__.py": "",
        "errors.py": "import os\nhome = os.environ['HOME']\n",
        "novel.py": "",
        "losses.py": "import time\nfrom jaxgpt.stages import sft\nopen('x')\n",
        "train/__init__.py": "",
        "train/state.py": "if TYPE_CHECKING:\n    from jaxgpt.train.step import Step\n",
        "train/step.py": "from .state import State\nfrom ..cli import main\n",
        "stages/__init__.py": "from jaxgpt.stages import sft\n",
        "stages/sft.py": "def f():\n    from jaxgpt.train import loop\n" + "    x = 1\n" * 79,
        "train/loop.py": "import jax\n",
        "pipeline.py": "import jaxgpt.terminal\n",
        "data/__init__.py": "from jaxgpt.mesh import rows\n",
        "terminal.py": "from . import pipeline\n",
        "mesh.py": "import jax.numpy as jnp\n" + "#\n" * 350,
        "cli.py": "import sys\nprint(sys.argv)\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return read_package(tmp_path)


def test_each_offence_is_seen(bad_package):
    assert unplaced(bad_package) == ["novel"]
    assert upward_imports(bad_package) == [
        "losses:2 imports stages.sft",
        "train.state:2 imports train.step",
        "train.step:2 imports cli",
    ]
    assert cycles(bad_package) == ["pipeline", "terminal"]
    assert jax_imports(bad_package) == ["data reaches jax through mesh"]
    assert impure_imports(bad_package) == ["losses:1 imports time", "losses:3 calls open"]
    assert environment_reads(bad_package) == ["errors:2 os.environ"]
    assert too_long(bad_package) == ["mesh has 351 lines, at most 350", "stages.sft:1 f has 81 lines, at most 80"]
