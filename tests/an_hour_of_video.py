"""Encodes and asks about an hour of video in a process of its own: prints by how many bytes memory grew, and visual tokens asked
with. The model sees 336 pixels, as CLIP-L, and has a context of 40,960 tokens.
"""

import resource
import tempfile
from pathlib import Path

import torch
from conftest import tiny_config
from test_processing import word_tokenizer
from video_files import moving_frames, write_video

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaImageProcessorPil, M3LlavaProcessor


def main() -> None:
    torch.manual_seed(0)
    config = tiny_config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={"max_position_embeddings": 40960},
    )
    model = M3LlavaForConditionalGeneration(config).eval()
    processor = M3LlavaProcessor(M3LlavaImageProcessorPil(), word_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        file = write_video(Path(folder) / "hour.mp4", moving_frames(3600), rate=1)
        model.encode_video(processor.stream_video(file, num_frames=2))  # what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encoded = model.encode_video(processor.stream_video(file, fps=1), 9)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    for number in (1, 9):
        inputs = processor(text="look <video>", videos=encoded, num_visual_tokens=number, return_tensors="pt")
        model.generate(**inputs, encoded_images=encoded, max_new_tokens=2, eos_token_id=None, suppress_tokens=[98])
        print((inputs["input_ids"] == processor.image_token_id).sum().item())


if __name__ == "__main__":
    main()
