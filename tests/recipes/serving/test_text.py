"""Text out of tokens: byte fallback, spaces, half characters, special tokens, and draws."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig

from retention_gates.recipes.serve import end_tokens
from retention_gates.recipes.serving.sampling import Sampler, Sampling, draw, next_tokens
from retention_gates.recipes.serving.text import LONGEST_DOUBT, TextStream, special_tokens

BYTES = [f"<0x{n:02X}>" for n in range(256)]
WORDS = ["▁king", "▁the", "sea", "é", "▁", "▁▁", "."]


def with_fallback():
    """A tokenizer as Llama 2's, Mistral's and Phi-3's: spaces are ▁, and what has no token is bytes."""
    names = ["<unk>", "</s>", *BYTES, *WORDS]
    tokenizer = Tokenizer(
        models.BPE({name: n for n, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return SimpleNamespace(backend_tokenizer=tokenizer)


def by_bytes():
    """A tokenizer as GPT-2's and Qwen's: every byte is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return SimpleNamespace(backend_tokenizer=tokenizer)


FALLBACK, LEVEL = with_fallback(), by_bytes()


def ids_of(*names):
    return [FALLBACK.backend_tokenizer.token_to_id(name) for name in names]


def streamed(tokenizer, ids, stop=(), **options):
    stream, pieces = TextStream(tokenizer, stop, **options), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.end()]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 2 + 256 + len(WORDS) - 1), max_size=40))
def test_no_tokens_of_a_fallback_tokenizer_are_an_error_and_words_survive(ids):
    text = "".join(streamed(FALLBACK, ids))
    whole = FALLBACK.backend_tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert text == whole
    words = [FALLBACK.backend_tokenizer.id_to_token(token).strip("▁") for token in ids if token >= 258]
    assert [letter for letter in text if letter in "kingtheséa."] or not any(words)
    place = 0
    for word in words:  # in order, whatever bytes lie between
        place = text.index(word, place) + len(word)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(0, 6), st.booleans())
def test_characters_of_several_bytes_come_whole(text, cut, is_level):
    tokenizer = LEVEL if is_level else FALLBACK
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.backend_tokenizer.decode(ids)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)
    part = tokenizer.backend_tokenizer.decode(ids[:cut])
    if is_level or "\ufffd" not in part:  # a run of bytes of which one is none makes all of them unknown there
        assert "".join(streamed(tokenizer, ids[:cut])) == part


def test_bytes_that_are_no_utf8_are_shown_and_go_on():
    bad = ids_of("▁king", "<0xFF>", "▁the", "<0xE2>", "<0x82>", "▁king")
    assert "".join(streamed(FALLBACK, bad)) == "king\ufffd the\ufffd\ufffd king"
    assert "".join(streamed(FALLBACK, ids_of("<0xE2>", "<0x82>", "<0xAC>"))) == "€"
    many = streamed(FALLBACK, ids_of(*["<0xFF>"] * (LONGEST_DOUBT + 1), "▁king"))
    assert many[LONGEST_DOUBT - 1] == "\ufffd" * LONGEST_DOUBT  # not held back for ever
    assert "".join(many).endswith("king")


def test_a_completion_keeps_its_leading_space_and_an_answer_has_none():
    ids = ids_of("▁king", "sea")
    assert "".join(streamed(FALLBACK, ids)) == "kingsea"
    assert "".join(streamed(FALLBACK, ids, before=ids_of("▁the", "sea"))) == " kingsea"
    half = ids_of("▁the", "<0xE2>", "<0x82>")
    assert "".join(streamed(FALLBACK, ids_of("<0xAC>", "▁king"), before=half)) == "€ king"
    assert "".join(streamed(FALLBACK, ids, before=ids_of("<0xFF>"))).endswith("kingsea")


def test_a_stop_string_that_is_a_special_token_ends_the_answer():
    special = special_tokens(FALLBACK)
    assert special == {"</s>": 1}
    ids = ids_of("▁king", "</s>", "sea")
    assert "".join(streamed(FALLBACK, ids, special=special)) == "kingsea"
    pieces = streamed(FALLBACK, ids, stop=("</s>",), special=special)
    assert pieces == ["king", "", ""] and len(pieces) == 3
    held = streamed(FALLBACK, ids_of("▁king", "</s>"), stop=("kings", "</s>"), special=special)
    assert "".join(held) == "king"  # what might have begun the other one is given


@pytest.mark.parametrize(
    "config, tokenizer, expected", [(None, 5, {5}), (7, 5, {7}), ([7, 8], 5, {7, 8}), (None, None, set())]
)
def test_the_tokenizers_own_end_counts_where_the_config_names_none(config, tokenizer, expected):
    ends = end_tokens(GenerationConfig(eos_token_id=config), SimpleNamespace(eos_token_id=tokenizer))
    assert ends == expected


def naive_draw(scores, number, top_p):
    """In plain Python: go through the likeliest first until they have top_p; then draw among them."""
    share = scores.double().softmax(-1).tolist()
    order, kept, mass = sorted(range(len(share)), key=lambda n: (-share[n], n)), [], 0.0
    for token in order:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += share[token]
    kept = kept if top_p < 1 else range(len(share))
    left = number * sum(share[token] for token in kept)
    for token in kept:
        left -= share[token]
        if left < 0:
            break
    return token


@pytest.mark.parametrize("top_p", [1e-30, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 5, 300])
def test_draws_are_those_of_plain_python(top_p, size):
    torch.manual_seed(size)
    scores = 3 * torch.randn(200, size)
    scores -= scores.max(-1, keepdim=True).values
    numbers = torch.rand(200, 1, dtype=torch.float64)
    cut = None if top_p == 1 else torch.full((200, 1), top_p, dtype=torch.float64)
    found = draw(scores, numbers, cut).tolist()
    expected = [naive_draw(row, number.item(), top_p) for row, number in zip(scores, numbers, strict=True)]
    assert sum(one != other for one, other in zip(found, expected, strict=True)) <= 1  # a rounding at a border


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e-12, 1e-3])
def test_the_lowest_temperatures_take_the_likeliest(temperature):
    torch.manual_seed(0)
    logits = 20 * torch.randn(64, 50)
    logits[:, 7] = -float("inf")
    samplers = {row: Sampler(Sampling(9, temperature=temperature, seed=row)) for row in range(64)}
    assert list(next_tokens(logits, samplers).values()) == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_in_any_company():
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    kinds = [dict(temperature=0.0), dict(temperature=1.3), dict(temperature=0.7, top_p=0.8), dict(top_p=0.5)]

    def drawn(rows):
        samplers = {row: Sampler(Sampling(9, seed=row, **kinds[row % 4])) for row in rows}
        return [next_tokens(logits, samplers) for _ in range(5)]

    together = drawn(range(6))
    for row in range(6):
        assert [one[row] for one in drawn([row])] == [one[row] for one in together]
    logits[2] = float("nan")
    logits[3, 1] = float("inf")
    after = next_tokens(logits, {row: Sampler(Sampling(9, seed=row)) for row in range(6)})
    assert after[2] is None and after[3] is None and None not in (after[0], after[1], after[4])
