"""One self-contained HTML page about a run: curves, time, the three views, tokens by entropy shift.

Plots what the records hold and leaves out what they do not; no script, no network, no dependency
besides PIL. Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from cppo.demo.svg import Series, line_chart, stacked_chart

_TIME_PARTS = (
    "rollout",
    "reward",
    "old_logps",
    "ref_logps",
    "views",
    "forward",
    "backward",
    "optimizer",
)
_IMAGE_HEIGHT = 96  # CSS pixels of a small image; larger ones keep their size
_CURVES: tuple[tuple[str, str, dict[str, str], float | None], ...] = (
    # heading, what it shows, {key of the history: label}, upper end of the axis (None: the data)
    (
        "Held-out accuracy",
        "share of right answers on questions that training never saw",
        {"sampled": "sampled", "greedy": "greedy"},
        1.0,
    ),
    (
        "Training reward",
        "of the sampled completions; the deviation is within a question",
        {"reward/mean": "mean", "reward/std": "standard deviation"},
        None,
    ),
    (
        "Trained on",
        "share of the sampled completions, and of their tokens, that pruning keeps",
        {"kept_share": "completions", "kept_token_share": "tokens"},
        1.0,
    ),
    (
        "Contrastive perception",
        "the loss, and the share of tokens with a positive advantage that it acts on",
        {"cpl_loss": "loss", "perception_share": "share of tokens"},
        None,
    ),
    ("Entropy", "of the policy, mean over response tokens, nats", {"entropy": "entropy"}, None),
    ("Completion length", "mean", {"completion/tokens": "tokens"}, None),
)


def write_report(
    path: str | Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    views: Sequence[Mapping[str, Any]] = (),
    completions: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        path: of the HTML file; its folder is made.
        title: heading of the page.
        history: the trainer's metrics, one mapping per step (`CPPOTrainer.history`): `step`,
            any of the keys of the curves, `eval/sampled/...`, `eval/greedy/...`, and
            `time/<part>` in seconds. Missing keys and None or NaN values are left out.
        summary: {row name: {"before": number, "after": number}} becomes the before/after table; any
            other value becomes a fact beside it. Numbers named ...accuracy are shown in percent.
        views: one mapping per image: `anchor`, `positive`, `negative` (PIL images), `question` and,
            if wanted, `answer`.
        completions: one mapping each: `question`, `image` (PIL or None), `tokens` (list of str),
            `entropy_shift` (nats, one per token), `selected` (bool, one per token: the perception
            tokens),
            `reward`, `advantage`, and `answer` if wanted.
        config: what the run was made with, in order; nested options get dotted names.
    Raises: ValueError if a completion's tokens, entropy_shift and selected differ in length.
    """
    history = _with_derived(history)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    body = [_header(title, summary), _curves(history), _time(history), _views(views)]
    body += [_completions(completions), _config(config or {})]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _with_derived(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The history with held-out accuracy under one name and the share of tokens trained on."""
    names = {name for row in history for name in row if name.startswith("eval/")}
    rows = []
    for row in history:
        derived: dict[str, Any] = {}
        for mode in ("sampled", "greedy"):
            accuracies = sorted(
                n for n in names if n.startswith(f"eval/{mode}/") and n.endswith("accuracy")
            )
            derived[mode] = row.get(accuracies[0] if accuracies else f"eval/{mode}/reward")
        if row.get("tokens/sampled") and row.get("tokens/trained") is not None:
            derived["kept_token_share"] = row["tokens/trained"] / row["tokens/sampled"]
        rows.append(derived | dict(row))
    return rows


def _header(title: str, summary: Mapping[str, Any]) -> str:
    """Title, the before/after cards and the facts."""
    cards, facts = [], []
    for name, value in summary.items():
        if isinstance(value, Mapping) and {"before", "after"} <= set(value):
            cards.append(_before_after(name, value["before"], value["after"]))
        else:
            facts.append(f"<div><dt>{escape(name)}</dt><dd>{escape(_text(name, value))}</dd></div>")
    return (
        f"<header><h1>{escape(title)}</h1></header>\n"
        + (f'<section class="cards">{"".join(cards)}</section>\n' if cards else "")
        + (f'<dl class="facts">{"".join(facts)}</dl>' if facts else "")
    )


def _before_after(name: str, before: float, after: float) -> str:
    percent = "accuracy" in name.lower() or "share" in name.lower()
    change = (after - before) * (100 if percent else 1)
    unit = " points" if percent else ""
    mood = "up" if change > 0 else "down" if change < 0 else "same"
    bar = ""
    if percent:
        low, high = sorted((before, after))
        bar = (
            f'<div class="bar"><i class="base" style="width:{100 * low:.1f}%"></i>'
            f'<i class="{mood}" style="width:{100 * (high - low):.1f}%"></i></div>'
        )
    return (
        f'<div class="card"><h3>{escape(name)}</h3><p class="figures"><span class="before">'
        f'{_text(name, before)}</span><span class="arrow">&rarr;</span><span class="after">'
        f"{_text(name, after)}</span></p>{bar}"
        f'<p class="change {mood}">{change:+.1f}{unit}</p></div>'
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for heading, note, keys, top in _CURVES:
        series = [Series(label, _points(history, key)) for key, label in keys.items()]
        series = [s for s in series if s.points]
        if series:
            figures.append(_figure(heading, note, line_chart(series, top=top)))
    return (
        f'<section><h2>Curves</h2><div class="grid">{"".join(figures)}</div></section>'
        if figures
        else ""
    )


def _time(history: Sequence[Mapping[str, Any]]) -> str:
    """Where a step's time goes, stacked."""
    named = [k.removeprefix("time/") for row in history for k in row if k.startswith("time/")]
    known = [part for part in _TIME_PARTS if part in named]
    parts = known + sorted(set(named) - set(known) - {"step", "total"})
    series = [Series(part, _points(history, f"time/{part}")) for part in parts]
    series = [s for s in series if any(y > 0 for _, y in s.points)]
    if not series:
        return ""
    totals = {s.label: sum(y for _, y in s.points) for s in series}
    whole = sum(totals.values())
    rows = "".join(
        f'<tr><td><i class="key c{i % 8}"></i>{escape(label)}</td><td>{total:.1f} s</td>'
        f"<td>{100 * total / whole:.0f} %</td></tr>"
        for i, (label, total) in enumerate(totals.items())
    )
    rows += f"<tr><td>all</td><td>{whole:.1f} s</td><td>100 %</td></tr>"
    table = f'<div class="panel"><table><tbody>{rows}</tbody></table></div>'
    figure = _figure("Seconds per step", "by part, stacked", stacked_chart(series))
    return (
        f'<section><h2>Where the time goes</h2><div class="split">{figure}{table}</div></section>'
    )


def _views(views: Sequence[Mapping[str, Any]]) -> str:
    """A few images, each as anchor, positive and negative."""
    if not views:
        return ""
    items = []
    for view in views:
        pictures = "".join(
            f'<figure class="view"><div class="frame">{_image(view[name])}</div>'
            f'<figcaption class="{name}">{name}</figcaption></figure>'
            for name in ("anchor", "positive", "negative")
            if view.get(name) is not None
        )
        question = escape(str(view.get("question", "")))
        if view.get("answer") is not None:
            question += f" <b>{escape(str(view['answer']))}</b>"
        items.append(f'<div class="views"><p>{question}</p><div>{pictures}</div></div>')
    return (
        "<section><h2>Three views of an image</h2><p>The <b>anchor</b> is the image as it is. The "
        "<b>positive</b> view keeps what it says, the <b>negative</b> view takes some of it away: "
        "where the model grows less certain under it, it was looking.</p>"
        f'<div class="grid">{"".join(items)}</div></section>'
    )


def _completions(completions: Sequence[Mapping[str, Any]]) -> str:
    """Completions with each token coloured by how far its entropy rises under the negative view."""
    if not completions:
        return ""
    for number, completion in enumerate(completions):
        lengths = [len(completion[k]) for k in ("tokens", "entropy_shift", "selected")]
        if len(set(lengths)) != 1:
            raise ValueError(
                "write_report: tokens, entropy_shift and selected must be equally long, "
                f"completion {number} has {lengths}"
            )
    shifts = [abs(x) for c in completions for x in c["entropy_shift"] if math.isfinite(x)]
    scale = max([*shifts, 1e-6])
    ramp = "".join(f'<i style="background:{_tint(i / 5)}"></i>' for i in range(-5, 6))
    legend = (
        f'<p class="legend">entropy shift, nats <span>{-scale:.1f}</span>'
        f'<span class="ramp">{ramp}</span><span>+{scale:.1f}</span>'
        '<span class="token selected">perception token</span></p>'
    )
    cards = "".join(_completion(completion, scale) for completion in completions)
    return (
        "<section><h2>Which tokens look at the image</h2><p>Each token of a completion, coloured "
        "by how much its entropy changes when the negative view replaces the image. The outlined "
        "tokens are the perception tokens that the contrastive loss acts on.</p>"
        f'{legend}<div class="stack">{cards}</div></section>'
    )


def _completion(completion: Mapping[str, Any], scale: float) -> str:
    tokens = "".join(
        f'<span class="token{" selected" if selected else ""}" title="{shift:+.2f} nats" '
        f'style="background:{_tint(shift / scale)}">{_token(token)}</span>'
        for token, shift, selected in zip(
            completion["tokens"], completion["entropy_shift"], completion["selected"], strict=True
        )
    )
    facts = [
        f"reward {_number(completion.get('reward'))}",
        f"advantage {_number(completion.get('advantage'), '+')}",
    ]
    if completion.get("answer") is not None:
        facts.append(f"right answer {escape(str(completion['answer']))}")
    good = (completion.get("reward") or 0) > 0
    badge = f'<span class="badge {"right" if good else "wrong"}">{" &middot; ".join(facts)}</span>'
    image = (
        f'<div class="frame">{_image(completion["image"])}</div>' if completion.get("image") else ""
    )
    return (
        f'<div class="completion">{image}<div><p class="question">'
        f"{escape(str(completion['question']))} {badge}</p>"
        f'<p class="tokens">{tokens}</p></div></div>'
    )


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td><code>{escape(str(v))}</code></td></tr>"
        for k, v in _flat(config).items()
    )
    table = f'<table class="config"><tbody>{rows}</tbody></table>'
    return f"<section><h2>Configuration</h2>{table}</section>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat


