"""transformers' Trainer with our order, our optimizer groups and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from llava_tune.config import Run
from llava_tune.constants import DATA_FINGERPRINT
from llava_tune.data import LlavaDataset
from llava_tune.data.batch import IdCollator
from llava_tune.data.order import BatchOrder
from llava_tune.errors import SharedRunFailed
from llava_tune.model.factory import LLM_FOLDER, WEIGHTS, drawn_parts, load_weights, read_weights, write_parts
from llava_tune.model.llava import Llava
from llava_tune.paths import write_whole
from llava_tune.train.checkpoint import STAGING, barrier, check_space, gather_state, rotate
from llava_tune.train.evaluating import EvaluationCallback
from llava_tune.train.guard import Guard, read_losses
from llava_tune.train.optimizer import build_optimizer
from llava_tune.train.reshard import forget, hyperparameters, mend
from llava_tune.train.saving import Saver
from llava_tune.train.telemetry import Telemetry, read_metrics
from llava_tune.train.zero import before_each_step, gradient_squares


def ids_path(work_dir: Path, rank: int) -> Path:
    """Where a rank writes the ids of its records (training.log_ids)."""
    return work_dir / f"ids-rank-{rank}.jsonl"


def forget_ids_after(work_dir: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run makes again."""
    for path in work_dir.glob("ids-rank-*.jsonl"):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step))


