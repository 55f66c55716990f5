"""The documentation against the code: commands, snippets, links, tables, words, widths."""

import argparse
import importlib.util
import itertools
import re
import shlex

import pytest
from pages import blocks, ids, subparsers
from paths import ROOT

from fasa_gguf.cli.main import parser
from fasa_gguf.counters import COUNTERS
from fasa_gguf.params import SETTINGS
from fasa_gguf.profile.keys import KEYS
from fasa_gguf.reasons import Reason

PAGES = sorted(p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[mp]*/README.md")])
SHOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "guide").rglob("*.md"))]
SHOWN += sorted((ROOT / "docs" / "reference").rglob("*.md"))
OUTSIDE_THE_LAB = [p for p in PAGES if "lab" not in p.parts and p.name != "CHANGELOG.md"]
# history, and phrases that stumble
WORDS = (
    r"an? (earlier|older) version|was tried|were tried|used to be|no longer does|left away|leaves? (it|them) away"
    r"|has the word|who thinks in|takes it away|switch(es)? them on|refused by name|goes before the"
    r"|a measurement (of|from) yesterday|tried and left out"
)


def commands(page):
    """Every `fasa-gguf ...` of a page: in code blocks, continued where a line is indented, and between backticks."""
    found = []
    for language, lines in blocks(page):
        if language == "python":
            continue
        for line in lines:
            if line.startswith("    ") and found and language == "indented":
                found[-1] += " " + line.split("  #")[0].strip()
            elif line.strip().startswith("fasa-gguf"):
                found.append(re.split(r"\s+[#>|]", line.strip())[0])
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found += [" ".join(x.split()) for x in re.findall(r"`(fasa-gguf [^`]*)`", prose)]
    return [c for c in found if "..." not in c.replace('"..."', "") and "COMMAND" not in c]


@pytest.mark.parametrize("page", SHOWN, ids=ids)
def test_every_command_shown_parses(page, capsys):
    for command in commands(page):
        words = shlex.split(command)[1:]
        if len(words) == 1 and words != ["--version"]:  # only named, as in "`fasa-gguf eval`"
            assert words[0] in subparsers(), command
            continue
        try:
            parser().parse_args(words)
        except SystemExit as e:
            assert not e.code, f"{ids(page)}: {command}: {capsys.readouterr().err}"


def test_commands_are_found_where_pages_show_them():
    """So that the test above does not pass because it saw nothing."""
    assert len(commands(ROOT / "README.md")) >= 5
    assert len({shlex.split(c)[1] for p in SHOWN for c in commands(p) if len(c.split()) > 1} - {"--version"}) >= 10


