"""The layout's laws: imports point downwards, no circles, one class per name, private torch in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "gradfold"

# Highest first: a module imports only from lines below its own; packages on one line do not import each other.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["compare", "doctor"],
    ["workloads"],
    ["verification", "integrations"],
    ["train_step"],
    ["accumulator"],
    ["windows"],
    ["memory", "packing", "batchnorm", "twophase", "dropout"],
    ["self_check", "distributed", "precision"],
    ["engine"],
    ["weights"],
    ["state", "batch", "losses"],
    ["errors", "messages", "torch_private"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def shown(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def part(path: Path) -> str:
    """The package that a file belongs to, or its own name at the root."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def gradfold_imports(path: Path) -> set[str]:
    """The modules of gradfold that a file imports, as dotted names, those inside functions included."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "gradfold"}


def module_file(name: str) -> Path | None:
    base = SOURCE.joinpath(*name.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def imported_files(path: Path) -> set[Path]:
    found = {module_file(name) for name in gradfold_imports(path)}
    return {file for file in found if file not in (None, SOURCE / "__init__.py", path)}


def test_imports_point_downwards():
    offenders = [
        f"{shown(path)} imports {shown(other)}"
        for path in MODULES
        for other in imported_files(path)
        if part(path) != part(other) and LEVEL[part(path)] >= LEVEL[part(other)]
    ]
    assert offenders == []


def test_the_page_on_design_has_the_same_lines():
    page = (SOURCE.parent.parent / "docs" / "design.md").read_text()
    lines = page.partition("## The import law")[2].split("```")[1].strip().splitlines()
    # A number, then names with three spaces between neighbors; more spaces before what is said of them.
    named = [set(re.split(r" {4,}", re.sub(r"^ *\d+ +", "", line))[0].split()) for line in lines]
    assert named == [set(names) for names in LAYERS]


def test_every_module_is_on_a_line():
    assert {part(path) for path in MODULES} <= set(LEVEL)


def test_there_are_no_circles():
    graph = {path: imported_files(path) for path in MODULES}
    done: set[Path] = set()
    circles: list[str] = []

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        if path in trail:
            circles.append(" -> ".join(map(shown, (*trail[trail.index(path) :], path))))
            return
        if path not in done:
            for other in graph.get(path, ()):
                visit(other, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())
    assert circles == []
    assert done == set(graph)


def test_no_two_classes_share_a_name():
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{shown(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


# Attributes of torch's own records that are private to it (FSDP's above all).
PRIVATE_ATTRIBUTES = {
    *("_fsdp_param_groups", "_get_fsdp_state", "_mp_policy", "_orig_cls_mro_index", "_orig_size", "_unsharded_param"),
    *("_states_to_forward_prefetch", "_states_to_backward_prefetch", "_flatten", "_sync_buffers", "_use_count"),
    *("_orig_mod", "_compiled_call_impl", "_opname", "_input_metadata", "_cdata", "_apply"),
}


def private_torch(path: Path) -> set[str]:
    """The private names of torch that a file uses: modules, functions, modes, attributes of its records."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(part.startswith("_") for part in parts) or node.module == "torch.overrides":
                found.add(node.module)
        elif isinstance(node, ast.Attribute):
            is_of_torch = ast.unparse(node.value).split(".")[0] == "torch"
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if (is_of_torch and is_private) or node.attr in PRIVATE_ATTRIBUTES:
                found.add(node.attr)
    return found


def test_private_torch_is_named_in_one_module_per_package():
    offenders = {shown(path): private_torch(path) for path in MODULES if path.name != "torch_private.py"}
    assert {name: found for name, found in offenders.items() if found} == {}


def test_nothing_is_a_drawer_for_everything():
    names = {name for path in MODULES for name in (path.stem, path.parent.name)}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_torch_distributed_is_named_in_one_package():
    naming = {part(path) for path in MODULES if "torch.distributed" in path.read_text()}
    assert naming <= {"distributed", "torch_private"}


def test_only_the_command_line_prints():
    offenders = [
        shown(path)
        for path in MODULES
        if part(path) not in ("cli", "__main__")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert offenders == []


def test_the_library_needs_torch_alone():
    """Everything below `workloads` imports the standard library, torch and gradfold."""
    offenders = []
    for path in MODULES:
        if LEVEL[part(path)] <= LEVEL["workloads"]:
            continue
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top not in {"torch", "gradfold"}:
                    offenders.append(f"{shown(path)} imports {name}")
    assert offenders == []


def test_the_reference_of_a_proof_imports_nothing_of_ours():
    assert gradfold_imports(SOURCE / "verification" / "reference.py") == set()


def test_every_file_says_what_it_is():
    docstrings = {shown(path): ast.get_docstring(tree(path)) or "" for path in MODULES}
    assert [name for name, text in docstrings.items() if len(text.partition("\n")[0]) < 20] == []


def test_a_window_in_the_steady_state_enters_few_functions():
    """`dev/count_calls.py` lists them. In a fresh process, since what it counts is what runs when nothing is new."""
    script = SOURCE.parent.parent / "dev" / "count_calls.py"
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    files, functions = map(int, re.findall(r"(\d+) files, (\d+) functions", output)[0])
    assert files <= 10 and functions <= 60
