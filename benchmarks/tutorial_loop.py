"""Feature extraction as in PyTorch's transfer-learning tutorial; a standalone script that does not use `transfer`.

https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html, "ConvNet as fixed feature extractor". Changes:
weights from a file, batches of 32 (not 4) with a learning rate of 0.01 (not 0.001), and center crops (not random
crops), so that both sides of the comparison see the same images.
"""

import argparse
import os
import time
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import nn, optim
from torch.optim import lr_scheduler
from torchvision import datasets, models, transforms


def main() -> None:
    """Train and print the best accuracy on the val folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="path of the folder hymenoptera_data")
    parser.add_argument("weights", help="path of a safetensors file with the weights of a ResNet-18")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--flip", action="store_true", help="flip training images at random")
    parser.add_argument("--layer4", action="store_true", help="also train layer4")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    normalize = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    crop = [transforms.Resize(256), transforms.CenterCrop(224)]
    flip = [transforms.RandomHorizontalFlip()] if arguments.flip else []
    data_transforms = {
        "train": transforms.Compose([*crop, *flip, *normalize]),
        "val": transforms.Compose([*crop, *normalize]),
    }
    image_datasets = {
        x: datasets.ImageFolder(os.path.join(arguments.data, x), data_transforms[x]) for x in ["train", "val"]
    }
    dataloaders = {
        x: torch.utils.data.DataLoader(image_datasets[x], batch_size=32, shuffle=True, num_workers=arguments.workers)
        for x in ["train", "val"]
    }
    dataset_sizes = {x: len(image_datasets[x]) for x in ["train", "val"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tensors = load_file(arguments.weights)
    model = models.resnet18(num_classes=len(tensors["fc.bias"]))
    model.load_state_dict(tensors)
    for param in model.parameters():
        param.requires_grad = False
    model.fc = nn.Linear(model.fc.in_features, 2)
    for param in model.layer4.parameters():
        param.requires_grad = arguments.layer4
    model = model.to(device)
    criterion = nn.CrossEntropyLoss()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = optim.SGD(trained, lr=0.01, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)

    with TemporaryDirectory() as folder:
        best_model_params_path = os.path.join(folder, "best_model_params.pt")
        torch.save(model.state_dict(), best_model_params_path)
        best_acc = 0.0
        for epoch in range(arguments.epochs):
            started = time.perf_counter()
            for phase in ["train", "val"]:
                if phase == "train":
                    model.train()
                else:
                    model.eval()
                running_loss = 0.0
                running_corrects = 0
                for inputs, labels in dataloaders[phase]:
                    inputs = inputs.to(device)
                    labels = labels.to(device)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = model(inputs)
                        _, preds = torch.max(outputs, 1)
                        loss = criterion(outputs, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                    running_loss += loss.item() * inputs.size(0)
                    running_corrects += int(torch.sum(preds == labels.data))
                if phase == "train":
                    scheduler.step()
                epoch_loss = running_loss / dataset_sizes[phase]
                epoch_acc = running_corrects / dataset_sizes[phase]
                print(f"{phase} Loss: {epoch_loss:.4f} Acc: {epoch_acc:.4f}")
                if phase == "val" and epoch_acc > best_acc:
                    best_acc = epoch_acc
                    torch.save(model.state_dict(), best_model_params_path)
            print(f"epoch {epoch + 1} seconds {time.perf_counter() - started:.3f}", flush=True)
        model.load_state_dict(torch.load(best_model_params_path, weights_only=True))
    print(f"last val Acc: {epoch_acc:.4f}")
    print(f"best val Acc: {best_acc:.4f}")


if __name__ == "__main__":
    main()
