#!/usr/bin/env bash
# tokenizers 0.23.3, an added token with `rstrip=True` (Phi-3 has such control tokens): the white space that the token
# swallows counts as the token's own. Its offsets end behind the line breaks and its text in the encoding contains them,
# while the vocabulary's entry of the same id does not. Whoever marks an assistant's turn by characters and asks for the
# tokens that lie wholly inside of it loses the token that ends the turn.
#
# Seen in "a  <|end|>\n\n b": the token spans characters 3 to 10 without the option, 3 to 13 with it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
cat >"$work/see.py" <<'PY'
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

for options in ({}, {"rstrip": True}):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|end|>", **options)])
    encoding = tokenizer.encode("a  <|end|>\n\n b")
    print(options, [encoding.tokens[1]], encoding.offsets[1], tokenizer.id_to_token(encoding.ids[1]))
PY
found=$("$work/venv/bin/python" "$work/see.py")
echo "$found"
expected="{} ['<|end|>'] (3, 10) <|end|>
{'rstrip': True} ['<|end|>\\n\\n '] (3, 13) <|end|>"
[ "$found" = "$expected" ] || { echo "changed: expected $expected" >&2; exit 1; }
