import datetime
import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from cir_core.losses import all_gather_with_grad, contrastive_loss
from cir_core.schema import CirError
from cir_core.tuning import backward_in_micro_batches, micro_batches

ROWS, DIM, WIDTH, TEMPERATURE = 4, 6, 5, 0.07


def batch(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(num_rows, DIM, generator=generator) for _ in range(2))
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def open_clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Imported here, because it takes seconds and the worker processes have no use for it."""
    import open_clip.loss

    loss: Tensor = open_clip.loss.ClipLoss()(image, text, logit_scale)
    return loss


def naive_loss(image: Tensor, text: Tensor, temperature: float) -> float:
    """Mean over rows and directions of -log softmax, with Python loops."""
    rows = range(len(image))
    total = 0.0
    for anchors, others in ((image, text), (text, image)):
        for i in rows:
            logits = [float(anchors[i].double() @ others[j].double()) / temperature for j in rows]
            total += math.log(sum(math.exp(x - logits[i]) for x in logits))
    return total / (2 * len(image))


def test_equals_the_definition_and_open_clip() -> None:
    image, text = batch(7)
    loss = contrastive_loss(image, text, TEMPERATURE)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert float(loss) == pytest.approx(naive_loss(image, text, TEMPERATURE), abs=1e-6)
    theirs = open_clip_loss(image, text, torch.tensor(1 / TEMPERATURE))
    assert float(loss) == pytest.approx(float(theirs), abs=1e-6)


def test_gradients_equal_open_clips() -> None:
    ours, theirs = ([x.requires_grad_() for x in batch(7)] for _ in range(2))
    contrastive_loss(*ours, TEMPERATURE).backward()
    open_clip_loss(*theirs, torch.tensor(1 / TEMPERATURE)).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=0)


def test_invalid_rows_are_as_if_absent_whatever_they_hold() -> None:
    image, text = batch(6)
    valid = torch.tensor([True, False, True, True, False, True])
    expected = contrastive_loss(image[valid], text[valid], TEMPERATURE)
    image[1], image[4], text[4] = torch.nan, torch.inf, 1e30
    image.requires_grad_()
    loss = contrastive_loss(image, text, TEMPERATURE, valid=valid)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert (image.grad[~valid] == 0).all()
    assert (image.grad[valid].abs().sum(1) > 0).all()


def test_no_valid_row_is_a_zero_loss_with_zero_gradients() -> None:
    image, text = batch(3)
    image.requires_grad_()
    loss = contrastive_loss(image, text, TEMPERATURE, valid=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert image.grad is not None
    assert (image.grad == 0).all()


def test_float32_inside_under_autocast_and_for_half_inputs() -> None:
    image, text = batch(16)
    exact = contrastive_loss(image, text, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, 0.01), exact)
        low = contrastive_loss(image.bfloat16(), text.bfloat16(), 0.01)
    assert low.dtype == torch.float32
    assert torch.equal(low, contrastive_loss(image.bfloat16().float(), text.bfloat16().float(), 0.01))


def test_a_learned_temperature_gets_its_gradient() -> None:
    image, text = batch(5)
    temperature = torch.tensor(0.5, requires_grad=True)
    contrastive_loss(image, text, temperature).backward()
    step = 1e-4
    slope = (naive_loss(image, text, 0.5 + step) - naive_loss(image, text, 0.5 - step)) / (2 * step)
    assert float(temperature.grad) == pytest.approx(slope, abs=1e-4)  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    image, text = batch(4)
    with pytest.raises(CirError, match=r"\[4, 6\]"):
        contrastive_loss(image, text[:3], TEMPERATURE)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CirError, match="temperature must be positive"):
            contrastive_loss(image, text, temperature)
    with pytest.raises(CirError, match="bool"):
        contrastive_loss(image, text, TEMPERATURE, valid=torch.ones(4))
    with pytest.raises(CirError, match="same number of rows"):
        contrastive_loss(image, text, TEMPERATURE, gather=lambda local: torch.cat([local, local[:1]]))
    with pytest.raises(CirError, match="rank 1"):
        contrastive_loss(image, text, TEMPERATURE, rank=1)
    with pytest.raises(CirError, match="not initialised"):
        all_gather_with_grad(image)


# Uneven on purpose: the first rank of three has nothing valid.
VALID = {
    "all_valid": [True] * 12,
    "uneven": [False] * 4 + [True, False, True, True] + [True] * 4,
    "none_valid": [False] * 12,
}
SIZES = (0, 1, 3)  # of the micro-batches of four rows; 0: without gradient caching


class Towers(torch.nn.Module):
    """One linear map shared by both inputs, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.linear = torch.nn.Linear(DIM, WIDTH)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.temperature = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = [F.normalize(self.linear(x), dim=1) for x in (image, text)]
        return both[0], both[1], self.temperature * 1.0


