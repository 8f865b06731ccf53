from __future__ import annotations

import dataclasses
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.tags import Box, FoundText, ImageEvidence
from vlm_ops.ad_slots import SLOTS, ad_slots, rules_in_force

TODAY = date(2026, 11, 23)
BEFORE, AFTER = date(2027, 1, 30), date(2027, 1, 31)
# 1500 x 1500 pixels, all ops on, nothing wrong.
IMAGE = ImageEvidence(
    1, "a.jpg", width=1500, height=1500, format="JPEG", num_bytes=300_000, texts=(), text_share=0.0, faces=(), plain_background=1.0, border=0.0,
    crops={"1:1": Box(0, 0, 1, 1), "1.91:1": Box(0, 0.25, 1, 0.25 + 1 / 1.91), "4:5": Box(0.1, 0, 0.9, 1), "9:16": Box(0.2, 0, 0.2 + 9 / 16, 1)},
)  # fmt: skip


def slot(name, on=TODAY, **fields):
    return {each.slot: each for each in ad_slots(dataclasses.replace(IMAGE, **fields), on)}[name]


def test_formats_say_where_they_are_published():
    names = [each.name for each in SLOTS]
    assert len(set(names)) == len(names)
    for each in SLOTS:
        assert each.source.startswith("https://support.google.com/")
        assert [since for since, _ in each.minimums] == sorted(since for since, _ in each.minimums)


def test_an_image_that_fits_everywhere():
    actual = ad_slots(IMAGE, TODAY)
    assert [each.slot for each in actual] == [each.name for each in SLOTS]
    assert all(each.eligible for each in actual)
    assert slot("google_ads_square").crop is None
    assert slot("google_ads_landscape").crop == IMAGE.crops["1.91:1"]
    assert slot("google_ads_landscape").reasons == ("cropped to 1.91:1",)
    assert slot("merchant_center_product").reasons == ()


def test_an_unknown_size_fits_nowhere():
    for each in ad_slots(dataclasses.replace(IMAGE, width=None), TODAY):
        assert not each.eligible
        assert each.reasons == ("the size of the image is not known (--ops quality)",)


def test_another_aspect_ratio_needs_a_crop():
    actual = slot("google_ads_landscape", crops={})
    assert not actual.eligible
    assert actual.reasons == ("1500 x 1500 pixels are not 1.91:1, and no crop is known (--ops focus)",)


@pytest.mark.parametrize(("width", "height"), [(600, 314), (1200, 628), (1910, 1000), (1205, 628)])
def test_the_published_sizes_have_their_aspect_ratio(width, height):
    assert slot("google_ads_landscape", width=width, height=height, crops={}).eligible


def test_a_crop_that_is_too_small():
    actual = slot("google_ads_landscape", width=500, height=500)
    assert actual.reasons == ("cropped to 1.91:1 it has 500 x 262 pixels; at least 600 x 314 are needed",)
    assert not actual.eligible
    assert actual.crop is None


def test_a_crop_of_another_aspect_ratio():
    actual = slot("google_ads_portrait", crops={"4:5": Box(0, 0, 0.7, 1)})
    assert actual.reasons == ("its crop for 4:5 has 1050 x 1500 pixels, which is another aspect ratio",)


def test_a_smaller_picture_than_advised_says_so():
    actual = slot("google_ads_square", width=400, height=400)
    assert actual.eligible
    assert actual.reasons == ("advised: 1200 x 1200 pixels or more; it has 400 x 400",)


@pytest.mark.parametrize(
    ("name", "side", "before"),
    [
        ("merchant_center_product", 99, False), ("merchant_center_product", 100, True), ("merchant_center_product", 499, True),
        ("merchant_center_apparel", 249, False), ("merchant_center_apparel", 250, True), ("merchant_center_apparel", 499, True),
    ],
)  # fmt: skip
def test_merchant_center_asks_for_more_from_the_last_of_january_2027(name, side, before):
    assert slot(name, BEFORE, width=side, height=side).eligible == before
    after = slot(name, AFTER, width=side, height=side)
    assert not after.eligible
    assert after.reasons == (f"it has {side} x {side} pixels; at least 500 x 500 are needed",)
    assert slot(name, AFTER, width=500, height=500).eligible


def test_rules_change_on_the_day_that_a_format_does():
    assert rules_in_force(TODAY) == rules_in_force(BEFORE) != rules_in_force(AFTER)