class LlavaTrainer(Trainer):
    """What differs from the base class: the data order, the optimizer's groups, and how checkpoints are written.

    Args:
        run: the config.
        tokenizer: kept in each checkpoint.
        dataset, collator: of training samples.
        order: this rank's micro batches for the whole run.
        data_fingerprint: what identifies the data, kept in each checkpoint.
        telemetry: measures, and writes what was measured.
        scoring: among the callbacks; its best checkpoint is never removed.
        Others: see transformers.Trainer.
    """

    def __init__(
        self,
        *,
        run: Run,
        tokenizer: Any,
        dataset: LlavaDataset,
        collator: IdCollator,
        order: BatchOrder,
        data_fingerprint: dict[str, Any],
        telemetry: Telemetry,
        scoring: EvaluationCallback | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=dataset, data_collator=collator, **kwargs)
        self.run = run
        self.tokenizer = tokenizer
        self.order = order
        self.data_fingerprint = data_fingerprint
        self.work_dir = Path(str(kwargs["args"].output_dir))
        self.telemetry = telemetry
        self.scoring = scoring
        if scoring is not None:
            scoring.trainer = self
        self.state_folder: Path | None = None
        """Where DeepSpeed's state is, if not in the checkpoint: see `resharded`."""
        self.ids: list[str] = []
        args = self.args
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.saver = Saver(
            self.work_dir, args.process_index, args.world_size, ranks_here, run.training.save_in_background
        )
        self._guard: Guard | None = None
        self._step_loss = torch.zeros((), device=self.args.device)
        self._component_norms: dict[str, float] = {}
        self._squares: dict[str, float] = {}

    # -- data --

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All micro batches of the run, from the step it starts at. Its length is the whole run's, so that the Trainer's
        step arithmetic sees one long epoch."""
        workers = self.run.dataset.num_workers
        order = self.order

        class WholeRun(DataLoader[Any]):
            def __len__(self) -> int:
                return order.total_steps * order.accumulation

        return WholeRun(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the global one must not depend on how often we started
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self.saver.check()
        meter = self.telemetry.meter
        with meter.waiting_for_data():
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.ids = []
        for batch in batches:
            self.ids += batch.pop("ids")
            meter.count(batch)
        if self.run.training.log_ids:
            step = {"step": self.state.global_step + 1, "ids": self.ids}
            with ids_path(self.work_dir, self.args.process_index).open("a") as file:
                file.write(json.dumps(step, ensure_ascii=False) + "\n")
        return batches, items

    # -- loss --

    @property
    def guard(self) -> Guard:
        """Made when the first loss is there: the history of the resumed run is known then."""
        if self._guard is None:
            losses = read_losses(self.state.log_history)
            self._guard = Guard(self.run.training, self.work_dir, self.args.process_index, losses)
        return self._guard

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro batch; with the last one, the global batch is judged before its backward pass.

        Raises:
            RunFailed: see `Guard`.
        """
        with self.telemetry.meter.forward():
            loss: Any = super().compute_loss(*args, **kwargs)
        self._step_loss += loss.detach().float()
        if self.accelerator.sync_gradients:
            if self.args.world_size > 1:
                torch.distributed.all_reduce(self._step_loss)
            loss_of_all = float(self._step_loss) / self.args.world_size
            self.guard.judge_loss(self.state.global_step, loss_of_all, self.ids)
            self._step_loss.zero_()
            if self.guard.skipping and self.is_deepspeed_enabled:
                # The engine makes no step with such gradients, and clears them.
                loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm before clipping; a bad batch's gradients are dropped here, so that the optimizer's step changes nothing (DeepSpeed has
        made or left out its step by now)."""
        norm = super()._get_grad_norm(model, grad_norm)
        deepspeed = self.is_deepspeed_enabled
        engine: Any = self.model_wrapped
        if norm is not None:
            applied = deepspeed and engine.was_step_applied()
            self.guard.judge_norm(self.state.global_step, float(norm), self.ids, applied)
        if self.guard.skipping and deepspeed:
            engine.optimizer.overflow = False  # else the Trainer would not move the schedule on
        elif self.guard.skipping:
            model.zero_grad(set_to_none=True)
        elif self._is_logged():
            llava: Any = self.model
            squares = self._squares if deepspeed else whole_squares(llava)
            # As they were before clipping.
            scale = float(norm) / max(sum(squares.values()) ** 0.5, 1e-30)
            self._component_norms = {f"grad_norm_{k}": v**0.5 * scale for k, v in squares.items() if v}
        return norm

    def _is_logged(self) -> bool:
        return (self.state.global_step + 1) % self.args.logging_steps == 0

    def _keep_squares(self) -> None:
        llava: Any = self.model
        if self._is_logged():
            self._squares = gradient_squares(llava)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what was measured, for every reporter."""
        if "loss" in logs:
            measured = self.telemetry.measure(self.state.global_step, logs["loss"], self.args)
            logs |= self._component_norms | {k: v for k, v in measured.items() if v is not None}
        super().log(logs, start_time)

    # -- optimizer --

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            llava: Any = self.model
            self.optimizer = build_optimizer(llava, self.run.optimizer)
        return self.optimizer

    # -- checkpoints --

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.work_dir / STAGING if self._saving else self.work_dir)

    _saving = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Every rank writes its part into a folder beside; when all have, it gets its name: see `Saver`."""
        llava: Any = model if isinstance(model, Llava) else self.model
        self.saver.wait()
        check_space(self.work_dir, llava)
        self.saver.begin(f"checkpoint-{self.state.global_step}")
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            self.saver.failed(error)
        finally:
            self._saving = False
        best = self.scoring.best if self.scoring is not None else None

        def then() -> None:
            if self.scoring is not None and best is not None:
                self.scoring.name(best)
            rotate(self.work_dir, self.run.training.save_total_limit, best[1] if best else None)

        self.saver.publish(then)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights that were trained or drawn, the config, the tokenizer: what a checkpoint needs to be opened."""
        llava: Any = self.model
        state = gather_state(llava, drawn_parts(self.run.model), self.args.should_save)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.work_dir
        folder.mkdir(parents=True, exist_ok=True)
        self.saver.write(_save_weights, state, folder / WEIGHTS)
        self.tokenizer.save_pretrained(folder / LLM_FOLDER)
        write_parts(llava, self.run, folder)
        (folder / DATA_FINGERPRINT).write_text(json.dumps(self.data_fingerprint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        if self.args.should_save:
            if not self.is_deepspeed_enabled:
                self.saver.write(torch.save, optimizer.state_dict(), Path(output_dir) / "optimizer.pt")
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        llava: Any = model if isinstance(model, Llava) else self.model
        load_weights(llava, read_weights(Path(resume_from_checkpoint)), resume_from_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # The base class would ask a checkpoint for every weight; frozen ones aren't there.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine: Any = self.model_wrapped
        before_each_step(engine, self._keep_squares)
        files = engine.checkpoint_engine
        files.save = partial(self._save_part, files.save)
        if resume_from_checkpoint is None:
            return prepared
        folder = self.state_folder or resume_from_checkpoint
        inner: torch.optim.Optimizer | None = engine.optimizer.optimizer if self.state_folder else None
        groups = hyperparameters(inner) if inner else []
        if engine.load_checkpoint(str(folder), load_module_strict=False)[0] is None:
            raise SharedRunFailed(f"DeepSpeed found no state in {folder}: it would train from the first weights again")
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if inner:
            scheduler: Any = self.lr_scheduler
            mend(inner, groups, scheduler.get_last_lr())
            barrier()  # all have read it
            if self.args.should_save:
                forget(self.work_dir)
        return prepared

    def _save_part(self, save: Callable[..., Any], state_dict: Any, path: str) -> None:
        self.saver.write(save, state_dict, Path(path))


def _save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})


def whole_squares(llava: Llava) -> dict[str, float]:
    """Of each component, the sum of its gradients' squares."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in llava.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(name.split(".", 1)[0], []).append(parameter.grad)
    return {name: float(torch.nn.utils.get_total_norm(some)) ** 2 for name, some in gradients.items()}
