"""Measures calls beside each other: seconds, bytes, and a table of both that is also written as JSON lines."""
import json
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Callable

import torch

from counting import Counting

COLUMNS = "{:<30} {:<32} {:>9} {:>9} {:<20} {:>6} {:>15} {:>16} {:>10} {:>10} {:>6}  {}"
TITLES = ("what", "sizes", "ours", "peer", "", "ratio", "lowest–highest", "target", "MiB", "peer's MiB", "limit", "")


def seconds_of(call: Callable[[], object]) -> float:
    """CUDA computes behind Python's back: what is not finished is waited for, before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def in_turn(calls: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each call. After one that warms up they run in turn, so that the n-th of each see the same machine."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    return seconds


def peak(call: Callable[[], object]) -> int:
    """Bytes of all tensors that a call makes, at their most."""
    if not torch.cuda.is_initialized():
        with Counting() as count:
            call()
        return count.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    found = {"cpu": (models or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    for package in ("torch", "transformers", "trl"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"date": time.strftime("%Y-%m-%d")}


class Ruler:
    """One table. `file` is made anew: its first line says on which machine, each other one is a row."""

    def __init__(self, file: str | Path):
        self.file, on = Path(file), machine()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(on) + "\n")
        print(", ".join(f"{name} {value}" for name, value in on.items()))
        print(COLUMNS.format(*TITLES).rstrip(), flush=True)

    def row(self, what: str, sizes: str, seconds: dict[str, list[float]], ours: str = "ours", peer: str | None = None,
            target: float | None = None, bytes: dict[str, int] | None = None, roofline: float | None = None,
            note: str = "") -> dict:
        """Adds a row. The ratio is peer / ours, pair by pair, of seconds, or of bytes where no seconds are given; the
        target is the least that its median should be. roofline: the share of what the hardware allows, 0 to 1."""
        bytes, found, verdict = bytes or {}, {}, ""
        values = seconds or {name: [n] for name, n in bytes.items()}
        if peer:
            ratios = [theirs / own for own, theirs in zip(values[ours], values[peer], strict=True)]
            found = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        if target is not None:
            verdict = "reached" if found["median"] >= target else "missed"
        row = {"what": what, "sizes": sizes, "ours": ours, "peer": peer, "ratio": found, "target": target,
               "verdict": verdict, "median": {name: median(x) for name, x in seconds.items()}, "seconds": seconds,
               "bytes": bytes, "roofline": roofline, "note": note}
        with self.file.open("a") as file:
            print(json.dumps(row), file=file)
        times, sizes_in = ([kind(row[key].get(name)) for name in (ours, peer)]
                           for kind, key in ((shown, "median"), (mebibytes, "bytes")))
        cells = [what, sizes, *times, peer or ""]
        cells += [f"{found['median']:.2f}", f"{found['lowest']:.2f}–{found['highest']:.2f}"] if found else ["", ""]
        cells += [f"≥ {target:g} {verdict}" if verdict else "", *sizes_in, f"{roofline:.0%}" if roofline else "", note]
        print(COLUMNS.format(*cells).rstrip(), flush=True)
        return row


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2 ** 20:,.1f}"
