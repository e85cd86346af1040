"""The HTML around a report: styles, and the script that singles out policies."""

from retention_gates.recipes.report.page_head import HEAD

PAGE = (
    HEAD
    + """body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .8rem 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .6rem; border-bottom: 2px solid var(--ink); padding-bottom: .2rem; }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
h4 { font-size: 1rem; margin: 0 0 .4rem; }
p, li { max-width: 50rem; margin: .4rem 0; overflow-wrap: anywhere; }
.subtitle { color: var(--soft); font-size: 1.05rem; margin: 0 0 1rem; }
.findings { background: var(--warm); border-left: 5px solid var(--gates); padding: .1rem 1rem .6rem; }
.findings h2 { border: 0; margin: .6rem 0 .2rem; }
.findings h3 { margin: .8rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.panels figure { max-width: 40rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--paper); display: flex; flex-wrap: wrap;
  gap: .2rem .4rem; padding: .5rem 0; border-bottom: 1px solid var(--line); align-items: center; }
.legend button { font: inherit; font-size: .85rem; color: inherit; display: flex; align-items: center; gap: .35rem;
  border: 1px solid transparent; border-radius: 4px; background: none; padding: .15rem .4rem; cursor: pointer; }
.legend button:hover { border-color: var(--line); }
.legend button[aria-pressed="true"] { border-color: var(--ink); background: var(--lit); }
.legend svg { width: 2.6rem; height: .9rem; }
@media (max-width: 45rem) { .legend { position: static; } }
.hint { color: var(--soft); font-size: .85rem; }
g[id^="series-"] { transition: opacity .15s; }
g[id$="-grey"] { filter: grayscale(1); opacity: .3; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
tr > :first-child, th + td.said, th { text-align: left; }
tr:first-child th { vertical-align: bottom; white-space: normal; border-bottom: 1px solid var(--ink); }
tr:first-child th + th { text-align: right; }
tr th { font-weight: 500; }
td.best { font-weight: 700; background: var(--warm); }
small { color: var(--soft); font-weight: 400; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; margin: .8rem 0; }
.question { white-space: pre-wrap; font-size: .92rem; color: var(--soft); }
mark { background: var(--asked); color: var(--ink); font-weight: 600; }
td.said { text-align: left; white-space: pre-wrap; min-width: 16rem; }
.wrong { color: var(--wrong); text-decoration: underline wavy var(--gates) 1px; text-underline-offset: 3px; }
.right { color: var(--ink); }
code { font-size: .92em; background: var(--lit); padding: 0 .2em; border-radius: 3px; }
</style>
</head>
<body>
<h1>$TITLE</h1>
<p class="subtitle">$SUBTITLE</p>
$BODY
<script>
for (const section of document.querySelectorAll("section[data-model]")) {
  const buttons = section.querySelectorAll(".legend button"), chosen = new Set();
  const draw = () => {
    for (const part of section.querySelectorAll('g[id^="series-"]')) {
      const lit = chosen.has(part.id.split("-")[1]);
      part.style.filter = lit ? "none" : "";
      part.style.opacity = !chosen.size ? "" : lit ? 1 : .07;
    }
    for (const button of buttons) button.setAttribute("aria-pressed", chosen.has(button.dataset.series));
  };
  for (const button of buttons) button.addEventListener("click", () => {
    const series = button.dataset.series;
    if (!chosen.delete(series)) chosen.add(series);
    draw();
  });
}
</script>
</body>
</html>
"""
)
