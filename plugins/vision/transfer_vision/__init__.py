"""Images for transfer: torchvision backbones, image preprocessing, and datasets of images."""
