from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_ops.rights import rights

FIELDS = {"creator", "credit_text", "copyright_notice", "license", "acquire_license_page"}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"author": "Ada"}, {"creator": "Ada"}),
        ({"Photographer": " Ada \n Lovelace "}, {"creator": "Ada Lovelace"}),
        ({"dc:creator": ["Ada", "Bob", "Ada"]}, {"creator": "Ada, Bob"}),
        ({"creator": {"@type": "Person", "name": "Ada"}}, {"creator": "Ada"}),
        ({"dc:rights": {"x-default": "© Ada"}}, {"copyright_notice": "© Ada"}),
        ({"xmp": {"photoshop:Credit": "Agency"}}, {"credit_text": "Agency"}),
        ({"exif": {"Artist": "Ada", "Copyright": "(c) Ada"}}, {"creator": "Ada", "copyright_notice": "(c) Ada"}),
        ({"license": "All rights reserved"}, {"license": "All rights reserved"}),
        ({"licence": "CC BY-SA 4.0"}, {"license": "https://creativecommons.org/licenses/by-sa/4.0/"}),
        ({"licence": "CC0-1.0"}, {"license": "https://creativecommons.org/publicdomain/zero/1.0/"}),
        ({"license": "CC BY", "license_url": "https://a.org/l"}, {"license": "https://a.org/l"}),
        ({"license": {"name": "Ours", "url": "https://a.org/l"}}, {"license": "https://a.org/l"}),
        ({"license": "Ours", "xmpRights:WebStatement": "https://a.org/w"}, {"license": "https://a.org/w"}),
        ({"acquireLicensePage": "https://a.org/buy"}, {"acquire_license_page": "https://a.org/buy"}),
        ({"plus:Licensor": [{"plus:LicensorURL": "https://a.org/buy"}]}, {"acquire_license_page": "https://a.org/buy"}),
        ({"creator": "Ada", "author": "Bob"}, {"creator": "Ada"}),
        ({"author": "Bob", "xmp": {"dc:creator": "Ada"}}, {"creator": "Ada"}),
        ({"creator": "Bob", "xmp": {"dc:creator": "Ada"}}, {"creator": "Bob"}),
        ({"creator": "", "author": "Bob"}, {"creator": "Bob"}),
    ],
)
def test_fields_by_their_usual_names(metadata, expected):
    assert rights(metadata) == expected


@pytest.mark.parametrize(
    "metadata",
    [
        {"license": 4},
        {"license": "4"},
        {"creator": None, "credit": True, "copyright": 2020},
        {"license": "javascript:alert(1)"},
        {"license": "JavaScript:alert(1)", "creator": " javascript :alert(1)"},
        {"license": "ftp://a.org/l"},
        {"license_url": "https://user:password@a.org/l"},
        {"license_url": "https://"},
        {"license_url": "https://[::1"},
        {"acquireLicensePage": "javascript:alert(1)"},
        {"acquireLicensePage": "mail us"},
        {"acquireLicensePage": 'https://a.org/"onload="x'},
        {"creator": "data:text/html,<script>"},
        {"creator": "A" * 2000},
        {"author": {"age": 3}},
    ],
)
def test_what_is_refused(metadata):
    assert rights(metadata) == {}


def test_the_next_name_serves_where_the_first_is_refused():
    assert rights({"license_url": "javascript:x", "license": "MIT"}) == {"license": "MIT"}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=30)
    | st.sampled_from(["javascript:a", "https://a.org", "CC BY 4.0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "url", "@value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["creator", "Author", "xmp", "dc:rights", "license", "licensor", "LicensorURL", "credit"]
) | st.text(max_size=8)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_came_along_the_fields_are_clean_texts(metadata):
    for field, text in rights(metadata).items():
        assert field in FIELDS
        assert text == " ".join(text.split())
        assert text and not text.lower().startswith(("javascript:", "vbscript:"))
        if field == "acquire_license_page":
            assert text.startswith(("http://", "https://"))
