"""The command line: one function a verb, its docstring the help; heavy imports inside.

Results go to stdout, everything else to stderr. With --json stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from lorikit import __version__
from lorikit.cli_data import Flags, Json, build, check, print_json
from lorikit.cli_export import export, merge
from lorikit.cli_report import Compare, compare, compare_after_training, runs
from lorikit.cli_serve import serve
from lorikit.cli_web import web
from lorikit.errors import ConfigError, DiskError, LorikitError, ModelError, OutOfMemoryError

if TYPE_CHECKING:
    from lorikit.infer.session import Session
    from lorikit.model.engine import Sampling

app = App(
    name="lorikit",
    version=f"lorikit {__version__}",
    help="Fine-tune chat models with LoRA: rows in, an adapter that answers out.",
    help_format="markdown",
    help_epilogue=(
        "Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 data, 4 model, adapter or device, 5 diverged, "
        "6 out of memory, 7 disk, 75 stopped by a signal (the same command goes on), 130 interrupted (train: twice)."
    ),
)


@Parameter(name="*")
@dataclass(frozen=True)
class Answering:
    """How answers are chosen, for chat and generate.

    Parameters
    ----------
    greedy
        Always the likeliest token: temperature 0, no repetition penalty.
    max_new_tokens
        Longest answer.
    temperature
        0 is greedy; higher is more varied.
    top_p
        Choose among the likeliest tokens that together have this probability.
    top_k
        Choose among so many likeliest tokens; 0 is off.
    min_p
        Leave out tokens less likely than this share of the likeliest one; 0 is off.
    repetition_penalty
        Above 1 avoids words that were said.
    seed
        Makes sampled answers repeatable.
    base
        Without the adapter: of a run, or of a base model.
    merge
        Fold the adapter into the base in memory: answers take less time, and the base is not there alone.
    device
        auto, cpu, cuda, cuda:N or mps.
    """

    greedy: Annotated[bool, Parameter(negative="")] = False
    max_new_tokens: int = 512
    temperature: float = 0.5
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    seed: int | None = None
    base: Annotated[bool, Parameter(negative="")] = False
    merge: Annotated[bool, Parameter(negative="")] = False
    device: str = "auto"

    def sampling(self) -> Sampling:
        """The same as the engine takes it."""
        from lorikit.model.engine import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if self.greedy else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.greedy else self.repetition_penalty,
            seed=self.seed,
        )

    def open(self, run: str) -> Session:
        """The engine and encoder of a run; what was found otherwise than expected is said on stderr."""
        from lorikit.infer.session import open_run

        session = open_run(run, device=self.device, need_adapter=not self.base, merge=self.merge)
        for note in session.notes:
            print(note, file=sys.stderr)
        return session


@app.command
def download(
    name: str,
    /,
    *,
    revision: str | None = None,
    hub: str = "auto",
    data: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Download a model (or with --data a data set) and print its folder; the same command resumes a cut download.

    Parameters
    ----------
    name
        ms:ID (ModelScope), hf:ID (Hugging Face), a bare ID (what this machine can reach), a bundled model or a path.
    revision
        Branch, tag or commit.
    hub
        auto, modelscope or huggingface: where a bare ID is looked for.
    data
        The ID names a data set.
    """
    from lorikit.hub import resolve_data, resolve_model

    if hub not in ("auto", "modelscope", "huggingface"):
        raise ConfigError(f"--hub is {hub!r}: auto, modelscope or huggingface")
    found = (resolve_data if data else resolve_model)(name, revision=revision, hub=hub)
    if as_json:
        print_json({"name": found.name, "path": str(found.path), "hub": found.hub, "revision": found.revision})
    else:
        print(found.path)


app.command(build)
app.command(check, usage="Usage: lorikit check FILE... --model MODEL [OPTIONS]")
app.command(merge)
app.command(export)
app.command(serve)
app.command(web)
app.command(compare)
app.command(runs)


@app.command
def plan(
    config: Path,
    /,
    *flags: Flags,
    gpu: str | None = None,
    memory_gib: float | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    as_json: Json = False,
) -> None:
    """What RUN.yaml will need, before anything is loaded: engine, steps, memory by part, time, and what to change.

    Reads the rows as train does, of the model only config.json and the weights' headers (a model that is not on this machine
    is downloaded first, whole). A run that does not fit is answered with settings that do, with their figures; exits with 6
    if not even one row a forward fits.

    Parameters
    ----------
    config
        The YAML file of the run; or a run folder, to see what was predicted beside what was measured.
    gpu
        Plan for h100, h200, a100, a100-40, l40s, rtx4090 or rtx3090; by default for this machine's GPU, or its CPU.
    memory_gib
        Plan for a GPU with this much memory; without --gpu its speed is not known.
    gpus
        Plan for so many of them in a machine; memory is then that of each.
    nodes
        Plan for so many machines.
    """
    from lorikit.config import load_config

    settings = None if config.is_dir() else load_config(config, flags)
    from lorikit.train import plan as planning
    from lorikit.train.plan_view import render

    rows = partial(_show, what="rows")
    asked = bool(flags or gpu or memory_gib or gpus or nodes)
    planned = (
        planning.plan(settings, gpu, memory_gib, rows, gpus=gpus, nodes=nodes)
        if settings
        else planning.compare(config, asked=asked)
    )
    print_json(planned.to_dict()) if as_json else render(planned)
    if not planned.can_run:
        raise SystemExit(OutOfMemoryError.exit_code)


