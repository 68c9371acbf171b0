"""The shape of the package: who may import whom, how long a file may be, what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_evopress"
NAME = "hf_evopress"

# The rooms, in the order of the pipeline. A module imports from its own room and from rooms above.
ROOMS = [
    "base",
    "plans",
    "methods",
    "models",
    "search",
    "recipes",
    "calibration",
    "store",
    "scoring",
    "loading",
    "serving",
    "export",
    "refine",
    "adapters",
    "training",
    "sharing",
    "jobs",
    "cli",
]
NO_TORCH = ("plans", "search", "recipes")  # names, levels and integers
ROOM_RULE = f"a room imports only from rooms above it: {', '.join(ROOMS)}"
# Heavy or optional: imported inside the function that needs them.
LAZY = {
    *("peft", "datasets", "gguf", "matplotlib", "compressed_tensors", "lm_eval", "optimum"),
    *("onnx", "onnxruntime", "onnxscript", "soundfile"),
}
LAZY |= {"numba", "llvmlite", "xllamacpp"}
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


def room(module: str) -> int:
    """Return the place in ROOMS of the room that `module` lies in."""
    name = module.partition(".")[0]
    if name not in ROOMS:
        raise LookupError(f"{module} is in no room: move it into one of {', '.join(ROOMS)}")
    return ROOMS.index(name)


def imports(
    path: Path, *, everywhere: bool = True, nodes: Sequence[ast.AST] | None = None
) -> Iterator[str]:
    """Yield the absolute names that a file imports, in functions too unless told otherwise."""
    package = module_name(path).split(".") if path.name == "__init__.py" else None
    parents = package or module_name(path).split(".")[:-1]
    base = [NAME, *(p for p in parents if p)]
    if nodes is None:
        nodes = list(ast.walk(tree(path)) if everywhere else top_level(tree(path)))
    for node in nodes:
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


def inner_imports(path: Path, *, nodes: Sequence[ast.AST] | None = None) -> set[str]:
    """Return the modules of the package that a file imports."""
    found = set()
    for name in imports(path, nodes=nodes):
        if name == NAME or name.startswith(f"{NAME}."):
            inner = name.removeprefix(NAME).removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    # `from . import plugins` goes through __init__ only for names that live there.
    return found - {module_name(path), ""}


def lines_of(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Yield the line of every import of a file and the modules of the package that it names."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno, inner_imports(path, nodes=[node])


@pytest.mark.parametrize("module", sorted(MODULES.keys() - PACKAGES - {"__main__"}))
def test_a_room_imports_only_from_rooms_above(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {other}"
        for line, found in lines_of(path)
        for other in sorted(found)
        if room(other) > room(module)
    ]
    assert not wrong, f"{'; '.join(wrong)}; {ROOM_RULE}"


def test_nothing_lies_loose_outside_the_rooms() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}, "every module lies in a room"
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("name", [*ROOMS[:-1], "methods/maths", "scoring/fitness", "scoring/kick"])
def test_a_door_plate_says_what_goes_in_and_out_and_imports_nothing(name: str) -> None:
    path = PACKAGE / name / "__init__.py"
    assert not list(imports(path))
    doc = ast.get_docstring(tree(path)) or ""
    assert 3 <= len(doc.splitlines()) <= 8
    assert "In:" in doc and "Out:" in doc and "Open first:" in doc
    named = [w.strip(".,;()`") for w in doc.split() if w.strip(".,;()`").endswith(".py")]
    missing = [
        w for w in named if not list((PACKAGE / name).rglob(w)) and not (PACKAGE / w).exists()
    ]
    assert named and not missing, f"{name}/__init__.py names {missing}"


def test_the_map_of_the_package_lists_every_room_in_order() -> None:
    doc = ast.get_docstring(tree(PACKAGE / "__init__.py")) or ""
    listed = [
        line.split()[0]
        for line in doc.splitlines()
        if line.split()[:1] and line.split()[0] in ROOMS
    ]
    assert listed == ROOMS


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


TORCHLESS = [
    *sorted(m for m in MODULES.keys() - PACKAGES if m.partition(".")[0] in NO_TORCH),
    "jobs.search_log",
]


@pytest.mark.parametrize("module", TORCHLESS)
def test_plans_search_and_recipes_never_name_torch(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"torch", "transformers", "numpy", "safetensors"}


def test_plans_search_and_recipes_load_without_torch() -> None:
    modules = [f"{NAME}.{m}" for m in TORCHLESS]
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


METHODS = [m for m in MODULES if m.startswith("methods.")]


@pytest.mark.parametrize("module", METHODS)
def test_a_method_knows_no_model_and_no_path(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"transformers", "pathlib", "os", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("module", [m for m in METHODS if m != "methods.menu"])
def test_a_method_knows_no_other_method(module: str) -> None:
    if module == "methods.compose":  # what the rest of the package calls methods through
        return
    others = {m for m in inner_imports(MODULES[module]) if m.startswith("methods.")}
    assert {m for m in others if not m.startswith("methods.maths")} <= {"methods.base"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("export.")])
def test_an_export_never_sees_the_search(module: str) -> None:
    seen = {m for m in inner_imports(MODULES[module]) if m.startswith(("search.", "scoring."))}
    assert not seen


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
def test_only_base_says_where_things_are_computed(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    wrong = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"))
        or (isinstance(node, ast.Call) and ast.unparse(node).endswith((".to('cuda')", ".cuda()")))
    ]
    assert room == "base" or not wrong, f"{path}: {wrong}; placement is base/placement.py's"


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
def test_tensors_that_a_cache_keeps_for_a_device_are_lasting(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = [ast.unparse(d).partition("(")[0] for d in node.decorator_list]
        about = [ast.unparse(arg.annotation or arg) for arg in node.args.args]
        is_of_device = any("torch.device" in words for words in about)
        makes = node.returns is not None and "Tensor" in ast.unparse(node.returns)
        if "lru_cache" in decorators and is_of_device and makes:
            assert decorators == ["lru_cache", "lasting"], f"line {node.lineno}: {node.name}"


@every_file
def test_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [w for w in ("TODO", "FIXME", "XXX", "NotImplementedError") if w in text]


def test_every_file_is_named_by_its_idea() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}
    assert not {path.stem for path in FILES} & vague


def test_optimum_stays_a_namespace_package() -> None:
    assert not list((PACKAGE.parent / "optimum").rglob("__init__.py"))


@every_file
def test_only_the_files_for_vllm_import_it_and_nothing_imports_those(path: Path) -> None:
    is_own = path.parent.name == "serving" and path.name.startswith("vllm_")
    roots = {name.partition(".")[0] for name in imports(path)}
    assert is_own or "vllm" not in roots
    assert is_own or not {m for m in inner_imports(path) if m.startswith("serving.vllm_")}


@every_file
def test_only_kernels_in_triton_import_it_and_nothing_imports_those(path: Path) -> None:
    is_own = path.name.startswith("triton_")
    roots = {name.partition(".")[0] for name in imports(path)}
    assert is_own or "triton" not in roots, "import_module at the first launch: gpu/launch.py"
    own = {m for m in inner_imports(path) if m.startswith("loading.kernels.gpu.triton_")}
    assert is_own or not own
