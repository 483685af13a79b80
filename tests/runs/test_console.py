"""Tables: every cell as it is, whoever reads them."""

import io

from vmapbn_flax.runs.console import table


def printed(*arguments):
    file = io.StringIO()
    table(*arguments, file=file)
    return file.getvalue()


def test_a_pipe_has_no_width():
    """Whatever the terminal's is, and however long a name: a row is a line."""
    rows = [("x " * 400, 0.25), ("short", 1)]
    lines = printed(rows, ("name", "figure")).splitlines()
    assert [line.split()[-1] for line in lines if line.strip() and "─" not in line] == ["figure", "0.25", "1"]


def test_names_are_neither_markup_nor_commands_to_a_terminal():
    text = printed([("[red]a[/red]", "b\x1b]0;title\x07"), ("[/]", "two\nlines")], ("[bold]x", ""))
    for cell in ("[red]a[/red]", "b\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}", "[/]", "[bold]x"):
        assert cell in text
    assert "two\N{REPLACEMENT CHARACTER}lines" in text
