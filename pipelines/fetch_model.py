"""`beamsight fetch-model`: a model into a directory, for machines without network."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.options import FetchModelOptions
from vlm_ops.models import fetch_model
from vlm_ops.models.settings import ModelSettings


def run(options: FetchModelOptions) -> int:
    """Fetches the model: one that ops run, or the language model of `tag` and `train`.

    Raises:
        ValueError: There is no such model, it cannot be fetched, or the directory holds something else.
    """
    settings = ModelSettings(trust_remote_code=options.trust_remote_code)
    spec = fetch_model(options.model, Path(options.to).expanduser(), settings)
    if spec is None:
        print(f"nothing to fetch: {options.model} is on this machine")
        return 0
    print(f"fetched    {options.model}\nuse it as  {spec}")
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("fetch-model", sys.argv[1:]))
