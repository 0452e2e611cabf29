"""Image towers of OpenCLIP as backbones, with zero-shot classifiers of their text towers. It needs ``open_clip``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from transfer import (
    ZERO_SHOT_TEMPLATES,
    Backbone,
    ConfigError,
    FeatureSpec,
    WeightsError,
    load_saved_backbone,
    saved_backbone,
)
from transfer_vision.models.timm_model import is_run
from transfer_vision.models.timm_stages import reduced
from transfer_vision.models.weights import find_local
from transfer_vision.preprocessing import Augmentation, CacheImages, ImagePreprocessing

CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
"""Names of the resize modes of OpenCLIP."""


class OpenCLIP(Backbone):
    """The image tower of a model of OpenCLIP (https://github.com/mlfoundations/open_clip), by its name there.

    The features are the normalized image embeddings. The stages of a vision transformer are ``stem``, ``block.0``,
    ``block.1`` ... and ``pool``; other towers are one stage, ``network``.

    Args:
        model: Name of the model in OpenCLIP (``ViT-B-32``), ``local-dir:FOLDER`` with ``open_clip_config.json``, or
            ``hf-hub:OWNER/NAME``.
        weights: ``pretrained`` for the weights of the folder or of the Hub, or the first that OpenCLIP lists for the
            name; the tag of others (``laion2b_s34b_b79k``); a file of the complete model; an earlier run of the same
            model (``runs/NAME``), without a text tower; or null for random initialization.
        image_size: Height and width of the model's input, in pixels; null: from the configuration of the model.
        augmentation: Random augmentation of training images: ``default`` (a random resized crop and a horizontal
            flip), ``strong`` (with TrivialAugment and random erasing), ``none``, or a list of torchvision.transforms.v2
            classes with options.
        cache_images: Memory for decoded and resized images, which are kept between epochs if those of a split fit:
            ``auto`` (half of the available memory), ``off``, or a number of GiB.
    """

    field = "image"

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        model: str,
        weights: str | None = "pretrained",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        augmentation: Augmentation = "default",
        cache_images: CacheImages = "auto",
    ) -> None:
        import open_clip

        if ":" not in model and model not in open_clip.list_models():
            raise ConfigError(f"OpenCLIP has no model called {model!r}", available=open_clip.list_models())
        self._name, self._weights, self._size = model, weights, image_size
        # The device is passed on, because OpenCLIP moves a model to the CPU by default, also from the meta device.
        with _errors(ConfigError, model, "create the model", "check the name, the folder and image_size"):
            network: Any = open_clip.create_model(
                model,
                load_weights=False,
                pretrained_text=False,
                force_image_size=image_size,
                device=torch.empty(0).device,
            )
        self._settings = settings or self._settings_of(network.visual)
        super().__init__(_split(network.visual))
        self._features = network.visual.proj.shape[1] if _is_chain(network.visual) else network.visual.output_dim
        self._loading: dict[str, Any] = {"augmentation": augmentation, "cache_images": cache_images}

    def _settings_of(self, visual: Any) -> dict[str, Any]:
        """Return the arguments of ImagePreprocessing that agree with OpenCLIP's evaluation of the model."""
        import open_clip

        config = dict(visual.preprocess_cfg)
        if (tag := self._tag()) is not None:
            published = open_clip.get_pretrained_cfg(self._name, tag)
            config |= {name: published[name] for name in config.keys() & published.keys()}
        size = self._size or config["size"]
        size = size if isinstance(size, int) else max(size)
        settings = {"image_size": size, "resize": size, "crop_mode": CROP_MODES[config["resize_mode"]]}
        return settings | {name: config[name] for name in ("interpolation", "mean", "std")}

    def _tag(self) -> str | None:
        """Return the tag of published weights; None for a folder, the Hub, a file, a run and random weights."""
        import open_clip

        tags = [] if ":" in self._name else open_clip.list_pretrained_tags_by_model(self._name)
        if self._weights == "pretrained" and ":" not in self._name:
            if not tags:
                raise ConfigError(f"OpenCLIP lists no weights for {self._name}", fix="give a file, or weights: null")
            return str(tags[0])
        return self._weights if self._weights in tags else None

    @property
    def features(self) -> FeatureSpec:
        """The normalized embedding of an image."""
        return FeatureSpec("vector", int(self._features))

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """The preprocessing with which OpenCLIP evaluates the model."""
        return ImagePreprocessing(**self._settings, **self._loading)

    @classmethod
    def from_assets(cls, assets: Mapping[str, str], **options: Any) -> Self:
        """Build the backbone with its saved preprocessing."""
        return cls(json.loads(assets["preprocessing.json"]), **options)

    def assets(self) -> Mapping[str, str]:
        """Return the settings of the preprocessing."""
        return {"preprocessing.json": json.dumps(self._settings)}

    def load_pretrained(self) -> Mapping[str, Any]:
        """Load the weights of the image tower through OpenCLIP, which downloads and converts them.

        Raises:
            WeightsError: The weights cannot be read, or are not those of this model.
        """
        import open_clip

        if self._weights is None:
            return {}
        facts = {"weights": self._weights, "open_clip": open_clip.__version__}
        if is_run(self._weights):
            return {**facts, **load_saved_backbone(self, saved_backbone(self._weights))}
        # Names of submodules must not contain dots; the stages of a backbone replace them in the same way.
        stages = {name.replace(".", "/"): stage for name, stage in _split(self._load().visual).items()}
        self.stages.load_state_dict(nn.ModuleDict(stages).state_dict())
        return facts

    def _load(self) -> Any:
        """Return the complete model with its weights."""
        import open_clip

        file = None
        if ":" not in self._name and (file := self._tag()) is None:
            file = str(find_local(str(self._weights)))
        fix = "connect to the Hugging Face Hub once, give a file of the complete model, or weights: null"
        with _errors(WeightsError, self._name, "read its weights", fix):
            return open_clip.create_model(
                self._name, pretrained=file, force_image_size=self._size, require_pretrained=True, pretrained_text=False
            )

    def zero_shot(
        self, classes: Sequence[str], templates: Sequence[str] = ZERO_SHOT_TEMPLATES
    ) -> tuple[Tensor, Tensor] | None:
        """Return the linear classifier of the text tower; None if the weights contain no text tower."""
        import open_clip

        if self._weights is None or is_run(self._weights):
            return None
        model = self._load().eval()
        tokenizer = open_clip.get_tokenizer(self._name)
        with torch.no_grad():
            embeddings = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)  # (D, C)
            bias = embeddings.new_zeros(len(classes))
            if model.logit_bias is not None:
                bias += model.logit_bias
            return model.logit_scale.exp() * embeddings.T, bias


