"""Generation checked and then timed: one stream and many, greedy and sampled, with an adapter on all seven linears.

    python benchmarks/make_model.py /tmp/llama && python benchmarks/generate.py --model /tmp/llama --out generate.jsonl
    python benchmarks/generate.py --model smollm2-135m-instruct --streams 1 4 --new 64 --peer --merged    side by side

Before anything is timed: logits of single steps within a few roundings of the float32 computation of transformers + peft
(where it fits the memory: --no-float32 leaves it out), and greedy answers of many streams with CUDA graphs equal to those
without graphs and to those of each alone, but for ties that rounding decides. Prints a table and JSON lines. --peer times
transformers + peft's generate in the same run, --merged the adapter folded into the base beside the unmerged one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikit.config import LoraSettings, ModelConfig
from lorikit.hub import Resolved, resolve_model
from lorikit.model import lora
from lorikit.model.decoder import DecoderEngine
from lorikit.model.decoder_generate import DecoderDecoding
from lorikit.model.engine import ADAPTER, Request, Sampling
from lorikit.model.load import load_engine

PROMPT = 128  # tokens of each prompt
WAYS = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
    "sampled": {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},  # the defaults of `lorikit chat`
}


def main() -> None:
    arguments = parse()
    base = resolve(arguments.model)
    folder = Path(tempfile.mkdtemp())
    write_adapter(folder, base, arguments)
    engine = load(base, folder, arguments)
    prompts = make_prompts(engine.shape.vocabulary, max(arguments.streams))
    if not arguments.no_check:
        check(engine, base, folder, prompts, arguments)
    model = peer(base, folder, engine.device, engine.weights.embed.dtype) if arguments.peer else None
    merged = load(base, folder, arguments, merge=True) if arguments.merged else None
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for _, streams, way in product(range(arguments.rounds), arguments.streams, WAYS):
        found = [measure(engine, prompts[:streams], streams, way, arguments)]
        if merged is not None:
            found.append(measure(merged, prompts[:streams], streams, way, arguments))
        if model is not None:  # in turns: what else the machine does meets both
            found.append(measure_peer(model, prompts[0], streams, way, engine.device, arguments))
        for row in found:
            key = row["who"], streams, way
            if key not in best or row["ms_per_step"] < best[key]["ms_per_step"]:
                best[key] = row
    rows = list(best.values())
    for row in rows:
        row |= {"model": base.name, "device": device_name(engine.device), "dtype": str(engine.weights.embed.dtype)}
        row |= {"threads": torch.get_num_threads(), "commit": arguments.commit, "command": shlex.join(sys.argv)}
        row |= {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}}
        print(json.dumps(row))
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"\n{base.name} on {device_name(engine.device)}, prompts of {PROMPT} tokens, {arguments.new} new ones")
    print(f"{'':28}{'streams':>8}{'choice':>9}{'tokens/s':>10}{'ms/step':>9}{'CPU ms':>8}{'first ms':>10}")
    for row in rows:
        print(
            f"{row['who']:28}{row['streams']:>8}{row['choice']:>9}{row['tokens_per_second']:>10,.0f}"
            f"{row['ms_per_step']:>9.2f}{row['processor_ms_per_step']:>8.1f}{row['first_ms']:>10.0f}"
        )
    if arguments.profile:
        profile(engine, prompts, arguments)


def resolve(name: str) -> Resolved:
    """A folder, or the id of a model."""
    return Resolved(Path(name), Path(name).name, "path", None) if Path(name).is_dir() else resolve_model(name)


def load(
    base: Resolved, folder: Path, arguments: argparse.Namespace, graphs: bool = True, merge: bool = False
) -> DecoderEngine:
    """The decoder with the adapter, beside the base or folded into it."""
    settings = ModelConfig(name_or_path=base.name, dtype=arguments.dtype, engine="decoder", device=arguments.device)
    engine = load_engine(settings, base, adapter=folder, merge=merge)
    assert isinstance(engine, DecoderEngine)
    engine.decode_graphs, engine.decode_kernels = graphs, True
    return engine


def write_adapter(folder: Path, base: Resolved, arguments: argparse.Namespace) -> None:
    """A PEFT adapter of random values, as large beside the base as trained ones are, B included."""
    values = json.loads((base.path / "config.json").read_text())
    from lorikit.model.decoder_adapter import Adapter
    from lorikit.model.decoder_config import decoder_shape

    shape = decoder_shape(values)
    settings = LoraSettings(r=arguments.rank, lora_alpha=4 * arguments.rank)
    names = shape.linear_names()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.r, "lora_alpha": settings.lora_alpha, "bias": "none",
        "lora_dropout": 0.0, "target_modules": sorted({n.rpartition(".")[2] for n in names}), "use_rslora": False,
        "base_model_name_or_path": str(base.path), "inference_mode": True,
    }  # fmt: skip
    adapter = Adapter(shape, names, config, device=torch.device("cpu"), dtype=torch.float32, trainable=False)
    adapter.initialise(0)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in adapter.named().items():
        state[name] = value.detach().clone()
        if "lora_B" in name:
            state[name].normal_(0, 0.01, generator=generator)
    from safetensors.torch import save_file

    save_file(state, folder / lora.WEIGHTS, metadata={"format": "pt"})
    (folder / lora.CONFIG).write_text(json.dumps(config))


def make_prompts(vocabulary: int, count: int) -> list[list[int]]:
    """Random words, the same in every run; none shorter than half of the longest."""
    rng = random.Random(0)
    lengths = [PROMPT, *(rng.randint(PROMPT // 2, PROMPT) for _ in range(count - 1))]
    return [[rng.randrange(100, min(vocabulary, 40000)) for _ in range(length)] for length in lengths]


def answers(
    engine: DecoderEngine, prompts: list[list[int]], slots: int, sampling: Sampling, top: int | None = None
) -> list[list[Any]]:
    """The tokens of each prompt, `slots` prompts at a time."""
    decoding = engine.decoding(slots, PROMPT + sampling.max_new_tokens)
    numbers = [decoding.add(Request(p, sampling, frozenset(), ADAPTER, top)) for p in prompts]
    found: dict[int, list[Any]] = {n: [] for n in numbers}
    while tokens := decoding.step():
        for token in tokens:
            found[token.prompt].append(token)
    decoding.close()
    return [found[n] for n in numbers]


def check(
    engine: DecoderEngine, base: Resolved, folder: Path, prompts: list[list[int]], arguments: argparse.Namespace
) -> None:
    """Fails where a figure would be worthless."""
    greedy = Sampling(max_new_tokens=32, **WAYS["greedy"])
    some = prompts[: max(2, min(8, len(prompts)))]
    graphed = answers(engine, some, len(some), greedy, 2)
    tolerance = 1e-3 if engine.weights.embed.dtype == torch.float32 else 0.15
    if not arguments.no_float32:
        tolerance = max(tolerance, 10 * check_logits(engine, base, folder, some, graphed))
    others = {"alone": [answers(engine, [prompt], 1, greedy, 2)[0] for prompt in some]}
    if engine.device.type == "cuda":
        others["once more"] = answers(engine, some, len(some), greedy, 2)
        engine.decode_graphs = False
        others["without graphs"] = answers(engine, some, len(some), greedy, 2)
        engine.decode_graphs = True
    for how, other in others.items():
        equal = sum(agreeing(a, b, tolerance) for a, b in zip(graphed, other, strict=True))
        print(f"{how}: {equal} of {sum(map(len, graphed))} greedy tokens equal up to the first tie of each answer")


def agreeing(a: list[Any], b: list[Any], tolerance: float) -> int:
    """How many tokens are equal before the first that differs, which must have been a tie in the logprobs of either."""
    for k, (left, right) in enumerate(zip(a, b, strict=True)):
        if left.id != right.id:
            gap = min(t.top[0][1] - t.top[1][1] for t in (left, right))
            assert gap < tolerance, f"token {k}: {left.id} and {right.id} differ, and the likeliest two by {gap:.3f}"
            return k
    return len(a)


@torch.no_grad()
def check_logits(
    engine: DecoderEngine, base: Resolved, folder: Path, prompts: list[list[int]], found: list[list[Any]]
) -> float:
    """Logprobs of the chosen tokens against transformers + peft in float32, which reads prompt and answer at once; the same
    computation in the engine's own type says how far rounding alone takes them, which is returned (root mean square)."""
    errors = {}
    for dtype in {torch.float32, engine.weights.embed.dtype}:
        model = peer(base, folder, engine.device, dtype)
        got = []
        for prompt, tokens in zip(prompts, found, strict=True):
            row = torch.tensor([[*prompt, *(t.id for t in tokens)]], device=engine.device)
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
            got.append(logits.gather(1, row[0, len(prompt) :, None])[:, 0].cpu())
        errors[dtype] = torch.cat(got)
        del model
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
    want = errors[torch.float32]
    ours = torch.tensor([t.logprob for tokens in found for t in tokens])
    own = rms(ours - want)
    theirs = rms(errors[engine.weights.embed.dtype] - want)
    bound = max(2 * theirs, 1e-4)
    print(f"logprobs: {own:.2e} from float32 (root mean square), transformers in the same type {theirs:.2e}")
    assert own <= bound, f"logprobs are {own:.3e} from float32; {bound:.3e} would be rounding"
    return theirs


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


