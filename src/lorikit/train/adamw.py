"""AdamW over an adapter's parameters, with the division by the labels of a step and gradient clipping in front of it.

    g = (sum of gradients) / labels, clipped by norm; then AdamW with decoupled weight decay

as torch's clip_grad_norm_ and torch.optim.AdamW. Where the adapter is one flat buffer it is two kernels of our own, else
torch's fused AdamW. Both keep the same state under the same names, so a checkpoint of one goes on in the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lorikit.config import TrainConfig
from lorikit.model.engine import Engine
from lorikit.model.host import host_copies
from lorikit.model.kernels.adamw import adamw_step
from lorikit.model.kernels.launch import compiling_ahead

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW(Protocol):
    """The optimizer of one engine."""

    def step(self, learning_rate: float, num_targets: int) -> Tensor:
        """Apply the parameters' `.grad`, a sum over `num_targets` labels; returns its norm () float32 after the division
        and before clipping. A norm that is not finite leaves parameters and state as they were, then and ever after."""
        ...

    def runs_behind(self) -> bool:
        """Whether `step` returns before the device has done it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copies of exp_avg.NAME, exp_avg_sq.NAME and step.NAME of each parameter on the CPU; none before the first step."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, which names these parameters and no others."""
        ...


def make_optimizer(engine: Engine, config: TrainConfig) -> AdamW:
    """The optimizer for an engine's adapter."""
    flat = engine.flat()
    return TorchAdamW(engine, config) if flat is None else FlatAdamW(engine, *flat, config)


class FlatAdamW:
    """Parameters and gradient are one float32 buffer (n,) each, of which `engine.parameters()` are views."""

    def __init__(self, engine: Engine, flat: Tensor, grad: Tensor, config: TrainConfig) -> None:
        self._engine, self._flat, self._grad, self._config = engine, flat, grad, config
        self._moments = {name: torch.zeros_like(flat) for name in MOMENTS[:2]}
        self._stopped = torch.zeros((), dtype=torch.int32, device=flat.device)
        self._done = 0
        if flat.is_cuda:  # its kernels are compiled while the first gradient is computed
            with compiling_ahead():
                self.step(0.0, 1)
            self._done = 0

    @torch.no_grad()
    def step(self, learning_rate: float, num_targets: int) -> Tensor:
        """Two kernels on a GPU; see `AdamW.step`."""
        c = self._config
        self._done += 1
        return adamw_step(
            self._flat,
            self._grad,
            self._moments["exp_avg"],
            self._moments["exp_avg_sq"],
            self._done,
            learning_rate,
            (c.adam_beta1, c.adam_beta2),
            c.adam_epsilon,
            c.weight_decay,
            c.max_grad_norm,
            num_targets,
            self._stopped,
        )

    def runs_behind(self) -> bool:
        """On a GPU."""
        return self._flat.is_cuda

    def state(self) -> dict[str, Tensor]:
        """See `AdamW.state`."""
        if not self._done:
            return {}
        names, parameters = self._engine.parameter_names(), self._engine.parameters()
        state = {f"step.{name}": torch.tensor(float(self._done)) for name in names}
        for moment, buffer in self._moments.items():
            copies = host_copies(buffer, parameters)
            state |= {f"{moment}.{name}": copy for name, copy in zip(names, copies, strict=True)}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `AdamW.load_state`."""
        for name, p in zip(self._engine.parameter_names(), self._engine.parameters(), strict=True):
            for moment, buffer in self._moments.items():
                if f"{moment}.{name}" in state:
                    self._part(buffer, p).copy_(state[f"{moment}.{name}"])
        self._done = max((int(value) for name, value in state.items() if name.startswith("step.")), default=0)

    @staticmethod
    def _part(buffer: Tensor, parameter: Tensor) -> Tensor:
        """What belongs to a parameter in a buffer that is laid out as the parameters are."""
        return buffer[parameter.storage_offset() :][: parameter.numel()].view(parameter.shape)


class TorchAdamW:
    """torch.optim.AdamW in its fused form, for parameters that lie anywhere."""

    def __init__(self, engine: Engine, config: TrainConfig) -> None:
        self._engine, self._max_norm = engine, config.max_grad_norm
        self._adamw = torch.optim.AdamW(
            engine.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=engine.device.type in ("cpu", "cuda"),
        )

    def step(self, learning_rate: float, num_targets: int) -> Tensor:
        """Waits for the norm; see `AdamW.step`."""
        parameters = self._engine.parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(grads, num_targets)
        norm = torch.nn.utils.get_total_norm(grads)
        if not norm.isfinite():
            return norm
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        return norm

    def runs_behind(self) -> bool:
        """No: it waits for the norm."""
        return False

    def state(self) -> dict[str, Tensor]:
        """See `AdamW.state`."""
        return {
            f"{moment}.{name}": self._adamw.state[p][moment].to("cpu", copy=True).contiguous()
            for name, p in zip(self._engine.parameter_names(), self._engine.parameters(), strict=True)
            for moment in MOMENTS
            if p in self._adamw.state
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `AdamW.load_state`."""
        moments = {
            # cloned: tensors of a file are not aligned as fresh ones are, and kernels may round by alignment
            index: {moment: state[f"{moment}.{name}"].clone() for moment in MOMENTS}
            for index, name in enumerate(self._engine.parameter_names())
            if f"step.{name}" in state
        }
        self._adamw.load_state_dict({"state": moments, "param_groups": self._adamw.state_dict()["param_groups"]})
