"""Find a pass key in noise."""

import numpy as np

from retention_gates.data.tasks.base import Filler, Split, Task, TaskExample, draw_code, encode_after_space

INSTRUCTION = "There is an important piece of information hidden in the text. Find it and remember it.\n"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Passkey(Task):
    """A five-digit pass key, said twice in a row inside sentences that repeat; it is asked for at the end.

    The noise is the same everywhere, so that this task shows what a policy does when nearly everything is worthless.
    After: Landmark Attention, arXiv 2305.16300.
    """

    name = "passkey"

    def build(self, filler: Filler, rng: np.random.Generator, length: int, split: Split) -> TaskExample:
        code = draw_code(rng, split)
        said, key = encode_after_space(filler, " The pass key is", code)
        again, _ = encode_after_space(filler, ". Remember it.", code)
        hidden = said + key + again + key + filler.encode(" is the pass key.")
        question, answer = encode_after_space(filler, "\n\nWhat is the pass key? The pass key is", code)
        head = filler.prefix + filler.encode(INSTRUCTION)
        room = self.filler_room(length, len(head) + len(hidden) + len(question) + len(answer))
        sentence = filler.encode(" " + NOISE)
        noise = (filler.encode(NOISE) + sentence * (room // len(sentence) + 1))[:room]
        start = int(rng.integers(room * 4 // 5 + 1))  # never just before the question
        prompt = head + noise[:start] + hidden + noise[start:] + question
        return TaskExample(prompt, answer, {"code": code, "position": len(head) + start})
