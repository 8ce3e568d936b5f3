"""The style sheet of a page, for a screen, a phone and paper, in light and dark colours."""

CSS = """
:root { --back: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --soft: #f3f5f7;
  --first: #0b62a8; --second: #b3450b; --bar: #b9d7f0; --link: #0b5cad; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e6e9ec; --muted: #a2abb5;
  --line: #3a424b; --soft: #1f242a; --first: #6cb4ee; --second: #f0a06a; --bar: #27527a;
  --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, nav, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
h1 { margin: 1.5rem 0 .25rem; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  font-size: 1.25rem; }
h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 60rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0; padding: 0;
  list-style: none; }
.lead { font-size: 1.1rem; } .lead strong { font-size: 1.8rem; }
.muted, figcaption, caption, summary { color: var(--muted); font-size: .875rem; }
dl { columns: 2 24rem; column-gap: 3rem; margin: .5rem 0; }
dl div { break-inside: avoid; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
details { margin: .75rem 0; } summary { cursor: pointer; }
.figures { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.figures.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.tables > figure { flex: 1 1 26rem; }
.tables > p { flex: 1 1 18rem; max-width: 30rem; margin-top: 2.5rem; }
figure { margin: .5rem 0; max-width: 38rem; break-inside: avoid; min-width: 0; }
figure.small { max-width: 28rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: 100%; margin: .75rem 0;
  background: linear-gradient(90deg, var(--back) 30%, transparent) local 0 0,
    linear-gradient(270deg, var(--back) 30%, transparent) local 100% 0,
    linear-gradient(90deg, var(--muted), transparent) scroll 0 0,
    linear-gradient(270deg, var(--muted), transparent) scroll 100% 0;
  background-size: 2.5rem 100%, 2.5rem 100%, .7rem 100%, .7rem 100%;
  background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; } td.number { white-space: nowrap; }
.long { display: inline-block; overflow-wrap: anywhere; min-width: 6rem; max-width: 24rem; }
.short { white-space: nowrap; }
.block { display: inline-block; max-width: 22rem; }
td.bar { min-width: 8rem; }
td.bar span { display: block; padding: 0 .25rem; background:
  linear-gradient(var(--bar), var(--bar)) no-repeat 0 50% / var(--share) 80%;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
pre { background: var(--soft); padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .875rem; }
pre span { display: inline-block; max-width: 100%; }
footer { margin: 3rem auto 2rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .5rem; }
  td.bar { min-width: 5rem; } .long { min-width: 4rem; }
  .stacked, .stacked tbody, .stacked caption { display: block; width: 100%; }
  .stacked thead { display: none; }
  .stacked tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr));
    gap: 0 1rem; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .stacked th, .stacked td { border: 0; padding: .1rem 0; text-align: left; }
  .stacked tbody th { grid-column: 1 / -1; }
  .stacked td:empty { display: none; }
  .stacked td::before { content: attr(data-label) ": "; display: block; color: var(--muted);
    white-space: normal; } .stacked td.bar span { padding-left: 0; } }
@media print { :root { --back: #fff; --ink: #000; --muted: #444; --line: #bbb; --soft: #f3f5f7;
  --first: #0b62a8; --second: #b3450b; --bar: #b9d7f0; --link: #000; } nav { display: none; }
  html { font-size: 9pt; } .figures, .figures.three { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; background: none; }
  .tables { display: block; orphans: 1; widows: 1; } .block, .long { max-width: 17rem; }
  h2, h3, caption, thead, section > p { break-after: avoid; }
  .tables > .wide { display: inline-block; vertical-align: top; margin-right: 1.5rem; }
  tr { break-inside: avoid; } details { display: none; } }
"""
