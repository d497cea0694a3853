"""The lens as a page: one self-contained HTML file, no script, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Lens = Sequence[Sequence[tuple[str, float]]]
"""Per latent step the likeliest tokens and their probabilities, the likeliest first."""

LEAST = 0.005  # what would show as 0
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2321; --dim: #5e6a66; --page: #fff; --line: #dfe5e2; --heat: 39, 122, 90; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eeeb; --dim: #9aa8a2; --page: #151918; --line: #2c3432;
  --heat: 76, 187, 138; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0; } p { margin: .4rem 0; } .dim { color: var(--dim); }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; padding: .3rem .8rem; }
td { padding: .25rem .8rem; border-top: 1px solid var(--line); white-space: nowrap; vertical-align: baseline; }
td:first-child { color: var(--dim); text-align: right; }
code { font: 14px ui-monospace, monospace; white-space: pre; } small { color: var(--dim); }
.first { padding: .05rem .35rem; border-radius: .25rem; background: rgba(var(--heat), calc(var(--p) * .55)); }
"""


def lens_page(
    question: str, lenses: Mapping[str, Lens], answer: str, *, about: str, texts: Mapping[str, str] | None = None
) -> str:
    """Lays out what agents thought, a column for each and a row for each latent step.

    Args:
        question: What was asked.
        lenses: By agent.
        answer: What the last agent said.
        about: Model, arrangement and the like, on one line.
        texts: By agent, what was said instead of thought, if anything.

    Returns:
        An HTML document. Everything that is not markup of its own is escaped.
    """
    depth = max((len(lens) for lens in lenses.values()), default=0)
    head = "".join(f"<th scope=col>{_text(agent)}</th>" for agent in lenses)
    rows = []
    for step in range(depth):
        cells = "".join(f"<td>{_cell(lens[step]) if step < len(lens) else ''}</td>" for lens in lenses.values())
        rows.append(f"<tr><td>{step + 1}</td>{cells}</tr>")
    said = "".join(f"<p><b>{_text(agent)}</b> {_text(text)}</p>" for agent, text in (texts or {}).items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Lens: {_text(question[:80])}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(question)}</h1>
<p class="dim">{_text(about)}</p>
{said}<p><b>Answer</b> {_text(answer)}</p>
<div class="scroll"><table>
<thead><tr><th scope=col>step</th>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table></div>
<p class="dim">Nothing of this was decoded. A cell is what one latent step would have written had it been a token: the
likeliest, darker the surer, then the next ones, each with its probability in %.</p>
</body>
</html>
"""


def _cell(tokens: Sequence[tuple[str, float]]) -> str:
    (first, share), *others = tokens
    rest = " ".join(f"<small><code>{_token(token)}</code> {100 * p:.0f}</small>" for token, p in others if p >= LEAST)
    return f'<code class="first" style="--p:{share:.2f}">{_token(first)}</code> <small>{100 * share:.0f}</small> {rest}'


def _token(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return _text(shown if shown.strip() else "␣" * max(1, len(shown)))


def _text(value: Any) -> str:
    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in str(value)))
