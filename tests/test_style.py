"""Claims: the countable house rules. Six files that are read in one sitting, and rooms that can be
skipped: their length, their lines, their functions, who imports whom."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ("losses.py", "predictor.py", "data.py", "model.py", "train.py", "evaluate.py")
ROOMS = ("support", "baselines", "world", "analysis", "published", "tests")
# What each part may import of this repository when it is loaded. A test may import everything.
ALLOWED = {
    "losses": set(), "predictor": set(), "data": {"support"}, "model": {"data", "support"},
    "train": {"data", "evaluate", "losses", "model", "predictor", "support", "baselines", "world"},
    "evaluate": {"data", "losses", "model", "support", "baselines", "world"},
    "support": {"support"},
    "baselines": {"losses", "predictor", "data", "model", "support", "baselines", "world"},
    "world": {"support", "world"},
    "analysis": {"losses", "predictor", "data", "model", "train", "evaluate", "support",
                 "baselines", "world", "analysis", "published"},
    "published": {"data", "model", "evaluate", "support", "world", "analysis", "published"},
}
# Here, inside a function, a part may reach what it may not when it is loaded.
LATER = {("data.py", "analysis"), ("evaluate.py", "analysis")}


def files(*rooms):
    found = [ROOT / name for name in CORE]
    for room in rooms:
        found += sorted((ROOT / room).glob("*.py"))
    return found


def name_of(file):
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(file):
    return [node for node in ast.walk(tree_of(file))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def at_load(tree):
    """Every statement that runs when the module is loaded: what is inside functions does not."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [child for child in ast.iter_child_nodes(node)
                    if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]


def imported(nodes):
    """The repository's own modules and rooms that these statements import, by their first name."""
    ours = {Path(name).stem for name in CORE} | set(ROOMS)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names & ours


def faults(file):
    """What a file has that the rules forbid, in words."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if len(line) > 100:
            found.append(f"line {number} has {len(line)} columns")
    for function in functions(file):
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        if (length := function.end_lineno - first + 1) > 50:
            found.append(f"{function.name} has {length} lines")
    if name_of(file).startswith("tests/"):
        return found
    for node in ast.walk(tree_of(file)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(getattr(node, "value", None), ast.Lambda) \
                and any(isinstance(target, ast.Name) for target in targets):
            found.append(f"line {node.lineno} gives a lambda a name: it is a function")
    for function in functions(file):
        if (count := unnamed_values(function)) > 3:
            found.append(f"{function.name} returns {count} unnamed values: use a NamedTuple")
    return found


def own_nodes(function):
    """The function's nodes without those of functions inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def unnamed_values(function):
    """The largest tuple that a function returns or says that it returns."""
    tuples = [node.value for node in own_nodes(function)
              if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)]
    tuples += [node.slice for node in ast.walk(function.returns or ast.Pass())
               if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
               and isinstance(node.value, ast.Name) and node.value.id == "tuple"]
    return max((len(t.elts) for t in tuples), default=1)


def test_the_six_files_are_read_in_one_sitting():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in CORE}
    assert sum(lines.values()) <= 1500, lines
    assert lines["train.py"] <= 350, lines


@pytest.mark.parametrize("file", files(*ROOMS), ids=name_of)
def test_lines_functions_lambdas_and_returns(file):
    assert not faults(file)


@pytest.mark.parametrize("file", files(*ROOMS[:-1]), ids=name_of)
def test_imports_go_one_way(file):
    tree, name = tree_of(file), name_of(file)
    part = name.partition("/")[0].removesuffix(".py")
    loaded = imported(at_load(tree))
    assert loaded <= ALLOWED[part], f"{name} imports {sorted(loaded - ALLOWED[part])}"
    later = {(name, module) for module in imported(ast.walk(tree)) - loaded}
    assert {(n, module) for n, module in later if module not in ALLOWED[part]} <= LATER


def test_only_analysis_and_tests_import_the_program():
    who = {name_of(file).partition("/")[0] for file in files(*ROOMS)
           if "train" in imported(ast.walk(tree_of(file)))}
    assert who <= {"analysis", "tests"}


@pytest.mark.parametrize("code, fault", [
    ("x = 1  # " + "x" * 92, "line 1 has 101 columns"),
    ("def f():\n" + "    x = 1\n" * 50, "f has 51 lines"),
    ("f = lambda x: x", "line 1 gives a lambda a name"), ("f = {}\nf['x'] = lambda x: x", ""),
    ("f: object = lambda x: x", "line 1 gives a lambda a name"),
    ("(f := lambda x: x)", "line 1 gives a lambda a name"),
    ("def f():\n    return 1, 2, 3, 4", "f returns 4 unnamed values"),
    ("def f() -> tuple[int, int, int, int]:\n    return g()", "f returns 4 unnamed values"),
    ("def f():\n    def g():\n        return 1, 2, 3, 4\n    return g", "g returns 4"),
    ("def f():\n    return 1, 2, 3\n\nsorted([], key=lambda x: x)", "")])
def test_the_rules_see(tmp_path, monkeypatch, code, fault):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "code.py"
    file.write_text(code, encoding="utf-8")
    found = faults(file)
    assert len(found) == bool(fault) and all(text.startswith(fault) for text in found)


def test_imports_inside_functions_and_conditions_are_told_apart():
    tree = ast.parse("try:\n    import data\nexcept ImportError:\n    pass\n"
                     "class A:\n    from model import VLM\n\n"
                     "    def f(self):\n        import train")
    assert imported(at_load(tree)) == {"data", "model"}
    assert imported(ast.walk(tree)) == {"data", "model", "train"}


def test_the_readme_names_the_six_files_with_their_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    counts = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in CORE}
    for name, count in counts.items():
        assert f"| `{name}` | {count} |" in readme
    assert f"{sum(counts.values()):,} lines" in readme and len(readme.splitlines()) <= 150
