"""TwoTower: a text encoder and a vision model side by side, with projections into one space, or a head over both.

The towers are used as they are; what is new (projections, temperature, head) is small, is trained whole, and is saved with the
adapter. Knows no data and no training.

Shapes: B rows, T tokens, D dimensions of the common space, C classes.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import SpecError, did_you_mean, some_names
from weft.models.fusion import FUSIONS
from weft.models.pair_losses import DUPLICATES, LOSSES, pair_loss

__all__ = ["POOLINGS", "Temperature", "TwoTower", "TwoTowerOutput"]

POOLINGS = ("auto", "mean", "first", "pooler")
MAX_SCALE = 100.0
_CLASSIFIERS = ("fc", "classifier", "head", "heads", "linear", "logits", "last_linear")
_UNTRAINED_POOLERS = (
    "vit",
    "deit",
    "beit",
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "dinov2",
    "vit_msn",
)
_SEED = 0


@dataclass
class TwoTowerOutput:
    """What a forward gives.

    Attributes:
        loss: of the whole batch, with ``labels``.
        logits: (B, B) scaled similarities of texts to images; (B, C) with a head.
        text_embeds, image_embeds: (B, D); of length one where they are compared.
        scale, bias: of similarities; None with a head.
    """

    loss: Tensor | None
    logits: Tensor
    text_embeds: Tensor
    image_embeds: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


class Temperature(nn.Module):
    """How much similarities are stretched, learned as a logarithm and held below `MAX_SCALE`; and a shift, for the sigmoid loss.

    Source:
        Radford et al. 2021, arXiv:2103.00020, section 2.5 (clipped at 100); Zhai et al. 2023, arXiv:2303.15343 (the bias).
    """

    bias: Tensor

    def __init__(self, scale: float = 1 / 0.07, bias: float | None = None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if bias is None:
            self.register_buffer("bias", torch.zeros(()))
        else:
            self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(scale, bias)."""
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp(), self.bias


