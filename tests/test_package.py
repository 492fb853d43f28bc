"""What is installed is what the tree holds."""

import pathlib
import re
import tomllib

import ridgeline as rl

ROOT = pathlib.Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed():
    tops = [path.parent for path in ROOT.glob("*/__init__.py")]
    folders = [path.parent.relative_to(ROOT) for top in tops for path in top.rglob("__init__.py")]
    found = {"ridgeline"} | {".".join(("ridgeline", *folder.parts)) for folder in folders}
    assert found == set(SETUPTOOLS["packages"])


def test_the_public_face_is_whole():
    assert len(set(rl.__all__)) == len(rl.__all__)  # their order is ruff's affair
    for name in rl.__all__:
        assert getattr(rl, name).__doc__, name


def test_arrows_point_down():
    """Folders import only what stands below them."""
    allowed = {
        "pallas_kernels": set(),
        "sharding": set(),
        "model": {"sharding", "pallas_kernels"},
        "decode": {"model", "sharding", "pallas_kernels"},
        "roofline": {"model", "sharding"},
    }
    for folder, below in allowed.items():
        for file in (ROOT / folder).rglob("*.py"):
            depth = len(file.relative_to(ROOT).parts)
            for dots, module in re.findall(r"^\s*from (\.+)(\w*)", file.read_text(), flags=re.MULTILINE):
                if len(dots) == depth:  # reaches the root of the package
                    assert module in below | {folder}, f"{file.relative_to(ROOT)} imports {module or 'the root'}"


def test_nothing_imports_benchmarks_but_their_entry():
    files = [file for folder in ROOT.glob("*/__init__.py") for file in folder.parent.rglob("*.py")]
    uses = {str(file.relative_to(ROOT)) for file in files if re.search(r"from \.+benchmarks\b", file.read_text())}
    assert uses == {"cli/__init__.py"}


def test_every_data_file_is_shipped():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        shipped = {path for pattern in patterns for path in folder.glob(pattern)}
        assert all(any(True for _ in folder.glob(pattern)) for pattern in patterns), package
        if folder != ROOT:
            packages = {path.parent for path in folder.rglob("__init__.py")}
            data = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
            assert {p for p in data if p.parent not in packages - {folder}} <= shipped, package
