"""The objective in `Trainer`, and on two processes: gradients are those of one process, synchronised once."""

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from test_objective import ANYRES, TINY_SCALES, assert_same, gradients, tiny_batch, tiny_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments


# As many labels in each row, so that the mean over ranks is that over rows.
ROWS = [[3, None, 5, None, 4], [2, None, 10]]
TEXT_ROWS = [[3, None, 5, None, 4], [12]]


def batch_of(model, rows=ROWS):
    return {**tiny_batch(model.config, rows, 144), "matryoshka_scales": TINY_SCALES}


def pick(batch, rank):
    """A rank's row, with the images that are its own."""
    images = slice(2) if rank == 0 else slice(2, None)
    rows = ("input_ids", "labels", "attention_mask")
    return {
        key: value if isinstance(value, list) else value[rank : rank + 1] if key in rows else value[images]
        for key, value in batch.items()
        if key in rows or key == "matryoshka_scales" or len(value[images])
    }


def layers_of(model):
    return [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers.children()]


def with_ddp(rank):
    model = tiny_model(**ANYRES)
    batch = pick(batch_of(model), rank)
    # The layers above the selected one have no gradient, as in every CLIP that LLaVA uses.
    ddp, buckets = DistributedDataParallel(model, find_unused_parameters=True), Counter()

    def counting_hook(state, bucket):
        buckets[bucket.index()] += 1
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, counting_hook)
    with ddp.no_sync():
        ddp(**batch).loss.backward()
    assert not buckets
    ddp(**batch).loss.backward()
    assert set(buckets.values()) == {1}
    return {name: gradient / 2 for name, gradient in gradients(model).items()}


def with_fsdp2(rank, rows=ROWS):
    model = tiny_model(**ANYRES)
    batch = pick(batch_of(model, rows), rank)
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    model(**batch).loss.backward()
    return {name: gradient.full_tensor() for name, gradient in gradients(model).items()}


def with_fsdp2_and_a_rank_without_images(rank):
    return with_fsdp2(rank, TEXT_ROWS)


def with_fsdp1(rank):
    model = tiny_model(**ANYRES)
    batch = pick(batch_of(model), rank)
    layers = layers_of(model)
    fsdp = FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, **_: recurse or any(module is layer for layer in layers),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    fsdp(**batch).loss.backward()
    with FullyShardedDataParallel.summon_full_params(fsdp, with_grads=True):
        # Parameters that are not used share a flat one with some that are: zeros, where they have no gradient otherwise.
        named = {name.replace("_fsdp_wrapped_module.", ""): g.clone() for name, g in gradients(model).items()}
    return {name: gradient for name, gradient in named.items() if gradient.any()}


WRAPPERS = (with_ddp, with_fsdp1, with_fsdp2, with_fsdp2_and_a_rank_without_images)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        found = wrapper(rank)
        if rank == 0:
            torch.save(found, folder / wrapper.__name__)
        dist.barrier()
    # Not by Python's own end: gloo's threads may still hold tensors then, and abort the process (pytorch/pytorch#179291).
    os._exit(0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with the gradients under each wrapper."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [wrapper.__name__ for wrapper in WRAPPERS])
def test_two_processes_equal_one(wrapper, two_processes):
    model = tiny_model(**ANYRES)
    model(**batch_of(model, TEXT_ROWS if "without_images" in wrapper else ROWS)).loss.backward()
    expected = gradients(model)
    if wrapper == "with_fsdp1":
        expected = {name: gradient for name, gradient in expected.items() if gradient.any()}
    assert_same(torch.load(two_processes / wrapper), expected)


class MatryoshkaTrainer(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "matryoshka_scales": TINY_SCALES}, *args, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_in_trainer_equals_a_larger_batch(checkpointing, tmp_path):
    """Over rows with different numbers of labels: `Trainer` divides by the number of all of them."""
    both = tiny_batch(tiny_model().config, [[3, None, 5], [2, None, 25]], 144)
    apart = [{name: values[i : i + 1] for name, values in both.items()} for i in range(2)]
    trained = []
    for steps, data in ((1, [both]), (2, apart)):
        arguments = TrainingArguments(
            output_dir=tmp_path / str(steps),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=checkpointing,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = MatryoshkaTrainer(tiny_model(), arguments, train_dataset=data, data_collator=lambda batch: batch[0])
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        trained.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    before = dict(tiny_model().named_parameters())
    changes = [{name: p - before[name].detach() for name, p in parameters.items()} for parameters in trained]
    assert_same(changes[1], changes[0], tolerance=1e-3)
