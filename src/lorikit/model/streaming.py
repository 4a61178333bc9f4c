"""Tokens out of transformers' generate as they come, for several prompts at a time.

generate runs in a thread of its own and hands each step's tokens over through a queue; closing the iterator stops it
at the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lorikit.model.engine import Sampling, Token

# Prompts generated side by side. More would gain little on a CPU and cost KV cache on a GPU.
BATCH = 16


def stream_tokens(
    model: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Generator[Token]:
    """Tokens of all prompts, `BATCH` prompts at a time, prompts of like length together so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        yield from _stream_batch(model, device, chosen, [prompts[i] for i in chosen], sampling, stop_ids)


def _stream_batch(
    model: Any,
    device: torch.device,
    names: list[int],
    prompts: list[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Iterator[Token]:
    """One call of generate. `names` are the positions of these prompts in the caller's list."""
    steps: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
    stop = threading.Event()
    worker = threading.Thread(
        target=_run, args=(model, device, prompts, sampling, stop_ids, steps, stop), name="generate", daemon=True
    )
    worker.start()
    unfinished = set(range(len(prompts)))
    held: list[int] | None = None  # a step is passed on when it is known whether another follows
    try:
        while unfinished:
            step = steps.get()
            if isinstance(step, BaseException):
                raise step
            if held is not None:
                for k in sorted(unfinished):
                    finish = "stop" if held[k] in stop_ids else "length" if step is None else None
                    yield Token(names[k], held[k], finish)
                    if finish:
                        unfinished.discard(k)
            if step is None:
                break
            held = step
    finally:
        stop.set()
        worker.join()


class _Stream:
    """transformers' streamer protocol: `put` gets the prompts first and then the tokens (batch,) of each step."""

    def __init__(self, steps: SimpleQueue[list[int] | BaseException | None]) -> None:
        self.steps = steps
        self.seen_prompts = False

    def put(self, value: Tensor) -> None:
        if self.seen_prompts:
            self.steps.put(value.reshape(-1).tolist())
        self.seen_prompts = True

    def end(self) -> None:
        pass


def _run(
    model: Any,
    device: torch.device,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    steps: SimpleQueue[list[int] | BaseException | None],
    stop: threading.Event,
) -> None:
    from transformers import GenerationConfig

    width = max(len(p) for p in prompts)
    pad = min(stop_ids, default=0)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    greedy = sampling.temperature == 0
    choice: dict[str, float] = {}
    if not greedy:
        choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        choice |= {"min_p": sampling.min_p} if sampling.min_p else {}
    settings = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
        **choice,
    )
    devices = [device] if device.type == "cuda" else []
    # A sampled answer must not move the random state of the caller.
    isolated = torch.random.fork_rng(devices=devices) if sampling.seed is not None else nullcontext()
    try:
        with _without_gradient(model), torch.cuda.device(device) if devices else nullcontext(), isolated:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                streamer=_Stream(steps),
                stopping_criteria=[
                    lambda ids_, scores, **_: torch.full((len(ids_),), stop.is_set(), device=ids_.device)
                ],
            )
        steps.put(None)
    except BaseException as error:
        steps.put(error)


def _without_gradient(model: Any) -> AbstractContextManager[Any]:
    """inference_mode, but for a sharded base: training goes on with the buffers that its layers are gathered into."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            return torch.no_grad()
    return torch.inference_mode()
