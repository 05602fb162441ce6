"""A converted folder needs nothing of this repository: it loads, answers, saves and reloads in a bare transformers."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CHECKPOINTS, GOLDENS


SCRIPT = """
import json, sys


class Refuse:
    def find_spec(name, path=None, target=None):
        if name.startswith(("modeling_m3", "m3_")):
            raise ImportError(name)


sys.meta_path.insert(0, Refuse)  # importing them fails, installed or not
folder, again, image = sys.argv[1:]

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

image = Image.open(image).convert("RGB")
messages = [
    {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
]


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def run(model, processor):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 36},
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return logits, answer.tolist(), int(inputs["num_visual_tokens"])


model, processor = load(folder)
logits, answer, budget = run(model, processor)
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
multimodal = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
chat = pipe(text=messages, processor_kwargs={"num_visual_tokens": 36}, max_new_tokens=5)
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
plain = pipe(images=image, text=prompt, num_visual_tokens=36, max_new_tokens=5, return_full_text=False)
processor.num_visual_tokens = 9
model.save_pretrained(again)
processor.save_pretrained(again)
saved_model, saved_processor = load(again)
saved_logits, saved_answer, _ = run(saved_model, saved_processor)
default = saved_processor(images=image, return_tensors="pt")["num_visual_tokens"].tolist()
print(json.dumps({
    "headless": type(headless).__name__,
    "multimodal": type(multimodal).__name__,
    "scales": config.visual_token_scales,
    "budget": budget,
    "answer": processor.decode(answer, skip_special_tokens=True),
    "chat": chat[0]["generated_text"][-1]["content"],
    "plain": plain[0]["generated_text"],
    "same_logits": torch.equal(logits, saved_logits),
    "same_answer": answer == saved_answer,
    "same_template": processor.chat_template == saved_processor.chat_template,
    "saved_scales": saved_processor.visual_token_scales,
    "saved_default": default,
}))
"""


@pytest.mark.pages
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_everything_works_where_the_package_cannot_be_imported(name, converted, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, script, converted[name], tmp_path / "again", GOLDENS / "images" / "photo_400x266.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout.splitlines()[-1])
    scales = [1, 9, 36, 144, 576]
    assert shown["headless"] == "M3LlavaModel" and shown["multimodal"] == "M3LlavaForConditionalGeneration"
    assert shown["scales"] == shown["saved_scales"] == scales
    assert shown["budget"] == 36
    assert shown["answer"] == shown["chat"] == shown["plain"]
    assert shown["same_logits"] and shown["same_answer"] and shown["same_template"]
    assert shown["saved_default"] == [9]
