"""What every training stage shares: its arguments, a learning rate, a moving average, a clock that ends in time."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from training.mini.config import Folders
from training.mini.layout import half
from training.mini.replay import Replay

STARTED = time.monotonic()  # loading the data is part of a stage's time
REPORT_EVERY = 15.0  # seconds
SAVE_EVERY = 120.0
READ_EVERY = 20  # steps; reading a value waits for the device
EMA_DECAY = 0.999
SMOOTHING = 0.8  # of readings
WORSE = 2.0  # times the best smoothed loss: lost
SOUND = 1.25  # times the best smoothed loss: still worth keeping
PATIENCE = 5  # lost readings in a row before the stage goes back
KEEP_EVERY = 10  # readings
MOST_READINGS = 8


def stage_arguments(description: str | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the data, made anew on every machine")
    parser.add_argument("--checkpoints", type=Path, required=True, help="what is carried from slice to slice")
    parser.add_argument("--seconds", type=float, default=60, help="save and end after so long, start included")
    parser.add_argument("--rate", type=float, help="peak learning rate, in place of the stage's own")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="smaller batches for a smaller machine")
    return parser.parse_args()


def folders(args: argparse.Namespace) -> Folders:
    return Folders(args.work, args.checkpoints)


def pick_device() -> torch.device:
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # a later slice must not see the first one's batches again
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be recorded on the default one
        return torch.device("cuda")
    return torch.device("cpu")


def mixed(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 products on a GPU; on a CPU they would be slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Clock:
    """Time, not steps, ends a stage: the learning rate follows the part of it that is spent."""

    def __init__(self, seconds: float):
        self.started, self.seconds = STARTED, seconds
        self.training_from: float | None = None

    def spent(self) -> float:
        """0 at the first step to 1 at the end."""
        now = time.monotonic()
        if self.training_from is None:
            self.training_from = now
        return (now - self.training_from) / max(self.started + self.seconds - self.training_from, 1e-3)


def rate_at(spent: float, peak: float, *, warm: float = 0.03, floor: float = 0.03) -> float:
    """A short linear warm-up, then a cosine down to `floor` of the peak."""
    if spent < warm:
        return peak * max(spent, 1e-3) / warm
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (spent - warm) / (1 - warm)))))


class Average:
    """An exponential moving average of the weights: what is saved and spoken with."""

    def __init__(self, network: nn.Module):
        self.live = [p for p in network.parameters() if p.requires_grad]
        self.network, self.steps = network, 0
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def restart(self) -> None:
        """Go on from the network's weights of now."""
        torch._foreach_copy_(self.mean, self.live)

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(EMA_DECAY, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        state = {name: tensor.detach() for name, tensor in self.network.state_dict().items()}
        live = [name for name, p in self.network.named_parameters() if p.requires_grad]
        return state | dict(zip(live, self.mean, strict=True))


class Guard:
    """Tells a loss that came apart, and keeps the averaged weights from before it did."""

    def __init__(self, average: Average):
        self.average = average
        self.smoothed = self.best = math.inf
        self.strikes = self.readings = 0
        self.keep()

    @property
    def lost(self) -> bool:
        return self.strikes > 0

    def keep(self) -> None:
        self.kept = {name: tensor.clone() for name, tensor in self.average.state_dict().items()}

    def read(self, loss: float) -> bool:
        """Takes one reading of the loss; whether the stage should go back to `kept`."""
        if math.isfinite(loss):
            first = math.isinf(self.smoothed)
            self.smoothed = loss if first else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
            self.best = min(self.best, self.smoothed)
        lost = not math.isfinite(loss) or self.smoothed > WORSE * self.best
        self.strikes = self.strikes + 1 if lost else 0
        self.readings += 1
        if not lost and self.smoothed <= SOUND * self.best and self.readings % KEEP_EVERY == 0:
            self.keep()
        return self.strikes >= PATIENCE

    def restart(self) -> None:
        self.strikes, self.smoothed = 0, self.best


def new_optimizer(parameters: list[nn.Parameter], rate: Tensor, betas: tuple[float, float] = (0.9, 0.98)) -> AdamW:
    """`rate` is read at every step. Biases and norms are not decayed: they are few, and some are large for a reason."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=rate, betas=betas, fused=True, capturable=rate.is_cuda)


class Stage:
    """A network, its optimizer and its time."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        args: argparse.Namespace,
        *,
        rate: float,
        clip: float = 1.0,
        warm: float = 0.03,
    ):
        self.name, self.network, self.clip, self.warm = name, network, clip, warm
        self.path = folders(args).checkpoint(name)
        self.log = self.path.with_suffix(".log.json")
        self.resumed = load_weights(self.path, network)
        self.clock = Clock(args.seconds)
        self.rate = args.rate or (rate * 0.7 if self.resumed else rate)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.current_rate = torch.zeros((), device=device)
        self.optimizer = new_optimizer(self.parameters, self.current_rate)
        self.replay = Replay(enabled=device.type == "cuda")
        self.readings = torch.zeros(MOST_READINGS, device=device)  # norm, health, losses
        self.names: list[str] = []
        self.average = Average(network)
        self.guard = Guard(self.average)
        self.step_number = 0
        self.losses: dict[str, float] = {}
        count = sum(p.numel() for p in network.parameters())
        print(f"{name}: {count / 1e6:.2f} M parameters, {'resumed' if self.resumed else 'new'}", flush=True)

    def steps(self) -> Iterator[int]:
        """Numbers the steps until the time is over, reporting and saving now and then; saves at the end."""
        reported = saved = time.monotonic()
        while (spent := self.clock.spent()) < 1 or self.step_number == 0:
            self.current_rate.fill_(rate_at(spent, self.rate, warm=self.warm))
            yield self.step_number
            self.finish_step()
            now = time.monotonic()
            if now - reported > REPORT_EVERY:
                reported = now
                print(f"{self.name}: {self.summary()}", flush=True)
            if now - saved > SAVE_EVERY:
                saved = now
                self.save()
        self.save()
        print(f"{self.name}: done, {self.summary()}", flush=True)

    def finish_step(self) -> None:
        """What no graph can hold."""
        self.average.update()
        if self.step_number % READ_EVERY == 0:
            self._read()
        self.step_number += 1

    def descend(self, loss: Tensor, *, health: Tensor | None = None, **parts: Tensor) -> None:
        """One optimizer step; a gradient that is not finite leaves the weights alone. Never waits for the device.

        `health` is what the guard watches, where `loss` itself may well rise.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel then leaves the weights alone
        self.optimizer.step()
        self.names = ["loss", *parts]
        values = [norm, loss if health is None else health, loss, *parts.values()]
        self.readings[: len(values)].copy_(torch.stack([value.detach().float() for value in values]))

    def _read(self) -> None:
        """Notes the losses; goes back to the last good weights where they came apart."""
        norm, health, *values = self.readings.tolist()
        if not math.isfinite(norm):
            print(f"{self.name}: step {self.step_number} is not finite", flush=True)
        for key, value in zip(self.names, values, strict=False):
            if math.isfinite(value):
                self.losses[key] = SMOOTHING * self.losses.get(key, value) + (1 - SMOOTHING) * value
        if self.guard.read(health if math.isfinite(norm) else math.nan):
            self.return_to_kept()

    def return_to_kept(self) -> None:
        """The last good weights again, at half the rate, with the optimizer's memory of what went wrong gone."""
        self.rate /= 2
        print(
            f"{self.name}: step {self.step_number} came apart (loss {self.guard.smoothed:.4f}, best "
            f"{self.guard.best:.4f}): back to the last good weights at half the rate, {self.rate:.1e}",
            flush=True,
        )
        self.network.load_state_dict(self.guard.kept)
        self.optimizer = new_optimizer(self.parameters, self.current_rate)
        self.replay.forget()
        self.average.restart()
        self.guard.restart()
        self.losses = {}

    def summary(self) -> str:
        seconds = max(time.monotonic() - (self.clock.training_from or 0), 1e-3)
        losses = ", ".join(f"{key} {value:.4f}" for key, value in self.losses.items())
        return f"step {self.step_number}, {self.step_number / seconds:.1f} a second, {losses}"

    def good_weights(self) -> dict[str, Tensor]:
        """The averaged weights; the last good ones while the loss is lost."""
        return self.guard.kept if self.guard.lost else self.average.state_dict()

    def save(self) -> None:
        save_weights(self.path, self.good_weights())
        total = json.loads(self.log.read_text("utf-8")) if self.log.is_file() and self.resumed else []
        total = [entry for entry in total if entry.get("pid") != os.getpid()]
        seconds = time.monotonic() - self.clock.started
        entry = {"pid": os.getpid(), "steps": self.step_number, "seconds": round(seconds)} | {
            key: round(value, 4) for key, value in self.losses.items()
        }
        self.log.write_text(json.dumps([*total, entry]), "utf-8")


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Written whole or not at all: a stage may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(half(state), partial)
    partial.replace(path)


def load_weights(path: Path, network: nn.Module) -> bool:
    """Whether there were any. Raises when they do not fit: a size was changed between slices."""
    if not path.is_file():
        return False
    network.load_state_dict(load_file(path))
    return True
