"""Files with rows that no reader can read, and chats of any content, in one random case each."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
from chat_templates import BLOCKS, TEMPLATES, WORDS, check_rows
from chats import byte_tokenizer, with_template

from retention_gates.data.reading import Reading, read_tokens
from retention_gates.data.tokens import TokenDocument

TOKENIZER = byte_tokenizer()
MARK = b"\xef\xbb\xbf"
BAD_LINES = [
    *(
        b'{"text": "half \\ud83d"}',
        b'{"text": "caf\xe9"}',
        b'{"text": 7}',
        b'{"title": ""}',
        b"[]",
        b"7",
        b"null",
        b"{",
    ),
    *(b'{"text": ' + b"[" * 100_000, b'{"text": %s}' % (b"9" * 5000), b"\xff\xfe", b"\x00", b'{"text": {"a": [{}]}}'),
]


def check_file(rng: random.Random, folder: Path) -> None:
    """Good rows are all read, in order, whatever the others hold; what ends the reading is a ValueError."""
    path = folder / f"rows{rng.choice(['.jsonl', '.json', '.parquet'])}"
    texts = [f"row {i} {random_text(rng)}." for i in range(rng.randint(1, 30))]
    write = write_parquet if path.suffix == ".parquet" else write_json
    good = write(rng, path, texts)
    whole_file_is_damaged = rng.random() < 0.2
    if whole_file_is_damaged:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
    try:
        found, reading = read_rows(path)
    except ValueError:
        assert whole_file_is_damaged or not good
        return
    if not whole_file_is_damaged:
        decoded = [TOKENIZER.decode(document.ids).removeprefix("<|endoftext|>") for document in found]
        assert [text for text in decoded if text in good] == good
        assert len(found) + reading.bad_rows >= len(texts)


def read_rows(path: Path) -> tuple[list[TokenDocument], Reading]:
    return read_tokens(str(path), TOKENIZER, text_field="text", skip_bad_rows=True, progress=False)


def write_json(rng: random.Random, path: Path, texts: list[str]) -> list[str]:
    """Rows of which some cannot be read; returns the texts of those that can."""
    rows, good = [], []
    for text in texts:
        row = json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5).encode()
        kind = rng.choice(["good", "good", "bad", "turned"])
        if kind == "good":
            good.append(text)
        elif kind == "bad":
            row = rng.choice([line for line in BAD_LINES if path.suffix == ".jsonl" or is_whole(line)])
        else:  # a byte inside of the text, so that a list still ends where it ends
            place = row.index(b"row") + rng.randrange(3)
            row = row[:place] + bytes([rng.randrange(128, 256)]) + row[place + 1 :]
        rows.append(row if path.suffix == ".json" or rng.random() < 0.9 else MARK + row)
    content = b"[" + b",\n".join(rows) + b"]" if path.suffix == ".json" else rng.choice([b"\n", b"\r\n"]).join(rows)
    path.write_bytes(MARK * (rng.random() < 0.3) + content)
    return good


def is_whole(line: bytes) -> bool:
    """Whether a list goes on behind it."""
    return line.count(b"[") == line.count(b"]") and line.count(b"{") == line.count(b"}")


def write_parquet(rng: random.Random, path: Path, texts: list[str]) -> list[str]:
    good = [text for text in texts if rng.random() < 0.7]
    rows = [text.encode() if text in good else text.encode() + b"\xff" for text in texts]
    buffers = pyarrow.array(rows, pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=rng.randint(1, 40))
    return good


def check_chat(rng: random.Random) -> None:
    """Each target of a chat is what the model would write there."""
    template = rng.choice([*TEMPLATES.values(), BLOCKS])
    tokenizer = with_template(byte_tokenizer(swallows=rng.random() < 0.3), template)
    roles = [*rng.choices(["user", "assistant", "tool"], k=rng.randrange(8)), "assistant"]
    check_rows([{"role": role, "content": random_text(rng)} for role in roles], tokenizer)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices([*WORDS, '"', "\\", "[", "}", ",", "\u2028", "\U0001f600"], k=rng.randrange(9)))
