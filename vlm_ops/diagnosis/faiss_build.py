"""The FAISS that is installed: for which processors and which cards it was built."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_ops.diagnosis import Finding, one_line
from vlm_ops.diagnosis.cuda import Card, Driver, read_driver
from vlm_ops.diagnosis.device_code import DeviceCode, fat_binaries, lacking


def check_faiss() -> Iterator[Finding]:
    """Version, instruction sets, and the cards that it has code for."""
    try:
        import faiss
    except Exception as error:  # its shared libraries may be missing
        told = f"cannot be imported: {one_line(error)}"
        yield Finding("faiss", "problem", told, "pip install --force-reinstall faiss-gpu")
        return
    yield Finding("faiss", "ok", f"{faiss.__version__}, {_instructions(faiss)}")
    if not hasattr(faiss, "StandardGpuResources"):
        yield Finding("faiss on GPUs", "ok", "a build for CPUs alone; searches run there")
        return
    try:
        binaries = [codes for path in _libraries(Path(faiss.__file__).parent) for codes in fat_binaries(path)]
    except (OSError, ValueError) as error:
        yield Finding("faiss on GPUs", "unknown", f"which cards it has code for cannot be told: {one_line(error)}")
        return
    yield from judge_device_code(binaries, read_driver(), faiss.get_num_gpus())


def judge_device_code(
    binaries: Sequence[Collection[DeviceCode]], driver: Driver | None, num_gpus: int
) -> Iterator[Finding]:
    """Whether FAISS has code for the cards.

    Args:
        binaries: What each part of its library has code for.
        num_gpus: How many cards FAISS sees itself.
    """
    name = "faiss on GPUs"
    if not binaries:
        yield Finding(name, "unknown", "its library has no code for cards in a form that is known")
        return
    told = f"has code for {', '.join(map(str, sorted(set().union(*binaries))))}"
    cards: dict[Card, int] = {card: lacking(binaries, card.capability) for card in (driver.cards if driver else ())}
    unfit = {card: number for card, number in cards.items() if number}
    for card, number in unfit.items():
        which = f"{card.name} (sm_{card.capability[0]}{card.capability[1]})"
        missing = "none" if number == len(binaries) else f"none in {number} of its {len(binaries)} parts"
        remedy = "search on the CPU, or install a build of FAISS for this card"
        yield Finding(name, "warning", f"{told}, and {missing} for {which}", remedy)
    if driver and len(cards) > 0 and num_gpus == 0:
        remedy = f"install a driver for its CUDA (this one runs up to {driver.cuda[0]}.{driver.cuda[1]})"
        yield Finding(name, "warning", f"{told}, but sees no card where the driver does", remedy)
    elif not unfit:
        fits = ", ".join(sorted({card.name + _how_it_runs(binaries, card) for card in cards}))
        yield Finding(name, "ok", f"{told}; fits {fits}" if fits else told)


def _how_it_runs(binaries: Sequence[Collection[DeviceCode]], card: Card) -> str:
    is_translated = lacking([[code for code in codes if not code.is_ptx] for codes in binaries], card.capability) > 0
    return " (translated by the driver at its first use)" if is_translated else ""


def _instructions(faiss: Any) -> str:
    """What the CPU side was compiled for, in FAISS's words, and what of it is used here: chosen by the loader (one
    module a set), or, in newer versions, inside the library."""
    config = getattr(faiss, "SIMDConfig", None)
    if config is not None and hasattr(config, "get_level_name"):
        used = config.get_level_name()
    else:
        used = next((name.upper() for name in vars(faiss) if name.startswith("swigfaiss_")), "").partition("_")[2]
    return f"built with {faiss.get_compile_options().strip()}" + (f"; uses {used} here" if used else "")


def _libraries(folder: Path) -> list[Path]:
    """FAISS's own libraries: inside the package, or where repaired wheels put them, beside it."""
    found = [*folder.glob("*faiss*.so*"), *folder.parent.glob("faiss*.libs/*faiss*.so*"), *folder.glob("*.pyd")]
    return sorted({path.resolve() for path in found})
