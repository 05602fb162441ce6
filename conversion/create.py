"""A new M3 of a vision tower and a language model, with a projector that is still random: everything is checked, then written."""

import math
import time
from pathlib import Path

import torch

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.modeling_m3 import M3LlavaMultiModalProjector

from .card import model_card
from .convert import Conversion, check_apart, plan, write_checkpoint
from .language_model import (
    LanguageModel,
    build_language_processing,
    check_chats,
    check_same,
    is_tied,
    language_tensors,
    load_reference,
    own_generation_config,
    probe,
    probe_ids,
    read_language_model,
    stored_dtype,
)
from .original import HeldTensor, StoredTensor, check_name
from .source import Source, build_processor, naming
from .vision import SomeTower, read_tower
from .writer import check_destination


VOCABULARY_MULTIPLE = 64  # rows of an embedding that has to grow, for the sake of matrix kernels
# Of LLaVA-NeXT, (rows, columns) of tiles, in its order: on ties the first one wins.
ANYRES_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


def create(
    vision_tower: str | Path,
    language_model: str | Path,
    destination: str | Path,
    *,
    scales: list[int] | None = None,
    anyres: bool = False,
    vision_feature_layer: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    chat_template: str | None = None,
    max_shard_size: int | str = "5GB",
    license: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Makes an M3 whose projector has to be trained: weights of both parts are as they were.

    Before it is done, logits of text alone are compared with those of the language model's own class. That loads the language
    model, and then the new one: each by itself, but for a GGUF file, which is in memory as long as it takes.

    Args:
        vision_tower: folder or Hub id of a CLIP or SigLIP, or of an M3 or a LLaVA of transformers', whose tower is taken.
        language_model: folder or Hub id of a causal language model, or a GGUF file.
        destination: the folder to write. It appears under this name only when it is whole.
        scales: numbers of visual tokens; by default the halvings of the tower's grid.
        anyres: cut pictures into tiles, as LLaVA-NeXT does, in up to four of the tower's size or three in a row.
        vision_feature_layer: of the tower, whose output is taken; by default -2, or as in the M3 or LLaVA it is taken out of.
        dtype: of all weights; that of the language model by default.
        seed: of the projector.
        chat_template: a key of `CHAT_TEMPLATES` in place of the language model's own.
        max_shard_size: of a weight file, in bytes or as `"5GB"`.
        license: for the card; that of the language model's own card by default.
        overwrite: replace `destination` where it exists.

    Raises:
        ConversionError: anything that is wrong with a part or the request, in one line.
        OSError: a file that cannot be read or written.
    """
    start = time.monotonic()
    check_name(destination, "the folder to write")
    destination = Path(destination).resolve()
    check_destination(destination, overwrite)
    tower = read_tower(vision_tower)
    with read_language_model(language_model) as language:
        check_apart(destination, tower.folder, language.folder if language.gguf_file is None else language.file)
        tokenizer, template, own = build_language_processing(language, chat_template)
        image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        layer = tower.layer if vision_feature_layer is None else vision_feature_layer
        config = _config(tower, language, image_token_id, layer, scales, anyres)
        with naming(tower.folder):
            processor = build_processor(config, tokenizer, template, do_pad=not anyres, **tower.preprocessing)
        if chat_template is None:
            check_chats(language, processor, own)

        dtype = dtype or stored_dtype(language)
        reference = load_reference(language, dtype)
        ids = probe_ids(own)
        with naming(language.file):
            expected = probe(reference, ids)
        if config.tie_word_embeddings and not is_tied(reference):
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        tensors = language_tensors(language, reference)
        generation_config = own_generation_config(language, reference, tokenizer)
        del reference
        new = _new_weights(config, destination, seed)
        source = Source(
            config=config,
            tensors=[
                (tower.tensors, tower.table),
                (tensors, {name: name for name in tensors}),
                (new, {name: name for name in new}),
            ],
            rows=language.config.vocab_size,
            processor=processor,
            generation_config=generation_config,
            folders=(tower.folder, language.folder),
        )
        planned, num_dropped = plan(source, dtype, language.file)
        config.architectures = [M3LlavaForConditionalGeneration.__name__]
        for part in (config, config.vision_config, config.text_config):
            part.dtype = dtype
        parts = (_shown(vision_tower), _shown(language_model))
        card = model_card(
            destination.name,
            parts[1],
            config,
            trained_for_scales=False,
            source=language.folder,
            license=license,
            parts=parts,
        )

        def check(folder: Path) -> None:
            with naming(folder):
                model = M3LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
                found = probe(model, ids)
            check_same(language, expected, found)

        files = write_checkpoint(
            destination, source, planned, card, max_shard_size=max_shard_size, overwrite=overwrite, check=check
        )
        nbytes = sum(tensor.nbytes for tensor in planned)
        return Conversion(destination, len(planned), num_dropped, nbytes, len(files), time.monotonic() - start)


def _config(
    tower: SomeTower, language: LanguageModel, image_token_id: int, layer: int, scales: list[int] | None, anyres: bool
) -> M3LlavaConfig:
    rows, pinpoints = language.config.vocab_size, None
    if image_token_id >= rows:
        rows = math.ceil((image_token_id + 1) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if anyres:
        side = tower.config.get("image_size", 224)
        pinpoints = [[side * down, side * across] for down, across in ANYRES_GRIDS]
    text_config = {**language.config.to_dict(), "vocab_size": rows}
    for key in ("architectures", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype"):
        text_config.pop(key, None)
    with naming(tower.folder / "config.json"):
        config = M3LlavaConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_id=image_token_id,
            vision_feature_layer=layer,
            visual_token_scales=scales,
            patch_merge_type="spatial_unpad" if anyres else "flat",
            image_grid_pinpoints=pinpoints,
        )
    config.trained_scales = []
    return config


def _new_weights(config: M3LlavaConfig, file: Path, seed: int) -> dict[str, StoredTensor]:
    """Those that neither part has, as the original draws them: linear layers as torch does, a newline of length one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = M3LlavaMultiModalProjector(config)
        drawn = {f"model.multi_modal_projector.{key}": value for key, value in projector.state_dict().items()}
        if config.image_grid_pinpoints is not None:
            size = config.text_config.hidden_size
            drawn["model.image_newline"] = torch.randn(size) / math.sqrt(size)
    return {name: HeldTensor.of(name, file, value) for name, value in drawn.items()}


def _shown(name: str | Path) -> str:
    """How the card calls a part: a Hub id as it is, a path by its last name."""
    return Path(name).resolve().name if Path(name).exists() else str(name)
