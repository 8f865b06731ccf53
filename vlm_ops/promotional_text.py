"""Which text in a picture advertises: sale, price, "free shipping".

Merchant Center refuses product images with it (https://support.google.com/merchants/answer/6324350), so a picture that
has some is for a person to look at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from schemas.tags import FoundText
from vlm_ops.plain_text import folded

# Below this, what OCR read is too often something else.
_LEAST_SCORE = 0.7
# Of the picture's height. What is smaller stands somewhere in the scene, and was not laid over it.
_LEAST_HEIGHT = 0.025
_MAX_CHARACTERS = 200  # of a line that is looked at

# Without case and accents, which OCR often misses, as it does spaces: a space here may be there or not.
_PHRASES = {
    "en": (
        "sale", "on sale", "flash sale", "final sale", "clearance", "free shipping", "free delivery", "ships free", "buy now", "shop now",
        "order now", "buy today", "order today", "add to cart", "buy one get one", "buy 1 get 1", "buy 2 get 1", "bogo",
        "coupons?", "coupon code", "promo code", "discount code", "voucher code", "discounts?", "best sellers?", "limited time", "limited offer",
        "special offer", "special price", "hot deals?", "best deals?", "best price", "lowest prices?", "low price", "price drop",
        "new arrivals?", "last chance", "while supplies last", "black friday", "cyber monday", "money back guarantee", "half price",
        "now only", "extended warranty",
    ),
    "de": (
        "rabatte?", "sonderangebote?", "angebot", "angebote", "ausverkauf", "schlussverkauf", "sommerschlussverkauf", "winterschlussverkauf",
        "gratis versand", "gratisversand", "kostenloser versand", "versandkostenfrei", "jetzt kaufen", "jetzt bestellen", "jetzt sparen",
        "gutschein", "gutscheincode", "rabattcode", "reduziert", "nur heute", "aktionspreis", "sonderpreis", "tiefpreis", "dauertiefpreis",
        "verkaufsschlager", "meistverkauft", "knallerpreis", "sparpreis",
    ),
    "fr": (
        "soldes", "promo", "promos", "promotion", "promotions", "remise", "livraison gratuite", "livraison offerte", "frais de port offerts",
        "acheter maintenant", "achetez maintenant", "commandez maintenant", "code promo", "offre speciale", "bon de reduction",
        "meilleure vente", "meilleures ventes", "prix reduit", "prix bas", "vente flash", "liquidation totale", "derniere chance", "bons plans",
    ),
    "es": (
        "rebajas", "oferta", "ofertas", "super oferta", "descuentos?", "envio gratis", "compra ahora", "comprar ahora", "compre ahora",
        "cupon", "cupones", "mas vendido", "liquidacion", "promocion", "promociones", "precio especial", "codigo de descuento", "ultima oportunidad",
    ),
    "it": (
        "saldi", "sconto", "sconti", "offerta", "offerte", "offerta speciale", "spedizione gratuita", "spedizione gratis", "acquista ora",
        "compra ora", "codice sconto", "buono sconto", "piu venduto", "promozione", "promozioni", "svendita", "sottocosto", "prezzo speciale",
        "prezzo scontato", "solo oggi",
    ),
}  # fmt: skip
# A house is for sale, and so is what stands in a classified ad; "sale" means salt in Italian and dirty in French.
_NOT_PROMOTIONAL = re.compile(
    r"\bfor\s*sale\b|\bsale\s+(?:marino|fino|grosso|iodato|e\s+pepe)\b|\b(?:di|con|senza)\s+sale\b"
)
_OFF = r"(?:off|rabatt|rabais|reduziert|(?:de\s*)?(?:remise|reduction|descuento|dto|dcto|sconto)|gunstiger|gespart|moins\s*cher)"
_UP_TO = r"(?:up\s*to|save|extra|bis\s*zu|bis|spare|jusqu\W?a|hasta(?:\s*el|\s*un)?|fino\s*al?|economisez|ahorra)"
_AMOUNT = r"\d{1,3}(?:[.,]\d{3})*(?:[.,]\d{2})?"
_CURRENCY = r"(?:[$€£]|us\$|eur|usd|gbp|chf)"
_PATTERNS = (
    rf"\d{{1,2}}\s*%\s*{_OFF}\b",
    rf"\b{_UP_TO}\W*\d{{1,2}}\s*%",
    r"(?:^|\s)[-–−]\s*\d{1,2}\s*%",
    rf"\bsave\s*{_CURRENCY}?\s*{_AMOUNT}\b",
    rf"(?:[$€£]|us\$)\s*{_AMOUNT}(?!\w)",
    rf"(?<![\w.,]){_AMOUNT}\s*(?:[$€£]|(?:eur|usd|gbp|chf)\b)",
    r"\b(?:code|kode|codigo|codice)\s*:?\s*(?=[a-z]+\d)[a-z0-9]{4,}\b",
    r"^\W*(?:2x1|3x2)\W*$",
)  # fmt: skip


def _spaceless(phrase: str) -> str:
    return phrase.replace(" ", r"[\s-]*")


_PROMOTIONAL = re.compile(
    "|".join([
        *_PATTERNS,
        r"\b(?:" + "|".join(_spaceless(phrase) for phrases in _PHRASES.values() for phrase in phrases) + r")\b",
    ])
)  # fmt: skip


def promotional_text(texts: Sequence[FoundText]) -> tuple[str, ...]:
    """The lines that advertise, as OCR read them and in its order.

    A line that says so only together with the one that follows, as "50%" and "OFF" do, counts as both of them.
    """
    lines = [each for each in texts if each.score >= _LEAST_SCORE and each.box.bottom - each.box.top >= _LEAST_HEIGHT]
    read = [folded(each.text[:_MAX_CHARACTERS]) for each in lines]
    says = [_advertises(line) for line in read]
    for at in range(len(lines) - 1):
        if not (says[at] or says[at + 1]) and _advertises(f"{read[at]} {read[at + 1]}"):
            says[at] = says[at + 1] = True
    return tuple(each.text for each, promotional in zip(lines, says, strict=True) if promotional)


def _advertises(line: str) -> bool:
    return _PROMOTIONAL.search(_NOT_PROMOTIONAL.sub(" ", line)) is not None
