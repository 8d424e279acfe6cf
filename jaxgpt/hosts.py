"""The processes that train together: how they start, wait for each other, and stop at one step.

Opens network connections, reads the clock. The word host stands for a process, of which a machine mostly runs one. The
coordination service, its barriers and the notice of preemption are jax's own; what is added is that the host which does
not come is named.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed  # the address that jax detects, and its client, have no public name
from jax.experimental import multihost_utils

from jaxgpt.config.schema import HostsConfig
from jaxgpt.errors import UserError
from jaxgpt.launch import Start

T = TypeVar("T")
POLL = 0.2
"""Seconds between two looks for a host."""
GRACE = 10.0
"""Seconds in which the others are told, or may fail in the same way, before a host that failed leaves them."""
LONG = 24 * 3600
"""Seconds; jax asks for a time-out where there is none to give."""


@dataclass
class _Together:
    """What this process knows of the others."""

    config: HostsConfig = field(default_factory=HostsConfig)
    names: dict[int, str] = field(default_factory=lambda: {0: "localhost"})
    calls: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of barriers, and of turns of the first host: the same on every host."""
    steps: Iterator[int] = field(default_factory=itertools.count)


_together = _Together()


def number() -> int:
    """Which host this is."""
    return jax.process_index()


def count() -> int:
    """How many hosts there are."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the host that writes files and speaks."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(given: Start | None, config: HostsConfig) -> Iterator[None]:
    """The life of a process among others; nothing where there are none.

    Raises UserError that names the hosts which did not come within config.start_timeout. A host that fails says
    why and ends its process at once: the others are told by jax after config.heartbeat_timeout at the latest.
    """
    global _together
    address, processes, process, devices = _resolved(given, config)
    if address is None or processes <= 1:
        yield
        return
    names = roll_call(address, processes, process, config.start_timeout)
    jax.distributed.initialize(
        address, processes, process, devices, cluster_detection_method="deactivate",
        initialization_timeout=config.start_timeout, heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=config.barrier_timeout,
    )  # fmt: skip
    _together = _Together(config, names)
    interrupted = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    except BaseException as error:
        _leave(error)
    signal.signal(signal.SIGINT, interrupted)
    jax.distributed.shutdown()


def _resolved(given: Start | None, config: HostsConfig) -> tuple[str | None, int, int, Any]:
    """Coordinator's address, processes, this one, and its devices where not all of the machine's are its own."""
    if given is None:
        return None, 1, 0, None
    if given.coordinator is not None:
        assert given.processes is not None and given.process is not None
        return given.coordinator, given.processes, given.process, None
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, processes, process, devices = detect(None, None, None, None, given.method, config.start_timeout)
    if address is None or processes is None or process is None:
        return None, 1, 0, None
    return address, processes, process, devices


def roll_call(address: str, processes: int, process: int, seconds: float) -> dict[int, str]:
    """Names of all machines by host, once every host is there.

    Goes before `jax.distributed.initialize`, which ends the process where a host is missing, and does not say which.
    Raises UserError that names those who did not come in time.
    """
    place, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if process == 0:
        wrong, found = _call(int(port), processes, deadline)
    else:
        wrong, found = _answer(place.strip("[]"), int(port), process, deadline)
    names = {int(key): name for key, name in found.items()}
    if wrong:
        raise UserError(f"{wrong}, among {processes}; each process needs a number of its own, from 0 on")
    missing = [host for host in range(processes) if host not in names]
    if missing:
        here = ", ".join(f"{host} ({name})" for host, name in sorted(names.items()))
        raise UserError(
            f"{_hosts(missing)} of {processes} did not come within hosts.start_timeout, {seconds:g} s; here: {here}"
        )
    return names


def _hosts(missing: list[int], names: dict[int, str] | None = None) -> str:
    told = [f"{host} ({names[host]})" if names and host in names else str(host) for host in missing]
    return f"host{'s' if len(told) > 1 else ''} {', '.join(told)}"


def _call(port: int, processes: int, deadline: float) -> tuple[str, dict[int, str]]:
    """Takes the others' names, and tells everybody's to everybody, or what is wrong with them."""
    names, lines, twice = {0: socket.gethostname()}, [], ""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=processes
    ) as server:
        while len(names) < processes and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
                line.settimeout(GRACE)
                host, name = json.loads(line.makefile().readline())
            except (OSError, ValueError, TypeError):  # nobody, or not one of ours
                continue
            lines.append(line)
            if host in names or host not in range(processes):
                twice = f"two processes say that they are host {host}" if host in names else f"no host {host}"
                break
            names[host] = name
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(json.dumps([twice, names]).encode() + b"\n")
        for line in lines:
            with line, contextlib.suppress(OSError):
                line.recv(1)  # the other side closes first: the port is free at once
    return twice, names


def _answer(place: str, port: int, process: int, deadline: float) -> tuple[str, dict[str, str]]:
    """Gives one's name to host 0; what is wrong with the names, and everybody's by number."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((place, port), timeout=left) as line:
                line.sendall(json.dumps([process, socket.gethostname()]).encode() + b"\n")
                line.settimeout(max(deadline - time.monotonic(), 0.0) + GRACE)
                told = line.makefile().readline()
                if told:
                    return json.loads(told)
        except OSError:
            pass
        time.sleep(POLL)
    raise UserError(f"host 0 at {place}:{port} did not answer within hosts.start_timeout; this is host {process}")


