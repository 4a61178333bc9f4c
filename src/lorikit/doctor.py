"""What this machine can train and the one thing it lacks; whether a run or adapter folder is whole."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorikit import __version__
from lorikit.bundled import BUNDLED, bundled_folder, cache_dir
from lorikit.errors import LorikitError, ModelError
from lorikit.hub import find_model
from lorikit.hub_clients import HubName, endpoint, unreachable

_HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")
_CPU = "the CPU alone"
_EXTRAS_OF_DEVELOPERS = ("test", "check")
_ITSELF = "Lorikit is on the path but not installed, so its requirements are unknown: pip install ."
_BIGGEST = (("70B", 70.6), ("32B", 32.8), ("14B", 14.8), ("8B", 8.03), ("3B", 3.2), ("1.5B", 1.54), ("0.5B", 0.49))


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found. `missing` is the one thing to do first, with its command; None if there is nothing."""

    machine: dict[str, Any]
    verdict: str
    missing: str | None
    run: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)  # of the run or adapter folder

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return asdict(self)


def doctor(run: Path | None = None) -> Report:
    """Look at this machine, and at a run, checkpoint or adapter folder if one is given; nothing is downloaded.

    Raises ModelError when `run` is no folder of that kind; what is wrong inside it is in the report.
    """
    looked_at = _look_at(run) if run is not None else None
    machine: dict[str, Any] = {
        "lorikit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory() / 2**30, 1),
        "torch": _torch(),
        "gpus": _gpus(),
        "cache": str(cache_dir()),
        "free_disk_gib": round(_free_disk(cache_dir()) / 2**30, 1),
        "hubs": _hubs(),
        "bundled": _bundled(),
    }
    machine["packages"], machine["unmet"], machine["extras"] = _packages()
    problems = looked_at.pop("problems") if looked_at else []
    return Report(machine, _verdict(machine), next(_lacks(machine), None), looked_at, problems)


def render(report: Report) -> None:
    """The report for people, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for rows in (_machine_rows(report.machine), _run_rows(report) if report.run else []):
        table = Table.grid(padding=(0, 2))
        for label, value, good in rows:
            mark = Text("") if good is None else Text("ok", "green") if good else Text("no", "red")
            table.add_row(Text(label, "bold"), mark, Text(value))
        if rows:
            console.print(table)
            console.print()
    console.print(Text(report.verdict), soft_wrap=True)
    missing = Text(report.missing or "Nothing is missing.", "red" if report.missing else "green")
    console.print(missing, soft_wrap=True)  # a command is not to be broken over lines
    for problem in report.problems:
        console.print(Text(f"{report.run and report.run['path']}: {problem}", "red"))


def lora_gib(billions: float, bytes_per_parameter: int = 2) -> float:
    """GiB that LoRA training of a model takes at batch 4 and 384 tokens, about: weights, 15 % on top, 2 for the rest."""
    return billions * 1e9 * bytes_per_parameter / 2**30 * 1.15 + 2


def _machine_rows(machine: dict[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    yield "lorikit", f"{machine['lorikit']} on Python {machine['python']}, {machine['system']}", None
    torch = machine["torch"]
    yield "torch", torch.get("error") or f"{torch['version']}, built for {torch['build']}", "error" not in torch
    for gpu in machine["gpus"]:
        bf16 = "bfloat16" if gpu["bf16"] else "no bfloat16" if gpu["bf16"] is not None else "not usable by torch"
        text = f"{gpu['name']}, {gpu['memory_gib']:.1f} GiB, {bf16}, driver {gpu['driver']}"
        yield "GPU", text, gpu["bf16"] is not None
    if not machine["gpus"]:
        yield "GPU", "none", None
    yield "host", f"{machine['cores']} cores, {machine['memory_gib']} GiB of memory", None
    yield "disk", f"{machine['free_disk_gib']} GiB free for {machine['cache']}", machine["free_disk_gib"] >= 1
    yield "packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items()), None
    if extras := ",".join(machine["extras"]):
        yield "extras", f"not installed: {extras}; to have them: pip install 'lorikit[{extras}]'", None
    for name, hub in machine["hubs"].items():
        yield name, hub["endpoint"] + (f": {hub['reason']}" if hub["reason"] else ""), hub["reason"] is None
    for name, reason in machine["bundled"].items():
        yield name, reason or "there", reason is None


def _run_rows(report: Report) -> Iterator[tuple[str, str, bool | None]]:
    assert report.run is not None
    run = report.run
    yield run["kind"], run["path"], not report.problems
    if run["adapter"]:
        adapter = run["adapter"]
        yield "adapter", f"r {adapter['r']}, alpha {adapter['lora_alpha']}, {adapter['parameters']:,} parameters", None
        yield "targets", ", ".join(adapter["target_modules"]), None
        at = f" at {adapter['revision']}" if adapter["revision"] else ""
        yield "base", f"{adapter['base']}{at}: {adapter['base_is']}", None
        takes = adapter["vllm"]
        fits = f"takes it as it is, with --enable-lora --max-lora-rank {takes['max_lora_rank']}"
        yield "vLLM", "; ".join(takes["problems"]) or fits, not takes["problems"]
    for name, problems in run["checkpoints"].items():
        yield name, "; ".join(problems) or "whole", not problems


def _torch() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"cannot be imported: {error}"}
    hip = getattr(torch.version, "hip", None)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {hip}" if hip else _CPU
    return {"version": torch.__version__, "build": build}


def _gpus() -> list[dict[str, Any]]:
    """What torch can use; else what the driver lists, with `bf16` None."""
    driver = _nvidia_smi()
    try:
        import torch
    except (ImportError, OSError):
        return driver
    if not torch.cuda.is_available():
        return driver
    found = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        version = driver[0]["driver"] if driver else "unknown"
        gib = round(card.total_memory / 2**30, 1)
        found.append({"name": card.name, "memory_gib": gib, "driver": version, "bf16": bf16})
    return found


def _nvidia_smi() -> list[dict[str, Any]]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # no NVIDIA driver here
    rows = [line.rsplit(", ", 2) for line in listed.splitlines() if line.count(", ") >= 2]
    return [{"name": n, "memory_gib": round(float(m) / 1024, 1), "driver": d, "bf16": None} for n, m, d in rows]


def _memory() -> int:
    """Bytes of host memory, or of this container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def _packages() -> tuple[dict[str, str], list[str], list[str]]:
    """Versions of what Lorikit requires, requirements that are not met, extras that lack something."""
    from packaging.requirements import Requirement

    versions, unmet, extras = {}, [], set()
    try:
        lines = importlib.metadata.requires("lorikit") or []
    except importlib.metadata.PackageNotFoundError:  # its source folder is on the path, nobody installed it
        return {}, [_ITSELF], []
    for line in lines:
        need, extra = Requirement(line), re.search(r"extra == ['\"](\w+)", line)
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        met = version != "missing" and need.specifier.contains(version, prereleases=True)
        if extra is None:
            versions[need.name] = version
            unmet += [] if met else [f"{need.name}{need.specifier}"]
        elif not met and extra[1] not in _EXTRAS_OF_DEVELOPERS:
            extras.add(extra[1])
    return versions, unmet, sorted(extras)


