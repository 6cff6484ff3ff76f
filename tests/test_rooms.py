"""The rooms of the package, and who may import whom: what the folder listing says is true."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "face_fusion_pipeline"
CORE = "core"  # the flat modules, which diffusers copies with pipeline.py
FILES = "files"  # how all rooms read and write
# room -> rooms it may import; a room may always import itself, the core and the files
MAY_IMPORT = {
    CORE: {"cli"},  # __main__ alone
    FILES: set(),
    "generation": set(),
    "inspection": set(),
    "publishing": set(),
    "training": {"generation", "publishing"},
    "evaluation": {"generation", "training"},
    "avatars": {"generation", "publishing", "training", "evaluation"},
    "app": {"generation", "avatars"},
    "cli": {"app", "avatars", "evaluation", "generation", "publishing", "training"},
}


def room_of(module: list[str]) -> str:
    return module[0] if module and (PACKAGE / module[0]).is_dir() else CORE


def imported(path: Path) -> list[list[str]]:
    """The modules of the package that a file imports, also inside functions, as paths from the package."""
    folder = list(path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            found += [[*module, alias.name] for alias in node.names] if not module else [module]
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = PACKAGE.glob("*.py") if room == CORE else (PACKAGE / room).rglob("*.py")
    for path in files:
        for module in imported(path):
            target = room_of(module)
            assert target in {CORE, room, *({FILES} if room != CORE else ()), *MAY_IMPORT[room]}, (
                f"{path.relative_to(PACKAGE)} imports {'.'.join(module)}"
            )


def test_every_room_is_listed_and_none_is_in_a_circle() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT) - {CORE}
    placed: set[str] = {CORE, FILES}
    while left := set(MAY_IMPORT) - placed:
        free = {room for room in left if MAY_IMPORT[room] <= placed}
        assert free, f"these rooms import each other: {', '.join(sorted(left))}"
        placed |= free


def test_a_function_of_the_core_is_a_screenful() -> None:
    lengths = {
        f"{path.name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 60}
    assert len((PACKAGE / "face_fusion_mixin.py").read_text().splitlines()) < 250