def _leave(error: BaseException) -> NoReturn:
    """Tells an error and ends the process, with 2 for a mistake of the user.

    Waits a little for hosts that fail in the same way, so that each can say why; an orderly end would wait for all.
    """
    told = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    print(f"jaxgpt: host {number()} of {count()}: {told}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("leave", int(GRACE * 1000))
    sys.stdout.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def _client() -> Any:
    return distributed.global_state.client


def barrier(what: str) -> None:
    """Waits for all hosts. Raises UserError that names those who did not come within hosts.barrier_timeout."""
    if count() == 1:
        return
    call, seconds = next(_together.calls), _together.config.barrier_timeout
    _client().key_value_set(f"jaxgpt/{call}/{number()}", "here")
    try:
        _client().wait_at_barrier(f"jaxgpt-{call}", int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        here = {int(key.rsplit("/", 1)[1]) for key, _ in _client().key_value_dir_get(f"jaxgpt/{call}")}
        missing = [host for host in range(count()) if host not in here]
        if not missing:
            raise
        raise UserError(
            f"{what}: {_hosts(missing, _together.names)} of {count()} did not come within hosts.barrier_timeout, "
            f"{seconds:g} s; look at what it printed last"
        ) from error


def lead(work: Callable[[], None]) -> None:
    """The first host does the work, and the others wait for it, however long it takes: work on files all hosts see.

    What it raises as UserError is raised by all.
    """
    if count() == 1:
        work()
        return
    key = f"jaxgpt/{next(_together.calls)}/done"
    if first():
        try:
            work()
        except UserError as error:
            _client().key_value_set(key, f"!{error}")
            raise
        _client().key_value_set(key, "done")
        return
    told = _client().blocking_key_value_get(key, LONG * 1000)
    if told.startswith("!"):
        raise UserError(told[1:])


def left_out(mesh: jax.sharding.Mesh) -> list[str]:
    """What there is to say of hosts without a device in the mesh: none may be, for all run the same programs."""
    there = {device.process_index for device in mesh.devices.flat}
    missing = [host for host in range(count()) if host not in there]
    if not missing:
        return []
    return [
        f"mesh: {mesh.size} of {jax.device_count()} devices are used, none of {_hosts(missing)}; set one axis to auto, "
        f"or start {len(there)} host{'s' if len(there) > 1 else ''}"
    ]


def preempted() -> bool:
    """Whether all hosts are to stop now, for one of them was asked to (SIGTERM). True once, at the same call on each.

    To be called equally often by all.
    """
    return count() > 1 and multihost_utils.reached_preemption_sync_point(next(_together.steps))


def all_or_none(work: Callable[[], T]) -> T:
    """What each host makes of its share of some work. Where one fails, all do: it with its error, they with ValueError.

    So that none goes on to wait for a host that has turned back.
    """
    if count() == 1:
        return work()
    failed: Exception | None = None
    try:
        made = work()
    except Exception as error:
        failed = error
    good = multihost_utils.process_allgather(np.array(failed is None))
    if failed is not None:
        raise failed
    if not good.all():
        raise ValueError(f"{_hosts(np.flatnonzero(~good).tolist(), _together.names)} failed at it")
    return made
