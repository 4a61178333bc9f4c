"""A frozen base that no process holds whole: FSDP2 shards it over all processes of the run, a layer is gathered to be used.

    model.device_map: shard           each GPU holds 1 / N of every weight
    model.device_map: shard-offload   the host holds that share, the GPU only the layers in use

Every weight is cut along its first dimension, and a process reads its rows of each tensor from the safetensors; the model
itself is made without memory (meta device). A layer is one group of torch's fully_shard, embeddings, last norm and head are
another: gathered before the forward, dropped after it, gathered again for the backward. The adapter is added afterwards and
stays whole on each process; its gradient is summed by train/distributed.py. All processes must run equally many forwards.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorikit.config import ModelConfig
from lorikit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

MAPS = ("shard", "shard-offload")
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_M_MMAP_THRESHOLD = -3  # malloc.h


def is_sharded(config: ModelConfig) -> bool:
    """Whether these settings ask for a sharded base."""
    return config.device_map in MAPS


def load(config: ModelConfig, folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base, frozen, each weight a DTensor of which this process holds its rows; the same call on every process.

    Raises ConfigError without a process group or with a quantised base, ModelError for a checkpoint whose tensors do not bear
    the model's own names (as some mixtures of experts do not).
    """
    from accelerate import init_empty_weights
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    if not dist.is_initialized():
        raise ConfigError(
            f"model.device_map {config.device_map} shares the base among processes: lorikit train --gpus N, or torchrun "
            "(docs/distributed.md)"
        )
    if config.quantization != "none":
        raise ConfigError(f"model.device_map {config.device_map} and model.quantization are both set: keep one")
    if device.type == "cpu":
        _return_memory()
    trust = config.trust_remote_code
    values = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # what is computed from settings, such as RoPE's angles, is made
        model: Any = AutoModelForCausalLM.from_config(
            values, dtype=dtype, attn_implementation=config.attn_implementation, trust_remote_code=trust
        )
    model.tie_weights()
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    offload = config.device_map == "shard-offload"
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    _fill(model, folder, name, mesh, torch.device("cpu") if offload else device)
    return model.eval()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the longest list of modules of one class in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    same = [found for found in lists if len({type(layer) for layer in found}) == 1]
    return list(max(same, key=len, default=[]))


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """First row and end of a rank's share of `count` rows, as torch.chunk cuts them."""
    chunk = -(-count // size)
    return min(rank * chunk, count), min((rank + 1) * chunk, count)


def move_adapter(model: nn.Module, device: torch.device) -> None:
    """Put what is trained where it is computed: peft leaves it where the base is, which may be in host memory."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


def _fill(model: Any, folder: Path, name: str, mesh: DeviceMesh, device: torch.device) -> None:
    from torch.distributed.tensor import DTensor, Shard

    empty: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.state_dict().keys() - empty.keys()
    rank, size = mesh.get_local_rank(), mesh.size()
    filled: dict[int, nn.Parameter] = {}  # by the parameter it replaces: tied weights are one
    stored = _stored(folder)
    for key, old in empty.items():
        if id(old) not in filled and key in stored:
            found = stored[key]
            if found.shape != tuple(old.shape):
                raise ModelError(f"{name}: {key} is {found.shape} in its file, not {tuple(old.shape)}")
            local = found.read(*rows_of(old.shape[0], rank, size)).to(device=device, dtype=old.dtype)
            whole = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=old.shape, stride=old.stride())
            filled[id(old)] = nn.Parameter(whole, requires_grad=False)
    state: dict[str, Any] = {key: filled[id(old)] for key, old in empty.items() if id(old) in filled}
    state |= {key: stored[key].read(0, stored[key].shape[0]) for key in buffers if key in stored and stored[key].shape}
    missing = sorted(empty.keys() - state.keys())
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise ModelError(
            f"{name}: its files hold no {', '.join(missing[:3])}{more} under the model's own names, so it cannot be loaded in "
            "shards; set model.device_map: auto"
        )
    model.load_state_dict(state, assign=True, strict=False)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a safetensors file, whose rows can be read without the others. No mmap: its pages would count as memory."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end`, copied."""
        width = math.prod(self.shape[1:])
        if first == end or not width:
            return torch.empty(end - first, *self.shape[1:], dtype=self.dtype)
        data = bytearray((end - first) * width * self.dtype.itemsize)
        with self.path.open("rb") as file:
            file.seek(self.start + first * width * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ModelError(f"{self.path}: cut off; download the model again")
        return torch.frombuffer(data, dtype=self.dtype).view(end - first, *self.shape[1:])


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every tensor in the safetensors of a folder. Format: 8 bytes with the header's length, the header in JSON, the data."""
    found: dict[str, _Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin = 8 + length + int(entry["data_offsets"][0])
                found[name] = _Stored(path, begin, tuple(entry["shape"]), _TYPES[entry["dtype"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: damaged, or of a type that cannot be sharded ({error!r})") from None
    return found


def _return_memory() -> None:
    """Have glibc give the layers of a CPU back to the system when they are dropped, as a GPU's allocator reuses them: by itself
    it learns from the first one to keep blocks of that size, in pieces."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the base that this process holds between forwards."""
    return sum(t.numel() * t.element_size() for t in _locals(model))


def _locals(model: nn.Module) -> Iterator[Tensor]:
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter.to_local() if isinstance(parameter, DTensor) else parameter
