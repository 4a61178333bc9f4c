"""The verbs that judge runs: compare and runs. They read a finished run and never change what training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorikit.cli_data import Json, print_json, say
from lorikit.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from lorikit.report.compare import Compared


def compare(
    run: Path,
    /,
    *others: Path,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    rows: int | None = None,
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Put the same prompts to a run and to its base: losses, answers, what was forgotten, and a verdict with its reasons.

    Writes compare.json and report.html into the run folder. With two runs, those two side by side, as far as they compare.

    Parameters
    ----------
    run
        A run folder; or a checkpoint or a PEFT adapter folder, of which nothing is written.
    others
        A second run folder.
    output
        With two runs: also write them as one HTML page, with their curves over each other.
    rows
        Look at so many held-out and trained rows, instead of a number that takes about a minute.
    device
        auto, cpu, cuda, cuda:N or mps.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows is {rows}: a number of rows, 1 or more")
    if len(others) > 1:
        raise ConfigError("compare takes one run, or two to put side by side; `lorikit runs DIR` lists more of them")
    if output is not None and not others:
        raise ConfigError("--output is for two runs; of one run the page is report.html in its folder")
    if others:
        from lorikit.report.beside import write_beside
        from lorikit.report.runs import render_side_by_side, side_by_side

        beside = side_by_side(run, others[0])
        if output is not None:
            say(f"{write_beside(output, beside)}")
        print_json(beside) if as_json else render_side_by_side(beside)
        return
    compared = _compare(run, rows, device)
    if as_json:
        print_json(compared.to_dict())
    else:
        from lorikit.report.view import render

        render(compared.comparison, compared.verdict)


def runs(folder: Path, /, *, as_json: Json = False) -> None:
    """The runs in a folder: state, the settings in which they differ, held-out loss, speed, verdict.

    Parameters
    ----------
    folder
        A folder with run folders in it, or below those.
    """
    from lorikit.report.runs import list_runs, render_runs

    found = list_runs(folder)
    print_json(found) if as_json else render_runs(found)


def compare_after_training(run: Path) -> None:
    """Compare a finished run and show it on stderr. Whatever happens here the run stays finished: nothing is raised."""
    from lorikit.train.signals import Signals

    again = f"`lorikit compare {run}` does it later"
    try:
        with Signals():
            from lorikit.report.compare import is_compared
            from lorikit.report.view import render

            if is_compared(run):
                return
            compared = _compare(run, None, "auto")
            render(compared.comparison, compared.verdict, to_stderr=True)
    except Interrupted:
        say(f"the comparison with the base was stopped; the run is finished, and {again}")
    except Exception as error:  # a comparison that fails is no failure of the training
        say(f"the run is finished, but could not be compared with its base ({type(error).__name__}: {error}); {again}")


def _compare(run: Path, rows: int | None, device: str) -> Compared:
    from lorikit.report.compare import compare as compare_run
    from lorikit.report.page import write_page

    compared = compare_run(run, rows=rows, device=device, say=say)
    if compared.written:
        say(f"{compared.written} and {write_page(run, compared)}, {compared.comparison.seconds:.0f} s")
    return compared


Compare = Annotated[
    bool,
    Parameter(name="--compare", help="Compare the finished run with its base (about a minute); --no-compare does not."),
]
