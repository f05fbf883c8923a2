"""The page's template (Jinja2, autoescaped), with its style and its few lines of script.

Without JavaScript every passage is shown; the script adds the switch between runs and a line that
tells depth and NLL of the token under the finger, where no mouse can hover.
"""

from __future__ import annotations

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root{--bg:#f6f7f9;--card:#fff;--ink:#1d2330;--faint:#5c6575;--line:#dfe3ea;--accent:#0067a3}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.3rem 0 .6rem}
h2{font-size:1.2rem;margin:2.2rem 0 .7rem}
h3{font-size:1rem;margin:0 0 .2rem}
p,li{max-width:75ch}
.faint,figcaption{color:var(--faint);font-size:.88rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;margin:0;font-size:.88rem}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
dd.code{font-family:ui-monospace,monospace;font-size:.82rem}
details{margin-top:.7rem;font-size:.9rem}summary{cursor:pointer;color:var(--accent)}
details dl{margin:.5rem 0 .9rem .9rem}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.5rem .65rem;text-align:right;border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;font-weight:600;font-size:.78rem;line-height:1.3;min-width:5.4rem}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);\
white-space:nowrap;max-width:45vw;overflow:hidden;text-overflow:ellipsis}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));\
gap:1rem;align-items:start}
figure{margin:0}figure img{width:100%;height:auto;display:block;margin:.3rem 0 .5rem}
.tabs{display:flex;flex-wrap:wrap;gap:.4rem;margin:.8rem 0}
.tabs button{font:inherit;font-size:.9rem;padding:.35rem .8rem;border-radius:99px;\
border:1px solid var(--line);background:var(--card);color:var(--ink);cursor:pointer}
.tabs button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);color:#fff}
.legend{display:flex;flex-wrap:wrap;gap:.35rem;align-items:center;margin:.4rem 0 .8rem;\
font-size:.85rem}
.legend b{font-weight:600;padding:.1rem .65rem;border-radius:5px}
.run+.run{margin-top:1rem}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;font:.95rem/1.75 ui-monospace,monospace;\
margin:.4rem 0 1.2rem}
.t{padding:.16em 0;border-radius:2px}
.t.on,.t:hover{outline:2px solid var(--ink)}
.nl{opacity:.55}
.told{position:sticky;bottom:0;background:var(--card);padding:.4rem 0;min-height:2.2rem;\
font-size:.88rem;border-top:1px solid var(--line)}
{{ css_light }}
{% for light, dark in run_colors %}
.c{{ loop.index0 }}{background:{{ light }}}
{% endfor %}
@media (prefers-color-scheme:dark){
:root{--bg:#0f1116;--card:#171a21;--ink:#e8eaf0;--faint:#a3abba;--line:#2d323d;--accent:#7cc0f5}
.tabs button[aria-pressed=true]{color:#0f1116}
{{ css_dark }}
{% for light, dark in run_colors %}
.c{{ loop.index0 }}{background:{{ dark }}}
{% endfor %}
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<section class="card">
<dl>
{% for key, text in shared.items() %}
<dt>{{ key }}</dt><dd{% if key == "command" %} class="code"{% endif %}>{{ text }}</dd>
{% endfor %}
</dl>
{% if own %}
<details><summary>{{ own[0][1] | join(", ") }} of each run</summary>
{% for label, origin in own %}
<p><strong>{{ label }}</strong></p>
<dl>
{% for key, text in origin.items() %}
<dt>{{ key }}</dt><dd{% if key == "command" %} class="code"{% endif %}>{{ text }}</dd>
{% endfor %}
</dl>
{% endfor %}
</details>
{% endif %}
</section>

<h2>The runs compared</h2>
<div class="card scroll" tabindex="0" role="region" aria-label="comparison table">
<table>
<thead><tr>{% for column in columns %}<th scope="col">{{ column.header }}</th>{% endfor %}</tr>\
</thead>
<tbody>
{% for run in runs %}
<tr><th scope="row" title="{{ run.label }}"><span class="dot c{{ loop.index0 }}"></span>\
{{ run.label }}</th>{% for column in columns[1:] %}<td>{{ column.text(run) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for note in notes %}
<p class="faint">{{ note }}</p>
{% endfor %}

<h2>What depth buys</h2>
<ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
<p class="faint">The cap stops a model that was trained with all its recursions; it does not say \
how well a model trained with one would do. For that, compare with the vanilla run.</p>

{% if plots %}
<h2>Plots</h2>
<div class="plots">
{% for plot in plots %}
<figure class="card">
<h3>{{ plot.title }}</h3>
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ plot.dark }}">
<img src="{{ plot.light }}" alt="{{ plot.title }}: {{ plot.caption }}"></picture>
<figcaption>{{ plot.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}

{% if spoken %}
<h2>Depth, token by token</h2>
<p>Every token on the colour of its depth: how many recursions it took under the causal rule. \
Point at a token, or tap it, for its depth and its NLL.</p>
{% if spoken | length > 1 %}
<div class="tabs" id="tabs" hidden>
{% for run in spoken %}
<button type="button" aria-pressed="false" data-run="run-{{ run.index }}">{{ run.label }}</button>
{% endfor %}
</div>
{% endif %}
{% for run in spoken %}
<section class="card run r{{ run.depth }}" id="run-{{ run.index }}">
<h3>{{ run.label }}</h3>
<div class="legend"><span>recursions:</span>
{% for depth in range(run.depth + 1) %}<b class="d{{ depth }}">{{ depth }}</b>{% endfor %}
</div>
{% for passage in run.passages %}
<p class="faint">{{ passage.title }}: {{ passage.summary }}.</p>
<div class="passage">{{ passage.spans | safe }}</div>
{% endfor %}
<div class="told" role="status"></div>
</section>
{% endfor %}
<script>
"use strict";
const tabs = document.getElementById("tabs");
const sections = [...document.querySelectorAll(".run")];
function show(id) {
  sections.forEach(section => { section.hidden = section.id !== id; });
  tabs.querySelectorAll("button").forEach(button =>
    button.setAttribute("aria-pressed", button.dataset.run === id));
}
if (tabs) {
  tabs.hidden = false;
  tabs.addEventListener("click", event => {
    if (event.target.dataset.run) show(event.target.dataset.run);
  });
  show(sections[sections.length - 1].id);
}
let marked = null;
document.addEventListener("click", event => {
  const token = event.target.closest(".t");
  if (!token) return;
  if (marked) marked.classList.remove("on");
  marked = token;
  token.classList.add("on");
  const told = token.closest(".run").querySelector(".told");
  told.textContent = JSON.stringify(token.textContent) + ": " + token.title;
});
</script>
{% endif %}
</main>
</body>
</html>
"""
