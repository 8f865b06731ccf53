"""Texts that break what is not escaped."""

from __future__ import annotations

from hypothesis import strategies as st

# What Arrow can hold: everything but lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
NASTY = (
    "</script><script>alert(1)</script>", "<!-- ", "]]>", "&amp; & &#0;", '"quoted", \'single\'', "a\tb\r\nc\rd",
    "\x00\x01\x0b\x1f\x7f\x85\u2028\u2029\ufffe\uffff", "=HYPERLINK(\"http://x\")", "+1", "-1", "@SUM(A1)", "＝1+1", "\t=1",
    "日本語 العربية עברית 👩‍👩‍👧 e\u0301", "{{7*7}} ${x} %s %00", "../../etc/passwd", "a" * 10_000, " ", "]]]]><![CDATA[>",
)  # fmt: skip
ANY_TEXT = st.one_of(st.sampled_from(NASTY), TEXTS)