def _hubs() -> dict[str, dict[str, str | None]]:
    with ThreadPoolExecutor(len(_HUBS)) as pool:
        reasons = pool.map(lambda hub: unreachable(hub, 2.0), _HUBS)
        return {hub: {"endpoint": endpoint(hub), "reason": reason} for hub, reason in zip(_HUBS, reasons, strict=True)}


def _bundled() -> dict[str, str | None]:
    """Of each bundled model what it lacks, None if it is there or can be unpacked at once."""
    found: dict[str, str | None] = {}
    for name in BUNDLED:
        try:
            folder, _ = bundled_folder(name)
            ready = folder.is_dir() or importlib.util.find_spec("gguf") is not None
            found[name] = None if ready else "is unpacked with the package gguf: pip install gguf"
        except ModelError as error:
            found[name] = str(error)
    return found


def _verdict(machine: dict[str, Any]) -> str:
    """What can be trained, computed from the memory."""
    usable = [gpu for gpu in machine["gpus"] if gpu["bf16"] is not None]
    tutorial = lora_gib(8.03)
    if not usable:
        fits = _biggest(machine["memory_gib"], 4)
        return (
            f"This machine trains on its CPU with LoRA in float32: by memory up to {fits}, in reasonable time models of "
            f"up to 0.5B. The tutorial's 8B model needs an NVIDIA GPU with about {tutorial:.0f} GiB."
        )
    gpu = max(usable, key=lambda g: g["memory_gib"])
    dtype = "bfloat16" if gpu["bf16"] else "float16"
    fits = _biggest(gpu["memory_gib"], 2)
    enough = gpu["memory_gib"] >= tutorial
    eight = "fits" if enough else f"needs about {tutorial:.0f} GiB"
    more = (
        f" on one of its {len(usable)} GPUs; larger ones are spread over several with model.device_map"
        if len(usable) > 1
        else ""
    )
    return f"This machine trains models of up to {fits} with LoRA in {dtype}{more}. The tutorial's 8B model {eight}."


def _biggest(gib: float, bytes_per_parameter: int) -> str:
    return next((name for name, size in _BIGGEST if lora_gib(size, bytes_per_parameter) <= gib), "0.3B")


