"""Where an export goes, and all that every format needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlm_ops import storage
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.rows import LeftOut

Written = Mapping[str, int]
"""How much of what was written, such as {"images": 20, "pages": 3}."""


@dataclass(frozen=True)
class Target:
    """Where an export goes.

    Attributes:
        uri: The file or the folder.
        addresses: Where images and pages are on the web.
        left_out: Told of the images that cannot be exported.
    """

    uri: str
    addresses: Addresses = field(default_factory=Addresses)
    left_out: LeftOut = field(default_factory=LeftOut)
    storage_options: storage.StorageOptions = field(default_factory=dict)
