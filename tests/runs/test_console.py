"""Tables: every cell as it is, whoever reads them."""

import io
import re

from vmapbn_flax.runs.console import table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(rows, header, file=None):
    file = file or io.StringIO()
    table(rows, header, file=file)
    return file.getvalue()


def test_a_pipe_has_no_width():
    """Whatever the terminal's is, and however long a name: a row is a line."""
    rows = [("x " * 400, 0.25), ("short", 1)]
    lines = printed(rows, ("name", "figure")).splitlines()
    assert [line.split()[-1] for line in lines if line.strip() and "─" not in line] == ["figure", "0.25", "1"]


def test_a_narrow_terminal_folds_names(monkeypatch):
    """And cuts nothing off."""
    monkeypatch.setenv("COLUMNS", "40")
    name = "/somewhere/deep/down/in/a/folder/of/images/photo.jpg"
    for header in ((), ("name", "class", "probability")):
        text = re.sub(r"\x1b\[[\d;]*m", "", printed([(name, "cat", 0.25)], header, file=Terminal()))
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 40
        assert name in "".join(re.findall(r"^  (\S+)", text.replace("name", "").replace("───", ""), re.MULTILINE))


def test_names_are_neither_markup_nor_commands_to_a_terminal():
    text = printed([("[red]a[/red]", "b\x1b]0;title\x07"), ("[/]", "two\nlines")], ("[bold]x", ""))
    for cell in ("[red]a[/red]", "b\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}", "[/]", "[bold]x"):
        assert cell in text
    assert "two\N{REPLACEMENT CHARACTER}lines" in text
