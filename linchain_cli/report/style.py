"""The style sheet of report pages: one column, a phone's width upwards, and paper."""

_CARDS = """
@media screen and (max-width: @WIDTH@) {
  table@CLASS@, @CLASS@ caption, @CLASS@ tbody, @CLASS@ tr, @CLASS@ td, @CLASS@ tbody th {
    display: block; width: 100%;
  }
  @CLASS@ thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  @CLASS@ tr { border: 1px solid var(--line); padding: .25rem .5rem; margin: .5rem 0; }
  @CLASS@ th, @CLASS@ td { border: 0; padding: .15rem 0; }
  @CLASS@ td { display: flex; gap: .75rem; }
  @CLASS@ td.empty { display: none; }
  @CLASS@ td::before { content: attr(data-label); flex: 0 0 45%; color: var(--faint); }
}
"""


def _cards(name: str, width: str) -> str:
    """Below `width`, every line of a table of the class becomes a block with its headers in it."""
    return _CARDS.replace("@CLASS@", f".{name}").replace("@WIDTH@", width)


# Tables by their number of columns: (class, most columns, the width below which they do not fit).
TABLES = (("narrow", 3, "20rem"), ("medium", 7, "48rem"), ("wide", 99, "64rem"))

STYLE = """
:root {
  color-scheme: light dark; --ink: #1c1c1c; --faint: #5a5a5a; --line: #d4d4d4;
  --ground: #fff; --mark: #fff0b3; --soft: #f5f5f5;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #aaa; --line: #444; --ground: #161616; --mark: #5c4a00; --soft: #222; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, ul, dl { margin: .5rem 0; }
ul { padding-left: 1.25rem; }
dl > div { display: flex; flex-wrap: wrap; gap: 0 .75rem; padding: .15rem 0; }
dl > div { border-bottom: 1px solid var(--line); }
dt { flex: 0 0 13rem; color: var(--faint); }
dd { flex: 1 1 16rem; min-width: 0; margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 20rem; min-width: 0; max-width: 36rem; margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
figcaption { color: var(--faint); font-size: .875rem; margin-top: .25rem; }
pre { background: var(--soft); padding: .75rem; margin: .5rem 0; white-space: pre-wrap; }
pre { font: .8125rem/1.45 ui-monospace, monospace; }
code { font: .875em ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; border-radius: 2px; box-shadow: 0 0 0 1px var(--line); }
.tokens mark { margin-right: 1px; text-decoration: underline 2px; text-underline-offset: 3px; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; margin: .75rem 0; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
thead th, td { overflow-wrap: normal; }
tbody th { min-width: 7rem; }
thead th { color: var(--faint); font-weight: 600; }
details { margin: .75rem 0; }
.faint { color: var(--faint); font-size: .875rem; }
@media screen and (max-width: 48rem) { dt { flex-basis: 100%; } }
@CARDS@
@media print {
  :root { color-scheme: light; --ink: #000; --faint: #444; --line: #bbb; }
  :root { --ground: #fff; --mark: #eee; --soft: #f5f5f5; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, h3, caption { break-after: avoid; }
  tr, dl > div { break-inside: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .25rem; }
}
""".replace("@CARDS@", "".join(_cards(name, width) for name, _, width in TABLES))
