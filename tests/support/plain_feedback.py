"""Policies that look at what is held, in plain Python, one head at a time and straight from the papers' equations.

One step is: the new token enters, the weights that the query gives every held entry are noted, and where a head holds
more than its budget the entries of lowest priority go.
"""

import cmath
import math
from dataclasses import dataclass, field


@dataclass
class PlainEntry:
    key: list[float]
    value: list[float]
    received: list[float] = field(default_factory=list)  # of every query since, oldest first
    stamp: int = 0
    rank: float = 1.0
    tokens: int = 1
    priority: float | None = None


@dataclass
class PlainLayer:
    query: list[list[list[float]]]  # [HQ][T][D]
    group: int
    budget: int
    scale: float
    protected: list[tuple[int, int]]
    frequencies: list[float]
    heads: list[dict[int, PlainEntry]]

    def queries(self, head: int) -> range:
        return range(head * self.group, (head + 1) * self.group)


Priorities = dict[int, float]


def h2o(layer: PlainLayer, head: int, step: int) -> Priorities:
    return {position: sum(entry.received) for position, entry in layer.heads[head].items()}


def tova(layer: PlainLayer, head: int, step: int) -> Priorities:
    return {position: sum(other[position].received[-1] for other in layer.heads) for position in layer.heads[head]}


def windowed(entries: dict[int, PlainEntry], window: int, neighbours: int) -> Priorities:
    order, reach = sorted(entries), neighbours // 2
    recent = [sum(entries[position].received[-window:]) for position in order]
    return {position: max(recent[max(0, i - reach) : i + reach + 1]) for i, position in enumerate(order)}


def snapkv(layer: PlainLayer, head: int, step: int) -> Priorities:
    return windowed(layer.heads[head], window=32, neighbours=7)


def morphkv(layer: PlainLayer, head: int, step: int) -> Priorities:
    return windowed(layer.heads[head], window=32, neighbours=1)


