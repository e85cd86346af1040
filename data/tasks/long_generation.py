"""Keep to a plan that was made long ago, while a long text is written."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention_gates.data.tasks.base import Filler, Span, Split, Task, TaskExample, check_setting
from retention_gates.data.tasks.words import ADJECTIVES, NOUNS

HEADING = "\n\nSection {}:"


@dataclass(frozen=True)
class LongGeneration(Task):
    """A plan with the titles of all sections, much other text, then the sections one by one, each under its title.

    The sections are part of the answer, with text of the documents as their body; only their titles are scored, each
    also as a part of its own, so that the score shows what is forgotten as the text grows.

    Args:
        sections: how many the plan has, 2 to 12.
        distance: tokens between the plan and the first section. None: half of what the length leaves.
    """

    kind: ClassVar[str] = "long_generation"
    sections: int = 4
    distance: int | None = None

    def __post_init__(self) -> None:
        check_setting(self.kind, "sections", self.sections, 2, 12)
        if self.distance is not None:
            check_setting(self.kind, "distance", self.distance, 0, 2**20)

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        adjectives = rng.choice(ADJECTIVES[split], self.sections, replace=False)
        nouns = rng.choice(NOUNS[split], self.sections, replace=False)
        titles = [f" The {adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
        encoded = [filler.encode(title) for title in titles]
        headings = [filler.encode(HEADING.format(index + 1)) for index in range(self.sections)]
        plan = filler.encode("This is the plan of the text.")
        for heading, title in zip(headings, encoded, strict=True):
            plan = plan + heading + title
        gap = filler.encode("\n\n")
        said = sum(map(len, headings)) + sum(map(len, encoded))
        used = len(filler.prefix) + len(plan) + len(gap) * self.sections + said
        asked_for = self.distance or 0
        least = 16 * self.sections
        room = self.filler_room(length, used + asked_for, least=least) + asked_for
        distance = room // 2 if self.distance is None else self.distance
        text = filler.window(rng, room)
        cuts = np.linspace(distance, room, self.sections).round().astype(int).tolist()
        prompt = filler.prefix + plan + gap + text[:distance] + headings[0]
        answer = list(encoded[0])
        parts: dict[str, Span] = {"section 1": (0, len(answer))}
        for index in range(1, self.sections):
            answer += gap + text[cuts[index - 1] : cuts[index]] + headings[index] + encoded[index]
            parts[f"section {index + 1}"] = (len(answer) - len(encoded[index]), len(answer))
        return TaskExample(prompt, answer, {"titles": [title.strip() for title in titles]}, parts)
