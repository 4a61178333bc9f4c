"""RunConfig: the only declaration of every setting, its type, its default and what it means.

The YAML file, the command-line flags, the JSON schema and the help all derive from the five groups below. Names are
those of peft's LoraConfig and transformers' TrainingArguments where these have one. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorikit.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Group(BaseModel):
    """A group of settings: unknown names are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Group):
    """Which base model, and how it is loaded."""

    name_or_path: Text
    """A folder, a bundled model (smollm2-135m-instruct) or a hub id; ms:ID and hf:ID name the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit it stood for is recorded in the run."""
    hub: Literal["auto", "modelscope", "huggingface"] = "auto"
    """Where a bare id is looked for; auto tries what this machine can reach."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the frozen weights; auto is bfloat16 where the GPU has it, float32 on a CPU."""
    quantization: Literal["none", "fp8", "nf4"] = "none"
    """Frozen linear layers in fewer bits. fp8: half the memory, 8-bit products (Ada, Hopper; engine decoder). nf4: QLoRA."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    device_map: str | dict[str, int | str] | None = None
    """For a base larger than one GPU: shard, shard-offload (several processes); auto, balanced, sequential, or a map."""
    attn_implementation: str | None = None
    """transformers' name of an attention to use as it is (sdpa, eager, ...); by default the fastest that packs exactly."""
    engine: Literal["auto", "generic", "decoder"] = "auto"
    """decoder: our own, for Llama, Mistral, Qwen2, Qwen3. generic: transformers + peft, for all. auto: the first that fits."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Most GPU memory to take (engine decoder): with less, more is computed again. By default all that is free."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class DataConfig(Group):
    """Which rows, and how they become tokens."""

    train: Text | Annotated[list[Text], Field(min_length=1)]
    """File, folder or hub data set (ms:ID, hf:ID), or a list of them."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"] = "auto"
    """How a row is laid out; auto recognises it by its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Your column names for the format's own: {instruction: question, output: answer}."""
    system: str | None = None
    """System prompt for every row that has none of its own."""
    template: str = "auto"
    """auto: the tokenizer's own chat template. tutorial: the tutorial's ids. Or the path of a Jinja file."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}."""
    input_separator: str | None = None
    """What joins instruction and input; by default a line break, or nothing with template: tutorial."""
    max_length: Positive = 1024
    """Longest row, in tokens."""
    on_long_row: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row over max_length; always counted and named."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at rows that cannot be used, or list them in rejects.jsonl and go on."""
    train_on: Literal["all", "last"] = "all"
    """Learn every assistant turn, or only the last one."""


