"""Imports go one way: a module imports only modules of lower floors. Walks the sources, runs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lower floor first; modules of one floor may not import each other, except inside one package.
FLOORS = [
    ["errors"],
    ["records", "quiet", "download", "userfile", "fetched"],
    ["statistics", "flow"],
    ["adapters"],
    ["prompts"],
    ["scorers"],
    ["geneval2_prompts", "drawbench", "compbench"],
    ["tiny"],
    ["pipeline"],
    ["models"],
    ["others"],
    ["benches"],
    ["store"],
    ["harness", "doctor"],
    ["rescore", "report", "compare", "export", "official", "paper", "compbench_layout"],
    ["explain", "gallery", "terminal"],
    ["job", "hub"],
    ["publishing_cli"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
SIBLINGS = ["training", "comfy_nodes", "app", "benchmarks"]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # ComfyUI loads the pack under a name of its own: it finds its own files only relatively
                assert path.relative_to(ROOT).parts[0] == "comfy_nodes", f"{path}: relative import"
                continue
            found += [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "flowopd_eval").parts[0].removesuffix(".py")


CORE = sorted(
    p for p in (ROOT / "flowopd_eval").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "flowopd_eval"
)


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_only_lower_floors(path: Path) -> None:
    here = room(path)
    assert here in LEVEL, f"{here} has no floor: give it one here and in the README's tree"
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in SIBLINGS, f"{path} imports {name}"
        if parts[0] == "flowopd_eval" and len(parts) > 1 and parts[1] != here:
            assert LEVEL.get(parts[1], 99) < LEVEL[here], f"{path} (floor {LEVEL[here]}) imports {name}"


@pytest.mark.parametrize("folder", SIBLINGS)
def test_the_folders_beside_the_core_never_import_one_another(folder: str) -> None:
    allowed = {folder} | ({"training"} if folder == "benchmarks" else set())  # what it measures
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & (set(SIBLINGS) - allowed), path


def test_the_core_comes_without_heavy_libraries() -> None:
    code = "import sys, flowopd_eval, flowopd_eval.cli, flowopd_eval.models, flowopd_eval.benches;"
    code += "print([m for m in ('torch', 'diffusers', 'transformers', 'cv2', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
