"""docs/lab/situations.md and the tests name the same situations, each once."""

import ast
import re
from pathlib import Path

from paths import ROOT

ISSUE = re.compile(r"[\w.-]+/[\w.-]+#\d+")


def test_every_situation_is_in_the_table():
    tests = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and path != Path(__file__):
                issue = ISSUE.match(ast.get_docstring(node) or "")
                assert issue, f"{path.name}: {node.name} begins with no issue"
                tests.setdefault(issue[0], []).append(path.name)
    table, page = {}, ""
    for line in (ROOT / "docs" / "lab" / "situations.md").read_text().splitlines():
        if line.startswith("## "):
            page = re.search(r"`(.*)`", line)[1]
        elif line.startswith("| ") and (issue := ISSUE.match(line[2:])):
            table.setdefault(issue[0], []).append(page)
            assert re.match(r"(works|mended|refused)\b", line.split(" | ")[2]), line
    assert tests == table and len(table) >= 30
    assert all(len(pages) == 1 for pages in table.values())
