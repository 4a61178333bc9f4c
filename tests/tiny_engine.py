"""A real engine that is small enough for tests of the loop: a bigram language model with one LoRA layer, in torch.

logits = (e + scale * B A dropout(e)) W^T with e the frozen embedding of a token. Everything that an engine promises holds:
dropout that follows torch's generator, a loss with a graph, PEFT's names, greedy answers.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional

from lorikit.data.values import IGNORE, Example
from lorikit.errors import ModelError
from lorikit.model.engine import Token

VOCABULARY = 24
STOP = 1


class TinyEngine:
    name = "tiny"
    choice = ""
    sharded = False

    def __init__(self, seed=0, dropout=0.1, width=16, rank=4):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.embedding = torch.randn(VOCABULARY, width, generator=generator)
        self.head = torch.randn(VOCABULARY, width, generator=generator) / width**0.5
        self.lora_a = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.lora_b = nn.Parameter(torch.zeros(width, rank))
        self.dropout, self.training, self.enabled = dropout, False, True

    def _logits(self, ids):
        hidden = self.embedding[ids]
        if self.enabled:
            dropped = functional.dropout(hidden, self.dropout, self.training)
            hidden = hidden + 2.0 * dropped @ self.lora_a.T @ self.lora_b.T
        return hidden @ self.head.T

    def loss_sum(self, batch):
        return functional.cross_entropy(
            self._logits(batch.input_ids), batch.targets, ignore_index=IGNORE, reduction="sum"
        )

    def clear_gradient(self):
        self.lora_a.grad = self.lora_b.grad = None

    def add_gradient(self, batch):
        loss = self.loss_sum(batch)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def token_losses(self, batch):
        kept = batch.targets != IGNORE
        return functional.cross_entropy(self._logits(batch.input_ids[kept]), batch.targets[kept], reduction="none")

    def parameters(self):
        return [self.lora_a, self.lora_b]

    def parameter_names(self):
        return ["base_model.model.head.lora_A.weight", "base_model.model.head.lora_B.weight"]

    def best_tokens(self):
        return 256

    def prepare(self, batch):
        return lambda: self.add_gradient(batch)

    def flat(self):
        return None

    def adapter_state(self):
        return {n: p.detach().clone() for n, p in zip(self.parameter_names(), self.parameters(), strict=True)}

    def load_adapter_state(self, state):
        if sorted(state) != sorted(self.parameter_names()):
            raise ModelError(f"adapter has {sorted(state)}")
        with torch.no_grad():
            for name, parameter in zip(self.parameter_names(), self.parameters(), strict=True):
                parameter.copy_(state[name])

    def adapter_config(self):
        return {"peft_type": "LORA", "r": self.lora_a.shape[0], "target_modules": ["head"]}

    def train(self, mode=True):
        self.training = mode

    @contextlib.contextmanager
    def without_adapter(self):
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @torch.no_grad()
    def generate(self, prompts, sampling, stop_ids):
        for number, prompt in enumerate(prompts):
            last = prompt[-1]
            for count in range(1, sampling.max_new_tokens + 1):
                last = int(self._logits(torch.tensor(last)).argmax())
                finish = "stop" if last in stop_ids else "length" if count == sampling.max_new_tokens else None
                yield Token(number, last, finish)
                if finish:
                    break


def tiny_rows(number, seed=0, longest=12):
    """Rows in which each token is followed by the one three places on; the first two tokens carry no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        start = int(torch.randint(2, VOCABULARY, (), generator=generator))
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        ids = [2 + (start + 3 * place) % (VOCABULARY - 2) for place in range(length - 1)] + [STOP]
        rows.append(Example(ids, [IGNORE, IGNORE, *ids[2:]], f"tiny.json:{index + 1}"))
    return rows