@contextmanager
def _errors(kind: type[ConfigError | WeightsError], model: str, action: str, fix: str) -> Iterator[None]:
    """Convert any error of OpenCLIP, of the Hub and of file formats; OpenCLIP's warnings are not printed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns about every model that is created without weights
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"OpenCLIP cannot {action} ({model}): {reason}", fix=fix) from error
    finally:
        logging.disable(disabled)


def _is_chain(visual: Any) -> bool:
    """Return whether an image tower is OpenCLIP's own vision transformer, whose blocks form a chain."""
    from open_clip.transformer import VisionTransformer

    return type(visual) is VisionTransformer and visual.transformer.batch_first and visual.proj is not None


def _split(visual: Any) -> dict[str, nn.Module]:
    """Split an image tower into stages, whose tensors keep OpenCLIP's names."""
    if not _is_chain(visual):
        return {"network": reduced(visual, [name for name, _ in visual.named_children()], _complete)}
    stem: Any = reduced(visual, ["conv1", "patch_dropout", "ln_pre"], _embed)
    pooling = [name for name in ("attn_pool", "attn_pool_contrastive", "ln_post") if visual._modules.get(name)]
    pool: Any = reduced(visual, pooling, _pool)
    # A stage without pooling by attention still reads the attributes.
    pool._modules |= {name: None for name in ("attn_pool", "attn_pool_contrastive") if name not in pooling}
    stem._parameters = {name: visual._parameters[name] for name in ("class_embedding", "positional_embedding")}
    pool._parameters = {"proj": visual._parameters["proj"]}
    blocks = {f"block.{number}": block for number, block in enumerate(visual.transformer.resblocks)}
    return {"stem": stem, **blocks, "pool": pool}


def _embed(visual: Any, images: Tensor) -> Any:
    return visual._embeds(images)


def _pool(visual: Any, values: Tensor) -> Tensor:
    pooled, _ = visual._pool(values)
    return F.normalize(pooled @ visual.proj, dim=-1)


def _complete(visual: Any, images: Tensor) -> Tensor:
    embeddings = type(visual).forward(visual, images)
    return F.normalize(embeddings[0] if isinstance(embeddings, tuple) else embeddings, dim=-1)
