from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.tags import Box, FoundText
from vlm_ops.promotional_text import promotional_text


def line(text, score=0.95, height=0.1):
    return FoundText(text, score, Box(0.1, 0.1, 0.9, 0.1 + height))


@pytest.mark.parametrize(
    "text",
    [
        "SALE", "Summer Sale", "50% OFF", "50%OFF", "UP TO 70%", "-30%", "$19.99", "19,99 €", "€ 5", "only 3.50 EUR", "FREE SHIPPING", "FREESHIPPING",
        "Free delivery today", "BUY NOW", "SHOP NOW", "Coupon inside", "BEST SELLER", "bestseller", "USE CODE SAVE20", "Code: WELCOME10",
        "Black Friday", "Limited time offer", "Buy one get one", "SAVE $10", "Half price",
        "20% Rabatt", "Bis zu 50% reduziert", "SONDERANGEBOT", "Jetzt kaufen", "Kostenloser Versand", "Gutscheincode", "Versandkostenfrei",
        "SOLDES", "Jusqu'à -50%", "LIVRAISON GRATUITE", "Prix réduit", "PRIX REDUIT", "Code promo", "Vente flash",
        "REBAJAS", "Hasta 40%", "ENVÍO GRATIS", "Oferta", "20% de descuento", "Compra ahora", "2x1",
        "SALDI", "Sconto 20%", "SPEDIZIONE GRATUITA", "Fino al 50%", "Acquista ora", "Offerta speciale",
    ],
)  # fmt: skip
def test_what_advertises(text):
    assert promotional_text([line(text)]) == (text,)


@pytest.mark.parametrize(
    "text",
    [
        "", "RESTAURANT", "STOP", "100% COTTON", "70% cacao", "HOUSE FOR SALE", "FORSALE", "sale marino", "Patate con sale", "wholesale", "Salem",
        "Nike", "No. 23", "1999", "24 hours", "Hotel Paris", "Police", "CODE OF CONDUCT", "offside", "Saldivar", "discounter", "Rebecca", "12:30", "coffee",
        "Product of Italy", "M 38", "USA 1", "Zip code 90210", "shelf 2x1.5 m", "Noise reduction", "save the whales", "EURO 2008",
    ],
)  # fmt: skip
def test_what_does_not(text):
    assert promotional_text([line(text)]) == ()


def test_lines_that_say_it_together():
    assert promotional_text([line("Shoes"), line("50%"), line("OFF"), line("all week")]) == ("50%", "OFF")
    assert promotional_text([line("FREE"), line("SHIPPING")]) == ("FREE", "SHIPPING")
    assert promotional_text([line("FREE"), line("hugs"), line("SHIPPING")]) == ()


def test_what_is_unsure_or_small_stands_in_the_scene():
    assert promotional_text([line("SALE", score=0.5)]) == ()
    assert promotional_text([line("SALE", height=0.01)]) == ()
    assert promotional_text([]) == ()


@given(st.lists(st.text(max_size=40) | st.sampled_from(["50%", "OFF", "SALE", "€", "9.99", "code"]), max_size=6))
def test_lines_stay_as_they_were_read_and_in_order(texts):
    found = list(promotional_text([line(text) for text in texts]))
    rest = iter(texts)
    assert all(text in rest for text in found)


def test_a_long_line_takes_no_longer():
    assert promotional_text([line("9" * 100_000 + "%"), line("a " * 50_000)]) == ()