@app.command
def train(
    config: Path, /, *flags: Flags, gpus: int | None = None, compare: Compare = True, as_json: Json = False
) -> None:
    """Train an adapter as RUN.yaml says; the same command goes on with a run that was cut off.

    Any setting can follow as a flag, over the file: --lora.r 16 --train.learning_rate 2e-4. `lorikit config` lists them.

    Parameters
    ----------
    config
        The YAML file of the run.
    gpus
        Share the rows of each step among so many GPUs of this machine (where it has none, processes); the adapter is the
        same. torchrun does it for several machines: docs/distributed.md.
    """
    from lorikit.config import load_config

    settings = load_config(config, flags)  # before the slow imports: a typing error shows at once
    if gpus is not None:
        from lorikit.train.launch import launch

        more = (["--json"] if as_json else []) + ([] if compare else ["--no-compare"])
        launch(["train", str(config), *flags, *more], gpus)
        return
    from lorikit.train.join import speaks
    from lorikit.train.loop import train as run_training

    run = run_training(settings)
    if not speaks():
        return
    if as_json:
        print_json({"run": str(run), "adapter": str(run / "adapter")})
    else:
        print(run, flush=True)
    if compare:
        compare_after_training(run)


@app.command
def chat(run: str, /, *, answering: Answering | None = None) -> None:
    """Talk to a run: streaming, with history; /help lists the commands. With a piped stdin, a question a line.

    Parameters
    ----------
    run
        A run folder, a checkpoint, a PEFT adapter folder; with --base also a base model.
    """
    from lorikit.infer.chat import chat as talk

    answering = answering or Answering()
    talk(answering.open(run), answering.sampling())


@app.command
def generate(
    run: str,
    /,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="")] = None,
    file: Path | None = None,
    stop: Annotated[list[str] | None, Parameter(negative="")] = None,
    answering: Answering | None = None,
    as_json: Json = False,
) -> None:
    """Answer prompts, in batches, in their order.

    Parameters
    ----------
    run
        A run folder, a checkpoint, a PEFT adapter folder; with --base also a base model.
    prompt
        A question; may be given several times.
    file
        JSONL with one {"prompt": ...} or {"messages": [...]} a line.
    stop
        End an answer before this text; may be given several times.
    """
    from lorikit.infer.generate import answer, stream
    from lorikit.infer.prompts import answer_rows, prompt_of, read_prompts

    if bool(prompt) == (file is not None):
        raise ConfigError("generate needs either --prompt TEXT or --file prompts.jsonl")
    prompts = read_prompts(file) if file is not None else [prompt_of(text) for text in prompt or []]
    answering = answering or Answering()
    session = answering.open(run)
    if len(prompts) == 1 and not as_json and sys.stdout.isatty():
        for piece in stream(session, prompts[0].messages, answering.sampling(), stop or ()):
            print(piece, end="", flush=True)
        print()
        return
    shown = partial(_show, total=len(prompts), what="answers")
    answers = answer(session, [p.messages for p in prompts], answering.sampling(), shown, stop or ())
    if as_json:
        print_json(answer_rows(prompts, answers))
        return
    for asked, given in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            print(f"> {asked.messages[-1].content}")
        print(given.text)


@app.command
def config(file: Path | None = None, /, *flags: Flags, schema: Annotated[bool, Parameter(negative="")] = False) -> None:
    """The resolved settings of RUN.yaml as YAML; without a file, every setting with its default and meaning.

    Parameters
    ----------
    file
        The YAML file of a run; settings may follow as flags.
    schema
        The JSON schema instead, for editors.
    """
    from lorikit.config import RunConfig, describe, dump_config, load_config

    if schema:
        print_json(RunConfig.model_json_schema())
    elif file is None:
        print(describe(), end="")
    else:
        print(dump_config(load_config(file, flags)), end="")


@app.command
def doctor(run: Path | None = None, /, *, as_json: Json = False) -> None:
    """What this machine can do, and the one thing it lacks; with a run or adapter folder, whether that is whole.

    Parameters
    ----------
    run
        A run or adapter folder to look at.
    """
    from lorikit.doctor import doctor as examine
    from lorikit.doctor import render

    report = examine(run)
    if as_json:
        print_json(report.to_dict())
    else:
        render(report)
    if report.problems:
        raise SystemExit(ModelError.exit_code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code. Errors of users go to stderr without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries among themselves; nothing a user can act on
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows \\u4f60, not a traceback
    code = 1
    try:
        app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            help_on_error=False,
        )
        code = 0
    except CycloptsError as error:
        _complain(f"{str(error).strip()} Try: lorikit {' '.join(error.command_chain or ())} --help".replace("  ", " "))
        code = ConfigError.exit_code
    except LorikitError as error:
        _complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our stdout, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        _complain("out of memory; close other programs or take a smaller model or batch")
        code = OutOfMemoryError.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _complain(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
        code = DiskError.exit_code
    raise SystemExit(code)


def _complain(text: str) -> None:
    print(f"lorikit: {text}", file=sys.stderr)


def _show(done: int, total: int, what: str) -> None:
    """Shows on a terminal how many of `total` are done."""
    if total > 1 and sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)
