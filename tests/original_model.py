"""An independent reference for variants that the goldens lack: the original's arithmetic in plain torch, from its files.

Reads the original layout itself and shares no code with what it checks. One prompt, one picture, float32.
Shapes: t tiles, n tokens, d hidden size.
"""

import ast
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conversion_checkpoints import VISION, read_weights
from PIL import Image


class OriginalModel:
    """The checkpoint in `folder`, whose vision weights count, with the preprocessing of the CLIP folder `clip`."""

    def __init__(self, folder: Path, clip: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.vision = json.loads((clip / "config.json").read_text())["vision_config"]
        self.preprocessing = json.loads((clip / "preprocessor_config.json").read_text())
        self.weights = {key: value.float() for key, value in read_weights(folder).items()}
        if "lm_head.weight" not in self.weights or self.config.get("tie_word_embeddings"):
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def logits(self, ids: list[int], mark: int, picture: Image.Image, scale: int | None) -> torch.Tensor:
        """Logits of a prompt in which one `mark` stands for the picture, (n, vocabulary)."""
        embed = self.weights["model.embed_tokens.weight"]
        place = ids.index(mark)
        before, after = (torch.tensor(part, dtype=torch.long) for part in (ids[:place], ids[place + 1 :]))
        return self.language_model(torch.cat([embed[before], self.image_features(picture, scale), embed[after]]))

    def image_features(self, picture: Image.Image, scale: int | None) -> torch.Tensor:
        features = self.project(self.vision_tower(self.tiles(picture)))
        if scale is not None:
            t, n, d = features.shape
            side = math.isqrt(n)
            window = int(math.sqrt(n / scale))
            grids = features.view(t, side, side, d).permute(0, 3, 1, 2)
            features = F.avg_pool2d(grids, window, window).flatten(2).transpose(1, 2)
        if self.config["image_aspect_ratio"] != "anyres" or self.config.get("mm_patch_merge_type") == "flat":
            return features.flatten(0, 1)
        side = math.isqrt(features.shape[1])
        width, height = self.resolution(picture.size)
        rows, columns = height // self.vision["image_size"], width // self.vision["image_size"]
        canvas = features[1:].view(rows, columns, side, side, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        assert self.config["mm_patch_merge_type"] == "spatial", "unpadding has goldens of its own"
        return torch.cat([features[0], canvas.flatten(0, 1)])

    def tiles(self, picture: Image.Image) -> torch.Tensor:
        edge = self.vision["image_size"]
        aspect_ratio = self.config["image_aspect_ratio"]
        if aspect_ratio == "anyres":
            width, height = self.resolution(picture.size)
            scale = min(width / picture.width, height / picture.height)
            fitted = min(math.ceil(picture.width * scale), width), min(math.ceil(picture.height * scale), height)
            canvas = Image.new("RGB", (width, height))
            canvas.paste(picture.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
            corners = [(x, y) for y in range(0, height, edge) for x in range(0, width, edge)]
            views = [canvas.crop((x, y, x + edge, y + edge)) for x, y in corners]
            views.insert(0, picture.resize((edge, edge)))
        elif aspect_ratio == "pad":
            longest = max(picture.size)
            canvas = Image.new("RGB", (longest, longest), tuple(int(x * 255) for x in self.preprocessing["image_mean"]))
            canvas.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
            views = [canvas.resize((edge, edge))]
        else:  # CLIP's own: the short edge resized, then the middle
            scale = edge / min(picture.size)
            resized = picture.resize(tuple(edge if x == min(picture.size) else int(x * scale) for x in picture.size))
            left, top = (resized.width - edge) // 2, (resized.height - edge) // 2
            views = [resized.crop((left, top, left + edge, top + edge))]
        pixels = (np.stack([np.asarray(view, np.float64) for view in views]) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(self.preprocessing[name], np.float32) for name in ("image_mean", "image_std"))
        return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2)

    def resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the pinpoint that keeps most of the picture, then wastes least."""
        pinpoints = self.config["image_grid_pinpoints"]
        best, best_fit = None, (-1, 0)
        for width, height in ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints:
            scale = min(width / size[0], height / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            if (kept, kept - width * height) > best_fit:
                best, best_fit = (width, height), (kept, kept - width * height)
        return best

    def vision_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        size, heads = self.vision["hidden_size"], self.vision["num_attention_heads"]

        def norm(x, name):
            return F.layer_norm(
                x, (size,), self.weights[f"{VISION}{name}.weight"], self.weights[f"{VISION}{name}.bias"]
            )

        patches = F.conv2d(pixels, self.weights[f"{VISION}embeddings.patch_embedding.weight"], stride=14)
        class_token = self.weights[f"{VISION}embeddings.class_embedding"].expand(len(pixels), 1, size)
        x = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
        states = [norm(x + self.weights[f"{VISION}embeddings.position_embedding.weight"], "pre_layrnorm")]
        for i in range(self.vision["num_hidden_layers"]):
            layer, x = f"encoder.layers.{i}.", states[-1]
            y = norm(x, f"{layer}layer_norm1")
            q, k, v = (
                self.linear(y, f"{VISION}{layer}self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
                for name in "qkv"
            )
            weights = (q @ k.transpose(-1, -2) / math.sqrt(size / heads)).softmax(-1)
            x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), f"{VISION}{layer}self_attn.out_proj")
            y = self.linear(norm(x, f"{layer}layer_norm2"), f"{VISION}{layer}mlp.fc1")
            states.append(x + self.linear(y * torch.sigmoid(1.702 * y), f"{VISION}{layer}mlp.fc2"))
        selected = states[self.config["mm_vision_select_layer"]]
        return selected if self.config["mm_vision_select_feature"] == "cls_patch" else selected[:, 1:]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.config["mm_projector_type"]
        if kind == "identity":
            return x
        if kind == "linear":
            return self.linear(x, "model.mm_projector")
        for i in range(int(kind.removeprefix("mlp").removesuffix("x_gelu"))):
            x = self.linear(F.gelu(x) if i else x, f"model.mm_projector.{2 * i}")
        return x

    def language_model(self, x: torch.Tensor) -> torch.Tensor:
        config, n = self.config, len(x)
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        width = config["hidden_size"] // heads
        # In the original's order of operations: a rounding here grows with the position.
        frequencies = 1.0 / (config["rope_theta"] ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.arange(n).float(), frequencies)
        cos, sin = (function(torch.cat([angles, angles], -1)) for function in (torch.cos, torch.sin))
        distance = torch.arange(n)[:, None] - torch.arange(n)
        is_seen = (distance >= 0) & (distance < (config.get("sliding_window") or n))

        def norm(x, name):
            return (
                x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * self.weights[f"{name}.weight"]
            )

        def rotate(x):
            return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            y = norm(x, f"{layer}input_layernorm")
            q, k, v = (
                self.linear(y, f"{layer}self_attn.{name}_proj").unflatten(-1, (-1, width)).transpose(0, 1)
                for name in "qkv"
            )
            k, v = (states.repeat_interleave(heads // groups, 0) for states in (rotate(k), v))
            scores = (rotate(q) @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~is_seen, -math.inf)
            x = x + self.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{layer}self_attn.o_proj")
            y = norm(x, f"{layer}post_attention_layernorm")
            gated = F.silu(self.linear(y, f"{layer}mlp.gate_proj")) * self.linear(y, f"{layer}mlp.up_proj")
            x = x + self.linear(gated, f"{layer}mlp.down_proj")
        return self.linear(norm(x, "model.norm"), "lm_head")