def raas(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries = layer.heads[head]
    best = sorted((entry.received[-1] for entry in entries.values()), reverse=True)
    least = best[math.ceil(len(best) / 2) - 1]
    for position, entry in entries.items():
        if entry.received[-1] >= least or position == step:
            entry.stamp = step
    return {position: entry.stamp for position, entry in entries.items()}


def keydiff(layer: PlainLayer, head: int, step: int) -> Priorities:
    units = {position: unit(entry.key) for position, entry in layer.heads[head].items()}
    mean = [sum(axis) / len(units) for axis in zip(*units.values(), strict=True)]
    return {position: -dot(key, unit(mean)) for position, key in units.items()}


def rkv(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries = layer.heads[head]
    importance = windowed(entries, window=8, neighbours=7)
    similarity = {
        i: {j: dot(unit(a.key), unit(b.key)) if i != j else 0.0 for j, b in entries.items()}
        for i, a in entries.items()
    }
    for row in similarity.values():
        alike = [j for j, cosine in row.items() if cosine > 0.5]
        if alike:
            row[max(alike)] = 0.0
    redundancy = softmax({j: sum(row[j] for row in similarity.values()) / len(entries) for j in entries})
    return {j: 0.1 * importance[j] / 8 / layer.group - 0.9 * redundancy[j] for j in entries}


def lagkv(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries, lag = layer.heads[head], max(2, min(128, layer.budget // 4))
    complete, rest = divmod(step + 1 - 4, lag)
    if step >= 4 and rest == 0 and complete >= 2:
        parts = [[p for p in sorted(entries) if (p - 4) // lag == c and p >= 4] for c in (complete - 2, complete - 1)]
        totals = dict.fromkeys(parts[0], 0.0)
        for name in ("key", "value"):
            low, high = (
                [f(axis) for axis in zip(*(getattr(entries[p], name) for p in parts[1]), strict=True)]
                for f in (min, max)
            )
            spreads = {}
            for p in parts[0]:
                x = [
                    (a - least) / (most - least)
                    for a, least, most in zip(getattr(entries[p], name), low, high, strict=True)
                ]
                mean = sum(x) / len(x)
                spreads[p] = math.sqrt(sum((a - mean) ** 2 for a in x) / (len(x) - 1))
            for p, share in softmax(spreads).items():
                totals[p] += share
        for rank, p in enumerate(sorted(totals, key=lambda p: totals[p])):
            entries[p].rank = rank / lag
    return {position: entry.rank for position, entry in entries.items()}


def expected_attention(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries = {p: entry for p, entry in layer.heads[head].items() if p >= 4}
    result = dict.fromkeys(layer.heads[head], math.inf)
    shares = dict.fromkeys(entries, 0.0)
    for q in layer.queries(head):
        rotated = [rotate(layer.query[q][t], -t, layer.frequencies) for t in range(4, step + 1)]
        if not rotated:
            return result
        mean = [sum(axis) / len(rotated) for axis in zip(*rotated, strict=True)]
        size = range(len(mean))
        covariance = [
            [sum((x[i] - mean[i]) * (x[j] - mean[j]) for x in rotated) / len(rotated) for j in size] for i in size
        ]
        # the mean rotation of the next 512 positions, as a matrix
        columns = []
        for i in size:
            axis = [float(i == j) for j in size]
            ahead = [rotate(axis, p, layer.frequencies) for p in range(step + 1, step + 513)]
            columns.append([sum(x) / 512 for x in zip(*ahead, strict=True)])
        back = {p: [dot(column, entry.key) for column in columns] for p, entry in entries.items()}  # R^T k
        logits = {
            p: dot(k, mean) * layer.scale
            + layer.scale**2 / 2 * sum(k[i] * covariance[i][j] * k[j] for i in size for j in size)
            for p, k in back.items()
        }
        for p, share in softmax(logits).items():
            shares[p] += share / layer.group
    return result | {p: share * math.sqrt(dot(entries[p].value, entries[p].value)) for p, share in shares.items()}


def triattention(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries, half = layer.heads[head], len(layer.frequencies)
    result = dict.fromkeys(entries, -math.inf)
    for q in layer.queries(head):
        before = [rotate(layer.query[q][t], -t, layer.frequencies) for t in range(step + 1)]
        scores = dict.fromkeys(entries, 0.0)
        for f, frequency in enumerate(layer.frequencies):
            pairs = [complex(x[f], x[f + half]) for x in before]
            centre = sum(pairs) / len(pairs)
            mean_length = sum(map(abs, pairs)) / len(pairs)
            for p, entry in entries.items():
                original = rotate(entry.key, -p, layer.frequencies)
                key = complex(original[f], original[f + half])
                phase = cmath.phase(centre) - cmath.phase(key)
                for ahead in (2**i for i in range(17)):
                    angle = frequency * (step + ahead - p) + phase
                    scores[p] += abs(centre) * abs(key) * math.cos(angle) / 17
                scores[p] += (mean_length - abs(centre)) * abs(key)
        mean = sum(scores.values()) / len(scores)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in scores.values()) / len(scores))
        result = {p: max(result[p], (scores[p] - mean) / max(deviation, 1e-6)) for p in entries}
    return result


def vase(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries, order = layer.heads[head], sorted(layer.heads[head])
    means = [sum(entries[p].received[-64:]) / min(step - p + 1, 64) / layer.group for p in order]
    sizes = {p: math.inf if p < 4 else max(e.value) - min(e.value) for p, e in entries.items()}
    recent = min(layer.budget // 2, 64)
    older = [p for p in order if step - p > recent - 8]
    large = sorted(older, key=lambda p: sizes[p], reverse=True)[: layer.budget // 4]
    result = dict.fromkeys(large, math.inf)
    for i, p in enumerate(order):
        if p not in large:
            weight = max(sum(means[max(0, i - 2) : i + 3]) / 5, 1e-30)
            seed = murmur(murmur(head + murmur(murmur(0) + 0)) + p) >> 8  # run, layer, head, token
            draw = murmur(seed + murmur(step)) >> 8
            result[p] = math.log(weight) - math.log(-math.log((draw + 0.5) / 2**24))
    return result


def murmur(x: int) -> int:
    """The finaliser of murmur3, in 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def citrus(layer: PlainLayer, head: int, step: int) -> Priorities:
    entries = layer.heads[head]
    instruction = [t for start, stop in layer.protected[1:] for t in range(start, stop) if t <= step][-16:]
    result = dict.fromkeys(entries, 0.0)
    for q in layer.queries(head):
        for i, t in enumerate(reversed(instruction)):
            now = rotate(layer.query[q][t], step + 16 - i - t, layer.frequencies)
            for p, share in softmax({p: dot(now, e.key) * layer.scale for p, e in entries.items()}).items():
                result[p] += share
    return result


def merge(entries: dict[int, PlainEntry], victims: list[int]) -> None:
    survivors = [p for p in entries if p not in victims]
    joins: dict[int, list[PlainEntry]] = {}
    for victim in victims:
        cosines = {p: dot(unit(entries[p].key), unit(entries[victim].key)) for p in survivors}
        nearest = max(cosines, key=lambda p: cosines[p])
        if cosines[nearest] >= 0.6:
            joins.setdefault(nearest, []).append(entries[victim])
    for p, others in joins.items():
        members = [entries[p], *others]
        total = sum(member.tokens for member in members)
        for name in ("key", "value"):
            axes = zip(*([x * member.tokens for x in getattr(member, name)] for member in members), strict=True)
            setattr(entries[p], name, [sum(axis) / total for axis in axes])
        entries[p].tokens = total


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a]


def softmax(logits: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(logit) for logit in logits.values())
    return {position: math.exp(logit) / total for position, logit in logits.items()}


def rotate(x: list[float], position: int, frequencies: list[float]) -> list[float]:
    half = len(frequencies)
    cos, sin = ([f(position * w) for w in frequencies] for f in (math.cos, math.sin))
    first = [x[i] * cos[i] - x[i + half] * sin[i] for i in range(half)]
    return first + [x[i + half] * cos[i] + x[i] * sin[i] for i in range(half)]


PLAIN = {
    f.__name__: f
    for f in (h2o, tova, snapkv, morphkv, raas, keydiff, rkv, lagkv, expected_attention, triattention, vase, citrus)
}
PLAIN["merging"] = h2o
# the share of the budget, and at most so many tokens, that the youngest entries are sure of
RECENT = dict.fromkeys(("h2o", "lagkv", "expected_attention", "citrus", "merging", "value_norm"), (0.5, None))
RECENT |= {"snapkv": (0.5, 32), "morphkv": (0.5, 32), "rkv": (0.5, 8), "triattention": (0.5, 128), "vase": (0.5, 64)}
INTERVAL = {"rkv": 8, "expected_attention": 8, "triattention": 8, "vase": 8}  # steps for which a priority holds


def value_norm(layer: PlainLayer, head: int, step: int) -> Priorities:
    return {position: math.sqrt(dot(entry.value, entry.value)) for position, entry in layer.heads[head].items()}


PLAIN["value_norm"] = value_norm


def simulate(name, query, key, value, budget, protected, scale, frequencies, chunks, shared=False, reserved=()):
    """What each head holds after each chunk of tokens, [chunks][H].

    Args:
        query: [HQ, T, D], key and value [H, T, D], all nested lists.
        protected: spans of offsets; those after the first are the instruction.
        chunks: how many tokens are read at a time; a chunk sees all that is held and itself, and is cut at its end.
        reserved: spans (start, stop, entries) of which each head keeps at least so many, the best.
        shared: whether the heads have one budget together, of which each is sure of a fifth of its share (AdaKV).
    """
    layer = PlainLayer(query, len(query) // len(key), budget, scale, protected, frequencies, [{} for _ in key])
    kept = {p for start, stop in protected for p in range(start, stop)}
    fraction, most = RECENT.get(name, (0.0, None))
    recent = min(
        int(fraction * budget), most or budget, budget - len(kept) - sum(entries for _, _, entries in reserved)
    )
    history, step = [], -1
    for length in chunks:
        for _ in range(length):
            step += 1
            for h, entries in enumerate(layer.heads):
                entries[step] = PlainEntry(key[h][step], value[h][step])
                received = dict.fromkeys(entries, 0.0)
                for q in layer.queries(h):
                    logits = {position: dot(query[q][step], entry.key) * scale for position, entry in entries.items()}
                    for position, weight in softmax(logits).items():
                        received[position] += weight
                for position, weight in received.items():
                    entries[position].received.append(weight)
            if name in ("raas", "lagkv"):  # what they see at a step they remember
                for h in range(len(layer.heads)):
                    PLAIN[name](layer, h, step)
        if length > 1 or (step + 1) % INTERVAL.get(name, 1) == 0:
            for h, priorities in enumerate([PLAIN[name](layer, h, step) for h in range(len(layer.heads))]):
                for position, priority in priorities.items():
                    layer.heads[h][position].priority = priority
        candidates = []  # of each head, the best last
        for entries in layer.heads:
            stays = {p for p, e in entries.items() if p in kept or step - p < recent or e.priority is None}
            for start, stop, least in reserved:
                inside = [(p in stays, e.priority or 0.0, p) for p, e in entries.items() if start <= p < stop]
                stays |= {p for _, _, p in sorted(inside, reverse=True)[:least]}
            candidates.append(sorted((entries[p].priority, p) for p in entries if p not in stays))
        if shared:
            floor = max(budget // 5, len(kept) + 1)
            may_go = [(*c, h) for h, own in enumerate(candidates) for c in own[: max(0, len(layer.heads[h]) - floor)]]
            surplus = sum(map(len, layer.heads)) - budget * len(layer.heads)
            gone = sorted(may_go)[: max(0, surplus)]
            victims_of = [[p for _, p, head in gone if head == h] for h in range(len(layer.heads))]
        else:
            victims_of = [
                [p for _, p in own[: max(0, len(entries) - budget)]]
                for own, entries in zip(candidates, layer.heads, strict=True)
            ]
        for entries, victims in zip(layer.heads, victims_of, strict=True):
            if name == "merging":
                merge(entries, victims)
            for position in victims:
                del entries[position]
        history.append([set(entries) for entries in layer.heads])
    return history
