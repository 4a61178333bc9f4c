"""The engine for any causal language model: transformers computes the base, peft the adapter.

loss_sum is the cross entropy in float32, summed over the labelled positions; logits are computed for these only where
the model can. How sequences of a batch are kept apart is tried when the engine is built, on the model itself, and the
first way is taken that gives what each sequence gives alone:

    packed   one forward, attention per sequence (model/packed_attention.py)
    masked   one forward, transformers' own mask for position_ids that start again at 0
    rows     one forward a sequence: models that mix positions outside attention
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorikit.data.pack import pack, to_device
from lorikit.data.values import IGNORE, Batch, Example
from lorikit.errors import ModelError
from lorikit.model import lora, packed_attention
from lorikit.model.engine import ADAPTER, BEST_TOKENS, BEST_TOKENS_CPU, Sampling, Token
from lorikit.model.serial_decoding import SerialDecoding
from lorikit.model.streaming import stream_tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class GenericEngine:
    """A transformers model, plain or inside a PeftModel, on its device.

    `attention` keeps that implementation of transformers instead of trying the packed one. `choice` says why this engine
    was chosen, for the person who trains; empty when it was asked for. A base of
    model/sharded.py computes on `sharded_on`.
    """

    name = "generic"

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        attention: str | None = None,
        choice: str = "",
        sharded_on: torch.device | None = None,
    ) -> None:
        self.model, self.choice, self.sharded = model, choice, sharded_on is not None
        self.base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.has_adapter = model is not self.base
        self._inner = {ADAPTER: ADAPTER} if self.has_adapter else {}  # the names of adapters -> peft's names for them
        self._num_added = 0
        self._answering = RLock()
        self.device = sharded_on or self.base.get_input_embeddings().weight.device
        # peft calls the base's forward past the hooks that gather its shards; its layers are in the base in any case
        self._call: Any = self.base if self.sharded else model
        found = self.base.config._attn_implementation
        self._attention = attention or ("sdpa" if found == packed_attention.NAME else found)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self.isolation = self._find_isolation(["masked", "rows"] if attention else ["packed", "masked", "rows"])
        if self.sharded and self.isolation == "rows":
            raise ModelError(
                "the model mixes the rows of a batch, so that processes would need different numbers of forwards; it cannot be "
                "sharded: set model.device_map: auto"
            )

    def loss_sum(self, batch: Batch) -> Tensor:
        """() float32: cross entropy summed over the targets that are not IGNORE, with a graph to the adapter."""
        losses = [cross_entropy(logits, want, reduction="sum") for logits, want in self._logits(batch)]
        return torch.stack(losses).sum()

    def best_tokens(self) -> int:
        """Tokens of a forward beyond which a larger one is no faster."""
        return BEST_TOKENS_CPU if self.device.type == "cpu" else BEST_TOKENS

    def clear_gradient(self) -> None:
        """Begin an optimizer step: the parameters have no gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """Nothing is done ahead."""
        return partial(self.add_gradient, batch)

    def add_gradient(self, batch: Batch) -> Tensor:
        """() float32: `loss_sum` without a graph, its gradient added to the parameters' `.grad`."""
        loss = self.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """(num_targets,) float32: cross entropy of each target in order, without a graph."""
        return torch.cat([cross_entropy(logits, want, reduction="none") for logits, want in self._logits(batch)])

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters in the order of `parameter_names`."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameter_names(self) -> list[str]:
        """PEFT's names, as the keys of adapter_model.safetensors."""
        return [lora.saved_name(n) for n, p in self.model.named_parameters() if p.requires_grad]

    def flat(self) -> None:
        """None: peft's parameters lie apart."""

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter under PEFT's names, on the CPU."""
        return {
            lora.saved_name(n): p.detach().to("cpu", copy=True).contiguous()
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }

    def adapter_config(self) -> dict[str, Any]:
        """The values of PEFT's adapter_config.json; the base's name is the caller's to fill in."""
        return lora.config_values(self.model)

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Put these values into the adapter; ModelError lists every name and shape that does not fit."""
        own = dict(zip(self.parameter_names(), self.parameters(), strict=True))
        problems = lora.mismatches(state, {name: p.shape for name, p in own.items()})
        if problems:
            raise ModelError("the adapter does not fit the model: " + "; ".join(problems))
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state[name])

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self.model.train(mode)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside it the engine computes with the base alone."""
        return self.model.disable_adapter() if self.has_adapter else nullcontext()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Generator[Token]:
        """Tokens as they come, each naming its prompt; ends when every prompt has a Token with `finish` set.

        transformers' own generate on left-padded batches. Closing the iterator stops the generation.
        """
        # Those that were added are used by their name only.
        with nullcontext() if ADAPTER in self._inner else self.without_adapter(), self._as_generate_wants() as model:
            yield from stream_tokens(model, self.device, prompts, sampling, stop_ids)

    @contextmanager
    def generating(self, adapter: str | None) -> Iterator[PreTrainedModel | PeftModel]:
        """The model, which inside it is as transformers' generate wants it, with a loaded adapter or as the base alone."""
        if adapter is None:
            with self._answering, self.without_adapter(), self._as_generate_wants() as model:
                yield model
            return
        with self._answering:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            peft_model: Any = self.model
            before = peft_model.active_adapter
            peft_model.set_adapter(self._inner[adapter], inference_mode=True)
            try:
                with self._as_generate_wants() as model:
                    yield model
            finally:
                peft_model.set_adapter(before, inference_mode=True)
                for parameter in trained:
                    parameter.requires_grad_(True)

    @contextmanager
    def _as_generate_wants(self) -> Iterator[PreTrainedModel | PeftModel]:
        training = self.model.training
        self.model.eval()
        self.base.set_attn_implementation(self._attention)
        try:
            yield self.model
        finally:
            self._enter(self.isolation)
            self.model.train(training)

    def decoding(self, num_slots: int, max_length: int) -> SerialDecoding:
        """Requests one after the other, whatever `num_slots` is: transformers cannot let any join later."""
        return SerialDecoding(self, max_length)

    def adapter_names(self) -> list[str]:
        """Names of the loaded adapters, "default" first where the engine was loaded with one."""
        return sorted(self._inner, key=lambda name: name != ADAPTER)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the PEFT adapter in `folder` beside the others, or in place of the one with this name; ModelError lists what
        does not fit. Another thread's answer ends first: peft switches the adapters of all layers."""
        with self._answering:
            inner = f"added_{self._num_added}"  # peft's name for it: any text is a name here, not there
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.model = lora.load_adapter(self.model, folder, trainable=False, name=inner)
            self.has_adapter = True
            self._num_added += 1
            for parameter in trained:  # peft looks for its names anywhere in those of parameters
                parameter.requires_grad_(True)
            before, self._inner[name] = self._inner.get(name), inner
            if before is not None:
                self.model.delete_adapter(before)

    def _logits(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of float32 logits (n, V) and targets (n,), which together are the batch's labelled positions in order."""
        batch = to_device(batch, self.device)
        if self.isolation != "rows":
            yield self._forward(batch.input_ids, batch.targets, batch.position_ids, batch)
            return
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            if bool((batch.targets[start:end] != IGNORE).any()):
                yield self._forward(batch.input_ids[start:end], batch.targets[start:end], None, None)

    def _forward(
        self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None, batch: Batch | None
    ) -> tuple[Tensor, Tensor]:
        keep = (targets != IGNORE).nonzero()[:, 0]
        extra: dict[str, Any] = {}
        if position_ids is not None:
            extra["position_ids"] = position_ids[None]
        if self._keeps_logits:
            extra["logits_to_keep"] = keep
        if self.isolation == "packed":
            assert batch is not None
            extra |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
            extra |= {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
        logits = self._call(input_ids=input_ids[None], use_cache=False, **extra).logits[0]
        logits = logits if self._keeps_logits else logits[keep.to(logits.device)]
        return logits.float(), targets[keep].to(logits.device)

    def _enter(self, isolation: str) -> None:
        self.isolation = isolation
        wanted = packed_attention.register() if isolation == "packed" else self._attention
        if self.base.config._attn_implementation != wanted:
            self.base.set_attn_implementation(wanted)

    @torch.no_grad()
    def _find_isolation(self, ways: Sequence[str]) -> str:
        """The first of `ways` in which sequences of a batch neither see each other nor change their losses."""
        training = self.model.training
        self.model.eval()
        vocabulary = int(self.base.get_input_embeddings().weight.shape[0])
        ids = [(7919 * k + 13) % vocabulary for k in range(1, 41)]  # arbitrary words, the same in every run
        a, b, other = (Example(part, part, "check") for part in (ids[:11], ids[11:26], ids[26:37]))
        self._enter("rows")
        alone = self.token_losses(pack([a, b]))
        half = next(self.base.parameters()).dtype in (torch.float16, torch.bfloat16)
        tolerance = (0.05 if half else 1e-3) * max(1.0, float(alone.abs().max()))
        for way in ways:
            try:
                self._enter(way)
                both, changed = self.token_losses(pack([a, b])), self.token_losses(pack([other, b]))
            except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
                if way == "rows":
                    raise
                continue  # the model cannot compute it this way; the next one is slower and takes more models
            leak = float((both[-14:] - changed[-14:]).abs().max())
            apart = float((both - alone).abs().max())
            if way == "rows" or (leak <= 1e-5 and apart <= tolerance and math.isfinite(apart)):
                break
        self.model.train(training)
        return self.isolation
