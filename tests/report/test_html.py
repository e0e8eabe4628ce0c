"""Escaping and tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linchain_cli.report.html import escaped, facts, page, section, table, tag


def test_no_text_becomes_markup(parse_page):
    @given(st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("<>&'\"/=- ")))
    def check(text):
        found = parse_page(tag("p", text, title=text))
        assert [name for name, _ in found.elements] == ["p"] and not found.problems
        visible = text.translate({code: None for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))})
        if visible == text:
            assert found.text == found.all("p")[0]["title"] == text

    check()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>&amp;\"'", "&lt;b&gt;&amp;amp;&quot;&#x27;"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\x07\x1b", "\\x00\\x07\\x1b"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\ud800", "\ufffd"),
        (None, ""),
        (1.5, "1.5"),
    ],
)
def test_what_a_text_becomes(text, shown):
    assert escaped(text) == shown


def test_a_page_can_be_encoded_whatever_is_in_it():
    assert page("\ud800 <title>", tag("p", "\udfff")).encode()


def test_attributes_are_escaped_and_left_out():
    assert tag("td", "x", data_label='"><script>', class_=None, hidden=True) == (
        '<td data-label="&quot;&gt;&lt;script&gt;" hidden>x</td>'
    )


def test_a_table_names_its_cells_for_narrow_screens(check_page):
    made = table([{"arm": "LoRA", "loss <b>": "0.1"}, {"arm": "depth 3", "loss <b>": ""}], "Caption & more")
    found = check_page(page("t", made))
    assert [cell["data-label"] for cell in found.all("td")] == ["loss <b>"] * 2
    assert [cell.get("class") for cell in found.all("td")] == [None, "empty"]
    assert [head.get("scope") for head in found.all("th")] == ["col", "col", "row", "row"]
    assert table([], "nothing") == ""


def test_empty_parts_are_left_out():
    assert section("Title", "", None, []) == ""
    assert facts([("a", None)]) == ""
    assert "0" in facts([("a", 0)])
