"""The page's own HTML: pictures with their scores, progress, notices, tables. Everything foreign is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from app.judging import DIGITS, MEANING, TITLES, Seat, best
from app.session import Arm, Drawn
from app.wanted import steps_in_words
from flowopd_eval.records import Score
from flowopd_eval.report import boxes
from flowopd_eval.store import flat

if TYPE_CHECKING:
    from PIL import Image

_NUMBER, _PLACES = 7.0, 14  # percent of a picture that a box's number is wide, at most; places tried along an edge
_INTERVAL = re.compile(r"\[[^\[\]]*\]")
_SMALL = 256  # pixels; larger pictures travel to the page as WebP, which a person cannot tell from them


def data_url(picture: Image.Image, *, exact: bool = False) -> str:
    """A picture as an address that holds it; ``exact``: without loss."""
    kind = "png" if exact or picture.width <= _SMALL else "webp"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({} if kind == "png" else {"quality": 92}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def notice(text: str, kind: str = "info") -> str:
    """A message: ``info``, ``good``, or ``bad``, which a screen reader says at once."""
    if not text:
        return ""
    role = "alert" if kind == "bad" else "status"
    return f'<p class="notice {kind}" role="{role}">{escape(text)}</p>'


def progress(text: str, done: int, total: int) -> str:
    """A bar with a line of text."""
    return (
        f'<div class="progress" role="status"><progress value="{done}" max="{total}" aria-label="{escape(text)}">'
        f"</progress><span>{escape(text)}</span></div>"
    )


def empty(title: str, text: str, command: str = "") -> str:
    """What stands where there is nothing yet: what would, and how to have it."""
    code = f"<code>{escape(command)}</code>" if command else ""
    return f'<div class="empty"><strong>{escape(title)}</strong><p>{escape(text)}</p>{code}</div>'


def framed(picture: Image.Image, alt: str, marks: Sequence[Mapping[str, Any]] = ()) -> str:
    """A picture, enlarged by a whole factor where it is small, with the boxes of ``marks`` over it."""
    small = picture.width < _SMALL
    labels = list(dict.fromkeys(map(_named, marks)))
    drawn, listed = "", ""
    taken: list[tuple[float, float]] = []
    for number, mark in enumerate(marks, 1):
        edges = _edges(mark, picture.size)
        taken.append(_free(edges, taken))
        hue = f"c{labels.index(_named(mark)) % 6}"
        drawn += _box(edges, hue, taken[-1], number)
        listed += f'<li class="{hue}"><i>{number}</i>{escape(mark["label"])}</li>'
    figure = (
        f'<figure class="frame{" small" if small else ""}" style="--side:{picture.width}px">'
        f'<img src="{data_url(picture)}" alt="{escape(alt)}" width="{picture.width}" height="{picture.height}">'
        f"{drawn}</figure>"
    )
    return f'<div class="seen">{figure}<ol>{listed}</ol></div>' if marks else figure


def _named(mark: Mapping[str, Any]) -> str:
    """What a box is said to hold, without how sure the judge is."""
    return mark["label"].rpartition(" ")[0] or mark["label"]


def _edges(mark: Mapping[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box in percent of the picture, within it."""
    left, top, right, bottom = (
        100 * min(max(edge / size[axis % 2], 0.0), 1.0) for axis, edge in enumerate(mark["box"])
    )
    return left, top, right, bottom


