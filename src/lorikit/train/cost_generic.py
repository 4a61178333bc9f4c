"""Memory and time of the generic engine's forward and backward: the model itself, run on the meta device.

transformers builds the model from config.json without weights, peft adds the adapter, and a training forward and backward
run on tensors that have a shape and no memory. Every operation is seen: what it makes and frees counts as on a device,
its FLOPs and bytes give its time. Attention alone is stood in for, by a function that makes and keeps what
FlashAttention does on a GPU and torch's flash attention on a CPU (model/packed_attention.py).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from lorikit.config import LoraSettings, ModelConfig
from lorikit.errors import LorikitError, ModelError
from lorikit.model import lora
from lorikit.model.load import enable_checkpoints
from lorikit.train.cost import Forward, Ledger, Stored, Uncounted, attended_pairs
from lorikit.train.live import LiveBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lorikit_counted"
_BLOCK = 128
_RANDOM = 80  # how much longer a CPU takes to draw a number than to move it


def build(
    config: ModelConfig, base: Path, dtype: torch.dtype, settings: LoraSettings, *, checkpoint: bool, kernels: bool
) -> tuple[PreTrainedModel, nn.Module]:
    """The base and the same inside its PeftModel, on the meta device and in training mode; `kernels` as on a GPU.

    ModelError for a config.json that transformers cannot build a model from, ConfigError for targets that match nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    try:
        values = AutoConfig.from_pretrained(str(base), local_files_only=True, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(values, dtype=dtype, **options)
    except Exception as error:  # transformers raises nearly every class here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{base}: no model can be built from its config.json: {first}") from error
    model.requires_grad_(False)
    wrapped: Any = _adapted(model, settings)
    if kernels:
        drops = [(name, m.p) for name, m in wrapped.named_modules() if isinstance(m, nn.Dropout)]
        for name, p in drops:
            wrapped.set_submodule(name, _FusedDropout(p))
    if checkpoint:
        enable_checkpoints(model)
    wrapped.train()
    return model, wrapped


def _adapted(model: PreTrainedModel, settings: LoraSettings) -> nn.Module:
    if settings.init_adapter is None:
        plain = settings.model_copy(update={"init_lora_weights": True})  # the others compute with values
        added: nn.Module = lora.add_adapter(model, plain, seed=0)
        return added
    from peft import PeftConfig, get_peft_model

    lora.read_config(Path(settings.init_adapter))  # says in our words what is wrong with the folder
    config = PeftConfig.from_pretrained(settings.init_adapter)
    config.inference_mode = False
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def static_bytes(model: PreTrainedModel, wrapped: nn.Module, linear: Stored | None = None) -> dict[str, int]:
    """Bytes of weights and adapter, which stay for the whole run; the gradient is made anew in each step. `linear`: how
    the linear layers but the head are stored, if not in their own type."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    frozen = [p for p in wrapped.parameters() if not p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in [*frozen, *model.buffers()])
    if linear:
        head = model.get_output_embeddings()
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        size += sum(linear.size(*w.shape) - w.numel() * w.element_size() for w in matrices)
        size += round(max((w.numel() for w in matrices), default=0) * linear.copied)
    return {"weights": size, "adapter": sum(p.numel() for p in trained) * 12}  # float32 and two moments


def run(
    model: PreTrainedModel, wrapped: nn.Module, forward: Forward, ledger: Ledger, *, training: bool, kernels: bool
) -> list[int]:
    """One forward and its loss, with its backward when `training`, written to the ledger, which is left as it was.

    `kernels`: attention as on a GPU. Returns the bytes that a layer keeps, for each layer the mean. Raises Uncounted.
    """
    register()
    model.set_attn_implementation(NAME)
    wrapped.train(training)
    counter = _Counter(ledger, int(model.config.get_text_config().vocab_size), kernels=kernels)
    kept = 0
    try:
        with counter.live, torch.set_grad_enabled(training):
            loss = cross_entropy(
                _logits(model, wrapped, forward, ledger, kernels=kernels),
                torch.empty(forward.labels, dtype=torch.int64, device="meta"),
                reduction="sum" if training else "none",
            )
            kept = counter.live.total
            if training:
                counter.in_backward = True
                loss.backward()  # type: ignore[no-untyped-call]
    except LorikitError:
        raise
    except Exception as error:  # whatever a model's own code raises without values
        raise Uncounted((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    for parameter in wrapped.parameters():
        parameter.grad = None
    logits = 4 * forward.labels * counter.vocabulary if training else 0
    activations = max(0, kept - logits) if training else 0
    rest = max(0, counter.live.peak - activations)
    parts = {"activations": activations, "logits" if counter.in_logits else "working": rest}
    for part, size in parts.items():
        ledger.take(part, size)
    for part, size in parts.items():
        ledger.free(part, size)
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    return [activations // layers] * layers


def _logits(model: Any, wrapped: Any, forward: Forward, ledger: Ledger, *, kernels: bool) -> Tensor:
    """(L, V) float32 as GenericEngine computes them."""
    import inspect

    def numbers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="meta")

    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": numbers(forward.labels)} if keeps else {}
    counted = {"lorikit_counted": (forward, ledger, kernels)}
    tokens = numbers(forward.tokens)[None]
    logits = wrapped(input_ids=tokens, position_ids=numbers(forward.tokens)[None], use_cache=False, **extra, **counted)
    rows: Tensor = logits.logits[0] if keeps else logits.logits[0][numbers(forward.labels)]
    return rows.float()


@cache
def register() -> str:
    """Make the stand-in known to transformers, once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _counted_attention)
    return NAME


