"""Policies that attention feeds back to, in plain Python, one head at a time and straight from the papers.

Every layer is a list of heads; a head is what it holds, {position: record}. One step is: the new token enters, the
weights that the query gave every held entry are looked at, and while a head holds more than its budget an entry goes.
"""

import math
from dataclasses import dataclass, field


@dataclass
class PlainEntry:
    key: list[float]
    value: list[float]
    received: list[float] = field(default_factory=list)  # of every query since, oldest first
    stamp: int = 0


Head = dict[int, PlainEntry]


def h2o(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    return {position: sum(entry.received) for position, entry in head.items()}


def tova(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    return {position: sum(other[position].received[-1] for other in heads) for position in head}


def snapkv(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    order = sorted(head)
    recent = [sum(head[position].received[-32:]) for position in order]
    return {position: max(recent[max(0, i - 3) : i + 4]) for i, position in enumerate(order)}


def morphkv(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    return {position: sum(entry.received[-32:]) for position, entry in head.items()}


def raas(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    best = sorted((entry.received[-1] for entry in head.values()), reverse=True)
    least = best[math.ceil(len(best) / 2) - 1]
    for position, entry in head.items():
        if entry.received[-1] >= least or position == step:
            entry.stamp = step
    return {position: entry.stamp for position, entry in head.items()}


def keydiff(heads: list[Head], head: Head, step: int) -> dict[int, float]:
    units = {position: unit(entry.key) for position, entry in head.items()}
    mean = [sum(axis) / len(units) for axis in zip(*units.values(), strict=True)]
    return {position: -dot(key, unit(mean)) for position, key in units.items()}


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a]


PLAIN = {"h2o": h2o, "tova": tova, "snapkv": snapkv, "morphkv": morphkv, "raas": raas, "keydiff": keydiff}
# the share of the budget, and at most so many tokens, that the youngest entries are sure of
RECENT = {"h2o": (0.5, None), "snapkv": (0.5, 32), "morphkv": (0.5, 32)}


def simulate(name, query, key, value, budget, protected, scale, chunks) -> list[list[set[int]]]:
    """What each head holds after each chunk of tokens, [chunks][H].

    Args:
        query: [HQ, T, D], key and value [H, T, D], all nested lists.
        chunks: how many tokens are read at a time; a chunk sees all that is held and itself, and is cut at its end.
    """
    heads: list[Head] = [{} for _ in key]
    group = len(query) // len(key)
    fraction, most = RECENT.get(name, (0.0, None))
    recent = min(int(fraction * budget), most or budget, budget - protected)
    history, step = [], -1
    for length in chunks:
        for _ in range(length):
            step += 1
            for h, head in enumerate(heads):
                head[step] = PlainEntry(key[h][step], value[h][step])
                received = dict.fromkeys(head, 0.0)
                for g in range(h * group, (h + 1) * group):
                    logits = {position: dot(query[g][step], entry.key) * scale for position, entry in head.items()}
                    total = sum(math.exp(logit) for logit in logits.values())
                    for position, logit in logits.items():
                        received[position] += math.exp(logit) / total
                for position, weight in received.items():
                    head[position].received.append(weight)
            priorities = [PLAIN[name](heads, head, step) for head in heads]
        for head, priority in zip(heads, priorities, strict=True):
            candidates = [(priority[p], p) for p in head if p >= protected and step - p >= recent]
            for _, position in sorted(candidates)[: max(0, len(head) - budget)]:
                del head[position]
        history.append([set(head) for head in heads])
    return history