def loss_and_gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    if loss.requires_grad:
        loss.backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach().reshape(1)}


def one_process(num_rows: int, valid: list[bool]) -> dict[str, Tensor]:
    """The reference: invalid rows removed, one process, open_clip's loss."""
    keep = torch.tensor(valid[:num_rows])
    image, text = (x[keep] for x in batch(num_rows, seed=3))
    model = Towers()
    v, w, temperature = model(image, text)
    loss = open_clip_loss(v, w, 1 / temperature) if keep.any() else 0 * (v.sum() + w.sum() + temperature)
    return loss_and_gradients(model, loss)


def cached_loss(model: torch.nn.parallel.DistributedDataParallel, image: Tensor, text: Tensor, size: int, **loss: Any):
    """The loss and its gradients by gradient caching: both embeddings and the temperature side by side are "the" one."""
    synchronised = []

    def embed(rows: slice) -> Tensor:
        v, w, temperature = model(image[rows], text[rows])
        if torch.is_grad_enabled():
            synchronised.append(model.require_backward_grad_sync)
        return torch.cat([v, w, temperature.expand(len(v), 1)], dim=1)

    def loss_of(all_of_it: Tensor) -> Tensor:
        v, w = all_of_it[:, :WIDTH], all_of_it[:, WIDTH:-1]
        return contrastive_loss(v, w, all_of_it[:, -1].mean(), **loss)

    found = backward_in_micro_batches(embed, loss_of, micro_batches(len(image), size), no_sync=model.no_sync)
    assert synchronised == [False] * (len(synchronised) - 1) + [True]  # gradients are averaged once
    return found


def worker(rank: int, folder: str) -> None:
    """One of three processes; the first two also form a group of their own, so one start-up tests both sizes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=300),
    )
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    for num_ranks, group in groups.items():
        rows = slice(rank * ROWS, (rank + 1) * ROWS)
        for name, valid in VALID.items() if rank < num_ranks else ():
            image, text = (x[rows] for x in batch(num_ranks * ROWS, seed=3))
            gather = functools.partial(all_gather_with_grad, group=group)
            rest = {"gather": gather, "rank": rank, "valid": torch.tensor(valid[rows])}
            for size in SIZES:
                model = torch.nn.parallel.DistributedDataParallel(Towers(), process_group=group)
                if size:
                    loss = cached_loss(model, image, text, size, **rest)
                else:
                    loss = contrastive_loss(*model(image, text), **rest)
                save_file(loss_and_gradients(model, loss), f"{folder}/{num_ranks}-{name}-{size}-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_and_three_processes_equal_one(tmp_path: Path) -> None:
    # This file is the worker's program: under importlib mode a spawned process cannot import it by name.
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(3)]
    assert [process.wait(timeout=500) for process in workers] == [0, 0, 0]
    for num_ranks, (name, valid), size in itertools.product((2, 3), VALID.items(), SIZES):
        expected = one_process(num_ranks * ROWS, valid)
        found = [load_file(tmp_path / f"{num_ranks}-{name}-{size}-{rank}.safetensors") for rank in range(num_ranks)]
        loss = torch.stack([part["loss"] for part in found]).mean(0)
        torch.testing.assert_close(loss, expected.pop("loss"), atol=1e-6, rtol=1e-6)
        assert expected.keys() == {"linear.weight", "linear.bias", "temperature"}
        for parameter, gradient in expected.items():
            for part in found:
                torch.testing.assert_close(part[parameter], gradient, atol=2e-6, rtol=1e-6)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
