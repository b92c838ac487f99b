"""Prose and tables as text."""

from __future__ import annotations

from runtime.text import text_table, unwrapped


def test_paragraphs_become_lines_and_other_markdown_stays():
    prose = "# Title\n\nOne\n*two*\n`three` four.\n\n"
    other = "    code\n    code\n\n1. a\n2. b\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n- x\n- y\n"
    assert unwrapped(prose + other) == "# Title\n\nOne *two* `three` four.\n\n" + other


def test_columns_are_aligned_and_none_is_a_dash():
    assert text_table(("name", "n"), [("a", 1.5), ("bc", None)]) == "  name       n\n  a     1.5000\n  bc         -"