def _figure(heading: str, note: str, svg: str) -> str:
    return f'<figure class="chart"><h3>{escape(heading)}</h3><p>{escape(note)}</p>{svg}</figure>'


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever the history holds a finite number under the key."""
    points = []
    for index, row in enumerate(history):
        value = row.get(key)
        if value is not None and math.isfinite(float(value)):
            points.append((float(row.get("step", index)), float(value)))
    return points


def _image(image: Image.Image) -> str:
    """An <img> with the PNG inside, small ones enlarged by a whole factor without smoothing."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    factor = max(1, _IMAGE_HEIGHT // image.height)
    width, height = image.width * factor, image.height * factor
    return f'<img alt="" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _tint(shift: float) -> str:
    """The colour of a shift in [-1, 1]: orange where the entropy rises, blue where it falls."""
    strength = 0.0 if not math.isfinite(shift) else min(1.0, abs(shift)) ** 0.7
    name = "rise" if shift > 0 else "fall"
    return f"color-mix(in srgb, var(--{name}) {100 * strength:.0f}%, transparent)"


def _token(token: str) -> str:
    """A token's text; blanks at its ends and line breaks stay visible."""
    text = escape(token).replace("\n", "&#8629;")
    return text.replace(" ", "&nbsp;") if text.strip() != text else text


def _text(name: str, value: Any) -> str:
    """A summary value in words: percent for accuracies and shares, else at most 4 digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "accuracy" in name.lower() or "share" in name.lower():
        return f"{100 * value:.1f} %"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _number(value: Any, sign: str = "") -> str:
    return "-" if value is None else f"{float(value):{sign}.2f}"
