"""A cloud for tpu/queue.sh: a `gcloud` that tells given states, and one machine, a folder, whose shell is real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

QUEUE = Path(__file__).parents[2] / "tpu" / "queue.sh"

GCLOUD = r"""#!/usr/bin/env bash
# shellcheck disable=SC2154
echo "$*" >>"$STUB/calls"
next() { head -n 1 "$STUB/$1"; if (($(wc -l <"$STUB/$1") > 1)); then sed -i 1d "$STUB/$1"; fi; }
case "$*" in
*queued-resources\ describe*)
    state=$(next states)
    if [[ $state == NONE ]]; then echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; fi
    if [[ $state == OFFLINE ]]; then echo "ERROR: no network" >&2; exit 1; fi
    echo "$state"
    ;;
*queued-resources\ create*)
    if [[ -e $STUB/quota ]]; then echo "ERROR: quota exceeded" >&2; exit 1; fi
    mkdir -p "$STUB/machine" ;;
*queued-resources\ delete*)
    if [[ -e $STUB/machine/.jaxgpt/pid ]]; then kill -KILL -- "-$(cat "$STUB/machine/.jaxgpt/pid")" 2>/dev/null; fi
    rm -rf "$STUB/machine" ;;
*queued-resources\ scp*) cp "$5" "$STUB/machine/" ;;
*queued-resources\ ssh*)
    if [[ $(next ssh) == broken ]]; then echo "ssh: connection refused" >&2; exit 255; fi
    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
    cd "$STUB/machine" && HOME=$STUB/machine exec bash -c "$command" ;;
esac
"""

UV = r"""#!/usr/bin/env bash
# As `uv sync` leaves it: a program, here one that ends as the script says.
echo "uv $*" >>"$STUB/calls"
mkdir -p .venv/bin
cat >.venv/bin/jaxgpt <<'END'
#!/usr/bin/env bash
if [[ $1 == --version ]]; then exit; fi
echo "$*|$LIBTPU_INIT_ARGS" >>"$STUB/commands"
code=$(head -n 1 "$STUB/codes"); sed -i 1d "$STUB/codes"
if [[ $code == works ]]; then sleep 60; fi
exit "$code"
END
chmod +x .venv/bin/jaxgpt
"""


class Cloud:
    """What queue.sh does in a cloud of given states (the last one stays), connections and exit codes."""

    def __init__(self, home: Path, states: list[str], codes: list[str], ssh: list[str] = ("good",)):  # type: ignore[assignment]
        self.home = home
        (home / "bin").mkdir()
        for name, text in (("gcloud", GCLOUD), ("uv", UV)):
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)
        for name, lines in (("states", states), ("codes", codes), ("ssh", ssh), ("calls", []), ("commands", [])):
            (home / name).write_text("".join(f"{line}\n" for line in lines))

    def queue(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
            "STUB": str(self.home),
            "XDG_STATE_HOME": str(self.home / "state"),
            "ZONE": "us-central1-a",
            "TYPE": "v5litepod-16",
            "POLL": "0.3",
            **settings,
        }
        return subprocess.run(
            ["bash", str(QUEUE), "night", *command],
            env=environment, cwd=self.home, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def calls(self, verb: str) -> list[str]:
        lines = (self.home / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"compute tpus queued-resources {verb} ")]

    def commands(self) -> list[str]:
        return (self.home / "commands").read_text().splitlines()


def told(found: subprocess.CompletedProcess[str]) -> list[str]:
    """What queue.sh said, without times and the name."""
    return [line.split(": ", 1)[1] for line in found.stdout.splitlines()]