class TwoTower(nn.Module):
    """A text encoder and a vision model, brought together.

    Args:
        text_model: any encoder of transformers, or a module that gives (B, T, width) or (B, width) from ``input_ids`` and
            ``attention_mask``.
        vision_model: any vision model of transformers, or of plain PyTorch.
        dim: D.
        fusion: ``"contrastive"``: compare; or a head over both: ``"concat"``, ``"gated"``, ``"cross-attention"``.
        classes: C, for a head.
        loss: ``"softmax"`` or ``"sigmoid"``, see `weft.models.pair_losses`.
        duplicates: what becomes of a caption or an image that stands in a batch twice, one of `DUPLICATES`.
        features: where the vision model's features are. None: what ``get_features`` gives; the pooled or last hidden state that it
            returns; or else what goes into its classifier: its last linear layer, if that is called fc, classifier, head or the like
            (`features_from` says which). A path names the module whose input is meant; ``"output"``: what the model returns.
        text_pooling: one of `POOLINGS`. ``"auto"``: the mean over real tokens; for CLIP- and SigLIP-like encoders, their own pooled one.
        vision_pooling: the same for hidden states (B, tokens, width); ``"auto"``: their own pooled one where it was trained, else the first.
        text_width, vision_width: lengths of the features, where the towers don't say.
        modality_dropout: probability that a row of a training batch has its text or its image blanked; for heads over both.
        frozen_features: compute the features of these towers without gradients, as for a tower without an adapter.
        seed: of what is new.

    Raises:
        SpecError: an unknown name, or a tower whose features can't be found; says what to give.

    Example:
        >>> model = weft.TwoTower(text_model, vision_model, dim=128)  # doctest: +SKIP
        >>> spec = {"text_model": weft.LoraSpec(targets=["query", "value"]), "vision_model": weft.LoraSpec(targets=["conv1", "conv2"])}
        >>> bank = weft.attach(model, {"mine": spec})  # doctest: +SKIP
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        text_model: nn.Module,
        vision_model: nn.Module,
        dim: int = 128,
        fusion: str = "contrastive",
        *,
        classes: int | None = None,
        loss: str = "softmax",
        duplicates: str = "targets",
        features: str | None = None,
        text_pooling: str = "auto",
        vision_pooling: str = "auto",
        text_width: int | None = None,
        vision_width: int | None = None,
        modality_dropout: float = 0.0,
        frozen_features: tuple[str, ...] = (),
        seed: int = _SEED,
    ) -> None:
        super().__init__()
        _one_of("fusion", fusion, ("contrastive", *FUSIONS))
        _one_of("loss", loss, LOSSES)
        _one_of("duplicates", duplicates, DUPLICATES)
        _one_of("text_pooling", text_pooling, POOLINGS)
        _one_of("vision_pooling", vision_pooling, POOLINGS)
        if dim < 1 or not 0 <= modality_dropout < 1:
            raise SpecError(
                f"TwoTower: dim={dim}, modality_dropout={modality_dropout}; expected at least 1, and a number in [0, 1)"
            )
        if (fusion == "contrastive") == (classes is not None):
            raise SpecError(
                f"TwoTower: fusion={fusion!r} with classes={classes}; a head over both has classes, a comparison has none"
            )
        if fusion == "contrastive" and modality_dropout:
            raise SpecError(
                "TwoTower: modality_dropout is for heads over text and image; a comparison without one of them is none"
            )
        self.text_model, self.vision_model = text_model, vision_model
        self.dim, self.fusion, self.loss, self.duplicates = dim, fusion, loss, duplicates
        self.text_pooling, self.vision_pooling = text_pooling, vision_pooling
        self.modality_dropout, self.frozen_features = modality_dropout, tuple(frozen_features)
        self.features_from = _where(vision_model, features)
        widths = text_width or _width(text_model, "text_model"), vision_width or self._vision_width()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.text_projection = nn.Linear(widths[0], dim, bias=False)
            self.vision_projection = nn.Linear(widths[1], dim, bias=False)
            self.temperature = (
                None if fusion != "contrastive" else Temperature() if loss == "softmax" else Temperature(10.0, -10.0)
            )
            self.head = None if fusion == "contrastive" else FUSIONS[fusion](dim, classes)
        weight = next((p for p in text_model.parameters() if p.is_floating_point()), torch.empty(0))
        for name in self.weft_heads:
            self.get_submodule(name).to(weight.device, weight.dtype if weight.dtype == torch.float64 else torch.float32)

    @property
    def weft_heads(self) -> tuple[str, ...]:
        """Modules that are new and have to be trained whole; `weft.attach` puts them into a spec by tower that names none."""
        return ("text_projection", "vision_projection", "temperature" if self.fusion == "contrastive" else "head")

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Tensor) -> Tensor:
        """(B, T) -> (B, D); of length one where they are compared."""
        return self._finished(
            self.text_projection(self._text(input_ids, attention_mask, rest).to(_dtype(self.text_projection)))
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D); of length one where they are compared."""
        return self._finished(self.vision_projection(self._image(pixel_values).to(_dtype(self.vision_projection))))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> TwoTowerOutput:
        """Compare texts and images of a batch, or classify its rows.

        Args:
            labels: (B,) numbers of captions, equal for equal ones (for a comparison; with ``arange`` all count as different); or classes.
                -100 for a class that isn't known.
            image_ids: (B,) numbers of images, equal for equal ones.
        """
        if pixel_values is None:
            raise SpecError("TwoTower: a forward needs pixel_values; encode_text encodes texts alone")
        rest = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        text, image = self.encode_text(input_ids, attention_mask, **rest), self.encode_image(pixel_values)
        if self.head is not None:
            if self.training and self.modality_dropout:
                text, image = self._blanked(text, image)
            logits = self.head(text, image)
            return TwoTowerOutput(None if labels is None else F.cross_entropy(logits, labels), logits, text, image)
        assert self.temperature is not None
        scale, bias = self.temperature()
        found = None
        if labels is not None:
            found = pair_loss(text, image, scale, bias, labels, image_ids, loss=self.loss, duplicates=self.duplicates)
        return TwoTowerOutput(found, (text @ image.T) * scale + bias, text, image, scale, bias)

    # inside

    def _finished(self, projected: Tensor) -> Tensor:
        return F.normalize(projected, dim=-1) if self.fusion == "contrastive" else projected

    def _blanked(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows lose their text, others their image, none both."""
        lost = torch.rand(len(text), 1, device=text.device) < self.modality_dropout
        which = torch.rand(len(text), 1, device=text.device) < 0.5
        return text.masked_fill(lost & which, 0.0), image.masked_fill(lost & ~which, 0.0)

    def _text(self, input_ids: Tensor, mask: Tensor | None, rest: dict[str, Tensor]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text_model" not in self.frozen_features):
            out = self.text_model(input_ids=input_ids, attention_mask=mask, **rest)
        states = _states(out)
        pooled = _pooled(out)
        if states is None:
            return _plain(out)
        kind = self.text_pooling
        if kind == "auto":
            kind = "pooler" if pooled is not None and _trained_pooler(self.text_model) else "mean"
        if kind == "mean" and mask is not None:
            weights = mask[..., None].to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return _choose(kind, states, pooled, "text_model")

    def _image(self, pixel_values: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision_model" not in self.frozen_features):
            if self.features_from == "get_features":
                found: Tensor = self.vision_model.get_features(pixel_values)  # type: ignore[operator]
                return found
            if self.features_from not in ("output", "states"):
                return _captured(self.vision_model, self.features_from, pixel_values)
            out = (
                self.vision_model(pixel_values)
                if self.features_from == "output"
                else self.vision_model(pixel_values=pixel_values)
            )
        states, pooled = _states(out), _pooled(out)
        if states is None:
            return _flat(_plain(out))
        kind = self.vision_pooling
        if states.dim() == 4:  # a map (B, width, H, W)
            return pooled.flatten(1) if pooled is not None and kind in ("auto", "pooler") else states.mean((2, 3))
        if kind == "auto":
            kind = "pooler" if pooled is not None and _trained_pooler(self.vision_model) else "first"
        return _choose(kind, states, pooled, "vision_model")

    def _vision_width(self) -> int:
        """Length of the vision model's features."""
        if self.features_from not in ("output", "states", "get_features"):
            module = self.vision_model.get_submodule(self.features_from)
            width = getattr(module, "in_features", None)
            if isinstance(width, int):
                return width
            raise SpecError(
                f"TwoTower: features={self.features_from!r} is a {type(module).__name__}, which doesn't say its width; give vision_width"
            )
        return _width(self.vision_model, "vision_model")


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise SpecError(
            f"TwoTower: {name}={value!r} is unknown.{did_you_mean(str(value), known)} Expected one of {', '.join(known)}"
        )


def _where(model: nn.Module, features: str | None) -> str:
    """``states`` of a transformers model, ``get_features``, ``output``, or the path of the classifier."""
    if features == "output":
        return features
    paths = dict(model.named_modules())
    if features is not None:
        if features not in paths or not features:
            raise SpecError(
                f"TwoTower: the vision model has no module {features!r} (features).{did_you_mean(features, paths)}"
            )
        return features
    if callable(getattr(type(model), "get_features", None)):
        return "get_features"
    linear = [path for path, module in paths.items() if isinstance(module, nn.Linear)]
    if linear and linear[-1].partition(".")[0] in _CLASSIFIERS:
        return str(linear[-1])
    if hasattr(model, "config") and hasattr(type(model), "from_pretrained"):
        return "states"
    return "output"


def _width(model: nn.Module, name: str) -> int:
    """Length of a tower's features."""
    config: Any = getattr(model, "config", None)
    for key in ("hidden_size", "d_model", "dim", "embed_dim", "num_features"):
        value = getattr(config, key, None) if config is not None else getattr(model, key, None)
        if isinstance(value, int) and value > 0:
            return value
    widths = getattr(config, "hidden_sizes", None)
    if widths:
        return int(widths[-1])
    children = some_names([path for path, _ in model.named_children()])
    hint = ", or features='PATH' of the layer that classifies" if name == "vision_model" else ""
    raise SpecError(
        f"TwoTower: a {type(model).__name__} doesn't say how long its features are; give {name.partition('_')[0]}_width=…{hint} (its parts: {children})"
    )


def _states(out: Any) -> Tensor | None:
    found = getattr(out, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else out if isinstance(out, Tensor) and out.dim() == 3 else None


def _pooled(out: Any) -> Tensor | None:
    found = getattr(out, "pooler_output", None)
    return found if isinstance(found, Tensor) else None


def _plain(out: Any) -> Tensor:
    for name in ("text_embeds", "image_embeds", "logits"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor):
            return found
    out = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(out, Tensor):
        raise SpecError(
            f"TwoTower: a tower returned a {type(out).__name__}; expected a tensor, or an output with last_hidden_state"
        )
    return out


def _flat(found: Tensor) -> Tensor:
    return found.mean((2, 3)) if found.dim() == 4 else found


def _choose(kind: str, states: Tensor, pooled: Tensor | None, name: str) -> Tensor:
    if kind == "pooler":
        if pooled is None:
            raise SpecError(f"TwoTower: {name} returns no pooler_output; choose another pooling, 'mean' or 'first'")
        return pooled
    return states.mean(1) if kind == "mean" else states[:, 0]


def _trained_pooler(model: nn.Module) -> bool:
    """Poolers of CLIP, SigLIP, ConvNeXt … are part of what was trained; those of BERT and ViT mostly are not."""
    return getattr(getattr(model, "config", None), "model_type", "") not in _UNTRAINED_POOLERS


def _captured(model: nn.Module, path: str, pixel_values: Tensor) -> Tensor:
    """What goes into a module of a model, in this thread's forward."""
    found: list[Tensor] = []
    thread = threading.get_ident()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            found.append(args[0])

    handle = model.get_submodule(path).register_forward_pre_hook(keep)
    try:
        model(pixel_values)
    finally:
        handle.remove()
    if not found:
        raise SpecError(
            f"TwoTower: {path!r} of the vision model wasn't called in its forward; name another layer with features='PATH'"
        )
    return _flat(found[-1]) if found[-1].dim() == 4 else found[-1]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
