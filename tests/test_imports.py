"""The layers of the package: a module imports only from layers below its own or from its own package, no circles."""

import ast

import pytest
from paths import ROOT

PACKAGE = ROOT / "fasa_gguf"

# lowest first; a name is a package, or a module that stands directly in fasa_gguf/
LAYERS = (
    ("errors",),
    ("counters", "reasons"),
    ("params",),
    ("reference",),
    ("reference_prefill",),
    ("gguf",),
    ("profile",),
    ("report",),
    ("runtime",),
    ("memory",),
    ("mended",),
    ("session", "llama"),
    ("serve",),
    ("quality",),
    ("calibrate",),
    ("speed",),
    ("harness",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = ("__init__",)  # the public names, which it imports when they are used


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def statements(tree):
    """Every node but those below `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from statements(node)


def imported(path):
    """(module as a tuple below fasa_gguf, line) of every import of the package's own modules, wherever it stands."""
    here = module_of(path)
    package = here if path.name == "__init__.py" else here[:-1]
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "fasa_gguf":
                    yield tuple(name.name.split(".")[1:]), node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + parts
            elif parts[:1] == ("fasa_gguf",):
                base = parts[1:]
            else:
                continue
            for name in node.names:
                inner = PACKAGE.joinpath(*base, name.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield (*base, name.name) if is_module else base, node.lineno


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if module_of(p))


def test_every_module_has_a_layer():
    assert {module_of(p)[0] for p in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(module_of(p)))
def test_imports_go_down(path):
    here = module_of(path)[0]
    for module, line in imported(path):
        if module and module[0] != here and module != ("__init__",):
            assert LEVEL[module[0]] < LEVEL[here], f"{path}:{line}: {here} imports {'.'.join(module)}"


def test_no_circles():
    """Also within a package, and also through imports inside functions."""
    below = {}
    for path in MODULES:
        name = module_of(path)
        found = set()
        for module, _ in imported(path):
            if PACKAGE.joinpath(*module).is_dir() and module != name:
                continue  # the package itself: its __init__ is a module of its own
            found.add(module)
        below[name] = found - {name, ()}
    done, path_now = set(), []

    def walk(name):
        assert name not in path_now, f"circle: {' -> '.join('.'.join(x) for x in [*path_now, name])}"
        if name in done:
            return
        path_now.append(name)
        for other in below.get(name, ()):
            walk(other)
        path_now.pop()
        done.add(name)

    for name in below:
        walk(name)


def test_files_are_short_and_lines_narrow():
    """No source file has 500 lines or more, no line more than 120 characters."""
    files = [p for folder in ("fasa_gguf", "tests", "patches", "models") for p in (ROOT / folder).rglob("*.py")]
    files += [p for p in (ROOT / "native").rglob("*") if p.is_file()]
    lines = {p.relative_to(ROOT): p.read_text().splitlines() for p in files}
    assert not {str(name): len(text) for name, text in lines.items() if len(text) >= 500}
    assert not [f"{name}:{i}" for name, text in lines.items() for i, line in enumerate(text, 1) if len(line) > 120]
