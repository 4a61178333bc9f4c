"""The house rules that can be counted: imports go one way, files and functions stay small, help stays quick."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorikit

SRC = Path(__file__).resolve().parent.parent / "src"
FILES = sorted(SRC.rglob("*.py"))

# Lowest first. A module may import from its own line and those above it; a new module has to be given its place here.
LAYERS = [
    ["lorikit", "lorikit.errors"],
    ["lorikit.config"],
    ["lorikit.hub", "lorikit.hub_clients", "lorikit.bundled", "lorikit.model_files"],
    [
        "lorikit.data",
        "lorikit.data.account",
        "lorikit.data.audit",
        "lorikit.data.border",
        "lorikit.data.build",
        "lorikit.data.build_view",
        "lorikit.data.characters",
        "lorikit.data.documents",
        "lorikit.data.encode",
        "lorikit.data.examples",
        "lorikit.data.faq",
        "lorikit.data.findings",
        "lorikit.data.fix",
        "lorikit.data.formats",
        "lorikit.data.lines",
        "lorikit.data.material",
        "lorikit.data.near",
        "lorikit.data.pack",
        "lorikit.data.privacy",
        "lorikit.data.probe",
        "lorikit.data.read",
        "lorikit.data.records",
        "lorikit.data.rows",
        "lorikit.data.scripts",
        "lorikit.data.split",
        "lorikit.data.suggest",
        "lorikit.data.tables",
        "lorikit.data.tokens",
        "lorikit.data.values",
        "lorikit.data.view",
        "lorikit.data.view_html",
        "lorikit.data.visible",
        "lorikit.data.writing",
    ],
    [
        "lorikit.model",
        "lorikit.model.decode_graph",
        "lorikit.model.decoder",
        "lorikit.model.decoder_adapter",
        "lorikit.model.decoder_batch",
        "lorikit.model.decoder_graph",
        "lorikit.model.decoder_config",
        "lorikit.model.decoder_decode",
        "lorikit.model.decoder_decode_host",
        "lorikit.model.decoder_generate",
        "lorikit.model.decoder_layer",
        "lorikit.model.decoder_load",
        "lorikit.model.decoder_loss",
        "lorikit.model.decoder_memory",
        "lorikit.model.decoder_offload",
        "lorikit.model.decoder_prefill",
        "lorikit.model.decoder_slots",
        "lorikit.model.decoder_stack",
        "lorikit.model.decoder_weights",
        "lorikit.model.engine",
        "lorikit.model.frozen",
        "lorikit.model.generic",
        "lorikit.model.kernels",
        "lorikit.model.host",
        "lorikit.model.kernels.adamw",
        "lorikit.model.kernels.attention",
        "lorikit.model.kernels.attention_triton",
        "lorikit.model.kernels.cross_entropy",
        "lorikit.model.kernels.decode_attention",
        "lorikit.model.kernels.dropout",
        "lorikit.model.kernels.fp8",
        "lorikit.model.kernels.launch",
        "lorikit.model.kernels.lora_a",
        "lorikit.model.kernels.lora_a_triton",
        "lorikit.model.kernels.lora_b",
        "lorikit.model.kernels.rmsnorm",
        "lorikit.model.kernels.rope",
        "lorikit.model.kernels.row_lora",
        "lorikit.model.kernels.sums",
        "lorikit.model.kernels.swiglu",
        "lorikit.model.kernels.swiglu_lora",
        "lorikit.model.load",
        "lorikit.model.lora",
        "lorikit.model.lora_fold",
        "lorikit.model.flash_attention_4",
        "lorikit.model.packed_attention",
        "lorikit.model.sampling",
        "lorikit.model.serial_decoding",
        "lorikit.model.sharded",
        "lorikit.model.streaming",
    ],
    [
        "lorikit.infer",
        "lorikit.infer.chat",
        "lorikit.infer.generate",
        "lorikit.infer.prompts",
        "lorikit.infer.session",
    ],
    [
        "lorikit.train",
        "lorikit.train.adamw",
        "lorikit.train.advice",
        "lorikit.train.card",
        "lorikit.train.checkpoint",
        "lorikit.train.cost",
        "lorikit.train.cost_decoder",
        "lorikit.train.cost_generic",
        "lorikit.train.cost_ops",
        "lorikit.train.distributed",
        "lorikit.train.evaluate",
        "lorikit.train.join",
        "lorikit.train.launch",
        "lorikit.train.live",
        "lorikit.train.loop",
        "lorikit.train.metrics",
        "lorikit.train.notebook",
        "lorikit.train.network",
        "lorikit.train.optim",
        "lorikit.train.plan",
        "lorikit.train.pulse",
        "lorikit.train.plan_costs",
        "lorikit.train.plan_view",
        "lorikit.train.predict",
        "lorikit.train.progress",
        "lorikit.train.run_folder",
        "lorikit.train.shared_state",
        "lorikit.train.signals",
        "lorikit.train.storage",
        "lorikit.train.training",
        "lorikit.train.writer",
    ],
    [
        "lorikit.report",
        "lorikit.report.beside",
        "lorikit.report.compare",
        "lorikit.report.curves",
        "lorikit.report.losses",
        "lorikit.report.page",
        "lorikit.report.panel",
        "lorikit.report.runs",
        "lorikit.report.svg",
        "lorikit.report.texts",
        "lorikit.report.values",
        "lorikit.report.verdict",
        "lorikit.report.view",
    ],
    ["lorikit.export", "lorikit.export.fold", "lorikit.export.merge", "lorikit.export.ollama", "lorikit.export.proof"],
    [
        "lorikit.serve",
        "lorikit.serve.answers",
        "lorikit.serve.app",
        "lorikit.serve.docs_page",
        "lorikit.serve.guard",
        "lorikit.serve.metrics",
        "lorikit.serve.models",
        "lorikit.serve.protocol",
        "lorikit.serve.run",
        "lorikit.serve.vllm",
        "lorikit.serve.words",
        "lorikit.serve.worker",
    ],
    [
        "lorikit.web",
        "lorikit.web.app",
        "lorikit.web.charts",
        "lorikit.web.client",
        "lorikit.web.folder",
        "lorikit.web.form",
        "lorikit.web.frame",
        "lorikit.web.page_compare",
        "lorikit.web.page_data",
        "lorikit.web.page_runs",
        "lorikit.web.page_train",
        "lorikit.web.process",
        "lorikit.web.run_view",
        "lorikit.web.texts",
        "lorikit.web.votes",
    ],
    [
        "lorikit.__main__",
        "lorikit.api",
        "lorikit.cli",
        "lorikit.cli_data",
        "lorikit.cli_export",
        "lorikit.cli_report",
        "lorikit.cli_serve",
        "lorikit.cli_web",
        "lorikit.doctor",
    ],
]
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}
HEAVY = ["torch", "transformers", "peft", "numpy", "pyarrow", "modelscope", "huggingface_hub", "tokenizers"]


def name_of(path: Path) -> str:
    """src/lorikit/data/read.py -> lorikit.data.read"""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}


def own_imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every lorikit module that a file imports, at its top, in a function or for types only, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "lorikit")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports out, without dots"
            if node.module and node.module.split(".")[0] == "lorikit":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    lazy = lorikit._HOME.get(alias.name) if node.module == "lorikit" else None
                    yield lazy or (inner if inner in MODULES else node.module), node.lineno


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Module-level functions and classes without an underscore, and the methods of these classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = (m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef))
                yield from (m for m in methods if not m.name.startswith("_"))


def test_every_module_has_its_place_in_the_order_and_no_place_is_empty():
    assert set(MODULES) - set(LAYER) == set(), "give these a place in LAYERS"
    assert set(LAYER) - set(MODULES) == set(), "these are gone; take them out of LAYERS"


def test_imports_go_one_way():
    upward = [
        f"{module}:{line} imports {other}"
        for module, tree in MODULES.items()
        for other, line in own_imports(tree)
        if LAYER.get(other, 0) > LAYER.get(module, len(LAYERS))
    ]
    assert upward == []


def at_run_time(tree: ast.Module) -> ast.Module:
    """The file without what stands under `if TYPE_CHECKING:`."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(body, type_ignores=[])


