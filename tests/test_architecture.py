"""The floors of the house: a room imports only lower floors, and implementations of an op never import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "logra_kernels"
FLOORS = [
    {"errors"},
    {"ops"},
    {"projection"},
    {"nn", "store"},
    {"curvature"},
    {"influence"},
    {"session"},
    {"run", "one_pass"},
    {"compat", "distributed", "integrations", "plan", "report", "selftest"},
    {"demo"},
    {"cli"},
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(PACKAGE.rglob("*.py"))
IMPLEMENTATIONS = {"reference", "cpu", "triton", "cuda"}


def imported(path: Path) -> set[str]:
    """Every logra_kernels module a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "logra_kernels"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in HEIGHT, f"{room} has no floor: say in this file where it belongs"
    for name in imported(path):
        target = name.split(".")[1] if "." in name else ""
        if target in ("", "__version__", "_C", "_C_cuda", room):
            continue
        if target not in HEIGHT:  # a name that the package's face re-exports: only the top floors go through the face
            assert HEIGHT[room] > HEIGHT["run"], f"{path} imports {name} through the package's face"
            continue
        assert HEIGHT[target] < HEIGHT[room], f"{room} (floor {HEIGHT[room]}) imports {name} (floor {HEIGHT[target]})"


def files_below(path: Path) -> set[Path]:
    """The files that a file imports; a package's face counts as its __init__.py."""
    found = set()
    for name in imported(path):
        for module in (name, name.rpartition(".")[0]):
            place = ROOT.joinpath(*module.split("."))
            file = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)
            if file is not None:
                found.add(file)
                break
    return found - {path}


def test_no_file_imports_what_imports_it():
    below = {path: files_below(path) for path in FILES if path.parent != PACKAGE or path.stem != "__init__"}
    while free := [path for path, files in below.items() if not files & below.keys()]:
        for path in free:
            del below[path]
    assert not below, f"these import each other in a circle: {sorted(str(p.relative_to(ROOT)) for p in below)}"


@pytest.mark.parametrize("op", sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists()))
def test_implementations_do_not_import_each_other(op):
    for implementation in IMPLEMENTATIONS:
        path = PACKAGE / "ops" / op / f"{implementation}.py"
        if path.exists():
            others = {f"logra_kernels.ops.{op}.{other}" for other in IMPLEMENTATIONS - {implementation}}
            assert not {n for n in imported(path) for o in others if n.startswith(o)}, f"{path} imports a sibling"


@pytest.mark.parametrize("op", sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists()))
def test_an_op_has_one_stem_in_all_its_places(op):
    places = [
        ROOT / "csrc" / op / "cpu.h",
        ROOT / "python" / f"bind_{op}.cpp",
        PACKAGE / "ops" / op / "reference.py",
        PACKAGE / "ops" / op / "cpu.py",
        PACKAGE / "ops" / op / "triton.py",
        ROOT / "tests" / "ops" / f"test_{op}.py",
        ROOT / "bench" / f"bench_{op}.py",
    ]
    assert not [str(place.relative_to(ROOT)) for place in places if not place.exists()]


def test_csrc_knows_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "torch/" not in text, path
        assert "Python.h" not in text, path
        assert "pybind11" not in text, path


FACTORIES = {"arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "scalar_tensor", "tensor", "zeros"}
FLOATS = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_made_does_not_hang_on_torchs_defaults(path):
    """A user may have set a default device or dtype, and C++ is given the address of what is made."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            made, given = call.func.attr, {keyword.arg for keyword in call.keywords}
            if ast.unparse(call.func) == f"torch.{made}" and made in FACTORIES and None not in given:
                needed = {"device", "dtype"} if made in FLOATS else {"device"}
                assert needed <= given, f"{path}:{call.lineno}: name {' and '.join(sorted(needed - given))}"