def measure(
    engine: DecoderEngine, prompts: list[list[int]], streams: int, way: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The second of two runs of the same requests, which finds kernels compiled and graphs captured."""
    sampling = Sampling(max_new_tokens=arguments.new, seed=0, **WAYS[way])
    decoding = engine.decoding(streams, PROMPT + arguments.new)
    for _ in range(2):
        first, steps, seconds, processor, count = run_once(
            decoding, prompts, sampling, None if engine.adapter is None else ADAPTER
        )
    peak = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else 0
    decoding.close()
    return {
        "who": f"Lorikit, {'adapter merged' if engine.adapter is None else f'engine {engine.name}'}",
        "streams": streams,
        "choice": way,
        "new_tokens": arguments.new,
        "tokens_per_second": round(count / seconds, 1),
        "ms_per_step": round(seconds / steps * 1000, 3),
        "processor_ms_per_step": round(processor / steps * 1000, 3),
        "first_ms": round(first * 1000, 1),
        "peak_gib": round(peak / 2**30, 2),
    }


def run_once(
    decoding: DecoderDecoding, prompts: list[list[int]], sampling: Sampling, adapter: str | None
) -> tuple[float, int, float, float, int]:
    """Seconds to the first token, decoding steps after it, their seconds, processor seconds and tokens."""
    for prompt in prompts:
        decoding.add(Request(prompt, sampling, frozenset(), adapter))
    begun = time.perf_counter()
    seen: set[int] = set()
    while len(seen) < len(prompts):
        seen |= {token.prompt for token in decoding.step()}
    started, processor = time.perf_counter(), time.process_time()
    count = steps = 0
    while tokens := decoding.step():
        count, steps = count + len(tokens), steps + 1
    return started - begun, steps, time.perf_counter() - started, time.process_time() - processor, count


def peer(base: Resolved, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers + peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).to(device)
    return PeftModel.from_pretrained(model, str(folder)).eval()


@torch.no_grad()
def measure_peer(
    model: Any, prompt: list[int], streams: int, way: str, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    """transformers' generate on copies of one prompt; the time of a one-token answer is taken off."""
    batch, values = torch.tensor([prompt] * streams, device=device), WAYS[way]
    draws = values["temperature"] > 0
    chosen: dict[str, Any] = {"do_sample": draws, "repetition_penalty": values["repetition_penalty"]}
    chosen |= {"temperature": values["temperature"], "top_p": values["top_p"], "top_k": 0} if draws else {}

    def run(new: int) -> tuple[float, float]:
        return seconds_of(
            lambda: model.generate(
                input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, min_new_tokens=new,
                pad_token_id=0, **chosen,
            ),
            device,
        )  # fmt: skip

    run(4)
    (first, first_processor), (whole, whole_processor) = run(1), run(arguments.new)
    steps = arguments.new - 1
    return {
        "who": "transformers + peft",
        "streams": streams,
        "choice": way,
        "new_tokens": arguments.new,
        "tokens_per_second": round(streams * steps / (whole - first), 1),
        "ms_per_step": round((whole - first) / steps * 1000, 3),
        "processor_ms_per_step": round((whole_processor - first_processor) / steps * 1000, 3),
        "first_ms": round(first * 1000, 1),
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of one call, the device's work included, and of this process' processor time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun, processor = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, time.process_time() - processor


def profile(engine: DecoderEngine, prompts: list[list[int]], arguments: argparse.Namespace) -> None:
    """What 8 steps of the fewest and of the most streams spend their time on."""
    for streams in sorted({min(arguments.streams), max(arguments.streams)}):
        decoding = engine.decoding(streams, PROMPT + 64)
        sampling = Sampling(max_new_tokens=64, seed=0, **WAYS["greedy"])
        for prompt in prompts[:streams]:
            decoding.add(Request(prompt, sampling, frozenset(), ADAPTER))
        for _ in range(8):
            decoding.step()
        with torch.profiler.profile() as found:
            for _ in range(8):
                decoding.step()
        by = "self_cuda_time_total" if engine.device.type == "cuda" else "self_cpu_time_total"
        print(f"{streams} streams, 8 steps")
        print(found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60))
        decoding.close()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or an id")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", action="store_true", help="also time transformers + peft")
    parser.add_argument("--merged", action="store_true", help="also time the adapter folded into the base")
    parser.add_argument("--rounds", type=int, default=1, help="of all measurements; the best of each counts")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument(
        "--no-float32", action="store_true", help="leave out the comparison that needs the model in float32"
    )
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--commit", help="of the code, for the lines")
    parser.add_argument("--profile", action="store_true", help="also print what a step spends its time on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
