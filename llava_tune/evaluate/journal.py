"""The answers of an evaluation that has not ended: kept as they come, so that a killed one goes on, and shared between processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_tune.errors import RunFailed
from llava_tune.paths import write_whole

_POLL_SECONDS = 0.2


class Journal:
    """Answers, one JSON line each, in a file for each process beside the file that will hold them all.

    Args:
        path: that file.
        key: what an earlier run must share for its answers to count.
        rank: of this process; each writes a file of its own, and reads all of them as it starts.
    """

    def __init__(self, path: Path, key: Sequence[object], rank: int = 0) -> None:
        self._pattern = f"{path.name}.unfinished-*"
        self.path = path.with_name(f"{path.name}.unfinished-{rank}")
        self._head = json.dumps({"key": key})
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = self._read(self.path)
        kept = [json.dumps({"question": i, "answer": a}, ensure_ascii=False) for i, a in mine.items()]
        write_whole(
            self.path, "".join(f"{line}\n" for line in [self._head, *kept])
        )  # without a line that a kill cut off
        self.answers: dict[int, str] = {}  # by the question's place: ids may come twice
        self.refresh()

    def _read(self, path: Path) -> dict[int, str]:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        found: dict[int, str] = {}
        if lines[:1] == [self._head]:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off, or still being written
                found[entry["question"]] = entry["answer"]
        return found

    def refresh(self) -> None:
        """Take in what other processes have answered."""
        for path in self.path.parent.glob(self._pattern):
            self.answers |= self._read(path)

    def add(self, answers: dict[int, str]) -> None:
        """Keep some answers, by their questions' places."""
        self.answers |= answers
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"question": i, "answer": a}, ensure_ascii=False) + "\n" for i, a in answers.items()
            )

    def wait(self, total: int, timeout: float, report: Callable[[int], None]) -> None:
        """Until all questions have an answer.

        Raises:
            RunFailed: nothing came for `timeout` seconds.
        """
        last = time.monotonic()
        while len(self.answers) < total:
            before = len(self.answers)
            time.sleep(_POLL_SECONDS)
            self.refresh()
            if len(self.answers) > before:
                last = time.monotonic()
                report(len(self.answers))
            elif time.monotonic() - last > timeout:
                raise RunFailed(
                    f"{total - len(self.answers)} of {total} questions have had no answer from the other processes for {timeout:.0f} s. "
                    "What is answered is kept: run the same command again"
                )

    def close(self) -> None:
        """All answers are in their file: remove these."""
        for path in self.path.parent.glob(self._pattern):
            path.unlink(missing_ok=True)
