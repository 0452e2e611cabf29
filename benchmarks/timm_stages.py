"""Print the table of the stages of timm's architectures in docs/vision.md: ``python benchmarks/timm_stages.py``.

Each architecture is built with random weights. The largest deviation is the one between the features of the stages and
those of timm's own forward pass, over two random images in float32.
"""

import timm
import torch

from transfer_vision.models.timm_model import Timm

MODELS = {
    "ViT": ("vit_tiny_patch16_224", 64),
    "DINOv2": ("vit_small_patch14_dinov2", 70),
    "DINOv3": ("vit_small_patch16_dinov3", 64),
    "EVA-02": ("eva02_tiny_patch14_224", 70),
    "ViT with trained rotary tables": ("vit_small_patch16_rope_mixed_224", 64),
    "BEiT v2": ("beitv2_base_patch16_224", 224),
    "SigLIP": ("vit_base_patch16_siglip_224", 64),
    "Swin": ("swin_tiny_patch4_window7_224", 224),
    "ConvNeXt": ("convnext_atto", 64),
    "EfficientNet": ("tf_efficientnet_lite0", 64),
    "RegNet": ("regnety_002", 64),
    "ResNet": ("resnet18", 64),
}


def deviation(model: str, size: int) -> tuple[int, float]:
    """Return the number of stages and the largest deviation of a feature from timm's."""
    torch.manual_seed(0)
    backbone = Timm(model=model, weights=None, image_size=size).eval()
    fixed = timm.get_pretrained_cfg(model).fixed_input_size
    network = timm.create_model(model, num_classes=0, **({"img_size": size} if fixed else {})).eval()
    tensors = {name: tensor for stage in backbone.stages for name, tensor in stage.state_dict().items()}
    network.load_state_dict(tensors, strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        return len(backbone.stage_names), float((backbone(images) - expected).abs().max())


def main() -> None:
    """Print the table."""
    print("| architecture | measured with | image size | stages | largest deviation |\n|---|---|---|---|---|")
    for family, (model, size) in MODELS.items():
        stages, difference = deviation(model, size)
        print(f"| {family} | `{model}` | {size} | {stages} | {difference:.1g} |", flush=True)


if __name__ == "__main__":
    main()
