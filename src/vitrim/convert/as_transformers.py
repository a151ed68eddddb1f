"""A sparse model as a model of transformers: for its pipelines, and in place of its vision towers.

This file is imported where transformers is there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import ModelOutput

from vitrim.errors import ConfigError
from vitrim.model import SparseModel


class SparseConfig(PreTrainedConfig):  # type: ignore[misc]
    """What transformers asks of a model, answered by a sparse one."""

    model_type = "vitrim"


@dataclass
class SparseOutput(ModelOutput):  # type: ignore[misc]
    """What a sparse model says of images."""

    loss: Tensor | None = None
    """Cross entropy, where labels were given."""
    logits: Tensor | None = None
    """(B, classes); None where there is no classifier."""
    last_hidden_state: Tensor | None = None
    """(B, P + N, C), see ``SparseModel.embeddings``."""
    pooler_output: Tensor | None = None
    """(B, C), or what a pooler of transformers made of the last hidden state."""
    hidden_states: Any = None
    attentions: Any = None


class SparseForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """What :func:`vitrim.as_transformers` makes."""

    config_class = SparseConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True

    def __init__(
        self, sparse: SparseModel, pooler: nn.Module | None = None, logits_only: bool = False
    ) -> None:
        super().__init__(_config_of(sparse))
        self.training = sparse.training
        self.sparse, self.pooler, self.logits_only = sparse, pooler, logits_only
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is new in here."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> SparseOutput | tuple[Any, ...]:
        """The answer of images (B, channels, H, W), of the size that the model was made for.

        Raises:
            ConfigError: hidden states or attentions of all blocks are asked for, or something else
                that a sparse model has not.
        """
        unserved = [
            name for name, value in asked.items() if value is not None and value is not False
        ]
        if unserved:
            raise ConfigError(
                f"a sparse model does not serve {', '.join(unserved)}; it gives logits, "
                "last_hidden_state and pooler_output"
            )
        images = pixel_values.to(next(self.sparse.parameters()).dtype)
        found = self._logits(images) if self.logits_only else self._everything(images)
        if labels is not None and "logits" in found:
            found["loss"] = self.loss_function(labels, found["logits"], self.config)
        output = SparseOutput(**found)
        return output if return_dict is not False else output.to_tuple()

    def _logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.sparse(images)}

    def _everything(self, images: Tensor) -> dict[str, Tensor]:
        backbone = self.sparse.backbone
        # As transformers' CLIP does: what it norms before its blocks, it hands on before the last.
        norm = isinstance(getattr(backbone, "norm_pre", None), nn.Identity)
        embeddings = self.sparse.embeddings(images, norm)
        hidden = torch.cat([embeddings.prefix, embeddings.patches], 1)
        pooled = embeddings.pooled if self.pooler is None else self.pooler(hidden)
        found = {"last_hidden_state": hidden, "pooler_output": pooled}
        return found | {"logits": embeddings.logits} if backbone.num_classes else found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write vitrim's checkpoint, which ``vitrim.from_pretrained`` reads."""
        self.sparse.save_pretrained(save_directory)


def _config_of(sparse: SparseModel) -> SparseConfig:
    """What is known of a sparse model, in the words of transformers' configs."""
    family, backbone = sparse.family, sparse.backbone
    height, width = family.image_size
    names = dict(enumerate(sparse.labels or ()))
    if len(names) == backbone.num_classes:
        labels: dict[str, Any] = {
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }
    else:
        labels = {"num_labels": backbone.num_classes}
    return SparseConfig(
        hidden_size=backbone.num_features,
        num_hidden_layers=len(backbone.feature_info),
        num_channels=family.in_channels,
        image_size=height if height == width else (height, width),
        patch_size=height // family.grid()[0],
        architectures=[SparseForImageClassification.__name__],
        **labels,
    )


# The pipeline asks this table whether a class is meant for it.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[SparseConfig.model_type] = (
    SparseForImageClassification.__name__
)
