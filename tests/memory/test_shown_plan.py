"""The plan of an 8B model that README and the guide show is what `plan` prints."""

import re

import pytest
from gguf import GGUFWriter
from paths import ROOT

from fasa_gguf.cli import main as cli
from fasa_gguf.speed import random_model


@pytest.fixture(scope="module")
def shown():
    """The table of guide/memory.md, by its first column."""
    lines = (ROOT / "docs" / "guide" / "memory.md").read_text().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("| MiB at 131,072 tokens"))
    return "\n".join(lines[start : start + 12])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The random 8B shape with holes for its 4.5 GB of weights."""
    path = tmp_path_factory.mktemp("plan") / "model.gguf"

    def hole(self, tensor, **_):
        size = tensor.nbytes + -tensor.nbytes % 32
        self.fout[0].truncate(self.fout[0].tell() + -self.fout[0].tell() % 32 + size)
        self.fout[0].seek(0, 2)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(GGUFWriter, "write_tensor_data", hole)
        m.setattr(random_model, "_q4_0", lambda rng, rows, cols: random_model.np.empty((rows, cols // 32 * 18), "u1"))
        random_model.write_model(path, "8b")
    return path


def test_the_guides_plan_is_what_plan_prints(model, shown, capsys):
    assert cli.main(["plan", str(model), "-c", "131072", "--vram", "12G", "--ram", "64G"]) == 0
    assert capsys.readouterr().out.strip() == shown


def test_readme_has_the_same_figures(shown):
    """Its rows of memory are some of the guide's."""
    rows = {line.split("|")[1].strip(" *"): [x.strip() for x in line.split("|")[2:6]] for line in shown.split("\n")}
    text = (ROOT / "README.md").read_text()
    gpu = re.search(r"\| GPU memory, MiB, [^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", text)
    assert [x.strip() for x in gpu.groups()] == [rows["GPU memory"][i] for i in (0, 2, 3)]
    longest = re.search(r"\| longest context[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", text)
    context = rows["largest context, tokens"]
    assert [x.strip() for x in longest.groups()] == [context[0], context[2], context[3].split(" ")[0]]
