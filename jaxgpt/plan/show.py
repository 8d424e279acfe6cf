"""The plan on the console: tables no wider than 80 columns, plain where that is no terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxgpt.plan.chips import GIB, Target
from jaxgpt.plan.estimate import DAY, HOUR, Estimate, kernel_notes
from jaxgpt.plan.meshes import Layout
from jaxgpt.plan.weights import PARTS, by_part, count
from jaxgpt.plan.work import Model

INDENT, NAME, WIDE = 2, 16, 120
"""Columns before everything, of names, and of the longest line."""


def short(value: float) -> str:
    """Three digits and a unit: 6.74B, 1.01T."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= value < 1e18:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def span(seconds: float) -> str:
    """A time in the unit that people would say it in."""
    for unit, size, least in (("days", DAY, 2 * DAY), ("h", HOUR, 2 * HOUR), ("min", 60.0, 120.0), ("s", 1.0, 1.0)):
        if seconds >= least:
            return f"{seconds / size:,.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def gib(size: float) -> str:
    """GiB, or MiB of what is small."""
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else f"{size / GIB:.4f}"


def table(*columns: str, right: Sequence[int] | None = None) -> Table:
    """One without lines; all columns but the first to the right, or those that are given."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(columns):
        wanted = number > 0 if right is None else number in right
        made.add_column(name, justify="right" if wanted else "left", no_wrap=wanted, overflow="fold")
    return made


def put(console: Console, made: Table) -> None:
    """Prints a table below its title."""
    console.print(Padding(made, (0, 0, 0, INDENT), expand=False))


def line(console: Console, name: str, text: str, style: str = "") -> None:
    """A name and what there is to say of it, in lines as wide as the console."""
    width = min(console.width, WIDE) - INDENT - NAME
    for number, part in enumerate(textwrap.wrap(text, width, break_on_hyphens=False) or [""]):
        shown = (
            Text(" " * INDENT).append(f"{name if number == 0 else '':<{NAME}}", style="dim").append(part, style=style)
        )
        console.print(shown, soft_wrap=True)


def title(console: Console, text: str) -> None:
    """Of a part."""
    console.print()
    console.print(Text(text, style="bold"))


def show_parameters(console: Console, models: Sequence[Model]) -> None:
    """Parameters by part, a column for each model; of an ensemble of reward models one."""
    models = [model for model in models if not model.role.startswith("reward ") or model.role == "reward 1"]
    made = table("parameters", *(model.role for model in models))
    found = [by_part(model.weights) for model in models]
    for part in PARTS:
        if any(part in sizes for sizes in found):
            made.add_row(part, *(f"{sizes.get(part, 0):,}" for sizes in found))
    made.add_row("all", *(f"{count(model.weights):,}" for model in models), style="bold")
    if any(len(model.learned) != len(model.weights) for model in models):
        made.add_row("trained", *(f"{count(model.learned):,}" for model in models))
    put(console, made)


def show_stage(console: Console, found: Estimate) -> None:
    """All of a stage."""
    plan, target = found.plan, found.target
    title(console, f"{plan.name} on {target.name}{'' if target.chips == 1 else f', {target.chips} chips'}")
    show_parameters(console, list(plan.models.values()))
    _show_tokens(console, found)
    chosen = found.chosen
    if found.refused:
        line(console, "the file's mesh", "; ".join(found.refused), "yellow")
    if chosen is not None:
        _show_memory(console, found, chosen)
        _show_meshes(console, found)
    _show_left_out(console, found)
    _show_verdict(console, found)
    notes = [*plan.notes, *(kernel_notes(plan, chosen, target) if chosen else [])]
    for note in notes:
        line(console, "note", note, "dim")


def _show_tokens(console: Console, found: Estimate) -> None:
    plan, flops = found.plan, found.flops
    trained = next(model for model in plan.models.values() if model.learned)
    size = count(trained.weights)
    if plan.tokens is not None:
        each = plan.tokens / size
        line(console, "tokens", f"{short(plan.tokens)} in {plan.updates:,} updates; {each:.3g} a parameter")
    hard = flops.hardware(trained.config.remat, found.target.chip.kind, found.target.chip.kind != "cpu", False)
    line(
        console,
        "FLOPs a token",
        f"{6 * size:.4g} as 6N; {flops.train():.4g} counting causal attention, {flops.train(full=True):.4g} full; "
        f"computed {hard:.4g} with remat={trained.config.remat}",
    )
    line(console, "FLOPs in all", f"{found.total:.4g}")


def _show_memory(console: Console, found: Estimate, chosen: Layout) -> None:
    room, hbm = chosen.memory, found.target.chip.hbm
    fullest = room.fullest
    mesh = " x ".join(map(str, chosen.mesh))
    made = table(f"GiB a device, mesh {mesh}", "stays", *room.programs)
    for name, size in room.resident.items():
        made.add_row(name, gib(size), *("" for _ in room.programs))
    names = dict.fromkeys(name for use in room.programs.values() for name in use.temporaries)
    for name in names:
        sizes = [use.temporaries.get(name) for use in room.programs.values()]
        made.add_row(name, "", *("" if size is None else gib(size) for size in sizes))
    stays = sum(room.resident.values())
    sums = [stays + sum(use.temporaries.values()) for use in room.programs.values()]
    made.add_row("all", gib(stays), *map(gib, sums), style="bold")
    put(console, made)
    share = "" if hbm is None else f" of {hbm / GIB:.1f}, {room.peak / hbm:.0%}"
    where = f" (at the {fullest.peak})" if fullest.peak else ""
    line(console, "peak", f"{gib(room.peak)} GiB{share}, in {fullest.name}{where}", "" if chosen.fits else "red")
    if room.host:
        line(console, "host memory", f"{gib(room.host)} GiB a device of offloaded activations")


def _show_meshes(console: Console, found: Estimate) -> None:
    plan, most = found.plan, found.options.meshes
    shown = list(found.layouts[:most])
    if found.chosen is not None and found.chosen not in shown:
        shown.append(found.chosen)
    made = table("data fsdp context tensor", "GiB", "fits", "bound by", "MFU at most", "time", right=(1, 4, 5))
    for layout in shown:
        longest = max(
            zip(plan.programs, layout.times, strict=True), key=lambda pair: (pair[0].times or 1) * pair[1].bound
        )
        sizes = f"{layout.mesh.data:>4} {layout.mesh.fsdp:>4} {layout.mesh.context:>7} {layout.mesh.tensor:>6}"
        own = " *" if layout.mesh == found.asked else ""
        seconds = layout.seconds(plan, found.options.mfu, found.options.reached)
        by = longest[1].by if found.target.chip.kind == "tpu" else longest[1].by.replace("ici", "network")
        name = by if len(plan.programs) == 1 else f"{longest[0].name}: {by}"
        made.add_row(
            sizes + own,
            gib(layout.memory.peak),
            "yes" if layout.fits else "no",
            name,
            f"{found.utilisation(layout):.0%}",
            span(seconds),
            style="" if layout.fits else "dim",
        )
    put(console, made)
    rest = len(found.layouts) - len(shown)
    said = [f"{rest} more meshes divide (meshes=N lists them)"] if rest > 0 else []
    said += ["* the file's"] if found.asked is not None and not found.refused else []
    if said:
        line(console, "", "; ".join(said), "dim")


def _show_left_out(console: Console, found: Estimate) -> None:
    if found.reasons:
        told = [f"{number} for {reason}" for reason, number in found.reasons.items()]
        more = f"; {len(told) - 5} more reasons" if len(told) > 5 else ""
        line(console, "meshes left out", "; ".join(told[:5]) + more, "dim")


def _show_verdict(console: Console, found: Estimate) -> None:
    plan, target, options = found.plan, found.target, found.options
    if found.chosen is None:
        line(console, "no mesh", f"of {target.devices} devices divides it: see what is left out", "bold red")
        return
    if not found.fits:
        line(console, "does not fit", _remedy(found), "bold red")
        return
    seconds = found.seconds or 0.0
    hours = seconds / HOUR * target.chips
    what = span(seconds) if plan.updates is not None else f"{span(seconds)} an update"
    cost = "" if found.cost is None else f", cost {found.cost:,.2f}"
    assumed = f"at {options.mfu:g} of peak arithmetic and {options.reached:g} of bandwidths, mfu=... reached=..."
    line(console, "takes", f"{what}, {digits(hours)} chip-hours{cost} ({assumed})", "bold")


def _remedy(found: Estimate) -> str:
    """What to change where nothing fits."""
    told = found.advice
    assert told is not None, "nothing fits, and no mesh divides"
    settings = " ".join(told.settings)
    if told.fits:
        return f"it would with {settings}"
    hbm = found.target.chip.hbm or 1.0
    chips = 2 ** math.ceil(math.log2(found.target.chips * told.least / hbm))
    least = f"{gib(told.least)} GiB a device{settings and f', with {settings}'}"
    more = f"{chips} such chips or more, chips with more memory, or a smaller model"
    return f"however it is cut: the least is {least}. Take {more}"


def show_total(console: Console, found: Iterable[Estimate], target: Target) -> None:
    """The sum over stages whose length is known."""
    known = [one for one in found if one.fits and one.seconds is not None and one.plan.updates is not None]
    if len(known) < 2:
        return
    seconds = sum(one.seconds or 0.0 for one in known)
    cost = sum(one.cost or 0.0 for one in known)
    title(console, f"All {len(known)} stages: {', '.join(one.plan.name for one in known)}")
    told = f", cost {cost:,.2f}" if cost else ""
    line(console, "takes", f"{span(seconds)}, {digits(seconds / HOUR * target.chips)} chip-hours{told}", "bold")
