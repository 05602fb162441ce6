"""What lmms-eval calls for tasks about videos: open-ended ones, as MSVD-QA, and those with options, as NExT-QA."""

import re


LETTERS = "ABCDEFGHIJ"


def doc_to_visual(doc):
    """The file's name, by which lmms-eval knows that it is a video."""
    return [doc["video"]]


def doc_to_text(doc):
    """Options as the authors list them (their `IG-VLM/eval_llava_multiplechoice.py`)."""
    if not doc["options"]:
        return f"{doc['question']}\nAnswer the question using a single word or phrase."
    options = " ".join(f"{letter}:{option}." for letter, option in zip(LETTERS, doc["options"]))
    return f"Question: {doc['question']} {options} \nSelect the correct answer from the options."


def process_results(doc, results):
    """Of options, the letter counts, or the option itself; else the answer, whole or somewhere in what was said."""
    answer, right = _plain(results[0]), _plain(doc["answer"])
    if doc["options"]:
        chosen = re.match(r"\W*(?:answer\W+)?([a-j])\b", answer)
        options = [_plain(option) for option in doc["options"]]
        said = options.index(answer) if answer in options else LETTERS.lower().index(chosen[1]) if chosen else None
        is_right = float(said is not None and LETTERS[said].lower() == right)
        return {"exact_match": is_right, "contains": is_right}
    contains = re.search(rf"(?<!\w){re.escape(right)}(?!\w)", answer) is not None
    return {"exact_match": float(answer == right), "contains": float(contains)}


def _plain(text):
    return " ".join(text.lower().split()).removesuffix(".")
