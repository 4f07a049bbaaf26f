"""Checkpoints of today for readers of yesterday."""

import json
from pathlib import Path


def for_transformers_4(folder: Path) -> None:
    """Complete a saved model for readers built on transformers 4, such as auto-gptq 0.7.1, in place.

    transformers 5 writes the rotary base into `rope_parameters`. Older readers look for `rope_theta`, do not find it
    and silently take 10,000: on a model whose base is 100,000, perplexity rises by a tenth.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "rope_theta" in config.get("rope_parameters", {}):
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
