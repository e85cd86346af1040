"""A page that shows a text with its tokens shaded by what a chosen head retains of them."""

import html
import json
import math
from collections.abc import Sequence

import torch

from retention_gates.recipes.report.page_head import HEAD

PAGE = (
    HEAD
    + """body { font: 16px/1.9 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; }
header { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--line);
  line-height: 1.5; }
h1 { font-size: 1.15rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
select { font: inherit; }
label { margin-right: 1.2rem; white-space: nowrap; }
#step { width: 16rem; max-width: 60vw; vertical-align: middle; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 1rem; }
#text span { border-bottom: 3px solid transparent; border-radius: 2px; }
#text .held { border-bottom-color: var(--gates); }
#text .future { opacity: .25; }
.swatch { display: inline-block; width: 9rem; max-width: 30vw; height: .8rem; vertical-align: middle; margin: 0 .4rem;
  border: 1px solid var(--line);
  background: linear-gradient(to right, rgba(var(--retained), 0), rgba(var(--retained), .75)); }
.underlined { border-bottom: 3px solid var(--gates); }
#about { color: var(--soft); font-size: .9rem; }
@media (max-width: 40rem) { header { position: static; } }
</style>
</head>
<body>
<header>
<h1><span id="memory"></span> $TITLE</h1>
<label>layer <select id="layer"></select></label>
<label>KV head <select id="head"></select></label>
<label>at token <input id="step" type="range"> <output id="shown"></output></label>
<div id="about">retention of a token: 0<span class="swatch"></span>1 &nbsp; <span class="underlined">underlined</span>:
attended to by that token &nbsp; <span id="count"></span><br>$CHOICE</div>
</header>
<div id="text">$TOKENS</div>
<script>
const data = $DATA;
const tokens = document.querySelectorAll("#text span"), last = tokens.length - 1;
const [layer, head, step] = ["layer", "head", "step"].map(id => document.getElementById(id));
data.layers.forEach((name, i) => layer.add(new Option(name, i)));
data.budgets[0].forEach((_, i) => head.add(new Option(i, i)));
layer.value = data.opens_on[0]; head.value = data.opens_on[1];
step.min = 0; step.max = last; step.value = last;
function draw() {
  const now = Number(step.value), lives = data.half_lives[layer.value][head.value];
  const times = data.eviction_times[layer.value][head.value];
  let held = 0;
  tokens.forEach((token, i) => {
    const life = lives[i], retention = life === null ? 1 : Math.pow(2, -(now - i) / life), seen = i <= now;
    const here = seen && now < times[i];
    held += here;
    token.className = seen ? (here ? "held" : "") : "future";
    token.style.background = seen ? `rgba(var(--retained), ${(0.75 * retention).toFixed(3)})` : "";
    token.title = `token ${i}: `
      + (life === null ? "protected" : `half-life ${life} tokens, retention ${retention.toFixed(3)}`)
      + (times[i] > last ? ", never evicted" : `, evicted after token ${times[i] - 1}`);
  });
  document.getElementById("shown").value = now;
  document.getElementById("count").textContent =
    `${held} of ${now + 1}, at most ${data.budgets[layer.value][head.value]} beside the newest`;
  document.getElementById("memory").textContent = `${data.budgets[layer.value][head.value]} entries in layer `
    + `${data.layers[layer.value]}, KV head ${head.value} (${data.memory_size} on average over all heads):`;
}
for (const control of [layer, head, step]) control.addEventListener("input", draw);
draw();
</script>
</body>
</html>
"""
)


def token_page(
    words: Sequence[str],
    half_lives: "torch.Tensor",
    eviction_times: "torch.Tensor",
    *,
    layers: Sequence[int],
    budgets: Sequence[Sequence[int]],
    opens_on: tuple[int, int],
    memory_size: int,
    title: str,
) -> str:
    """A self-contained HTML page; layer, head and the step that is looked at are chosen on it.

    Args:
        words: the text of each token.
        half_lives: in tokens, [layers, H, T]; infinite where a token never decays.
        eviction_times: int64 [layers, H, T], the first step at which a token is no longer seen; T: never.
        layers: the layers' indices in the model; budgets: [layers][H], memory_size in the mean.
        opens_on: place in `layers` and head that are shown first, as `telling_head` chooses them.
    """
    data = {
        "layers": list(layers),
        "budgets": [list(row) for row in budgets],
        "opens_on": list(opens_on),
        "memory_size": memory_size,
        "half_lives": _rounded(half_lives.tolist()),
        "eviction_times": eviction_times.tolist(),
    }
    # inside a script, "<" could begin "</script>" or "<!--"
    script = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    spans = "".join(f"<span>{html.escape(_visible(word))}</span>" for word in words)
    layer, head = opens_on
    choice = (
        f"Opens on layer {layers[layer]}, KV head {head}: of the heads whose memory is near the mean, the one whose "
        "tokens differ most in how long they stay."
    )
    before, _, rest = PAGE.replace("$CHOICE", choice).partition("$TOKENS")
    between, _, after = rest.partition("$DATA")
    return before.replace("$TITLE", html.escape(title)) + spans + between + script + after


def _visible(word: str) -> str:
    return word.replace("\n", "\u21b5\n")


def _rounded(values: list) -> list:
    """Three digits are plenty to look at, and JSON has no infinity: null."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if math.isinf(values) else float(f"{values:.3g}")