class LoraSettings(Group):
    """peft's LoraConfig under its own names."""

    r: Positive = 8
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by lora_alpha / r (or / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.1
    """Dropout on the input of each adapter, an independent mask per module."""
    target_modules: str | list[Text] = "all-linear"
    """all-linear, a list of module names or suffixes, or one regular expression that matches whole names."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """True: kaiming-uniform A and zero B, as peft does."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """As in the tutorial; only causal language models."""
    inference_mode: Literal[False] = False
    """As in the tutorial; training needs it off."""
    init_adapter: str | None = None
    """Go on from this PEFT adapter folder (same base, r and lora_alpha; its own targets are kept)."""


class TrainConfig(Group):
    """transformers' TrainingArguments under their own names."""

    output_dir: Text
    """The run folder."""
    per_device_train_batch_size: Positive = 4
    """Rows a device takes at a time; with gradient_accumulation_steps the rows of an optimizer step."""
    gradient_accumulation_steps: Positive = 4
    """4 x 4 gives the same step as 16 x 1: the loss is summed and divided once."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the rows; fractions are allowed."""
    max_steps: int = -1
    """If positive, the number of optimizer steps, instead of num_train_epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: to 0, or not at all."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises from 0."""
    warmup_ratio: Fraction = 0.0
    """The same as a share of all steps; only one of the two."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay."""
    adam_beta1: Fraction = 0.9
    """AdamW."""
    adam_beta2: Fraction = 0.999
    """AdamW."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping by norm; 0 is off."""
    max_tokens_per_forward: Annotated[int, Field(ge=0)] = 0
    """Most tokens packed into one forward; 0 lets the memory decide."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, much less memory."""
    logging_steps: Positive = 10
    """Optimizer steps between lines on the screen and in metrics.jsonl."""
    save_steps: Positive = 100
    """Optimizer steps between checkpoints."""
    save_total_limit: Positive | None = 2
    """Checkpoints to keep, besides the best; null keeps all."""
    save_on_each_node: bool = False
    """Of several machines each writes checkpoints and adapter into its own output_dir; false: one folder, by rank 0."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Initial adapter, order of rows, dropout."""
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    """Trackers beside metrics.jsonl."""


class EvalConfig(Group):
    """What is held out, and when it is looked at."""

    eval_size: Annotated[float, Field(ge=0)] = 0.05
    """Held out of the training rows: a share below 1, or a number of rows; (nearly) equal prompts stay on one side."""
    data: Text | None = None
    """A file of its own instead of a share of the training rows."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations; 0 is once an epoch."""
    load_best_model_at_end: bool = True
    """The saved adapter is the one with the lowest held-out loss."""
    early_stopping_patience: Positive | None = None
    """Stop after this many evaluations without a lower held-out loss."""
    prompts: list[Text] = Field(default_factory=list)
    """Questions answered at each evaluation, greedily."""
    max_new_tokens: Positive = 64
    """Longest answer to these prompts."""


class RunConfig(Group):
    """One run: model, data, lora, train, eval. See `lorikit config` for the resolved file, `--schema` for editors."""

    model: ModelConfig
    data: DataConfig
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _contradictions(run: RunConfig) -> Iterator[str]:
    """Each pair of settings that cannot hold together, in one line."""
    if run.train.warmup_steps and run.train.warmup_ratio:
        yield "train.warmup_steps and train.warmup_ratio are both set: keep one"
    if run.train.max_steps == 0 or run.train.max_steps < -1:
        yield f"train.max_steps is {run.train.max_steps}: give a positive number, or -1 to use num_train_epochs"
    if run.eval.early_stopping_patience and run.eval.eval_size == 0 and run.eval.data is None:
        yield "eval.early_stopping_patience needs held-out rows: set eval.eval_size or eval.data"
    if run.eval.eval_size >= 1 and run.eval.eval_size != int(run.eval.eval_size):
        yield f"eval.eval_size is {run.eval.eval_size}: give a share below 1 or a whole number of rows"
    if run.model.device_map is not None and run.model.device != "auto":
        yield "model.device and model.device_map are both set: keep one"
    yield from _unquantisable(run.model)


def _unquantisable(model: ModelConfig) -> Iterator[str]:
    """What model.quantization cannot hold together with; what the machine lacks for it is found when it loads."""
    others = ("device_map", "attn_implementation", "trust_remote_code")
    if model.quantization == "fp8":
        if model.engine == "generic":
            yield "model.quantization fp8 needs the decoder: set model.engine: auto or decoder, or model.quantization: nf4"
        if model.dtype == "float16":
            yield "model.quantization fp8 computes in bfloat16: set model.dtype: auto or bfloat16"
        for name in (name for name in others if getattr(model, name)):
            yield f"model.quantization fp8 needs the decoder, which model.{name} excludes: keep one"


def load_config(path: str | Path | None = None, flags: Sequence[str] = (), **groups: Any) -> RunConfig:
    """The run described by a YAML file, with flags over the file over the defaults.

    `flags` are command-line tokens such as ["--lora.r", "16", "--train.learning_rate=2e-4"], their values read as YAML.
    `groups` are dictionaries by group name, over the file and under the flags. Raises ConfigError that names every
    unknown key with its nearest known one, and every value that is not allowed.
    """
    tree = read_yaml(path) if path is not None else {}
    origin = str(path) if path is not None else "settings"
    for group, values in groups.items():
        _merge(tree, {group: values})
    given = list(_parse_flags(flags))
    for dotted, value in given:
        nested: Any = value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        _merge(tree, nested)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"--{line}" if name in dict(given) else f"{origin}: {line}" for name, line in _explain(error).items()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def setting_names() -> dict[str, str]:
    """Every dotted setting name with its one-line docstring, in declaration order."""
    return {
        f"{group}.{name}": field.description or ""
        for group, of in RunConfig.model_fields.items()
        for name, field in of.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def describe() -> str:
    """Every setting as YAML with its default, or its type where it must be given, each under its meaning."""
    lines = []
    for group, of in RunConfig.model_fields.items():
        lines.append(f"{group}:  # {of.annotation.__doc__}")
        for name, field in _fields(group).items():
            default = field.get_default(call_default_factory=True)
            shown = (
                "<required>" if field.is_required() else yaml.safe_dump(default, default_flow_style=True).split("\n")[0]
            )
            lines += [f"  # {field.description}", f"  {name}: {shown}"]
    return "\n".join(lines) + "\n"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (1e-4 is one) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError says line and column of what cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the YAML file of a run") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected the groups {', '.join(RunConfig.model_fields)}, found {_kind(tree)}")
    return tree


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None


def _kind(value: Any) -> str:
    return {type(None): "nothing", list: "a list", str: "text", dict: "a mapping"}.get(type(value), repr(value))


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _parse_flags(tokens: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """["--lora.r", "16"] -> ("lora.r", 16); a switch without a value is true."""
    names = setting_names()
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--"):
            raise ConfigError(f"unexpected argument {token!r}; settings are given as --group.name value")
        name = name.replace("-", "_")
        parts = name.split(".")
        if ".".join(parts[:2]) not in names and name not in RunConfig.model_fields:
            raise ConfigError(f"unknown flag --{name}{_nearest(name, list(names), '--')}")
        if not equals:
            takes_value = rest and not re.match(r"--[a-z]", rest[0])
            if not takes_value and bool not in _kinds(parts):
                raise ConfigError(f"--{name} needs a value")
            text = rest.pop(0) if takes_value else "true"
        plain = str in _kinds(parts) and not text.startswith(("[", "{")) and text != "null"
        yield name, text if plain else _parse_yaml(text, f"--{name}")


def _kinds(parts: Sequence[str]) -> list[Any]:
    """The types that a flag takes: where str is one, "Answer briefly: in one line" is text and no YAML mapping."""
    kinds: list[Any] = [_fields(parts[0])[parts[1]].annotation] if len(parts) == 2 else [str] * (len(parts) > 2)
    while any(get_args(kind) for kind in kinds if get_origin(kind) is not Literal):
        kinds = [inner for kind in kinds for inner in (get_args(kind) or (kind,)) if get_origin(kind) is not Literal]
    return kinds


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right word in the wrong group, or none at all
        close = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {prefix}{close[0]}?" if close else "; `lorikit config` lists them all"


def _explain(error: ValidationError) -> dict[str, str]:
    """One line for each problem, by the dotted name: that, what it was, what is allowed."""
    lines: dict[str, str] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        name = ".".join(path[:2])
        if item["type"] == "extra_forbidden":
            groups = list(RunConfig.model_fields)
            known = list(setting_names()) if len(path) > 1 else groups + list(setting_names())
            lines.setdefault(name, f"unknown setting {name}{_nearest(name, known)}")
        elif item["type"] == "missing":
            lines.setdefault(name, f"{name} is not set; {_required(path)}")
        elif not path:
            lines.setdefault(item["msg"], item["msg"].removeprefix("Value error, "))
        else:
            shown = repr(item["input"])
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            group = item["type"] == "model_type" and f"it is a group of settings: {', '.join(_fields(name))}"
            lines.setdefault(name, f"{name} is {shown}: {group or item['msg'].lower().replace('input', 'it', 1)}")
    return lines


def _required(path: Sequence[str]) -> str:
    if len(path) == 1:
        return f"the group needs {', '.join(k for k, v in _fields(path[0]).items() if v.is_required())}"
    return _fields(path[0])[path[1]].description or ""


def _fields(group: str) -> Any:
    return RunConfig.model_fields[group].annotation.model_fields  # type: ignore[union-attr]
