"""Claims: the house rules that ruff does not check: who imports whom, and how long each part is."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = dict(losses=170, predictor=75, data=230, model=200, train=300, evaluate=230)
# a part imports itself and parts of earlier layers, nothing else of this repository
LAYERS = (("support", "losses", "predictor"), ("data",), ("model",), ("evaluate",), ("train",),
          ("world",), ("baselines",), ("published",), ("analysis",), ("docs", "tiny-vlm"))
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}
# a function may import packages that are optional, or take long and are rarely needed
LATE = ("matplotlib", "sklearn", "peft", "pyarrow", "torch.distributed", "train")
CORE = [ROOT / f"{name}.py" for name in BUDGETS]
SOURCE = CORE + [file for part in LAYER for file in sorted((ROOT / part).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LINES = {file: file.read_text(encoding="utf-8").splitlines() for file in SOURCE + TESTS}
TREES = {file: ast.parse("\n".join(lines)) for file, lines in LINES.items()}
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in SOURCE}


def imports(tree) -> set[str]:
    """Dotted names: of `from support import images`, support and support.images."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name for node in nodes for alias in node.names for name in (
        (alias.name,) if isinstance(node, ast.Import)
        else (node.module, f"{node.module}.{alias.name}"))}


def test_imports_go_one_way_and_in_no_circle():
    for module, file in MODULES.items():
        part = module.partition(".")[0]
        others = {name.partition(".")[0] for name in imports(TREES[file])} & LAYER.keys() - {part}
        assert all(LAYER[other] < LAYER[part] for other in others), (module, others)
    # train.py imports itself when it is run as a program
    TopologicalSorter({module: (imports(TREES[file]) & MODULES.keys()) - {module}
                       for module, file in MODULES.items()}).prepare()


def test_functions_are_short_and_imports_are_at_the_top():
    for file in LINES:
        for node in ast.walk(TREES[file]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 50, (file, node.name)
                late = {name for name in imports(node) if not name.startswith(LATE)}
                assert file in TESTS or not late, (file, node.name, late)


def test_the_house_is_small():
    assert all(len(LINES[file]) <= BUDGETS[file.stem] for file in CORE)
    # comments on a line of their own, in the six files: one for eight lines
    text = [line.strip() for file in CORE for line in LINES[file] if line.strip()]
    assert 8 * sum(line.startswith("#") for line in text) >= len(text)
    core, source, tests = (sum(len(LINES[f]) for f in files) for files in (CORE, SOURCE, TESTS))
    assert core <= 1200 and source <= 8000 and tests <= 5000, (core, source, tests)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
