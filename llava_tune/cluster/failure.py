"""Why a run failed: the first error, its rank and host, from what the ranks left in WORK_DIR/crash."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_tune.constants import CRASH

_HEAD = re.compile(r"rank (\d+) on (\S+), process (\d+)")
_HUNG = re.compile(r"^Timeout \((.+?)\)!", re.MULTILINE)
_FOLLOWING = re.compile(
    r"connection (closed|reset|refused)|broken pipe|nccl|gloo|socket|peer|store->get|watchdog|recv|allreduce|barrier",
    re.IGNORECASE,
)
"""What a rank says that lost another one."""
_IN_COLLECTIVE = re.compile(
    r"torch/distributed/|nn/parallel/distributed|_engine_run_backward|deepspeed/comm|synchronize|accelerate/utils/operations"
)
"""Where a rank is that waits for the others."""


@dataclass(frozen=True)
class Left:
    """What one rank left.

    Attributes:
        when: seconds; of an error the time it was caught.
        error: its message; '' if it left none.
        traceback: of the error, or the stacks that it wrote when it was told to end or hung.
        kind: "error", "hung", "killed" (it said nothing) or "ended" (it was told to).
    """

    rank: int
    host: str
    when: float
    error: str
    traceback: str
    kind: str

    @property
    def follows(self) -> bool:
        """Whether it looks like the consequence of another rank's end."""
        if self.kind == "hung":
            return bool(_IN_COLLECTIVE.search(_main_thread(self.traceback)))
        return self.kind == "ended" or (self.kind == "error" and bool(_FOLLOWING.search(self.error)))


def read_crash(work_dir: Path) -> list[Left]:
    """What the ranks left, the first cause first; empty after a run that ended well."""
    found: dict[int, Left] = {}
    folder = work_dir / CRASH
    for path in sorted(folder.glob("rank-*.stack")):
        text = path.read_text(errors="replace")
        if not (head := _HEAD.match(text)):
            continue
        stacks = text[head.end() :].strip()
        hung = _HUNG.search(stacks)
        kind = "hung" if hung else "ended" if stacks else "killed"
        error = f"no step, score or checkpoint for {hung.group(1)}" if hung else ""
        rank = int(head.group(1))
        found[rank] = Left(rank, head.group(2), path.stat().st_mtime, error, stacks, kind)
    for path in sorted(folder.glob("rank-*.json")):
        facts: dict[str, Any] = json.loads(path.read_bytes())
        error, traceback = facts["error"], "".join(facts["traceback"])
        found[facts["rank"]] = Left(facts["rank"], facts["host"], path.stat().st_mtime, error, traceback, "error")
    order = {"error": 1, "killed": 0, "hung": 1, "ended": 2}
    return sorted(found.values(), key=lambda left: (left.follows, order[left.kind], left.when, left.rank))


def explain(work_dir: Path) -> str | None:
    """The first cause, ready to print, the others in a line; None after a run that left nothing."""
    ranks = read_crash(work_dir)
    if not ranks:
        return None
    first, others = ranks[0], ranks[1:]
    lines = []
    if others:
        kinds = {
            kind: [left.rank for left in others if left.kind == kind] for kind in ("error", "hung", "killed", "ended")
        }
        words = {"error": "failed after it", "hung": "hung", "killed": "said nothing", "ended": "were told to end"}
        lines.append("; ".join(f"{_ranks(some)} {words[kind]}" for kind, some in kinds.items() if some))
    if first.kind == "hung":
        lines += [
            f"where the ranks were (innermost frame, outermost of llava_tune): {place}" for place in _places(ranks)
        ]
    elif first.traceback and first.kind == "error":
        lines.append(first.traceback.rstrip())
    said = (
        first.error
        or "it ended without a word: killed (kill -9, or the out-of-memory killer: see dmesg), or its machine failed"
    )
    lines.append(f"first error: rank {first.rank} on {first.host}: {said}")
    return "\n".join(lines)


def _main_thread(stacks: str) -> str:
    """Of all threads' stacks, that of the one that trains."""
    threads = stacks.split("\n\n")
    return next((t for t in threads if "llava_tune" in t), threads[-1])


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _places(ranks: list[Left]) -> list[str]:
    """Of each rank's main thread, where it was; ranks at the same place in one line, the fewest first."""
    places: dict[str, list[int]] = {}
    for left in ranks:
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', _main_thread(left.traceback))
        ours = [frame for frame in frames if "llava_tune" in frame[0]]
        named = [f"{Path(f).name}:{n} {what}" for f, n, what in [*frames[:1], *ours[:1]]]
        places.setdefault(" < ".join(named) or "unknown", []).append(left.rank)
    return [f"{_ranks(some)}: {place}" for place, some in sorted(places.items(), key=lambda item: len(item[1]))]
