"""The training loop, whose pseudocode stands in trainer/__init__.py."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from data.loader import Batch, Loader
from sparsity import Sparsity, measure
from trainer.checkpoints import checkpoint
from trainer.checkpoints.mask_history import save_masks
from trainer.checkpoints.run_dir import DENSE_TWIN, EMA, SPARSE, RunDir
from trainer.checkpoints.saved_model import save_model
from trainer.checkpoints.state import Position, capture, seed_generators
from trainer.config.durations import duration_steps
from trainer.distributed import ranks
from trainer.distributed.signals import StopRequest
from trainer.engine import autocast, num_graphs, precision_name
from trainer.errors import Diverged, Stopped, UserError
from trainer.evaluate import Interrupted, Metrics, evaluate, recompute_batch_norm
from trainer.kernels import accelerate, choice_table
from trainer.loaders import cure_of_bad_files
from trainer.models.mixing import Mixer
from trainer.monitor.clock import Clock
from trainer.monitor.records import Monitor, kept_weights
from trainer.optim import learning_rate
from trainer.task import Task


class Trainer:
    """What a run needs, built by trainer.build, and the loop over it.

    engine: a DeepSpeed engine around a Classifier around acdc.model. monitor: None on ranks but the first.
    """

    def __init__(
        self, task: Task, engine: Any, run_dir: RunDir, monitor: Monitor | None, position: Position
    ) -> None:
        self.task, self.engine, self.run_dir, self.monitor = task, engine, run_dir, monitor
        self.config, self.acdc = config, acdc = task.config, task.acdc
        self.device, self.loaders, self.flops = task.device, task.loaders, task.flops
        self.averages = engine.averages  # of weights, None where the recipe has none
        self.mixer = Mixer(config.mixing, config.seed) if config.mixing else None
        self.position = position
        self.micro_batches = config.engine.accumulation_steps
        self.steps_per_epoch = acdc.steps_per_epoch
        self.log_steps = duration_steps(config.log.every, self.steps_per_epoch)
        self.checkpoint_steps = duration_steps(config.save.every, self.steps_per_epoch)
        self.graphs_before = num_graphs()
        self.graphs_at_first: int | None = None  # compiled by the end of this process's first epoch
        self._clock = Clock(self.device)
        self.lr = config.optimizer.lr  # of the last step
        self._rates: dict[str, float] = {}
        self._sparsity: tuple[int, Sparsity] | None = None
        self._tuned = False
        self.stop_request = StopRequest()
        self._began = time.monotonic() - position.seconds

    def fit(self) -> None:
        """Train from the position to the last epoch. Raises Diverged, or Stopped after a signal."""
        with self.stop_request:
            for epoch in range(self.position.epoch, self.config.epochs):
                trained = self.train_epoch(epoch)
                ranks.average_buffers(self.acdc.model)
                self.check_weights(epoch)
                if self.config.engine.compile and self.graphs_at_first is None:
                    self.save_checkpoint()  # no signal is seen while the evaluation is compiled
                try:
                    tested = self.evaluate(self.loaders.test, epoch)
                    self.check_finite(tested.loss, epoch)
                    loaders = self.loaders.watched.items()
                    watched = {name: self.evaluate(each, epoch) for name, each in loaders}
                    if self.averages is not None:
                        with self.averages.in_place() as model:
                            ranks.average_buffers(model)
                            watched["ema"] = self.evaluate(self.loaders.test, epoch)
                except Interrupted:  # all steps of the epoch are taken: a resumed run evaluates first
                    self.save_checkpoint()
                    self.stop()
                self.position.epoch, self.position.step, self.position.totals = epoch + 1, 0, [0.0] * 4
                if self.averages is not None:
                    with self.averages.in_place():
                        self.save_pair(epoch, watched["ema"], EMA)
                self.record_epoch(epoch, trained, tested, watched)
                self.save_pair(epoch, tested)
                last = epoch + 1 == self.config.epochs
                stopping = self.should_stop(at_once=True)
                if last and not self.config.finetune_dense:  # a signal finds nothing left to stop
                    stopping = self.failure() is not None
                if last or stopping or self.acdc.step % self.checkpoint_steps == 0:
                    self.save_checkpoint()
                if stopping:
                    self.stop()

    def train_epoch(self, epoch: int) -> Metrics:
        """The rest of an epoch from the position's step on; loss and accuracy over the whole of it."""
        position, config = self.position, self.config
        self.set_lr(epoch)
        if position.step == 0:
            seed_generators(config.seed, epoch)
        totals = torch.tensor(position.totals, dtype=torch.float64, device=self.device)
        batches = self.loaders.train.epoch(epoch, position.step * self.micro_batches)
        self._clock.restart()
        slow = config.sparsity.recompute_batch_norm or (config.engine.compile and not self._tuned)
        if position.step == 0 and self.acdc.actions.get(epoch) and slow:
            self.save_checkpoint()  # no signal is seen for a while: it finds all saved
        while position.step < self.steps_per_epoch:
            self.acdc.before_step()
            if position.step == 0 and self.acdc.actions.get(epoch) is not None:
                self.after_compression(epoch)
            if self.monitor and position.step == 0 and (epoch == 0 or epoch in self.acdc.actions):
                self.monitor.phase_begins(self.acdc.step, self.acdc.phase.kind, self.sparsity().overall)
            if not self._tuned and self.acdc.phase.kind == "sparse" and self.acdc.masks_settled:
                self.accelerate()
            if config.lr.by == "step":
                self.set_lr(epoch)
            for _ in range(self.micro_batches):
                totals += self.train_batch(batches)
            if self.averages is not None:
                self.averages.update()
            position.step += 1
            self._clock.step(config.data.batch_size)
            if self.monitor:
                self.monitor.screen.step(self.acdc.phase.kind)
            if position.step == self.steps_per_epoch:
                break
            logging = position.step % self.log_steps == 0
            if logging:
                self.log_step(epoch, totals)
            stopping = self.should_stop()
            if stopping or self.acdc.step % self.checkpoint_steps == 0:
                self.check_weights(epoch)
                position.totals = totals.tolist()
                self.save_checkpoint()
            if stopping:
                self.stop()
        position.totals = totals.tolist()
        trained = Metrics.of(ranks.sum_over_ranks(totals))
        self._rates = self._clock.rates
        self.check_finite(trained.loss, epoch)
        return trained

    def evaluate(self, loader: Loader, epoch: int) -> Metrics:
        return evaluate(self.engine, loader, self.device, epoch, self.should_stop)

    def after_compression(self, epoch: int) -> None:
        """What the recipe asks for once new masks are chosen."""
        if self.averages is not None:
            self.averages.mask_()
        if (span := self.config.sparsity.recompute_batch_norm) is not None:
            count = duration_steps(span, self.steps_per_epoch) * self.micro_batches
            computed, images = autocast(self.config, self.device), self.loaders.train
            try:
                recompute_batch_norm(self.engine.module, images, epoch, count, computed, self.should_stop)
            except Interrupted:
                self.acdc.step -= 1  # begun, not taken: what is saved is from before
                self.stop()
        if self.config.save.mask_history and ranks.is_main():
            self.run_dir.masks.mkdir(exist_ok=True)
            save_masks(self.run_dir.masks / f"epoch-{epoch:04}.npz", self.acdc.masks())

    def accelerate(self) -> None:
        """Choose the kernels of compressed phases, once a process."""
        self._tuned = True

        def on_progress(done: int, total: int) -> None:
            if self.monitor:
                self.monitor.screen.working("measuring kernels", done, total)

        choices = accelerate(self.config, self.acdc, self.device, self.flops.calls(), on_progress)
        if choices and self.monitor:
            self.run_dir.write_kernels([choice.as_record() for choice in choices])
            self.monitor.screen.console.print(choice_table(choices))

    def train_batch(self, batches: Iterator[Batch]) -> torch.Tensor:
        images, labels = self._clock.next_of(batches)
        draw = [self.mixer.row(self.position.epoch, self.position.step, images)] if self.mixer else []
        if self.monitor and self.monitor.wants_batch:
            self.monitor.batch(images, labels, draw[0] if draw else None, self.loaders.info.classes)
        loss, counts = self.engine(images, labels, *draw)
        self.engine.backward(loss)
        self.engine.step()
        return counts

    def set_lr(self, epoch: int) -> None:
        """For the step that is about to come, and with lr.by=epoch for the others of its epoch."""
        config, step = self.config, self.position.step
        clock = epoch, config.epochs, step, self.steps_per_epoch
        self.lr = learning_rate(config.lr, config.optimizer.lr, *clock)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr

    def log_step(self, epoch: int, totals: torch.Tensor) -> None:
        """Read the epoch's loss so far from the device, and record it."""
        so_far = Metrics.of(ranks.sum_over_ranks(totals.clone()))
        self.check_finite(so_far.loss, epoch)
        if self.monitor:
            rates = self._clock.rates
            phase, sparsity = self.acdc.phase.kind, self.sparsity().overall
            self.monitor.screen.status(epoch, phase, sparsity, so_far.loss, rates["images_per_second"])
            record = {"epoch": epoch, "step": self.acdc.step, "phase": phase, "lr": self.lr}
            self.monitor.step({**record, "loss": so_far.loss, **rates, **self.loss_scaling()})

    def record_epoch(
        self, epoch: int, trained: Metrics, tested: Metrics, watched: dict[str, Metrics]
    ) -> None:
        sparsity = self.sparsity()
        flops = self.flops.at(epoch)
        self.position.training_flops += flops.training(sparsity.density_by_layer) * trained.num_images
        self.position.dense_training_flops += flops.training() * trained.num_images
        self.position.seconds = time.monotonic() - self._began
        if self.graphs_at_first is None:
            self.graphs_at_first = num_graphs()
        bad_files = sum(ranks.all_gather(self.loaders.bad_files.count))
        if self.monitor:
            compressed = self.acdc.actions.get(epoch) is not None
            change = self.acdc.mask_change if compressed else None
            record = {
                "epoch": epoch,
                "step": self.acdc.step,
                "phase": self.acdc.phase.kind,
                "lr": self.lr,
                "train_loss": trained.loss,
                "train_top1": trained.top1,
                "val_loss": tested.loss,
                "val_top1": tested.top1,
                "val_top5": tested.top5,
                **{f"{name}_loss": metrics.loss for name, metrics in watched.items()},
                **{f"{name}_top1": metrics.top1 for name, metrics in watched.items()},
                "bad_files": bad_files,
                "sparsity": sparsity.overall,
                "sparsity_of_all_parameters": sparsity.of_all_parameters,
                "mask_difference": self.acdc.mask_difference if compressed else None,
                **(change.as_record() if change else {}),
                **self._rates,
                **self.loss_scaling(),
                "training_flops": self.position.training_flops,
                "dense_training_flops": self.position.dense_training_flops,
                "graphs": num_graphs() - self.graphs_before,
                "seconds": self.position.seconds,
            }
            self.monitor.epoch(record, sparsity.by_layer)
            if self.config.log.weight_histograms:
                self.monitor.histograms(self.acdc.step, kept_weights(self.acdc))

    def save_pair(self, epoch: int, tested: Metrics, suffix: str = "") -> None:
        """Save the dense twin or the sparse model if its phase ends with this epoch. suffix: to its name."""
        for key, kind in ((DENSE_TWIN, "dense"), (SPARSE, "sparse")):
            phase = self.acdc.schedule.last("dense" if kind == "dense" else "sparse")
            if phase is None or epoch + 1 != phase.end:
                continue
            sparsity = self.sparsity()
            self.position.pair[key + suffix] = result = {
                **asdict(tested),
                "epoch": epoch,
                "sparsity": sparsity.overall,
                "sparsity_of_all_parameters": sparsity.of_all_parameters,
                "num_weights": sparsity.num_weights,
                "num_kept": sparsity.num_kept,
                "inference_flops": self.flops.inference.forward(sparsity.density_by_layer),
            }
            # the dense twin carries the whole state: a branch goes on from there, see trainer.train
            branches = kind == "dense" and epoch + 1 < self.config.epochs and not suffix
            state = capture(self.engine, self.acdc, self.loaders.train, self.position) if branches else None
            if ranks.is_main():
                info = {**self.info(), "result": result}
                save_model(self.run_dir.checkpoints / (key + suffix), self.acdc.export().cpu(), info, state)

    def save_checkpoint(self) -> None:
        self.position.seconds = time.monotonic() - self._began
        state = capture(self.engine, self.acdc, self.loaders.train, self.position)
        if ranks.is_main():
            folder = self.run_dir.checkpoints
            point = checkpoint.step_folder(folder, self.acdc.step)
            checkpoint.save(point, {checkpoint.STATE: state}, self.info())
            checkpoint.remove_old(folder, self.config.save.keep)

    def info(self) -> dict[str, Any]:
        return {
            "model": self.task.model_info,
            "config": self.config.model_dump(mode="json"),
            "precision": precision_name(self.config, self.device),
            "step": self.acdc.step,
            "epoch": self.position.epoch,
            "phase": self.acdc.phase.kind,
        }

    def loss_scaling(self) -> dict[str, float | int]:
        """loss_scale and skipped_steps of a run in fp16. Reads the device."""
        return {} if self.engine.loss_scaling is None else self.engine.loss_scaling.read()

    def sparsity(self) -> Sparsity:
        """Counted once an epoch: masks change only as an epoch begins."""
        epoch = (self.acdc.step - 1) // self.steps_per_epoch
        if self._sparsity is None or self._sparsity[0] != epoch:
            self._sparsity = (epoch, measure(self.acdc.model, self.acdc.masks()))
        return self._sparsity[1]

    def check_finite(self, loss: float, epoch: int) -> None:
        if math.isfinite(loss):
            return
        last = checkpoint.newest_whole(self.run_dir.checkpoints)
        raise Diverged(
            f"training diverged: the loss is {loss} in epoch {epoch}, at step {self.acdc.step}; "
            + (f"the last good checkpoint is {last}" if last else "no checkpoint was saved before")
            + f". A lower learning rate (optimizer.lr={self.config.optimizer.lr}) or a longer warm-up "
            f"(lr.warmup_epochs={self.config.lr.warmup_epochs}) helps most often"
        )

    def check_weights(self, epoch: int) -> None:
        """No good checkpoint has NaN or infinite weights, or dropped ones that are not 0."""
        floats = [value for value in self.acdc.model.state_dict().values() if value.is_floating_point()]
        finite = torch.stack([value.isfinite().all() for value in floats]).all()
        if not all(ranks.all_gather(bool(finite))):
            self.check_finite(float("nan"), epoch)
        self.acdc.check_masks()

    def should_stop(self, at_once: bool = False) -> bool:
        """Whether a signal came to any rank, or a bad file where the recipe says to stop. See StopRequest."""
        return self.stop_request.came(self.loaders.bad_files.failure is not None, self.device, at_once)

    def close(self) -> None:
        """Let go of the run's files and optimizer."""
        self.acdc.detach()
        if self.monitor:
            self.monitor.close()
        self.run_dir.release()

    def failure(self) -> str | None:
        """A bad file, on any rank, where the recipe says to stop at one."""
        return next(filter(None, ranks.all_gather(self.loaders.bad_files.failure)), None)

    def stop(self) -> NoReturn:
        folder, step = self.run_dir.resumed_by, self.acdc.step
        if failure := self.failure():
            cure = cure_of_bad_files(self.config.data)
            raise UserError(
                f"{failure}\na checkpoint is saved at step {step}. {cure}; then go on with resume={folder}"
            )
        numbers = filter(None, ranks.all_gather(self.stop_request.number))  # a signal may reach some alone
        raise Stopped(
            f"stopped at step {step}; a checkpoint is saved. Go on with resume={folder}",
            next(numbers, signal.SIGTERM),
        )
