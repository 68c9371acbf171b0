"""The shape of the package: who may import whom, how long a file may be, what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_evopress"
NAME = "hf_evopress"

# A module imports from rows above and from its own row, without cycles. A name with `/` stands
# for every module in that folder; the first row knows names, levels and integers, never torch.
LAYERS = (
    "level patterns plugins resources after_import hub_errors plan_repo card_template plan_push "
    "plan genes space budget drop_counts knapsack pareto paired mixture search_log surrogate "
    "rounds evopress_search swap evolve baselines search recipe recipe_schema",
    "devices checksums linalg packing recompute grid codes obs sparse methods/ compose menu "
    "runtimes layers",
    "experts plain ranks data token_cache units sub_blocks dropped fingerprint stream calibrate "
    "sensitivity store stitch fitness/ objective head evaluator scores diagnose patching "
    "asymmetric written two_streams rounding block_tuning refined refine refined_levels foreign",
    "config compress_on_load loading_checks quantizer",
    "peft_layers adapters lord eora eora_ranks merge kappa distill tunable trainer "
    "export/ evaluate size report plots cards hub html_report published",
    "problem tables reporting job repair tune finish measure pipeline refine_plan front convert "
    "end_to_end follow_up",
    "cli/ __main__",
)
# Heavy or optional: imported inside the function that needs them.
LAZY = {"peft", "datasets", "gguf", "matplotlib", "compressed_tensors", "lm_eval", "optimum"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


@lru_cache(maxsize=None)
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """Return "methods.rtn" for hf_evopress/methods/rtn.py, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {module_name(path): path for path in FILES}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def layer(module: str) -> int:
    """Return the row of LAYERS that holds `module`; the package itself is above them all."""
    folder, _, name = module.rpartition(".")
    for row, names in enumerate(LAYERS):
        if (folder + "/" if folder else name) in names.split():
            return row
    raise LookupError(f"{module} is in no row of LAYERS in {Path(__file__).name}: add it")


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Yield the absolute names that a file imports, in functions too unless told otherwise."""
    package = module_name(path).split(".") if path.name == "__init__.py" else None
    parents = package or module_name(path).split(".")[:-1]
    base = [NAME, *(p for p in parents if p)]
    for node in ast.walk(tree(path)) if everywhere else top_level(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from top_level(child)


def inner_imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Return the modules of the package that a file imports."""
    found = set()
    for name in imports(path, everywhere=everywhere):
        if name == NAME or name.startswith(f"{NAME}."):
            inner = name.removeprefix(NAME).removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    # `from . import plugins` goes through __init__ only for names that live there.
    return found - {module_name(path), ""}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - PACKAGES))
def test_a_module_imports_from_its_own_row_or_a_row_above(module: str) -> None:
    row = layer(module)
    too_high = sorted(m for m in inner_imports(MODULES[module]) - PACKAGES if layer(m) > row)
    assert not too_high, f"{module} (row {row}) imports {too_high} of later rows"


def test_there_are_no_import_cycles() -> None:
    graph = {m: inner_imports(MODULES[m]) for m in MODULES.keys() - PACKAGES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for other in sorted(graph.get(module, ())):
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in LAYERS[0].split() if m in MODULES])
def test_the_first_row_never_names_torch(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"torch", "transformers", "numpy", "safetensors"}


def test_the_first_row_loads_without_torch() -> None:
    modules = [f"{NAME}.{m}" for m in LAYERS[0].split() if m in MODULES]
    assert not loaded_by(f"import {', '.join(modules)}") & {"torch", "transformers"}


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after running `code`."""
    code += "\nimport sys; print('\\n' + ' '.join({m.partition('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


COMMANDS = ("--help", "show --help", "list --help", "compress --help")


@pytest.mark.parametrize("command", COMMANDS if "cli" in MODULES else ())
def test_help_answers_without_torch(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['hf-evopress', *{command.split()!r}]\n"
        f"from {NAME}.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert not loaded_by(code) & {"torch", "transformers", "peft", "datasets", "matplotlib"}


@every_file
def test_heavy_packages_are_imported_inside_functions(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path, everywhere=False)}
    assert not roots & LAZY


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("methods.")])
def test_a_method_knows_no_other_method_no_model_and_no_path(module: str) -> None:
    others = {m for m in inner_imports(MODULES[module]) if m.startswith("methods.")}
    assert others <= {"methods.base"}
    assert layer("compose") == layer(module)
    assert "compose" not in inner_imports(MODULES[module])
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"transformers", "pathlib", "os", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("export.")])
def test_an_export_never_sees_the_search(module: str) -> None:
    assert not inner_imports(MODULES[module]) & {"search", "space", "knapsack", "evaluator"}


@every_file
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@every_file
def test_a_function_fits_on_a_screen(path: Path) -> None:
    functions = (
        n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= MAX_FUNCTION_LINES]
    assert not long


@every_file
def test_a_file_begins_with_what_it_is_for(path: Path) -> None:
    empty = not tree(path).body
    assert empty or ast.get_docstring(tree(path)), "a module needs a docstring"


@every_file
def test_only_the_command_line_prints(path: Path) -> None:
    if path.parent.name != "cli":
        assert "print" not in {name for name, _ in calls(path)}


@every_file
def test_nothing_is_pickled(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {"torch.load", "torch.save"} & {name for name, _ in calls(path)}
    unsafe = [call for name, call in calls(path) if name in ("yaml.load", "yaml.unsafe_load")]
    assert not unsafe, "yaml.safe_load reads data; yaml.load runs it"


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@every_file
def test_errors_are_caught_by_name(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = {ast.unparse(c) for c in caught} & {"Exception", "BaseException"}
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue  # cleans up and passes the error on
            assert not broad, f"line {node.lineno}: except {broad.pop()}"


@every_file
def test_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [w for w in ("TODO", "FIXME", "XXX", "NotImplementedError") if w in text]


def test_every_file_is_named_by_its_idea() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
    assert not {path.stem for path in FILES} & vague


def test_optimum_stays_a_namespace_package() -> None:
    assert not list((PACKAGE.parent / "optimum").rglob("__init__.py"))
