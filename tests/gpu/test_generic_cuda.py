"""The generic engine on an NVIDIA GPU: FlashAttention on packed sequences against transformers + peft in float32."""

import copy
import random

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config  # noqa: E402

from lorikit.config import LoraSettings  # noqa: E402
from lorikit.data.pack import pack  # noqa: E402
from lorikit.data.values import IGNORE, Example  # noqa: E402
from lorikit.model import lora  # noqa: E402
from lorikit.model.engine import Sampling  # noqa: E402
from lorikit.model.generic import GenericEngine  # noqa: E402

SIZES = {
    "vocab_size": 997, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig(**SIZES), "packed"),
    "mistral with a sliding window": (MistralConfig(**SIZES, sliding_window=8), "packed"),
    "qwen3": (Qwen3Config(**SIZES), "packed"),
    "gemma2 with soft caps": (Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=64), "masked"),
}


def adapted(config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to("cuda", dtype)
    peft = lora.add_adapter(model, LoraSettings(lora_dropout=0.0), seed=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return peft


def rows(seed):
    rng = random.Random(seed)
    examples = []
    for k in range(9):
        ids = [rng.randrange(3, 997) for _ in range(rng.choice([1, 2, 17, 64, 65, 130]))]
        cut = len(ids) // 2
        examples.append(Example(ids, [IGNORE] * cut + ids[cut:], f"row:{k}"))
    return examples


def reference(config, examples, dtype, state):
    """Loss and gradients of transformers + peft, a row at a time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to("cuda", dtype)
    peer = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=state["targets"]))
    peer.load_state_dict(state["weights"], strict=False)
    total = torch.zeros((), device="cuda")
    for example in examples:
        ids, labels = (torch.tensor([x], device="cuda") for x in (example.input_ids, example.labels))
        count = int((labels[:, 1:] != IGNORE).sum())
        if count:
            total = total + peer(input_ids=ids, labels=labels).loss.float() * count
    total.backward()
    return total.detach(), {n: p.grad.float() for n, p in peer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_step_is_as_close_to_float32_as_transformers_and_peft_are(family, dtype):
    config, way = FAMILIES[family]
    model = adapted(config, dtype)
    engine = GenericEngine(model)
    assert engine.isolation == way
    engine.train()
    examples = rows(seed=random.randrange(10**6))
    loss = engine.loss_sum(pack(examples))
    loss.backward()
    ours = {n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad}
    state = {
        "targets": sorted(model.peft_config["default"].target_modules),
        "weights": {n: p for n, p in model.state_dict().items() if "lora_" in n},
    }
    exact_loss, exact = reference(config, examples, torch.float32, state)
    peer_loss, peer = reference(config, examples, dtype, state)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert abs(loss - exact_loss) <= 2 * abs(peer_loss - exact_loss) + tolerance * exact_loss
    for name, want in exact.items():
        assert want.abs().max() > 0, name
        error, allowed = (ours[name] - want).norm(), 1.5 * (peer[name] - want).norm() + tolerance * want.norm()
        assert error <= allowed, f"{name}: {error} > {allowed}"


def test_greedy_generation_on_the_gpu_is_transformers_own():
    config, _ = FAMILIES["llama"]
    engine = GenericEngine(adapted(config, torch.float32))
    prompts = [e.input_ids for e in rows(4)]
    got = {k: [] for k in range(len(prompts))}
    for token in engine.generate(
        prompts, Sampling(max_new_tokens=10, temperature=0, repetition_penalty=1.0), frozenset({2})
    ):
        got[token.prompt].append(token.id)
    for k, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device="cuda")
        engine.base.set_attn_implementation("sdpa")
        out = engine.model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert got[k] == out[0, len(prompt) :].tolist()
