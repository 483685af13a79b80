"""The code of README.md and docs/ runs as it stands there, and prints what it says."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if page.exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace a page and an empty directory; a block that starts with >>> is a doctest."""
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        code, line = block[1], text.count("\n", 0, block.start(1))
        if code.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line)
            report = []
            result = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
            assert result.failed == 0, "".join(report)
            namespace = example.globs
        else:
            exec(compile("\n" * line + code, page, "exec"), namespace)
