"""LLaVA: a vision call, a projector call, one scatter into the embeddings, the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_tune.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_tune.model.attention import PER_SAMPLE, sample_bounds
from llava_tune.model.loss import supervised_loss
from llava_tune.model.vision import VisionEncoder

_HEAD_EXTRAS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Llava(nn.Module):
    """A vision tower, a projector and a language model (LLaVA, arXiv:2304.08485); or a language model alone.

    Batches come with each image's placeholder already repeated once a patch, so nothing here changes a shape.
    """

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch

    def __init__(self, vision: VisionEncoder | None, projector: nn.Module | None, llm: Any) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.llm = llm
        self.config = llm.config
        self.plain_head = all(getattr(llm.config, name, None) in (None, 1, 1.0) for name in _HEAD_EXTRAS)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings with the projected patches in the placeholders' positions.

        Args:
            input_ids: int64 [batch, length]; IMAGE_TOKEN_INDEX once a patch.
            pixel_values: float [images, 3, size, size] in the order of the placeholders. If the batch has no placeholder
                the images still go through the tower and the projector, and count for nothing: every rank of a
                distributed run makes the same calls.

        Returns:
            float [batch, length, dim]

        Raises:
            ValueError: the placeholders are not the images' patches.
        """
        is_patch = input_ids == IMAGE_TOKEN_INDEX
        embeddings: Tensor = self.llm.get_input_embeddings()(input_ids.masked_fill(is_patch, 0))
        if pixel_values is None or self.vision is None or self.projector is None:
            return embeddings
        trained = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = self.vision(pixel_values.to(next(self.vision.parameters()).dtype))
        projected = self.projector(features).to(embeddings.dtype)
        placeholders = int(is_patch.sum())
        if placeholders == 0:
            return embeddings + 0.0 * projected.sum()
        if placeholders != projected.shape[0] * projected.shape[1]:
            raise ValueError(
                f"{placeholders} image tokens in the batch, but the images give {tuple(projected.shape[:2])} patches"
            )
        return embeddings.masked_scatter(is_patch[..., None], projected)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            input_ids, labels: int64 [batch, length].
            position_ids: int64 [batch, length]; a sample starts wherever they start again at 0, and samples in a row
                don't see each other.
            pixel_values: see `embed`.
            num_items_in_batch: supervised tokens of the whole global batch; None: of this batch.

        Returns:
            {"loss": the sum over supervised tokens divided by their number, float32 scalar}
        """
        embeddings = self.embed(input_ids, pixel_values)
        # No mask and no cache: transformers then isolates samples by their position ids on every attention backend of its own.
        mask = sample_bounds(position_ids) if self.config._attn_implementation == PER_SAMPLE else None
        inputs = {"inputs_embeds": embeddings, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        if self.plain_head:
            hidden = self.llm.get_decoder()(**inputs).last_hidden_state
            total = supervised_loss(hidden, self.llm.get_output_embeddings().weight, labels)
        else:
            logits = self.llm(**inputs).logits
            total = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum()
        items = torch.as_tensor(num_items_in_batch, device=total.device, dtype=total.dtype)
        return {"loss": total / items.clamp(min=1)}

    def trained_state(self, keep: frozenset[str]) -> dict[str, Tensor]:
        """Weights that a checkpoint must hold: trained ones, and all of the components in `keep` (random ones)."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        parts = {name.split(".", 1)[0] for name in trained} | keep
        state = self.state_dict()
        weights = {
            n for n, _ in self.named_parameters() if n in trained or n.split(".", 1)[0] in keep
        }  # tied ones once
        buffers = {n for n, _ in self.named_buffers() if n in state and n.split(".", 1)[0] in parts}
        return {name: state[name] for name in sorted(weights | buffers)}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations of the language model, and of the vision tower if it is trained."""
        kwargs = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if self.vision is None or not any(p.requires_grad for p in self.vision.parameters()):
            return
        if hasattr(self.vision.visual, "set_grad_checkpointing"):
            self.vision.visual.set_grad_checkpointing(True)
