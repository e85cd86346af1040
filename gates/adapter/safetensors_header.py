"""Reads the header of a safetensors file, whose sizes are not trusted."""

import json
import struct
from pathlib import Path
from typing import Any


def read_header(path: str | Path, most: int, way_out: str) -> dict[str, Any]:
    """The header of a safetensors file, `__metadata__` among its keys, if it has at most `most` bytes.

    Raises:
        ValueError: for a longer one, and for a file that is none of safetensors; it ends with the way out.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise not_safetensors(path, f"it has {size} bytes", way_out)
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise not_safetensors(path, f"it states a header of {length} bytes and has {size}", way_out)
        if length > most:
            raise not_safetensors(path, f"its header has {length} bytes, where at most {most} are needed", way_out)
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_safetensors(path, f"its header is no JSON: {type(error).__name__}", way_out) from error
    if not isinstance(header, dict):
        raise not_safetensors(path, f"its header is a {type(header).__name__}", way_out)
    return header


def not_safetensors(path: str | Path, why: str, way_out: str) -> ValueError:
    return ValueError(f"{path} is not a whole safetensors file ({why}): {way_out}.")
