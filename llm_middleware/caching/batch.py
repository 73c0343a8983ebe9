"""Embedding requests with a list of inputs, answered input by input.

Each input is an entry of its own, the same that a request for it alone would make. What is stored is taken
from there, only the rest goes to the handler, each different input once, and the answer is put together in
the order asked: ``index`` and ``usage`` are right even where the provider answers out of order.
https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..types import Headers
from .sse import dump_json, load_json

__all__ = ["Batch", "inputs_of", "joined", "reduced", "single"]


def inputs_of(form: Mapping[str, object]) -> list[object] | None:
    """The inputs of a request for several embeddings, else None. A list of numbers is one input: tokens."""
    value = form.get("input")
    if not isinstance(value, list) or not value or all(isinstance(item, int) for item in value):
        return None
    return value


def single(form: Mapping[str, object], item: object) -> dict[str, object]:
    """The request for one of the inputs alone."""
    return {**form, "input": item}


@dataclass(slots=True)
class Batch:
    """What is known of a list request: the store key of each input, in order, and the stored answers found
    (key to body)."""

    keys: tuple[str, ...]
    found: dict[str, bytes]
    headers: Headers = ()

    @property
    def missing(self) -> list[int]:
        """The positions to ask for: of each different input that is not stored, its first."""
        seen = set(self.found)
        positions = []
        for position, key in enumerate(self.keys):
            if key not in seen:
                seen.add(key)
                positions.append(position)
        return positions

    @property
    def share(self) -> str:
        """How many of the inputs were stored: ``3/4``."""
        return f"{sum(key in self.found for key in self.keys)}/{len(self.keys)}"

    @property
    def whole(self) -> bool:
        """The request must go on as it is: nothing is stored and no input comes twice."""
        return len(self.missing) == len(self.keys)


def reduced(body: object, batch: Batch) -> object:
    """The request body (bytes or mapping) with the missing inputs only."""
    fields = load_json(body) if isinstance(body, bytes) else body
    assert isinstance(fields, Mapping)
    inputs = fields["input"]
    assert isinstance(inputs, Sequence)
    fewer = {**fields, "input": [inputs[position] for position in batch.missing]}
    return (
        json.dumps(fewer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if isinstance(body, bytes)
        else fewer
    )


def _rows(answer: object, count: int) -> list[dict[str, object]] | None:
    """The ``data`` of an answer in the order of its indexes; None where those are not 0 to ``count`` - 1."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or len(data) != count or not all(isinstance(row, dict) for row in data):
        return None
    ordered = {row.get("index"): row for row in data}
    if any(type(index) is not int or not 0 <= index < count for index in ordered) or len(ordered) != count:
        return None
    return [ordered[index] for index in range(count)]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` in parts proportional to ``weights`` that add up to it exactly."""
    whole, parts, given = sum(weights) or 1, [], 0
    reached = 0
    for weight in weights:
        reached += weight
        part = total * reached // whole - given
        parts.append(part)
        given += part
    return parts


def _usages(usage: object, inputs: Sequence[object]) -> list[object]:
    """A batch's usage as one for each input, by length; providers tell only the sum."""
    if not isinstance(usage, dict):
        return [usage] * len(inputs)
    weights = [max(1, len(item)) if isinstance(item, (str, list)) else 1 for item in inputs]
    rows: list[dict[str, object]] = [{} for _ in inputs]
    for name, total in usage.items():
        counted = isinstance(total, int) and not isinstance(total, bool)
        values = _shares(total, weights) if counted else [total] * len(inputs)
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return list(rows)


def split(body: bytes, batch: Batch, inputs: Sequence[object]) -> dict[str, bytes] | None:
    """A handler's answer to the missing inputs as one answer for each, by store key. None where it is not an
    answer to them."""
    try:
        answer = load_json(body)
    except ValueError:
        return None
    positions = batch.missing
    rows = _rows(answer, len(positions))
    if rows is None:
        return None
    assert isinstance(answer, dict)
    asked = [inputs[position] for position in positions]
    parts = {}
    for position, row, usage in zip(positions, rows, _usages(answer.get("usage"), asked), strict=True):
        part = {**answer, "data": [{**row, "index": 0}]}
        if "usage" in answer:
            part["usage"] = usage
        parts[batch.keys[position]] = dump_json(part)
    return parts


def _added(total: object, usage: object) -> object:
    if not isinstance(total, dict) or not isinstance(usage, dict):
        return usage if total is None else total
    summed = dict(total)
    for name, value in usage.items():
        before = summed.get(name, 0)
        if isinstance(value, int) and isinstance(before, int):
            summed[name] = before + value
    return summed


def joined(keys: Sequence[str], parts: Mapping[str, bytes]) -> bytes:
    """One answer to all inputs from the answers to each; ``ValueError`` where one is no such answer."""
    answers = {key: load_json(body) for key, body in parts.items()}
    data: list[object] = []
    whole: dict[str, object] = {}
    usage: object = None
    for position, key in enumerate(keys):
        answer = answers[key]
        rows = _rows(answer, 1)
        if rows is None or not isinstance(answer, dict):
            raise ValueError("not the answer to one input")
        data.append({**rows[0], "index": position})
        whole = whole or answer
    for key in dict.fromkeys(keys):
        part = answers[key]
        usage = _added(usage, part.get("usage") if isinstance(part, dict) else None)
    return dump_json({**whole, "data": data, **({"usage": usage} if "usage" in whole else {})})