def _lacks(machine: dict[str, Any]) -> Iterator[str]:
    """What is in the way, the most basic first, each in a sentence with its command."""
    torch, hubs = machine["torch"], machine["hubs"]
    for need in machine["unmet"]:
        yield _ITSELF if need == _ITSELF else f"Lorikit needs {need}: pip install '{need}'"
    if "error" in torch:
        yield f"torch {torch['error']}: pip install --force-reinstall torch"
    idle = next((gpu for gpu in machine["gpus"] if gpu["bf16"] is None), None)
    if idle and torch.get("build") == _CPU:
        yield (
            f"The {idle['name']} is idle, because torch is built for {_CPU}: "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        )
    elif idle:
        yield (
            f"torch, built for {torch.get('build')}, cannot use the {idle['name']} with driver {idle['driver']}: take a newer "
            "driver, or set CUDA_VISIBLE_DEVICES if that hides it"
        )
    if machine["free_disk_gib"] < 1:
        yield (
            f"Only {machine['free_disk_gib']} GiB are free for {machine['cache']}: free space, or set LORIKIT_CACHE, "
            "HF_HOME and MODELSCOPE_CACHE to another disk"
        )
    if [name for name in hubs if hubs[name]["reason"] is None] == ["modelscope"] and "modelscope" in machine["extras"]:
        yield "Of the hubs only ModelScope can be reached, and its library is missing: pip install 'lorikit[modelscope]'"
    yield from (f"{name}: {reason}" for name, reason in machine["bundled"].items() if reason)


def _look_at(folder: Path) -> dict[str, Any]:
    """A run, checkpoint or adapter folder: its adapter, base and checkpoints, and what is wrong with them."""
    from lorikit.config import load_config
    from lorikit.model import lora
    from lorikit.train import checkpoint
    from lorikit.train.run_folder import ADAPTER_FOLDER, CONFIG

    is_run = (folder / CONFIG).is_file()
    adapter = folder / ADAPTER_FOLDER if is_run else folder
    if not is_run and not (folder / lora.CONFIG).is_file():
        raise ModelError(f"{folder}: neither a run folder ({CONFIG}) nor an adapter folder ({lora.CONFIG})")
    problems: list[str] = []
    hub = "auto"
    kind = "run" if is_run else "checkpoint" if (folder / checkpoint.MANIFEST).is_file() else "adapter"
    steps = checkpoint.checkpoints(folder) if is_run else [folder] if kind == "checkpoint" else []
    found = {step.name: checkpoint.verify(step) for step in steps}
    problems += [f"{name}: {problem}" for name, wrong in found.items() for problem in wrong]
    if is_run:
        try:
            hub = load_config(folder / CONFIG).model.hub
        except LorikitError as error:
            problems.append(str(error))
    described = None
    if adapter.is_dir():
        try:
            described = _describe(adapter, hub, problems)
        except ModelError as error:
            problems.append(str(error))
    elif not any(not wrong for wrong in found.values()):
        problems.append(
            "no adapter and no whole checkpoint: the run did not get that far; lorikit train starts it again"
        )
    return {"path": str(folder), "kind": kind, "adapter": described, "checkpoints": found, "problems": problems}


def _describe(folder: Path, hub: str, problems: list[str]) -> dict[str, Any]:
    """Rank, targets and base of an adapter; its tensors are read. Raises ModelError when that cannot be done."""
    from lorikit.model import lora

    values = lora.read_config(folder)
    tensors = lora.read_weights(folder)
    spoilt = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if spoilt:
        problems.append(f"{len(spoilt)} tensors hold NaN or infinity ({spoilt[0]})")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    targets = values.get("target_modules") or []
    base_is = "not recorded"
    if not base:
        problems.append(f"{lora.CONFIG} does not name the base: write it as base_model_name_or_path")
    else:
        try:
            base_is = (
                "on this machine" if find_model(base, revision, hub) else "not on this machine; downloaded when needed"
            )
        except LorikitError as error:
            problems.append(f"the base: {error}")
            base_is = "not to be had"
    return {
        "r": values.get("r"),
        "lora_alpha": values.get("lora_alpha"),
        "target_modules": [targets] if isinstance(targets, str) else sorted(targets),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "base": base,
        "revision": revision,
        "base_is": base_is,
        "vllm": _vllm(folder, values),
    }


def _vllm(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Whether vLLM takes the adapter as it is, and with which --max-lora-rank."""
    from lorikit.serve import vllm

    problems = vllm.problems(values)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append("no tokenizer beside it: vLLM takes the base's, and its chat template instead of the run's")
    rank = values.get("r")
    return {"max_lora_rank": vllm.max_lora_rank(rank) if isinstance(rank, int) else None, "problems": problems}
