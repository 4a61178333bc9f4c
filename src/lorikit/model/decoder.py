"""The engine for Llama-family models: our own packed decoder, from config.json and safetensors, without transformers.

A forward takes all tokens of its batch end to end, in layers that are one autograd function each (decoder_layer.py), and
computes logits for labelled tokens alone (decoder_loss.py). Layers below the first adapter keep nothing and get no
gradient. Dropout masks come from one number a forward, drawn from torch's generator, so that torch.manual_seed repeats
a step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorikit.data.values import Batch
from lorikit.model import decoder_loss
from lorikit.model.decoder_adapter import Adapter, read_adapter
from lorikit.model.decoder_batch import Packed, cut_to_labels, lay_out, two_rows
from lorikit.model.decoder_config import DecoderShape, inverse_frequencies
from lorikit.model.decoder_generate import DecoderDecoding, stream_tokens
from lorikit.model.decoder_graph import Bucket, Inputs, StepGraphs, bucket_of, fill_bucket
from lorikit.model.decoder_layer import Layer, Step, run_layer
from lorikit.model.decoder_memory import Keep, choose
from lorikit.model.decoder_offload import HostCopies
from lorikit.model.decoder_weights import Weights
from lorikit.model.engine import ADAPTER, BEST_TOKENS, BEST_TOKENS_CPU, Sampling, Token
from lorikit.model.host import host_copies
from lorikit.model.kernels.launch import Compiling, compiling_ahead
from lorikit.model.packed_attention import attend, is_varlen

GRAPH_TOKENS = 8192  # in larger batches the GPU computes longer than Python takes to start its kernels


class DecoderEngine:
    """Frozen weights and an adapter (or none) on one device.

    Each layer keeps for its backward what its level says, on a GPU as much as the memory allows and at most `highest`;
    `gpu_bytes` limits what is taken there in all (None: what is free).
    """

    name = "decoder"
    choice = ""
    sharded = False

    def __init__(
        self,
        shape: DecoderShape,
        weights: Weights,
        adapter: Adapter | None = None,
        *,
        highest: Keep = Keep.ALL,
        graphs: bool = True,
        gpu_bytes: int | None = None,
    ) -> None:
        self.shape, self.weights, self.adapter = shape, weights, adapter
        self.highest, self._gpu_bytes, self._free = highest, gpu_bytes, 0
        self.device = weights.embed.device
        self.training = False
        self._plain = [Layer(n, shape, w) for n, w in enumerate(weights.layers)]
        self.layers = self._plain if adapter is None else self._adapted(adapter)
        self._tables: dict[int, Tensor] = {}  # none is ever freed: captured graphs go on reading theirs
        self._graphs: StepGraphs | None = None
        self._others: dict[str, Adapter] = {}  # added after loading, by name; "default" here replaces the first one
        self.decode_graphs = self.decode_kernels = True  # on a GPU; tests and benchmarks switch them off to compare
        self._compiling: Compiling | None = None
        # In float32 the attention goes sequence by sequence, which a graph of fixed shapes cannot.
        self._takes_graphs = graphs and is_varlen(weights.embed, shape.head_dim)

    def loss_sum(self, batch: Batch) -> Tensor:
        """() float32: cross entropy summed over the targets that are not IGNORE, with a graph to the adapter."""
        packed = cut_to_labels(batch, self.device)
        if packed is None:
            return torch.stack([p.sum() * 0 for p in self.parameters()] or [torch.zeros(())]).sum()
        return self._loss_sum(packed, self._draw_seed())

    def clear_gradient(self) -> None:
        """Begin an optimizer step: the gradient, one buffer for all parameters, is zero."""
        if self.adapter is not None:
            self.adapter.clear_gradient()

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """What `add_gradient` does on the host is done now, the rest when the result is called.

        On a GPU that is to replay a CUDA graph, where a batch is small enough for the starts of its kernels to matter.
        """
        at = lay_out(batch) if self._takes_graphs and batch.num_tokens <= GRAPH_TOKENS else None
        if at is None or self.levels(len(at.tokens))[0] == Keep.HOST:
            return partial(self._eager_gradient, batch)
        bucket = bucket_of(at)
        self.rope_tables(bucket.longest)  # which a capture could not make
        return partial(self._graphed_gradient, bucket, fill_bucket(batch, at, bucket))

    def add_gradient(self, batch: Batch) -> Tensor:
        """() float32: `loss_sum` without a graph, its gradient added to the parameters' `.grad`."""
        return self.prepare(batch)()

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """(num_targets,) float32: cross entropy of each target in order, without a graph."""
        packed = cut_to_labels(batch, self.device)
        if packed is None:
            return torch.zeros(0, device=self.device)
        w = self.weights
        return decoder_loss.token_losses(
            self._hidden(packed, self._draw_seed()), w.norm, self.shape.eps, w.head, packed.targets
        )

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters in the order of `parameter_names`; none when it was loaded to be used only."""
        return list(self._trainable().values())

    def parameter_names(self) -> list[str]:
        """PEFT's names, as the keys of adapter_model.safetensors."""
        return list(self._trainable())

    def flat(self) -> tuple[Tensor, Tensor] | None:
        """The parameters and their `.grad` as one float32 buffer each; None without an adapter to train."""
        if self.adapter is None or not len(self.adapter.grad):
            return None
        return self.adapter.flat, self.adapter.grad

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter under PEFT's names, on the CPU."""
        named = self._trainable()
        if self.adapter is None or not named:
            return {}
        return dict(zip(named, host_copies(self.adapter.flat, list(named.values())), strict=True))

    def adapter_config(self) -> dict[str, Any]:
        """The values of PEFT's adapter_config.json; the base's name is the caller's to fill in."""
        assert self.adapter is not None
        return self.adapter.values | {"inference_mode": True}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Put these values into the adapter; ModelError lists every name and shape that does not fit."""
        assert self.adapter is not None
        self.adapter.load(state, "the adapter does not fit the model")

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self.training = mode

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside it the engine computes with the base alone."""
        layers, self.layers = self.layers, self._plain
        try:
            yield
        finally:
            self.layers = layers

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: frozenset[int]
    ) -> Generator[Token]:
        """Tokens as they come, each naming its prompt; ends when every prompt has a Token with `finish` set."""
        name = None if self.adapter is None or self.layers is self._plain else ADAPTER
        yield from stream_tokens(self, prompts, sampling, stop_ids, name)

    def decoding(self, num_slots: int, max_length: int) -> DecoderDecoding:
        """A place for `num_slots` requests at a time of at most `max_length` tokens each; OutOfMemoryError where it does
        not fit."""
        return DecoderDecoding(self, num_slots, max_length)

    def adapter_names(self) -> list[str]:
        """Names of the loaded adapters, "default" first where the engine was loaded with one."""
        return list(self.adapters())

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the PEFT adapter in `folder` beside the others, or in place of the one with this name; ModelError lists what
        does not fit."""
        # On a CPU adapters compute in float32 whatever the base is, as in peft.
        dtype = self.weights.embed.dtype if self.device.type == "cuda" else torch.float32
        self._others[name] = read_adapter(folder, self.shape, self.device, dtype)

    def adapters(self) -> dict[str, Adapter]:
        """The loaded adapters by name."""
        own = {} if self.adapter is None else {ADAPTER: self.adapter}
        return own | self._others

    def adapter_named(self, name: str | None) -> Adapter | None:
        """A loaded adapter, up to date in its compute type; None for the base."""
        if name is None:
            return None
        found = self.adapters()[name]
        found.refresh()
        return found

    def layers_with(self, name: str | None) -> list[Layer]:
        """The layers with a loaded adapter, or the base's."""
        adapter = self.adapter_named(name)
        return self._plain if adapter is None else self._adapted(adapter)

    @torch.no_grad()
    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin (P, E/2) float32 of at least the first `positions` positions."""
        count = 1 << (positions - 1).bit_length()
        if count not in self._tables:
            angles = torch.outer(torch.arange(count).float(), inverse_frequencies(self.shape.rope, self.shape.head_dim))
            self._tables[count] = torch.stack([angles.cos(), angles.sin()]).to(self.device)
        cos, sin = self._tables[count]
        return cos, sin

    def best_tokens(self) -> int:
        """Tokens of a forward beyond which a larger one is no faster; on a GPU as many as need no product again."""
        if self.device.type == "cpu":
            return BEST_TOKENS_CPU
        tokens = BEST_TOKENS
        while tokens > 4096 and self.levels(tokens)[0] < min(Keep.GATE_UP, self.highest):
            tokens //= 2
        return tokens

    def levels(self, tokens: int) -> tuple[Keep, ...]:
        """How much each layer keeps in a forward of so many tokens."""
        if self.device.type == "cpu":
            return (self.highest,) * self.shape.layers
        if not self._free:  # asked once: later some of it is taken by what is kept
            self._free = free_bytes(self.device, self._gpu_bytes)
        return choose(self.shape, tokens, self._free, self.weights.embed.element_size(), self.highest)

    def run(self, input_ids: Tensor, step: Step) -> Tensor:
        """(T,) int64 -> what comes out of the last layer, (L, D) for the rows that `step.last` keeps."""
        if self.adapter is not None:
            self.adapter.refresh()
        x = self.weights.embed[input_ids]
        for layer in self.layers:
            x = run_layer(x, layer, step)
        return x

    def rehearse(self) -> None:
        """Have the kernels of a training step compiled in threads, which takes seconds; the weights need not be there yet.

        What they are is found by a step over two short rows through layers of each kind, in which none is started.
        """
        layers, training = self.layers, self.training
        self.layers, self.training = _one_of_each(layers), True
        batch = two_rows()
        at = lay_out(batch)
        assert at is not None
        bucket = bucket_of(at)
        inputs = fill_bucket(batch, at, bucket).on(self.device)
        try:
            with compiling_ahead() as self._compiling:
                packed = inputs.packed(bucket.longest) if self._takes_graphs else cut_to_labels(batch, self.device)
                assert packed is not None
                torch.autograd.grad(self._loss_sum(packed, inputs.seed), self.parameters(), allow_unused=True)
        finally:
            self.layers, self.training, self._free = layers, training, 0

    def _await_kernels(self) -> None:
        if self.device.type != "cuda":
            return
        if self._compiling is None:
            self.rehearse()
        assert self._compiling is not None
        self._compiling.wait()

    def _eager_gradient(self, batch: Batch) -> Tensor:
        self._await_kernels()
        loss = self.loss_sum(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _graphed_gradient(self, bucket: Bucket, filled: Inputs) -> Tensor:
        if self._graphs is None:
            self._await_kernels()
            self._graphs = StepGraphs(self.parameters(), self.device)
        try:
            return self._graphs.add_gradient(self._loss_sum, bucket, filled, self._draw_seed())
        except torch.OutOfMemoryError:
            # Memory is short: from here on without graphs, whose pool stands beside what evaluations need.
            self._graphs, self._takes_graphs = None, False
            raise

    def _draw_seed(self) -> int:
        """The number that this forward's dropout masks come from."""
        drops = self.training and self.adapter is not None and self.adapter.dropout > 0
        return int(torch.randint(1 << 31, ())) if drops else 0

    def _loss_sum(self, packed: Packed, seed: int | Tensor) -> Tensor:
        w = self.weights
        return decoder_loss.loss_sum(self._hidden(packed, seed), w.norm, self.shape.eps, w.head, packed.targets)

    def _hidden(self, packed: Packed, seed: int | Tensor) -> Tensor:
        shape = self.shape

        def attend_within(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            last = layer.number == shape.layers - 1
            sequences = packed.last_sequences if last else packed.sequences
            return attend(q, k, v, sequences, shape.head_dim**-0.5, layer.window)

        p = self.adapter.dropout if self.adapter is not None and self.training else 0.0
        cos, sin = self.rope_tables(packed.sequences.longest_k)
        keep = self.levels(len(packed.input_ids)) if torch.is_grad_enabled() else ()
        step = Step(
            cos=cos,
            sin=sin,
            position_ids=packed.position_ids,
            attend=attend_within,
            last=packed.last,
            p=p,
            seed=seed,
            keep=keep,
            host=HostCopies(self.device) if keep and keep[0] == Keep.HOST and self.device.type == "cuda" else None,
        )
        return self.run(packed.input_ids, step)

    def _adapted(self, adapter: Adapter) -> list[Layer]:
        return [
            Layer(n, self.shape, w, adapter.loras[n], tuple(adapter.by_layer[n]))
            for n, w in enumerate(self.weights.layers)
        ]

    def _trainable(self) -> dict[str, nn.Parameter]:
        named = {} if self.adapter is None else self.adapter.named()
        return {name: p for name, p in named.items() if p.requires_grad}


def _one_of_each(layers: Sequence[Layer]) -> list[Layer]:
    """A layer for each set of adapters that layers have, below and above the first adapter, and the last layer."""
    found: dict[object, Layer] = {}
    above = False
    for layer in layers:
        found.setdefault((tuple(p.shape for p in layer.parameters), above, layer is layers[-1]), layer)
        above |= bool(layer.parameters)
    return list(found.values())


def free_bytes(device: torch.device, limit: int | None) -> int:
    """What can still be taken on a GPU, within a limit for all that is taken."""
    free, _ = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    return free if limit is None else min(free, limit - used)