def test_no_module_imports_itself_through_others():
    graph = {
        module: {other for other, _ in own_imports(at_run_time(tree))} - {module} for module, tree in MODULES.items()
    }
    while free := [module for module, others in graph.items() if not others & set(graph)]:
        for module in free:
            del graph[module]
    assert graph == {}, f"a circle of imports among {sorted(graph)}"


def test_no_file_is_over_400_lines():
    lengths = {str(path.relative_to(SRC)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}


def test_no_function_is_over_60_lines():
    long = [
        f"{module}:{function.lineno} {function.name} has {function.end_lineno - function.lineno + 1}"
        for module, tree in MODULES.items()
        for function in functions(tree)
        if function.end_lineno - function.lineno + 1 > 60
    ]
    assert long == []


def test_every_module_and_everything_public_says_what_it_is():
    silent = [module for module, tree in MODULES.items() if not ast.get_docstring(tree) and tree.body]
    silent += [
        f"{module}:{node.lineno} {node.name}"
        for module, tree in MODULES.items()
        for node in public(tree)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_nothing_is_a_stub_and_nothing_is_pickled():
    banned = {"NotImplementedError", "pickle", "dill", "cloudpickle", "joblib", "torch.load", "torch.save"}
    found = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Name | ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [f"{module}:{node.lineno} {name}" for name in names if name in banned]
    assert found == []


def test_no_exception_is_swallowed():
    found = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                if node.type is None or (everything and all(isinstance(inner, ast.Pass) for inner in node.body)):
                    found.append(f"{module}:{node.lineno}")
    assert found == []


def imported_names(tree: ast.Module) -> set[str]:
    """Local names that stand for something of another module, wherever in the file they are imported."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def written(node: ast.AST) -> Iterator[ast.expr]:
    """The attributes that a statement assigns to, deletes, or sets by name."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        yield node.args[0]
    for target in targets:
        for inner in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
            if isinstance(inner, ast.Attribute):
                yield inner.value


def test_nothing_is_assigned_into_another_package():
    found = []
    for module, tree in MODULES.items():
        names = imported_names(tree)
        for node in ast.walk(tree):
            for owner in written(node):
                root = owner
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in names:
                    found.append(f"{module}:{owner.lineno} {ast.unparse(owner)}")
    assert found == []


RUNNER = """
import json, sys
from lorikit.cli import main
report = sys.argv.pop(1)
try:
    main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
with open(report, "w") as out:
    json.dump([code, sorted(sys.modules)], out)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "--schema"]])
def test_help_and_schema_import_nothing_heavy(tmp_path, arguments):
    out = tmp_path / "modules.json"
    command = [sys.executable, "-c", RUNNER, str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr
    status, modules = json.loads(out.read_text())
    assert status in (0, None)
    assert [name for name in HEAVY if name in modules] == []


def test_help_starts_in_half_a_second_of_processor_time():
    command = [str(Path(sys.executable).parent / "lorikit"), "--help"]
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5, seconds  # processor time, so that a busy machine does not fail it