@pytest.mark.parametrize("page", OUTSIDE_THE_LAB, ids=ids)
def test_python_snippets_compile(page):
    for language, lines in blocks(page):
        if language == "python":
            compile("\n".join(lines), ids(page), "exec")


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"`|\*", "", t).lower()) for t in titles]
    return {t.strip().replace(" ", "-") for t in plain}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{ids(page)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{ids(page)}: {target}: has {sorted(anchors(there))}"


def test_no_page_is_lost():
    """Every page is reached by links from README."""
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
        todo += [(page.parent / x).resolve() for x in links if x.endswith(".md") and "://" not in x]
    assert set(PAGES) <= seen, sorted(map(ids, set(PAGES) - seen))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_are_at_most_120_wide(page):
    wide = [n for n, line in enumerate(page.read_text().split("\n"), 1) if len(line) > 120]
    assert not wide, f"{ids(page)}: lines {wide}"


@pytest.mark.parametrize("page", OUTSIDE_THE_LAB, ids=ids)
def test_history_is_in_the_lab(page):
    text = " ".join(page.read_text().split())
    found = [m.group() for m in re.finditer(WORDS, text, re.I)]
    assert not found, f"{ids(page)}: {found}"


# ---- tables ----


def table(page, title):
    """The cells of the first table below a heading, without its head."""
    text = "\n" + (ROOT / "docs" / page).read_text()
    lines = text[text.index(f"\n{title}\n") :].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def load(path):
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated(name, page):
    """The block of a page that native/generate.py writes, after a check that it is there and up to date."""
    generate = load(ROOT / "native" / "generate.py")
    text = (ROOT / "docs" / page).read_text()
    shown = re.search(f"<!-- begin {name} -->\n(.*?)<!-- end {name} -->\n", text, re.S)
    assert shown and shown.group(1) == generate.docs_blocks()[name], f"{page}: {name}: run `make tables`"
    return shown.group(1)


def test_the_settings_are_in_the_docs():
    block = generated("settings", "reference/settings.md")
    assert re.findall(r"^- \*\*`(\w+)`\*\* = (\S+) \(", block, re.M) == [
        (s.name, f"{s.default:g}" if s.kind is float else str(s.default)) for s in SETTINGS
    ]


def test_the_counters_are_in_the_docs():
    generated("counters", "reference/counters.md")
    shown = [row[:2] for row in table("reference/counters.md", "## Counters")]
    assert shown == [[c.name, c.unit] for c in COUNTERS]


def test_the_reasons_are_in_the_docs():
    block = generated("reasons", "reference/counters.md")
    shown = [" ".join(x.split()) for x in re.split(r"^- ", block, flags=re.M)[1:]]
    assert [x.split("`: ")[0].strip("`") for x in shown] == [r.name for r in Reason if r.text]
    assert all(x.split("`: ", 1)[1].startswith(Reason[x.split("`: ")[0].strip("`")].text) for x in shown)


def test_the_troubleshooting_table_quotes_reasons():
    shown = [row[0] for row in table("guide/troubleshoot.md", "# Troubleshoot")]
    assert len(shown) >= 5 and set(shown) <= {r.text for r in Reason}


def test_the_key_table_is_the_profiles_keys():
    """The keys of settings are one row, which names the types that are not u32."""
    own = [(name, kind) for name, kind, _ in KEYS if not name.startswith("fasa.default.")]
    kinds = dict.fromkeys(s.gguf_type for s in SETTINGS if s.gguf_type != "u32")
    names = {kind: [s.name for s in SETTINGS if s.gguf_type == kind] for kind in kinds}
    other = "; ".join(f"{kind}: {', '.join(mine)}" for kind, mine in names.items())
    at = next(i for i, key in enumerate(KEYS) if key.name.startswith("fasa.default."))
    expected = [*own[:at], ("fasa.default.NAME", "u32"), *own[at:]]
    rows = table("reference/profile.md", "## Keys")
    assert [tuple(row[:2]) for row in rows] == expected
    assert rows[at][2] == other


# ---- names of files ----


def alternatives(text):
    """`a/{b,c}.py` -> `a/b.py`, `a/c.py`."""
    parts = re.split(r"\{([^}]*)\}", text)  # every other one stood in braces
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(x) for x in itertools.product(*choices)]


PLACES = r"(?:native|fasa_gguf|tests|patches|models|docs)/[\w./{},*-]*"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_named_exist(page):
    """Paths from the root of the repository; `NAME` in one, and models/cache/, stand for what is not there yet."""
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text())  # links have a test of their own
    text = re.sub(r"<!-- .*? -->", "", text, flags=re.S)
    for found in re.findall(rf"(?<![\w./-]){PLACES}", text):
        for name in alternatives(found.rstrip(".,")):
            if "NAME" not in name and not name.startswith("models/cache"):
                assert any(ROOT.glob(name.rstrip("/"))), f"{ids(page)}: {name}"


def test_files_that_the_source_names_exist():
    """In comments and docstrings."""
    sources = [p for folder in ("fasa_gguf", "native") for p in (ROOT / folder).rglob("*.*") if "lib" not in p.parts]
    for source in [p for p in sources if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]:
        for name in re.findall(
            r"(?<![\w./-])(?:docs|native|patches|tests)/[\w./-]*\.(?:md|py|h|cpp|cuh?)\b", source.read_text()
        ):
            assert "NAME" in name or (ROOT / name).exists(), f"{ids(source)}: {name}"


