"""What lmms-eval calls for the tasks beside this file."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    """Right is what is answered to the letter."""
    return {"exact_match": float(results[0] == doc["answer"])}
