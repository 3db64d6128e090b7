"""The part of a run that needs torch: build everything, train, write the end."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from llava_tune.config import Run, to_json
from llava_tune.constants import FINISHED
from llava_tune.data import ImageTransform, LlavaDataset
from llava_tune.data.batch import IdCollator
from llava_tune.data.images import image_transform
from llava_tune.data.mix import describe_mix, image_folders, shares
from llava_tune.data.order import BatchOrder
from llava_tune.data.plan import make_layout
from llava_tune.data.store import read_manifest
from llava_tune.data.tokens.layout import Layout
from llava_tune.data.tokens.tokenizer import load_tokenizer
from llava_tune.errors import InputError, SharedInputError, SharedRunFailed
from llava_tune.model.factory import build_llava
from llava_tune.model.flops import step_flops
from llava_tune.model.llava import Llava
from llava_tune.model.tokens import image_tokens
from llava_tune.paths import write_whole
from llava_tune.train.checkpoint import barrier, check_resume, checkpoints, clear_staging, find_resume, step_of, verify
from llava_tune.train.crash import crash_bundle
from llava_tune.train.data import is_foreign
from llava_tune.train.evaluating import EvaluationCallback
from llava_tune.train.heartbeat import Heartbeat
from llava_tune.train.launch import collective_timeout, rank, world_size
from llava_tune.train.preview import PreviewCallback
from llava_tune.train.stopping import StopOnSignal
from llava_tune.train.telemetry import Telemetry, draw_loss_curve
from llava_tune.train.trainer import LlavaTrainer, forget_ids_after
from llava_tune.train.zero import drops_spoilt_steps


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        steps: optimizer steps of the whole run.
        stopped: it saved and ended early, for a signal.
    """

    work_dir: Path
    checkpoint: Path
    steps: int
    stopped: bool = False


def use_bf16(run: Run) -> bool:
    """Train in bf16: as the config says; auto asks the GPU."""
    if run.training.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return run.training.precision == "bf16"