def _counted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lorikit_counted: tuple[Forward, Ledger, bool] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E), all without values."""
    if lorikit_counted is None:
        raise ValueError("the model does not hand its arguments on to attention")
    if refused := [k for k in ("softcap", "s_aux", "position_bias") if others.get(k) is not None]:
        raise ValueError(f"its attention has {', '.join(refused)}, which packed attention does not compute")
    forward, ledger, kernels = lorikit_counted
    sizes = ledger, attended_pairs(forward, sliding_window or 0, last=False, tile=_BLOCK if kernels else 1)
    if kernels:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _Attention.apply(q, k, v, len(forward.lengths), *sizes)[None], None  # type: ignore[no-untyped-call]
    ends = [sum(forward.lengths[:n]) for n in range(len(forward.lengths) + 1)]
    parts = [
        _Attention.apply(
            *(x[:, :, start:end] for x in (query, key, value)), 0, ledger, sizes[1] // len(forward.lengths)
        )  # type: ignore[no-untyped-call]
        for start, end in pairwise(ends)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])[None], None


class _Attention(torch.autograd.Function):
    """What attention makes and keeps: its result and the log-sum-exp of each query; in the backward on a GPU also a
    float32 gradient of q and, where queries share them, a gradient of k and of v for each query head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: int, ledger: Ledger, pairs: int) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ctx.sizes = sequences, ledger, pairs
        _time(ledger, 4.0 * pairs, q, sequences)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        sequences, ledger, pairs = ctx.sizes
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        if sequences:  # (T, H, E)
            width = q.shape[1] * q.shape[2]
            work = [q.new_empty((q.shape[0] + _BLOCK * sequences) * (width + q.shape[1]), dtype=torch.float32)]
            if q.shape[1] != k.shape[1]:
                work += [torch.empty_like(q), torch.empty_like(q)]
        _time(ledger, 10.0 * pairs, q, sequences)
        return *grads, None, None, None


def _time(ledger: Ledger, flops_a_width: float, q: Tensor, sequences: int) -> None:
    heads = q.shape[1]  # in both layouts
    rate = 1.0
    if ledger.rates:
        rate = ledger.rates.attention_forward if flops_a_width % 10 else ledger.rates.attention_backward
    ledger.compute(flops_a_width * heads * q.shape[-1], 4 * q.numel() * q.element_size(), rate)


class _FusedDropout(nn.Module):
    """On a GPU dropout keeps a mask of booleans; what the meta device does, as a CPU does, is a mask of numbers."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, dropped where the module trains."""
        return torch.native_dropout(x, self.p, self.training)[0] if self.training and self.p else x


class _Counter:
    """Writes each operation's time to the ledger, and notes whether the worst moment was one of the logits'."""

    def __init__(self, ledger: Ledger, vocabulary: int, *, kernels: bool) -> None:
        self.ledger, self.vocabulary, self.kernels = ledger, vocabulary, kernels
        self.live = LiveBytes(self.seen)
        self.in_logits = self.in_backward = False
        self._peak = 0

    def seen(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """One operation; views cost nothing."""
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        read = [t for t in tree_iter(args) if isinstance(t, Tensor)]
        if self.live.peak > self._peak:
            self._peak = self.live.peak
            self.in_logits = any(t.dim() and t.shape[-1] == self.vocabulary for t in made + read)
        if not made or func.is_view or "empty" in func.name() or "detach" in func.name():
            return
        moved = sum(t.numel() * t.element_size() for t in made + read)
        if "bernoulli" in func.name() and not self.kernels:
            moved *= _RANDOM
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, out_val=out)) if count else 0.0
        rates = self.ledger.rates
        rate = rates.product(read[0].element_size()) if rates and read else 1.0
        # Gradients are on while a layer is computed again in the backward, off in the rest of it, which no Python slows.
        self.ledger.slow = not self.in_backward or torch.is_grad_enabled()
        self.ledger.compute(flops, moved, rate)
