"""The layout's promises: imports point downwards, there are no circles, nothing is called utils."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gradfold"

# Highest first: a module imports only from lines below its own; neighbours on a line do not import each other.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["compare", "doctor"],
    ["workloads"],
    ["verification"],
    ["train_step"],
    ["accumulator"],
    ["opening"],
    ["cutting"],
    ["loader"],
    ["loop_window"],
    ["self_check", "coupled", "memory"],
    ["examination", "padding_check"],
    ["glance"],
    ["examined"],
    ["trial", "replay", "sharded"],
    ["inspection", "agreement", "token_split", "surroundings"],
    ["stopwatch", "padded_rows"],
    ["transaction", "window"],
    ["precision", "metric", "feed", "sharding"],
    ["loss"],
    ["weight"],
    [
        "split",
        "backward",
        "gradients",
        "hooks",
        "buffers",
        "random_state",
        "attributes",
        "sync",
        "rendezvous",
        "draws_ahead",
        "reach",
        "lazy",
    ],
    ["ranks"],
    ["recovery", "fitting_size", "out_of_memory", "token_budget", "trimming"],
    ["draws", "mixture", "weight_search", "accusation", "jitter", "dropout"],
    ["row_count"],
    ["batch", "losses"],
    ["length_plan"],
    ["rows", "errors", "warning", "version"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def part(path: Path) -> str:
    """The name of the line that a file belongs to: its folder in src/gradfold, or its own name."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def gradfold_imports(path: Path) -> set[str]:
    """The modules of gradfold that a file imports, as dotted names, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "gradfold"}


def module_file(name: str) -> Path | None:
    base = SOURCE.joinpath(*name.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path):
    own = part(path)
    for name in gradfold_imports(path):
        file = module_file(name)
        if file is None or file == SOURCE / "__init__.py":
            continue
        other = part(file)
        assert other == own or LEVEL[other] > LEVEL[own], f"{own} imports {other}"


def test_the_page_on_design_has_the_same_lines():
    page = (SOURCE.parent.parent / "docs" / "design.md").read_text()
    lines = page.partition("## The lines")[2].split("```")[1].strip().splitlines()
    # Three spaces between neighbours, more before what is said of them.
    named = [set(re.split(r" {4,}", line)[0].split()) for line in lines]
    assert named == [set(names) for names in LAYERS]


def test_every_module_is_on_a_line():
    assert {part(path) for path in MODULES} == set(LEVEL)


def test_there_are_no_circles():
    graph = {path: {module_file(name) for name in gradfold_imports(path)} - {None, path} for path in MODULES}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(str(step.relative_to(SOURCE)) for step in (*trail, path))
        if path not in done:
            for other in graph.get(path, ()):
                visit(other, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())
    assert len(done) >= len(MODULES)


def test_nothing_is_a_drawer_for_everything():
    names = {name for path in MODULES for name in (path.stem, path.parent.name)}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_torch_distributed_is_named_in_one_place():
    naming = {part(path) for path in MODULES if "torch.distributed" in path.read_text()}
    assert naming <= {"ranks", "sync", "sharding", "rendezvous"}


def test_only_the_command_line_prints():
    for path in MODULES:
        if part(path) in ("cli", "__main__"):
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_the_library_needs_torch_alone():
    """Everything below `workloads` imports the standard library, torch and gradfold."""
    import sys

    for path in MODULES:
        if LEVEL[part(path)] <= LEVEL["workloads"]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in {"torch", "gradfold"}, (path, name)


def test_the_reference_of_a_proof_imports_nothing_of_ours():
    assert gradfold_imports(SOURCE / "verification" / "reference.py") == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_file_says_what_its_noun_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring.splitlines()[0]) >= 20