def test_files_in_the_design_exist():
    page = (ROOT / "docs" / "design.md").read_text()
    folders = dict(re.findall(r"^- `(\w+)/` \([\w-]+\): (.*?)(?=^- |\n\n)", page, re.M | re.S))
    assert set(folders) == {p.name for p in (ROOT / "native").iterdir() if p.is_dir() and p.name != "__pycache__"}
    for folder, text in folders.items():
        named = {x for found in re.findall(r"`([^`]*)`", text) for x in alternatives(found)}
        there = {p.name for p in (ROOT / "native" / folder).iterdir()}
        stems = {name.rsplit(".", 1)[0] for name in there}
        assert {x for x in named if re.fullmatch(r"[a-z-]+(\.\w+)?", x)} <= there | stems, folder


def test_the_order_of_packages_is_the_imports():
    page = (ROOT / "docs" / "design.md").read_text()
    start = page.index("| fasa_gguf/, lowest first")
    rows = page[start:].split("\n\n")[0].split("\n")[2:]
    shown = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in rows]
    layers = load(ROOT / "tests" / "test_imports.py").LAYERS
    assert shown == [list(names) for names in layers if names != ("__main__",)]


def test_the_bench_columns_are_in_the_docs():
    from fasa_gguf.speed.report import COLUMNS

    shown = {name for row in table("reference/bench.md", "## Columns") for name in row[0].split(", ")}
    assert set(COLUMNS) <= shown, sorted(set(COLUMNS) - shown)


def sections():
    """commands.md by heading; "" is what comes before the first."""
    first, *rest = re.split(r"^## ", (ROOT / "docs" / "reference" / "commands.md").read_text(), flags=re.M)
    return {"": first, **{part.split("\n", 1)[0].strip(): part for part in rest}}


def test_every_command_has_its_section():
    assert set(subparsers()) == set(sections()) - {""}


@pytest.mark.parametrize("name", list(subparsers()))
def test_every_flag_is_in_the_reference(name):
    shared, own = sections()[""], sections()[name]
    text = shared + own + (sections()["calibrate"] if name == "embed-profile" else "")
    for action in subparsers()[name]._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        for flag in action.option_strings:
            if not flag.startswith("--fasa-"):
                assert re.search(rf"`{re.escape(flag)}[` ]", text), f"{name}: {flag}"


def test_the_page_of_flags_is_the_parsers():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert page == load(ROOT / "tests" / "helpers" / "write_cli.py").page(), "run `make tables`"
    for name, p in subparsers().items():
        part = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for action in p._actions:
            for flag in () if action.help == argparse.SUPPRESS else action.option_strings:
                assert f"`{flag}" in part or flag in ("-h", "--help") or flag.startswith("--fasa-"), f"{name}: {flag}"


def test_the_page_of_c_functions_is_the_headers():
    write = load(ROOT / "tests" / "helpers" / "write_c_api.py")
    assert (ROOT / "docs" / "reference" / "c-api.md").read_text() == write.page(), "run `make tables`"
    names = {re.search(r"(fasa_\w+)\(", declaration).group(1) for declaration, _ in write.functions()}
    header = (ROOT / "native" / "fasa.h").read_text()
    assert names == set(re.findall(r"^FASA_API[^(]*?(\w+)\(", header, re.M)) and len(names) > 20
    shown = (ROOT / "docs" / "reference" / "api.md").read_text().split("## C\n")[1]
    for name in re.findall(r"`(fasa_\w+)(?:\(\))?`", shown):
        assert name in header, f"api.md: {name}"


@pytest.mark.parametrize("name", list(subparsers()))
def test_every_command_has_help_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as e:
        parser().parse_args([name, "--help"])
    assert e.value.code == 0 and f"example: fasa-gguf {name}" in capsys.readouterr().out
