"""Every command and every Python snippet of README and the guide: it runs here on a tiny model, or a row says why not.

The commands of a page run in its order, in one folder that has the files which the page names. A new command that needs
more than a tiny model on a CPU, or more than seconds, gets a row in NOT_RUN, with what runs it instead.
"""

import re
import shlex

import pytest
from pages import blocks, ids, subparsers
from paths import ROOT
from tiny_gguf import write_tiny

from fasa_gguf.cli import main as cli
from fasa_gguf.cli.main import parser
from fasa_gguf.speed import traffic

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").rglob("*.md"))]

# command, as a regular expression: why it is not run here, and what runs it
NOT_RUN = {
    r"make demo": "fetches a model and builds for minutes; tests/cli/test_demo.py runs its code",
    r"make (test|build( CMAKE_ARGS=\S*)?|stock|tools|check|wheel.*|sdist|cuda-check|fuzz.*|sanitize)": "builds for "
    "minutes; .ci/run builds and tests",
    r"((CMAKE_ARGS=(\"[^\"]*\"|\S+) )?pip install|cibuildwheel)\b.*": "downloads and builds for minutes",
    r"fasa-gguf doctor": "takes ten seconds; tests/doctor/test_doctor.py runs it",
    r"fasa-gguf serve .*": "runs until it is stopped; tests/serve/test_api.py runs it",
    r"curl .*": "needs a server that runs; tests/serve/test_api.py sends such requests",
    r"(FASA_\w+=\S+ )*build/tools/bin/.*": "needs `make tools`; tests/native/test_tools.py runs them",
    r"fasa-gguf run .*--fasa-mode host.*": "needs a GPU; tests/native/test_cuda_mode.py",
    r"fasa-gguf plan .*--check": "needs a GPU; tests/native/test_cuda_mode.py",
    r"fasa-gguf (calibrate HF_DIR|embed-profile \S+ --hf HF_DIR).*": "needs torch and transformers; "
    "tests/calibrate/test_hf.py runs it",
    r"fasa-gguf run .*--rpc .*": "needs GGML_RPC=ON and a server; tests/native/test_rpc.py",
    r"fasa-gguf run .*--profile models/SmolLM2.*": "needs that model; tests/profile/test_published.py runs it",
    r"fasa-gguf compare .*": "needs torch; tests/harness/test_compare.py runs it",
    r"fasa-gguf bench -t 2 -p 0 --shape 1b .*": "writes a model of 1 GB and runs for minutes",
}
# command, as a regular expression: flags that make it short
SHORTER = {
    r"fasa-gguf run .*": "-n 2 -c 2048 --fasa-min-context 0",
    r"fasa-gguf bench .*--find-crossover.*": "-n 2 -r 1 -p 0 -d 64",
    r"fasa-gguf bench --shape tiny .*": "--output-model tiny.gguf",
    r"fasa-gguf bench .*": "-n 2 -r 1 -d 64,1200",
    r"fasa-gguf calibrate-layers .*": "--windows 1 --window 1024 --score 16 --masses 0.9 --budgets 64,256 --group 9",
    r"fasa-gguf (calibrate|embed-profile) [^-]*(-f .*|--chunks .*|-o .*)?": "-c 1024",
    r"fasa-gguf eval .*--task ruler.*": "--samples 1 --tasks niah_single_1 --lengths 1200 -n 4",
    r"fasa-gguf eval .*--question.*": "--samples 1 --lengths 1200 --depths 1",
    r"fasa-gguf eval .*--task needle.*": "--samples 1 --lengths 1200 --depths 1 -n 4",
    r"fasa-gguf eval .*--task long.*": "-n 8 --windows 1 --window 1200",
    r"fasa-gguf eval .*": "--windows 2 --window 1024 --score 16",
    r"fasa-gguf sweep .*": "--windows 2 --window 1024 --score 16 --chunks 8,12 --budgets 64 --masses 0.9",
}
# a line of this text in a snippet: why it is not run here, and what runs it
SNIPPETS_NOT_RUN = {
    "langchain_community": "needs langchain; tests/apps/test_frameworks.py runs it",
    "llama_index": "needs llama-index; tests/apps/test_frameworks.py runs it",
    "server.main()": "runs until it is stopped; tests/apps/test_server.py runs it",
    "OpenAI(": "needs a server that runs; tests/serve/test_api.py sends such requests",
    'fasa_mode="host"': "needs a GPU; tests/native/test_cuda_mode.py",
    "stats = llm.": "a part of one; tests/test_llama.py has the counters",
    "add_rpc_servers": "needs GGML_RPC=ON and a server; tests/native/test_rpc.py",
    "fasa_gguf.enable()": "changes llama_cpp for the whole process; tests/apps/test_frameworks.py calls it",
}
PROGRAMS = r"fasa-gguf|make|pip|python3?|git|curl|cmake|cibuildwheel|docker|\S+/bin/\S+"
STARTS = rf"(?:\$ )?((?:\w+=(?:\"[^\"]*\"|\S+) )*(?:{PROGRAMS}) .*)"