def run_session(
    run: Run,
    store: Path,
    work_dir: Path,
    accumulation: int,
    deepspeed: dict[str, Any] | None,
    resume: str | None,
    state: Path | None,
) -> Trained:
    """Train on a store that is ready, in a process group that has begun. See `train`; `state` is `resharded`'s."""
    main = rank() == 0
    transform = image_transform(run.model.vision, run.dataset.pad_image_to_square, run.dataset.scaled_image_decoding)
    dataset = _dataset(run, store, transform, work_dir)
    taken = shares(run.dataset, dataset.manifest)
    if run.model.vision is None and dataset.manifest["images"]:
        raise InputError(
            f"model.vision is None, but the data has {dataset.manifest['images']:,} images. Set model.vision, or train on text alone"
        )
    fingerprint = {
        "samples": len(dataset),
        "spec": dataset.manifest["spec"],
        "sources": dataset.manifest["sources"],
        "mix": [[share.start, share.stop, share.count] for share in taken],
    }
    checkpoint = find_resume(resume, work_dir) if resume else None
    if checkpoint is not None:
        verify(checkpoint, hashes=main)
        check_resume(checkpoint, run, fingerprint)
    elif not resume and checkpoints(work_dir):
        raise InputError(
            f"{work_dir} holds checkpoints of an earlier run. Go on with it: --resume; start anew: another --work-dir, or remove it"
        )
    if deepspeed is not None and run.training.bad_step == "skip" and not drops_spoilt_steps(deepspeed):
        raise SharedInputError(
            "training.bad_step='skip' needs a DeepSpeed config that looks at its gradients before it uses them: zero_optimization.stage 1, "
            "2 or 3, and bf16.check_grad_overflow not false. Change the config, or use bad_step='stop'"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    start_step = step_of(checkpoint) if checkpoint else 0
    if main:
        clear_staging(work_dir)
        (work_dir / FINISHED).unlink(missing_ok=True)
        forget_ids_after(work_dir, start_step)
    barrier()
    order = BatchOrder(
        dataset.lengths,
        shares=taken,
        seed=run.training.seed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        group_by_length=run.training.group_by_length,
        pack_length=run.dataset.max_length if run.training.packing else None,
        rank=rank(),
        world_size=world_size(),
        start_step=start_step,
        total_steps=run.training.max_steps or None,
        epochs=run.training.epochs,
    )
    arguments = _arguments(run, work_dir, accumulation, order.total_steps, deepspeed)
    transformers.set_seed(run.training.seed)
    llava = build_llava(run.model, dtype=torch.bfloat16 if use_bf16(run) else torch.float32, seed=run.training.seed)
    if run.training.gradient_checkpointing:
        llava.gradient_checkpointing_enable()
    tokenizer = load_tokenizer(run.model.llm.tokenizer or run.model.llm.name)
    trainer = _trainer(run, llava, tokenizer, dataset, transform, order, arguments, fingerprint, work_dir, start_step)
    trainer.state_folder = state
    stop = StopOnSignal()
    trainer.add_callback(stop)
    if main:
        _announce(run, llava, dataset, order, work_dir, checkpoint)
    with crash_bundle(run, work_dir, rank(), lambda: trainer.ids) as stacks:
        heartbeat = Heartbeat(run.training.hang_timeout, stacks)
        trainer.add_callback(heartbeat)
        if trainer.scoring is not None:
            trainer.scoring.alive = heartbeat.beat
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.saver.wait()
        except BaseException as error:
            # All ranks ended for the same reason, or one of them may be gone.
            trainer.saver.close(600 if isinstance(error, (SharedRunFailed, InputError)) else 10)
            raise
        trainer.saver.close(0)
        barrier()
    last = checkpoints(work_dir)[-1]
    stopped = stop.stopped and step_of(last) < order.total_steps
    if main:
        if not stopped:
            facts = {"checkpoint": last.name, "steps": order.total_steps, "run": json.loads(to_json(run))}
            write_whole(work_dir / FINISHED, json.dumps(facts, indent=1))
        _finish(dataset, work_dir)
    return Trained(work_dir, last, order.total_steps, stopped)


def _dataset(run: Run, store: Path, transform: ImageTransform, work_dir: Path) -> LlavaDataset:
    foreign = is_foreign(run, store)
    patches = image_tokens(run.model.vision)
    folders: Any = run.dataset.image_folder if foreign else image_folders(run.dataset, read_manifest(store))
    quarantine = work_dir / "quarantine.jsonl"
    return LlavaDataset(store, folders, transform, quarantine, foreign=foreign, image_tokens=patches)


def _arguments(
    run: Run, work_dir: Path, accumulation: int, steps: int, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    training, optimizer = run.training, run.optimizer
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work_dir / "tensorboard")
    return TrainingArguments(
        output_dir=str(work_dir),
        max_steps=steps,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=int(steps * optimizer.warmup_ratio + 0.999),
        bf16=use_bf16(run),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        ignore_data_skip=True,
        seed=training.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=["tensorboard", *training.report_to],
        ddp_find_unused_parameters=False,
        ddp_timeout=int(collective_timeout().total_seconds()),
        deepspeed=deepspeed,
        accelerator_config={"dispatch_batches": False},
    )


def _trainer(
    run: Run,
    llava: Llava,
    tokenizer: Any,
    dataset: LlavaDataset,
    transform: ImageTransform,
    order: BatchOrder,
    arguments: TrainingArguments,
    fingerprint: dict[str, Any],
    work_dir: Path,
    start_step: int,
) -> LlavaTrainer:
    main = rank() == 0
    telemetry = Telemetry(work_dir, dataset, run.dataset.max_bad_share, start_step, order, main)
    callbacks: list[Any] = [telemetry]
    if run.preview.every_steps:
        layout = Layout(make_layout(run)[0])
        callbacks.append(PreviewCallback(run.preview, layout, tokenizer, transform, work_dir, main))
    scoring = None
    if run.evaluation.every_steps:
        layout = Layout(make_layout(run)[0])
        scoring = EvaluationCallback(run, layout, tokenizer, transform, work_dir, rank(), world_size())
        scoring.go_on_from(start_step)
        callbacks.append(scoring)
    trainer = LlavaTrainer(
        run=run,
        model=llava,
        args=arguments,
        tokenizer=tokenizer,
        dataset=dataset,
        collator=IdCollator(image_tokens(run.model.vision), transform.size),
        order=order,
        data_fingerprint=fingerprint,
        telemetry=telemetry,
        scoring=scoring,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    telemetry.costs, telemetry.image_tokens = step_flops(llava), image_tokens(run.model.vision)
    return trainer


def _announce(
    run: Run, llava: Llava, dataset: LlavaDataset, order: BatchOrder, work_dir: Path, checkpoint: Path | None
) -> None:
    sizes: dict[str, list[int]] = {}
    for name, parameter in llava.named_parameters():
        part = sizes.setdefault(name.split(".", 1)[0], [0, 0])
        count = int(getattr(parameter, "ds_numel", parameter.numel()))
        part[0] += count
        part[1] += count if parameter.requires_grad else 0
    parts = ", ".join(
        f"{name} {total / 1e6:,.1f}M ({trained / 1e6:,.1f}M trained)" for name, (total, trained) in sizes.items()
    )
    lines = [
        f"model: {parts}",
        f"data: {len(dataset):,} samples, {int(dataset.lengths.sum(dtype='int64')):,} tokens",
        *(f"  {line}" for line in (describe_mix(dataset.manifest, order.shares) if len(order.shares) > 1 else [])),
        f"batches: {order.global_batch_size} global = {order.world_size} rank(s) x {order.micro_batch_size} x "
        f"{order.accumulation} accumulated; {order.total_steps} steps, {order.total_steps / order.steps_per_epoch:.2f} epochs",
        *(
            [
                f"packing: rows of {order.pack_length} tokens, {order.samples_per_step():.1f} samples in a global batch on average"
            ]
            if order.pack_length
            else []
        ),
        f"work dir: {work_dir}" + (f", resuming from {checkpoint}" if checkpoint else ""),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _finish(dataset: LlavaDataset, work_dir: Path) -> None:
    curve = draw_loss_curve(work_dir)
    print(
        f"done: {checkpoints(work_dir)[-1]}" + (f", loss curve: {curve}" if curve else ""), file=sys.stderr, flush=True
    )
    bad = dataset.quarantine.entries() if dataset.quarantine else []
    if bad:
        print(
            f"{len(bad)} image(s) could not be used and gave no loss: {work_dir / 'quarantine.jsonl'}",
            file=sys.stderr,
            flush=True,
        )
