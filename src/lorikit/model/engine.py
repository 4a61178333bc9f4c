"""What training and inference need of a model, and nothing more: the interface that every engine has.

`decoder` (our own, Llama-family models) and `generic` (transformers + peft, any causal language model) implement it; code
outside `model/` uses only these names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorikit.data.values import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are the tutorial's; temperature 0 is greedy.

    `min_p` leaves out tokens less likely than that share of the likeliest one's probability. `seed` makes a sampled answer
    repeatable on the same machine, whatever is answered beside it; None draws a new one each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.5
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.1
    seed: int | None = None
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one prompt. `finish` is None until the last: "stop" (a stop token, not part of the answer),
    "length" (max_new_tokens or the model's longest sequence reached).

    `logprob` and `top`, pairs of id and logprob from the likeliest down, where the request asks for them: natural logarithms
    of the model's own probabilities, before any setting of the sampling.
    """

    prompt: int
    id: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered. `adapter` names a loaded one, None is the base; `top_logprobs` None: no logprobs, 0: the
    chosen token's alone, n: and those of the n likeliest."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    adapter: str | None = None
    top_logprobs: int | None = None


ADAPTER = "default"  # the name of the adapter that an engine was loaded with


class Decoding(Protocol):
    """Requests that join and leave between steps. Driven by one thread; an adapter may be added by another meanwhile."""

    num_slots: int

    @property
    def num_active(self) -> int:
        """Requests that have a slot."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one."""
        ...

    def add(self, request: Request) -> int:
        """Its number; it waits in line while no slot is free. ModelError for an adapter that is not loaded, DataError for
        a prompt that is empty or leaves no room for an answer."""
        ...

    def cancel(self, number: int) -> None:
        """Free its slot at once; nothing where the request has ended already."""
        ...

    def step(self) -> list[Token]:
        """At most one token for each active request, whose number is `Token.prompt`; [] only when there is none left."""
        ...

    def close(self) -> None:
        """Give the memory back; nothing can be added afterwards."""
        ...


# Beyond these a larger forward is no faster, it only takes memory. On 2 cores SmolLM2-135M trains 128 tokens a CPU second
# at 256 tokens in 1.8 GiB, 132 at 512 in 2.3 GiB and 89 at 2048 in 4.3 GiB.
BEST_TOKENS, BEST_TOKENS_CPU = 16384, 256


class Engine(Protocol):
    """A base model with one adapter (or none) on one device."""

    name: str
    device: torch.device
    choice: str
    """Why this engine was taken and not the other, for the person who trains; empty where there is nothing to say."""

    sharded: bool
    """Whether the base is shared by the processes of the run, which must then run equally many forwards."""

    def loss_sum(self, batch: Batch) -> Tensor:
        """() float32: cross entropy summed over the targets that are not IGNORE, with a graph to the adapter."""
        ...

    def best_tokens(self) -> int:
        """Tokens of a forward beyond which a larger one is no faster."""
        ...

    def clear_gradient(self) -> None:
        """Begin an optimizer step: the parameters' `.grad` is None or zero."""
        ...

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """What `add_gradient` does on the host is done now, while the device may be busy; calling the result does the
        rest."""
        ...

    def add_gradient(self, batch: Batch) -> Tensor:
        """() float32: `loss_sum` without a graph, its gradient added to the parameters' `.grad`."""
        ...

    def token_losses(self, batch: Batch) -> Tensor:
        """(num_targets,) float32: cross entropy of each target in order, without a graph."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, float32, in the order of `parameter_names`."""
        ...

    def parameter_names(self) -> list[str]:
        """PEFT's names, as the keys of adapter_model.safetensors."""
        ...

    def flat(self) -> tuple[Tensor, Tensor] | None:
        """(n,) float32 twice: the parameters and their `.grad` as one buffer each, of which `parameters()` and, after
        `clear_gradient`, their `.grad` are views; None where they lie apart."""
        ...

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter under PEFT's names, on the CPU."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """The values of PEFT's adapter_config.json; the base's name is the caller's to fill in."""
        ...

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Put these values into the adapter; ModelError lists every name and shape that does not fit."""
        ...

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside it the engine computes with the base alone."""
        ...

    def adapter_names(self) -> list[str]:
        """Names of the loaded adapters, "default" first where the engine was loaded with one."""
        ...

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the PEFT adapter in `folder` beside the others, or in place of the one with this name; ModelError lists what
        does not fit."""
        ...

    def decoding(self, num_slots: int, max_length: int) -> Decoding:
        """A place for `num_slots` requests at a time, each of at most `max_length` tokens with its answer; OutOfMemoryError
        says how many would fit."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Generator[Token]:
        """Tokens as they come, each naming its prompt; ends when every prompt has a Token with `finish` set."""
        ...
