"""transformers' Trainer with our order, our optimizer groups and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from llava_tune.config import Run
from llava_tune.data import Collator, LlavaDataset
from llava_tune.data.order import BatchOrder
from llava_tune.model.factory import LLM_FOLDER, WEIGHTS, drawn_parts, load_weights, read_weights, write_parts
from llava_tune.model.llava import Llava
from llava_tune.paths import sync, sync_tree
from llava_tune.train.checkpoint import DATA_FINGERPRINT, STAGING, barrier, gather_state
from llava_tune.train.optimizer import build_optimizer


class LlavaTrainer(Trainer):
    """What differs from the base class: the data order, the optimizer's groups, and how checkpoints are written.

    Args:
        run: the config.
        tokenizer: kept in each checkpoint.
        dataset, collator: of training samples.
        order: this rank's micro batches for the whole run.
        data_fingerprint: what identifies the data, kept in each checkpoint.
        Others: see transformers.Trainer.
    """

    def __init__(
        self,
        *,
        run: Run,
        tokenizer: Any,
        dataset: LlavaDataset,
        collator: Collator,
        order: BatchOrder,
        data_fingerprint: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=dataset, data_collator=collator, **kwargs)
        self.run = run
        self.tokenizer = tokenizer
        self.order = order
        self.data_fingerprint = data_fingerprint
        self.work_dir = Path(str(kwargs["args"].output_dir))
        self.data_seconds = 0.0
        self.tokens = torch.zeros(3, dtype=torch.int64)  # tokens, supervised tokens, slots

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
        started = time.monotonic()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.data_seconds += time.monotonic() - started
        for batch in batches:
            positions = batch["position_ids"]  # padding is 0, and so is the first token of each sample
            starts = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
            real = int((positions > 0).sum() + starts.sum())
            supervised = int((batch["labels"] >= 0).sum())
            self.tokens += torch.tensor([real, supervised, batch["labels"].numel()])
        return batches, items

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
        """Every rank writes its part into a folder beside; when all have, it gets its name."""
        work_dir = self.work_dir
        name = f"checkpoint-{self.state.global_step}"
        staged, final = work_dir / STAGING / name, work_dir / name
        if self.args.should_save:
            staged.mkdir(parents=True, exist_ok=True)
        barrier()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        barrier()
        if self.args.should_save and not final.exists():
            sync_tree(staged)
            staged.rename(final)
            sync(work_dir)
            rotate_checkpoints(str(work_dir), save_total_limit=self.args.save_total_limit)
        barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights that were trained or drawn, the config, the tokenizer: what a checkpoint needs to be opened."""
        llava: Any = self.model
        state = gather_state(llava, drawn_parts(self.run.model))
        if not self.args.should_save:
            return
        from safetensors.torch import save_file

        folder = Path(output_dir) if output_dir else self.work_dir
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder / LLM_FOLDER)
        write_parts(llava, self.run, folder)
        (folder / DATA_FINGERPRINT).write_text(json.dumps(self.data_fingerprint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        llava: Any = model if isinstance(model, Llava) else self.model
        load_weights(llava, read_weights(Path(resume_from_checkpoint)), resume_from_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # The base class would ask for every weight; frozen ones aren't in a checkpoint.
        engine: Any = self.model_wrapped
        engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared
