"""Run one command of a recipe: its output goes to a log, and one line shows how far it is.

    python run_step.py --step train --log LOG --updates 1000 -- fairseq-train ...
    python run_step.py --step test --log LOG --stdout FILE --sentences 500 -- fairseq-generate ...

On a terminal the line is rewritten every second. Elsewhere a line is printed every 30 seconds
(EVOMOE_PROGRESS_SECONDS). After Ctrl-C, or if the command fails, the script says how to go on; the
recipe's own command comes from EVOMOE_RECIPE.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

TAIL = 20
TRAINED = re.compile(rb"\| train_inner \| (\{.*\})")
PATIENCE = 20
"""Seconds that a command has to end after Ctrl-C."""


def duration(seconds: float) -> str:
    """A time in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Training:
    """How far a training is, from the JSON lines of its log.

    Args:
        updates: number of updates after which it ends.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.first: tuple[float, int] | None = None
        self.row: dict[str, Any] = {}

    def read(self, lines: list[bytes]) -> None:
        for line in lines:
            if found := TRAINED.search(line):
                self.row = json.loads(found[1])
                if self.first is None:
                    self.first = time.monotonic(), int(self.row["num_updates"])

    def __str__(self) -> str:
        if not self.row:
            return "starting"
        done = int(self.row["num_updates"])
        parts = [f"update {done} of {self.updates}", f"loss {self.row['loss']}"]
        if "moe_active_experts" in self.row:
            parts.append(f"{float(self.row['moe_active_experts']):.1f} active experts")
        parts.append(f"{float(self.row['wps']):,.0f} tokens/s")
        assert self.first is not None
        start, before = self.first
        if done > before:
            each = (time.monotonic() - start) / (done - before)
            parts.append(f"about {duration(each * (self.updates - done))} left")
        return ", ".join(parts)


class Translating:
    """How far fairseq-generate is, from the hypotheses that it has written.

    Args:
        sentences: number of sentences.
    """

    def __init__(self, sentences: int) -> None:
        self.sentences, self.done = sentences, 0

    def read(self, lines: list[bytes]) -> None:
        self.done += sum(line.startswith(b"H-") for line in lines)

    def __str__(self) -> str:
        return f"{self.done} of {self.sentences} sentences" if self.done else "starting"


class Waiting:
    """A command that does not say how far it is."""

    def read(self, lines: list[bytes]) -> None:
        pass

    def __str__(self) -> str:
        return "running"


class Line:
    """The line of progress, on standard error.

    Args:
        step: name of the step.
    """

    def __init__(self, step: str) -> None:
        self.step, self.start = step, time.monotonic()
        self.live = sys.stderr.isatty()
        self.every = 1.0 if self.live else float(os.environ.get("EVOMOE_PROGRESS_SECONDS", "30"))
        self.next = self.start + self.every

    def show(self, state: object) -> None:
        """Print the state if it is time to."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + self.every
        text = f"{self.step}: {state} ({duration(now - self.start)})"
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True,
              file=sys.stderr)  # fmt: skip

    def close(self) -> None:
        """Remove a line that would be rewritten."""
        if self.live:
            print("\r\033[K", end="", flush=True, file=sys.stderr)


def new_lines(source: IO[bytes], rest: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines that were added to a file, and the beginning of the next one."""
    *lines, rest = (rest + source.read()).split(b"\n")
    return lines, rest


def follow(process: subprocess.Popen, source: Path, state: Any, line: Line) -> int:
    """Show the state until the command ends; return its exit status."""
    rest = b""
    with source.open("rb") as written:
        if source.stat().st_size and isinstance(state, Training):
            written.seek(0, os.SEEK_END)
        while True:
            status = process.poll()
            lines, rest = new_lines(written, rest)
            state.read(lines)
            line.show(state)
            if status is not None:
                return status
            time.sleep(0.2)


def go_on() -> str:
    recipe = os.environ.get("EVOMOE_RECIPE", "").strip()
    return f"Go on with the same command: {recipe}" if recipe else "Run the same command again."


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status, or 130 after Ctrl-C."""
    state: Any = Waiting()
    if args.updates:
        state = Training(args.updates)
    elif args.sentences:
        state = Translating(args.sentences)
    line = Line(args.step)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    # also where the shell that started this ignores Ctrl-C, as it does in the background
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with args.log.open("ab" if args.append else "wb") as log:
        out = args.stdout.open("wb") if args.stdout else log
        process = subprocess.Popen(args.command, stdout=out, stderr=log)
        try:
            status = follow(process, args.stdout or args.log, state, line)
        except KeyboardInterrupt:
            # from a terminal the command got the signal too; from elsewhere it did not
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            line.close()
            print(f"{args.step}: stopped at: {state}. {go_on()}", file=sys.stderr)
            return 130
        finally:
            line.close()
            if out is not log:
                out.close()
    if status:
        last = args.log.read_bytes().decode("utf-8", errors="replace").splitlines()[-TAIL:]
        print("\n".join(last), file=sys.stderr)
        print(
            f"\nstep {args.step} failed with status {status}; these are the last lines of its log, "
            f"{args.log}\nThe step alone: {shlex.join(args.command)}\n{go_on()}",
            file=sys.stderr,
        )
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", required=True, help="name of the step, for the messages")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--append", action="store_true", help="keep what the log holds")
    parser.add_argument("--stdout", type=Path, help="standard output apart from the log")
    parser.add_argument("--updates", type=int, help="updates of a training")
    parser.add_argument("--sentences", type=int, help="sentences of a translation")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = parser.parse_args()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    sys.exit(run(args))


if __name__ == "__main__":
    main()