def test_merchant_center_takes_at_most_64_megapixels():
    assert (
        "it has 8001 x 8000 pixels; at most 64 million are taken"
        in slot("merchant_center_product", width=8001, height=8000).reasons
    )


def test_files_that_are_too_large_or_of_another_format():
    large = slot("google_ads_square", num_bytes=6 * 2**20)
    assert large.reasons == ("the file has 6.0 MB; at most 5 are taken",)
    webp = slot("google_ads_square", format="WEBP")
    assert webp.reasons == ("it is a WEBP file; taken are GIF, JPEG, PNG",)
    assert slot("google_ads_landscape", format="WEBP", num_bytes=6 * 2**20).eligible  # cropping writes another file
    assert slot("merchant_center_product", format="WEBP").eligible


def test_promotional_text_keeps_a_picture_out_of_merchant_center_alone():
    text = FoundText("50% OFF", 0.99, Box(0.1, 0.45, 0.6, 0.55))
    actual = slot("merchant_center_product", texts=(text,), text_share=0.05)
    assert (actual.eligible, actual.reasons) == (False, ("promotional text: '50% OFF'",))
    assert slot("google_ads_square", texts=(text,), text_share=0.05).eligible


def test_text_may_cover_a_fifth_of_an_ad():
    assert slot("google_ads_square", text_share=0.2).eligible
    assert slot("google_ads_square", text_share=0.21).reasons == ("text covers 21% of it; at most 20% may be text",)


def test_text_counts_within_the_crop():
    text = FoundText("a very long headline", 0.99, Box(0.0, 0.3, 1.0, 0.44))
    assert slot("google_ads_square", texts=(text,), text_share=0.14).eligible
    assert slot("google_ads_landscape", texts=(text,), text_share=0.14).reasons == (
        "text covers 27% of it; at most 20% may be text",
    )


def test_text_that_nobody_looked_for_is_said():
    assert slot("google_ads_square", texts=None, text_share=None).reasons == (
        "text in it was not looked for (--ops ocr)",
    )
    assert slot("merchant_center_product", texts=None).reasons == ("text in it was not looked for (--ops ocr)",)


def test_adult_content_fits_nowhere():
    for each in ad_slots(dataclasses.replace(IMAGE, nsfw_score=0.9), TODAY):
        assert (each.eligible, each.reasons) == (False, ("adult content score 0.90; adult content is not taken",))
    assert all(each.eligible for each in ad_slots(dataclasses.replace(IMAGE, nsfw_score=0.7), TODAY))


def test_borders_and_backgrounds():
    cropped = slot("google_ads_landscape", border=0.08)
    assert cropped.reasons == ("cropped to 1.91:1", "8% of the image is a border, of which the crop may hold some")
    assert slot("merchant_center_product", border=0.08).reasons == ("8% of it is a border",)
    actual = slot("merchant_center_product", plain_background=0.1)
    assert (actual.eligible, actual.reasons) == (True, ("advised: a plain background",))


def test_a_crop_that_cuts_a_face():
    face, background = Box(0.4, 0.05, 0.6, 0.3), Box(0.9, 0.0, 0.92, 0.03)
    actual = slot("google_ads_landscape", faces=(face, background))
    assert (actual.eligible, actual.reasons) == (False, ("its crop for 1.91:1 cuts 1 of 2 faces",))
    assert slot("google_ads_square", faces=(face, background)).eligible
    assert slot("google_ads_landscape", faces=(Box(0.4, 0.4, 0.6, 0.6), background)).eligible


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.dates(date(2020, 1, 1), date(2030, 1, 1)),
    st.floats(0, 0.5),
    st.floats(0.05, 0.5),
)
def test_an_eligible_image_keeps_every_rule(width, height, on, left, share):
    crop = Box(left, 0.1, left + share, 0.1 + share)
    image = dataclasses.replace(IMAGE, width=width, height=height, crops=dict.fromkeys(IMAGE.crops, crop))
    for format_, actual in zip(SLOTS, ad_slots(image, on), strict=True):
        assert actual.eligible or actual.reasons
        if actual.eligible:
            box = actual.crop or Box(0, 0, 1, 1)
            wide = round(box.right * width) - round(box.left * width)
            high = round(box.bottom * height) - round(box.top * height)
            minimum = format_.minimum(on)
            assert wide >= minimum.width and high >= minimum.height
            if format_.aspect:
                one, other = map(float, format_.aspect.split(":"))
                assert wide / high == pytest.approx(one / other, rel=0.012)
