"""The design that the imports and the sizes of the files must keep."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = "loku_kernels._core"
BACKENDS = ("native", "reference", "triton")
MOST_LINES = 500


def module_files() -> dict[str, Path]:
    """Return the file of each module of the two packages."""
    files = {}
    for path in [*ROOT.glob("loku/**/*.py"), *ROOT.glob("loku_kernels/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a file, in functions too, without those under ``if TYPE_CHECKING``.

    ``loku/__init__.py`` imports the names under its ``if TYPE_CHECKING`` when they are used, so these count.
    """
    lazy = path == ROOT / "loku/__init__.py"
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not lazy and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)


def imported(path: Path, modules: set[str]) -> set[str]:
    """Return the names of the modules that a file imports.

    ``from package import name`` imports the module ``package.name``, or the package if ``name`` is no module
    of it.
    """
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0 and node.module, f"{path}, line {node.lineno}: a relative import"
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        found |= {name if name in modules else node.module for name in names}
    return found


FILES = module_files()
GRAPH = {name: imported(path, {*FILES, CORE}) - {name} for name, path in FILES.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules along a cycle of the graph, or [] if it has none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if cycle := walk(other, [*path, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in graph if (cycle := walk(name, []))), [])


def test_the_graph_is_read():
    assert "loku_kernels.backends" in GRAPH["loku_kernels.losses"]
    assert CORE in GRAPH["loku_kernels.backends.native"]
    assert "loku.data.rows" in GRAPH["loku.data"]
    assert "loku.unlearning" in GRAPH["loku"]
    assert "loku_kernels" in set().union(*GRAPH.values())
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_cycle():
    assert find_cycle(GRAPH) == []


def test_kernels_do_not_know_the_training():
    above = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if name.split(".")[0] == "loku_kernels" and other.split(".")[0] == "loku"
    }
    assert above == set()


def test_one_module_imports_the_compiled_core():
    assert [name for name, others in GRAPH.items() if CORE in others] == ["loku_kernels.backends.native"]


def test_a_single_backend_is_imported_by_few():
    single = tuple(f"loku_kernels.backends.{backend}" for backend in BACKENDS)
    users = {
        name
        for name, others in GRAPH.items()
        if not name.startswith("loku_kernels.backends")
        and any(other == module or other.startswith(f"{module}.") for other in others for module in single)
    }
    assert users <= {"loku_kernels", "loku.commands.info"}


def opening(path: Path) -> str:
    """Return the docstring and the first comment of a file."""
    text = path.read_text(encoding="utf-8")
    mark = "#" if path.suffix == ".py" else "//"
    comment = re.match(rf"(\s*{mark}.*\n)*", text)
    docstring = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else ""
    return " ".join(f"{comment[0] if comment else ''} {docstring or ''}".replace(mark, " ").split())


def test_long_files_give_a_reason():
    folders = ("loku", "loku_kernels", "csrc", "benchmarks", "experiments", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + [ROOT / "setup.py"]
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix in (".py", ".cpp", ".cu", ".h")
    }
    assert "csrc/bindings.cpp" in lines
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert {n: c for n, c in long.items() if "over 500 lines because" not in opening(ROOT / n)} == {}


FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def test_a_new_tensor_names_its_dtype():
    """``torch.set_default_dtype`` would otherwise decide it."""
    unnamed = []
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES and all(k.arg != "dtype" for k in node.keywords):
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not unnamed
