"""What the page shows of answers, as HTML: text, costs, the comparison and its plot."""

import difflib
import html
import io
import re
import threading

from .asking import AUTO, Answer, Compared


ENDS = {"length": "cut off: it reached the longest length", "stopped": "stopped"}
LINES = ("#2563eb", "#d97706")  # told apart by their marks, too
_DRAWING = threading.Lock()  # matplotlib is for one thread at a time
TEXT = "#010203"  # stands for the colour of the page's text, whichever it is


def answer_html(answer: Answer | None) -> str:
    """An answer by itself, and how it ended."""
    if answer is None:
        return '<div class="m3-answer m3-empty">The answer appears here.</div>'
    end = f' <span class="m3-end">({ENDS[answer.finished]})</span>' if answer.finished in ENDS else ""
    busy = "false" if answer.finished else "true"
    text = _text(answer.text) or ("&hellip;" if not answer.finished else "<em>(no words)</em>")
    return f'<div class="m3-answer" aria-live="polite" aria-busy="{busy}">{text}{end}</div>'


def problem_html(sentence: str) -> str:
    """An error, as a sentence."""
    return f'<div class="m3-problem" role="alert">{_text(sentence)}</div>'


def notes_html(sentence: str) -> str:
    """What is said about a picture."""
    return f'<p class="m3-notes" role="status">{_text(sentence)}</p>'


def cost_html(answer: Answer | None) -> str:
    """What an answer took."""
    cost = (answer or Answer()).cost
    numbers = answer.num_visual_tokens if answer and answer.finished else ()
    each = f" ({' + '.join(map(str, numbers))} a tile)" if numbers and numbers != (cost.visual_tokens,) else ""
    facts = [
        ("Visual tokens", _number(cost.visual_tokens) + each),
        ("Prompt tokens", _number(cost.prompt_tokens)),
        ("Prefill", _flops(cost.prefill_flops)),
        ("First token", _seconds(cost.first_token_seconds)),
        ("Total", _seconds(cost.seconds or None)),
        ("Speed", "–" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.0f} tokens/s"),
    ]
    return f'<dl class="m3-cost">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)}</dl>'


def compared_html(compared: Compared | None) -> str:
    """Answers side by side, coarse to fine; once all are there, what differs from the finest one's is marked."""
    if compared is None:
        return '<div class="m3-answer m3-empty">Answers at every number of visual tokens appear here.</div>'
    answers = compared.answers
    finest = max((number for number in answers if number != AUTO), default=None)
    done = all(answer.finished for answer in answers.values())
    reference = answers[finest].text if done and finest is not None and not answers[finest].error else None
    rows = "".join(_row(number, answer, reference, number == finest) for number, answer in answers.items())
    encoded = ""
    if compared.encoding_seconds is not None:
        encoded = (
            f"The picture was encoded once: {_seconds(compared.encoding_seconds)}, {_flops(compared.encoding_flops)}. "
        )
    marked = f"Marked: what differs from the answer at {finest}." if reference is not None else ""
    plot = plot_svg(compared) if done else ""
    return (
        f'<div class="m3-compared" aria-live="polite" aria-busy="{str(not done).lower()}"><table>'
        f"<caption>{encoded}{marked}</caption><thead><tr><th scope='col'>Visual tokens</th><th scope='col'>Answer</th>"
        f"<th scope='col'>Cost</th></tr></thead><tbody>{rows}</tbody></table>{plot}</div>"
    )


def plot_svg(compared: Compared) -> str:
    """First token and whole answer, in seconds, over visual tokens."""
    points = [
        (answer.cost.visual_tokens or number, answer.cost.first_token_seconds, answer.cost.seconds)
        for number, answer in compared.answers.items()
        if number != AUTO and answer.cost.first_token_seconds is not None
    ]
    if len(points) < 2:
        return ""
    with _DRAWING:
        written = _drawn(*zip(*points))
    drawing = re.sub(r"\A.*?(?=<svg)", "", written, flags=re.DOTALL).replace(TEXT, "currentColor")
    said = "; ".join(f"{number} visual tokens: {one:.3g} s, {all_of_it:.3g} s" for number, one, all_of_it in points)
    label = html.escape(f"Seconds to the first token and for the whole answer. {said}")
    return drawing.replace("<svg", f'<svg class="m3-plot" role="img" aria-label="{label}"', 1)


def status_html(words: str, share: float | None, ready: bool, error: str) -> str:
    """How far loading is, or what answers."""
    if error:
        return problem_html(error)
    if ready:
        return f'<p class="m3-status" role="status">{_text(words)}</p>'
    value = "" if share is None else f' value="{share:.3f}"'
    return (
        f'<p class="m3-status" role="status">{_text(words)}&hellip;</p>'
        f'<progress max="1"{value} aria-label="Loading the model"></progress>'
    )


def _drawn(numbers: tuple[int, ...], first: tuple[float, ...], whole: tuple[float, ...]) -> str:
    """The drawing, in the colour `TEXT`."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # without pyplot: it keeps figures, and is for one thread

    rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})  # of the page's process
    figure = Figure(figsize=(4.6, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(numbers, whole, marker="o", color=LINES[0], label="whole answer")
    axes.plot(numbers, first, marker="s", color=LINES[1], label="first token")
    axes.set(xscale="log", xlabel="visual tokens", ylabel="seconds", ylim=(0, None))
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    for text in [axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()]:
        text.set_color(TEXT)
    axes.tick_params(colors=TEXT, labelcolor=TEXT)
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return written.getvalue()


def _row(number: int | str, answer: Answer, reference: str | None, is_finest: bool) -> str:
    cost = answer.cost
    name = str(number)
    if number == AUTO and answer.finished and not answer.error:
        name = f"auto: {', '.join(map(str, answer.num_visual_tokens))}"
    elif cost.visual_tokens not in (None, number):
        name += f"<br><small>{cost.visual_tokens:,} in all</small>"
    if answer.error:
        text = f'<span class="m3-problem">{_text(answer.error)}</span>'
    else:
        text = _text(answer.text) if reference is None else _marked(answer.text, reference)
        text = text or ("" if answer.finished else "&hellip;")
        if answer.finished in ENDS:
            text += f' <span class="m3-end">({ENDS[answer.finished]})</span>'
        elif reference is not None and not is_finest and answer.text == reference:
            text += ' <span class="m3-end">(the same)</span>'
    facts = [
        f"first token {_seconds(cost.first_token_seconds)}",
        f"in all {_seconds(cost.seconds or None)}",
        *([] if cost.prefill_flops is None else [_flops(cost.prefill_flops)]),
    ]
    shown = "" if cost.first_token_seconds is None else "<br>".join(facts)
    return f'<tr><th scope="row">{name}</th><td>{text}</td><td class="m3-small">{shown}</td></tr>'


def _marked(text: str, reference: str) -> str:
    """The words that are not in the reference, marked."""
    words, others = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", reference)
    parts = []
    for kind, begin, end, _, _ in difflib.SequenceMatcher(a=words, b=others, autojunk=False).get_opcodes():
        part = _text("".join(words[begin:end]))
        parts.append(part if kind == "equal" or not part.strip() else f"<mark>{part}</mark>")
    return "".join(parts)


def _text(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def _flops(value: float | None) -> str:
    if value is None:
        return "–"
    power, unit = next((each for each in ((1e12, "T"), (1e9, "G")) if value >= each[0]), (1e6, "M"))
    return f"{float(f'{value / power:.3g}'):,g} {unit}FLOPs"  # 1,000 and not 1e+03