def _free(edges: tuple[float, float, float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a box's number stands: at the corner, or along the edges, nearest to the first that is not taken."""
    left, top, right, bottom = edges
    last = 100 - _NUMBER
    places = [(left, top), (right - _NUMBER, top), (left, bottom - _NUMBER), (right - _NUMBER, bottom - _NUMBER)]
    places += [(left + part * _NUMBER, top) for part in range(1, _PLACES)]
    places += [(left, top + part * _NUMBER) for part in range(1, _PLACES)]
    inside = [(min(max(x, 0.0), last), min(max(y, 0.0), last)) for x, y in places]
    for x, y in inside:
        if all(abs(x - other_x) >= _NUMBER or abs(y - other_y) >= _NUMBER for other_x, other_y in taken):
            return x, y
    return inside[0]


def _box(edges: tuple[float, float, float, float], hue: str, place: tuple[float, float], number: int) -> str:
    left, top, right, bottom = edges
    return (
        f'<span class="box {hue}" style="left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;'
        f'height:{bottom - top:.2f}%"></span>'
        f'<i class="number {hue}" style="left:{place[0]:.2f}%;top:{place[1]:.2f}%">{number}</i>'
    )


# -------------------------------------------------------------------------------------------------------- comparison


def said(flag: str, score: Score) -> str:
    """A judge's words on one picture, as short as they can be."""
    if score.value is None:
        return f"not judged: {score.error or 'no reason given'}"
    if flag == "geneval":
        return "right" if score.value == 1 else f"wrong: {score.reason}"
    number = f"{score.value:.{DIGITS[flag]}f}"
    if flag == "ocr":
        read = score.detail.get("recognised")
        return f"{number}, reads “{read}”" if read else f"{number}, reads nothing"
    return number


def lines(drawn: Sequence[Drawn]) -> dict[str, list[tuple[str, bool]]]:
    """What stands under each picture: judge and words, and whether it is the best of these pictures there."""
    top = best({one.arm: one.scores for one in drawn})
    return {
        one.arm: [
            (
                f"{TITLES[flag]}: {said(flag, score)}{' · best' if one.arm in top.get(flag, ()) else ''}",
                one.arm in top.get(flag, ()),
            )
            for flag, score in one.scores.items()
        ]
        for one in drawn
        if one.picture is not None
    }


def comparison(
    prompt: str,
    asked: Sequence[Arm],
    drawn: Sequence[Drawn],
    seats: Sequence[Seat],
    *,
    drawing: bool,
    earlier: str = "",
) -> str:
    """All arms: drawn, being drawn, waiting, or failed; ``earlier`` says what they were drawn for, if not for this."""
    done = {one.arm: one for one in drawn}
    top = best({one.arm: one.scores for one in drawn})
    current = next((arm.name for arm in asked if arm.name not in done), None) if drawing else None
    cards = [_card(prompt, arm, done.get(arm.name), top, arm.name == current, drawing) for arm in asked]
    seen = any(boxes(score.detail) for one in drawn for score in one.scores.values())
    toggle = '<label class="toggle"><input type="checkbox" checked> Show what the judge saw</label>' if seen else ""
    grid = f'<div class="cards n{len(cards)}">{"".join(cards)}</div>'
    absent = "" if drawing else _absent(seats)
    was = f'<p class="asked">{escape(earlier)}</p>' if earlier else ""
    kind = "results earlier" if earlier else "results"
    return f'<section class="{kind}" aria-label="Pictures">{was}{toggle}{grid}{absent}</section>'


def _card(prompt: str, arm: Arm, one: Drawn | None, top: Mapping[str, set[str]], drawing: bool, going: bool) -> str:
    if one is None:
        text = "Drawing…" if drawing else "Waiting for its turn" if going else "Not drawn: stopped"
        body = f'<div class="frame waiting{" now" if drawing else ""}"><span>{text}</span></div>'
        return f'<article class="arm">{body}<h3>{escape(arm.name)}</h3><p class="by">{escape(arm.about)}</p></article>'
    if one.picture is None:
        body = f'<div class="frame failed" role="alert"><span>{escape(one.error)}</span></div>'
        return f'<article class="arm">{body}<h3>{escape(arm.name)}</h3><p class="by">{escape(arm.about)}</p></article>'
    marks = [mark for score in one.scores.values() for mark in boxes(score.detail)]
    sampling = one.identity["sampling"]
    by = f"{steps_in_words(sampling['steps'])} · guidance {sampling['guidance']:g} · {one.seconds:.1f} s"
    rows = "".join(_score(flag, score, one.arm in top.get(flag, ())) for flag, score in one.scores.items())
    told = [("seed", one.seed), *flat(one.identity)]
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in told if v not in (None, ""))
    return (
        f'<article class="arm">{framed(one.picture, f"{arm.name}: {prompt}", marks)}'
        f'<h3>{escape(arm.name)}</h3><p class="by">{by}</p><ul class="scores">{rows}</ul>'
        f'<details class="facts"><summary>Provenance</summary><dl>{facts}</dl></details></article>'
    )


def _score(flag: str, score: Score, is_best: bool) -> str:
    kind = "unscored" if score.value is None else ""
    if flag == "geneval" and score.value is not None:
        kind = "right" if score.value == 1 else "wrong"
    badge = '<span class="badge">best</span>' if is_best else ""
    judge = f'<abbr title="{escape(MEANING[flag])}">{TITLES[flag]}</abbr>'
    return f'<li class="{kind}"><b>{judge}</b><span>{escape(said(flag, score))}</span>{badge}</li>'


def _absent(seats: Sequence[Seat]) -> str:
    """The judges who said nothing, each with the reason."""
    silent = [seat for seat in seats if seat.scorer is None]
    if not silent:
        return ""
    rows = "".join(f"<li><b>{seat.title}</b>: {_with_code(seat.absent)}</li>" for seat in silent)
    names = ", ".join(seat.title for seat in silent)
    return f'<details class="absent"><summary>Not judged: {names}</summary><ul>{rows}</ul></details>'


def _with_code(text: str) -> str:
    """``text`` with what stands between backticks as code, broken between words and not within an option."""
    plain, *rest = escape(text).split("`")
    if len(rest) % 2:
        return escape(text)
    words = [" ".join(f"<span>{word}</span>" for word in command.split()) for command in rest[::2]]
    return plain + "".join(f"<code>{code}</code>{after}" for code, after in zip(words, rest[1::2], strict=True))


# ------------------------------------------------------------------------------------------------- tables and intervals


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table whose first column names its rows; wider than the page, it is scrolled by itself."""
    # A model's name may be broken behind its family's, where a phone breaks the cells.
    head = "".join(f'<th scope="col">{escape(cell).replace(":", ":<wbr>")}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f'<figure class="sheet"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{whole}</div></figure>'
    )


def _cell(text: str) -> str:
    """``text`` with an interval as one piece: on a phone it stands below its value."""
    return _INTERVAL.sub(r"<span>\g<0></span>", escape(text))


def interval(one: Mapping[str, Any] | None) -> str:
    """``0.495 [0.455, 0.535]``, or a dash."""
    if not one or one.get("value") is None:
        return "–"
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Any] | None]]]], axis: tuple[float, float] = (0.0, 1.0)
) -> str:
    """Points with their intervals: a row a name, in it a line for each labelled interval."""
    low, high = axis
    body = []
    for name, cells in rows:
        bars = "".join(_bar(label, one, place, low, high) for place, (label, one) in enumerate(cells))
        body.append(f'<div class="row"><span class="name">{escape(name)}</span><div class="bars">{bars}</div></div>')
    ticks = "".join(f"<i>{low + (high - low) * part / 4:.2f}</i>" for part in range(5))
    names = list(dict.fromkeys(label for _, cells in rows for label, _ in cells))
    keys = "".join(f'<span class="c{place % 6}">{escape(name)}</span>' for place, name in enumerate(names))
    legend = f'<div class="legend" aria-hidden="true">{keys}</div>' if len(names) > 1 else ""
    return f'<div class="chart">{legend}{"".join(body)}<div class="ticks"><span></span><div>{ticks}</div></div></div>'


def _bar(label: str, one: Mapping[str, Any] | None, place: int, low: float, high: float) -> str:
    if not one or one.get("value") is None:
        return f'<div class="bar none">{escape(label)}: no score</div>'
    value, start, end = (100 * (one[field] - low) / (high - low) for field in ("value", "low", "high"))
    text = escape(f"{label}: {interval(one)}")
    return (
        f'<div class="bar c{place % 6}" role="img" aria-label="{text}" title="{text}">'
        f'<s style="left:{start:.2f}%;width:{end - start:.2f}%"></s><b style="left:{value:.2f}%"></b></div>'
    )
