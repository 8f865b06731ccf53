"""What an English caption names: noun phrases, found by lists of words that are no part of one.

Captions are short and plain; a noun phrase ends before a preposition, a conjunction, a form of "to be" or a verb of
what people and animals do in photos, and begins after an article or a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from vlm_ops.mentions import PEOPLE, words
from vlm_ops.plain_text import ADJECTIVES, BEFORE_A_PHRASE, INSIDE_A_PHRASE, is_doing, word_set

_MAX_WORDS = 3
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
# After these a word in -ing or -ed belongs to the thing: "a swimming pool", "a striped shirt".
_OPENERS = word_set(
    f"a an the his her its their my our your some several many two this that these those another {_NUMBERS}"
)
# Behind these, what could be a verb is a thing: "near waves".
_PREPOSITIONS = BEFORE_A_PHRASE - word_set(
    "and as but down like off or out that through to until up where which while whilst who"
)
_NEVER = frozenset(
    BEFORE_A_PHRASE
    | INSIDE_A_PHRASE
    | word_set(
        f"""{_NUMBERS} he she it they him them i we you us who what when how there here not no nor so than then too also
        just very can could do does did done doing get gets getting got has have having will would may might must been
        am if because although though yet still already again only even ever never almost quite rather away back ahead
        together apart along aside forward forwards backward backwards upward upwards downward downwards sideways upside
        outdoors indoors outside inside up down out off over under across around through each other others something
        someone somebody anything anyone nothing everyone himself herself itself themselves whose all both either neither
        half few more most much less least lots about front side sides top bottom middle edge end background foreground
        distance midair mid-air closeup close-up group groups bunch couple pair lot number picture photo photograph image view scene shot
        camera way part piece type kind sort thing things set side-by-side same left right nearby upon among apparently"""
    )
)
_VERBS = word_set(
    """appear appears attempt attempts balance balances bark barks begin begins bend bends bike bites bite blow blows bounce
    bounces bound bounds break breaks bring brings build builds buy buys carry carries cast casts catch catches celebrate
    celebrates chase chases cheer cheers chew chews climb climbs clap claps come comes compete competes cook cooks cover covers
    crawl crawls cross crosses cry cries cut cuts dance dances dig digs dives dive drag drags drink drinks drive drives drop drops
    eat eats embrace embraces enjoy enjoys enter enters examine examines exit exits face faces fall falls feed feeds fetch fetches
    fight fights fill fills flies float floats follow follows gather gathers gaze gazes give gives glide glides go goes grab grabs
    grin grins grind grinds hang hangs happen happens held help helps hike hikes hit hits hold holds hop hops hug hugs hurdles jog
    jogs join joins jump jumps keep keeps kick kicks kiss kisses kneel kneels laugh laughs laid lay lays lead leads lean leans leap
    leaps leave leaves let lets lick licks lie lies lift lifts listen listens look looks made make makes march marches move moves
    navigate navigates observe observes open opens pass passes pause pauses peer peers perform performs pet pets pick picks play
    plays point points pose poses practice practices prepare prepares pretend pretends pull pulls push pushes put puts race raise
    raises reach reaches read reads ready relax relaxes rest rests retrieve retrieves ride rides roll rolls run runs sail sails
    say says scale scales scratch scratches see sees seem seems sell sells show shows shake shakes share shares shoot shoots shop shops shovels sing sings sit sits
    skate skates ski skis skateboards sleep sleeps slide slides smile smiles smoke smokes sniff sniffs snowboards speak speaks spin
    spins splash splashes stand stands stare stares start starts stop stops stretch stretches stroll strolls surf surfs
    surround surrounds swim swims swing swings tackle tackles tied take takes talk talks taste tastes tend tends throw throws toss tosses
    touch touches trot trots try tries tug tugs turn turns use uses wade wades wait waits walk walks watch watches wave waves wear
    wears win wins work works wrestle wrestles write writes yell yells sat stood lit seen shown taken worn thrown"""
)
_THINGS_IN_ED = word_set("breed speed steed tweed thoroughbred seaweed watershed bobsled moped hotbed")
_ANY_DOING = word_set(
    """bearing being coming containing doing facing featuring following getting giving going having holding including keeping
    laying leaning leaving letting looking lying making moving posing putting resting showing sitting staring standing
    starting surrounding taking trying turning using waiting watching wearing during nothing something anything
    everything according"""
)
_ENGLISH = frozenset((*BEFORE_A_PHRASE, *INSIDE_A_PHRASE, *ADJECTIVES, *PEOPLE)) | word_set(
    "is it not they we what you"
)
_SURELY_READ = 6


def noun_phrases(caption: str) -> Iterator[str]:
    """Lower-case noun phrases of at most three words, in their order: `black dog`, `swimming pool`."""
    phrase: list[str] = []
    opener, shared = "", False
    for word in (*_words(caption), "."):
        if _belongs(word, phrase, opener):
            phrase.append(word)
            continue
        shares = word in ("and", "or") and bool(phrase) and all(map(_is_modifier, phrase))  # "black and white dog"
        if phrase and not shares and _names_something(phrase[-1]):
            yield " ".join(_thing(phrase) if shared else phrase[-_MAX_WORDS:])
        opener = "near" if (opener, word) == ("next", "to") else word
        phrase, shared = [], shares


def doings(caption: str) -> list[str]:
    """What somebody does, where it says something of the picture: `skiing`, not `standing`."""
    found = _words(caption)
    things = set(found)
    doing = (word for word in found if is_doing(word) and "-" not in word and word not in _ANY_DOING)
    return [word for word in doing if word[:-3] not in things]  # "swinging on a swing"


def reads_english(text: str) -> bool:
    """Whether a text has a common English word, or is too short to tell."""
    found = _words(text)
    return len(found) < _SURELY_READ or not _ENGLISH.isdisjoint(found)


@lru_cache(64)  # a caption is looked at more than once
def _words(text: str) -> tuple[str, ...]:
    return tuple(words(text))


def _belongs(word: str, phrase: list[str], opener: str) -> bool:
    """Whether a word goes on with a phrase, which is empty at first; `opener` is the word before it."""
    if word in _NEVER or not word[0].isalpha():
        return False
    if not phrase and opener == "to":
        return False  # "tries to catch"
    if not _is_verb(word):
        return True
    if word in _VERBS:
        return (opener in _OPENERS and (not phrase or _is_modifier(phrase[-1]))) or (
            not phrase and opener in _PREPOSITIONS
        )
    return _is_modifier(phrase[-1]) if phrase else opener in _OPENERS


def _is_verb(word: str) -> bool:
    if word in _VERBS or is_doing(word):
        return True
    return word.endswith("ed") and len(word) > 4 and word not in _THINGS_IN_ED


def _is_modifier(word: str) -> bool:
    return word in ADJECTIVES or word.endswith(("'s", "s'"))


def _names_something(word: str) -> bool:
    return len(word) > 1 and not _is_modifier(word) and not is_doing(word)


def _thing(phrase: list[str]) -> list[str]:
    """Without the adjectives that it begins with."""
    return phrase[next(i for i, word in enumerate(phrase) if not _is_modifier(word)) :][-_MAX_WORDS:]