def shown(page):
    """Every command of a page in its order: lines of code blocks, and text between backticks with an argument."""
    found = []
    for language, lines in blocks(page):
        if language == "python":
            continue
        text = re.sub(r"\\\n\s*", "", "\n".join(lines))
        found += [re.split(r"\s+#", m.group(1))[0] for x in text.split("\n") if (m := re.fullmatch(STARTS, x.strip()))]
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    prose = "\n".join(x for x in prose.split("\n") if not x.startswith("    "))
    spans = [" ".join(x.split()) for x in re.findall(r"`([^`\n][^`]*)`", prose)]
    found += [x for x in spans if re.fullmatch(STARTS, x) and len(x.split()) > 1 and "python -m llama_cpp" not in x]
    # a command that is only named, as in "`fasa-gguf eval`", is not one to type
    return [x for x in dict.fromkeys(found) if not re.fullmatch(r"fasa-gguf (?!doctor)\S+|.*\bMODEL\b.*|.*\.\.\.", x)]


def reason(command):
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def short(command):
    """The words of a command after `fasa-gguf`, with what makes it short."""
    words = shlex.split(command)
    assert words[0] == "fasa-gguf", f"{command}: not a command of ours; give it a row in NOT_RUN"
    words = words[1:]
    options = subparsers()[next(x for x in words if x[0] != "-")]._option_string_actions
    threads = ["-t", "1"] if "--threads" in options else []  # two wait for each other on a busy machine
    flags = next((flags for pattern, flags in SHORTER.items() if re.fullmatch(pattern, command)), "")
    return [*words, *threads, *flags.split()]


@pytest.fixture(scope="session")
def model(library, tmp_path_factory):
    """A model of random weights with 32 chunks a head, and the same with a profile."""
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.profile.embed import rewrite
    from fasa_gguf.speed.random_model import synthetic_profile

    folder = tmp_path_factory.mktemp("guide")
    write_tiny(folder / "plain.gguf", n_layer=2, head_dim=64, n_head=2, n_head_kv=1, n_embd=128, n_ctx=131072)
    profile = synthetic_profile(*model_shape(GGUFFile(folder / "plain.gguf")), seed=2)
    rewrite(folder / "plain.gguf", profile, folder / "profiled.gguf")
    profile.save(folder / "profile.json")
    return folder


@pytest.fixture
def sandbox(model, text, tmp_path, monkeypatch):
    """A folder with the files that pages name."""
    for name in ("model.gguf", "b.gguf", "small.gguf", "large.gguf"):
        (tmp_path / name).write_bytes((model / "profiled.gguf").read_bytes())
    (tmp_path / "a.json").write_bytes((model / "profile.json").read_bytes())
    for name in ("text.txt", "test.txt", "valid.txt"):
        (tmp_path / name).write_text(text[:12000])
    (tmp_path / "long.txt").write_text(text[:1200])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(traffic, "COPY_BYTES", 8 << 20)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_and_snippet_runs_or_has_a_reason(page, sandbox, capfd):
    for command in shown(page):
        if reason(command):
            continue
        words = short(command)
        try:
            status = cli.main(words)
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        assert not status, f"{ids(page)}: {command}, run as {' '.join(words)}: exit {status}: {err[-500:]}"
        assert out, f"{ids(page)}: {command}: printed nothing"
    for language, lines in blocks(page):
        code = "\n".join(lines)
        if language == "python" and not any(x in code for x in SNIPPETS_NOT_RUN):
            exec(compile(code, ids(page), "exec"), {})


def test_rows_are_used_and_name_files_that_exist():
    commands = {x for page in PAGES for x in shown(page)}
    for pattern, why in NOT_RUN.items():
        assert any(re.fullmatch(pattern, x) for x in commands), f"{pattern}: no page shows it; remove the row"
        assert all((ROOT / x).exists() for x in re.findall(r"[\w./]+\.py|\.ci/run", why)), why
    for pattern in SHORTER:
        assert any(re.fullmatch(pattern, x) for x in commands), f"{pattern}: no page shows it; remove the row"
    snippets = ["\n".join(lines) for page in PAGES for language, lines in blocks(page) if language == "python"]
    for part, why in SNIPPETS_NOT_RUN.items():
        assert any(part in x for x in snippets), f"{part}: no page shows it; remove the row"
        assert all((ROOT / x).exists() for x in re.findall(r"[\w./]+\.py", why)), why


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {x.split()[1] for page in PAGES for x in shown(page) if x.startswith("make ")}
    assert named and named <= targets, named - targets


def test_a_new_command_without_a_reason_fails(tmp_path):
    page = tmp_path / "new.md"
    page.write_text(
        "Type:\n\n    fasa-gguf run model.gguf -p 'x y'   # go\n\nor `make tea`:\n\n```sh\n$ curl -s \\\n  x\n```\n"
    )
    assert shown(page) == ["fasa-gguf run model.gguf -p 'x y'", "curl -s x", "make tea"]
    assert reason("make tea") is None
    with pytest.raises(AssertionError, match="make tea: not a command of ours; give it a row in NOT_RUN"):
        short("make tea")
    parser().parse_args(short("fasa-gguf run model.gguf -p 'x y'"))
