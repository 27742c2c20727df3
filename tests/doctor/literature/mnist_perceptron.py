# expect: GF002
"""A perceptron on images like MNIST's, accumulating by 4: no division, and the last window is flushed."""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 16
ACCUMULATION_STEPS = 4
EPOCHS = 2
LEARNING_RATE = 0.01


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = x.view(-1, 28 * 28)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


def digits(num_samples):
    """Ten blurred shapes with noise, in the place of the handwritten ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = F.avg_pool2d(torch.rand(10, 1, 28, 28, generator=generator), 5, 1, 2)
    labels = torch.randint(0, 10, (num_samples,), generator=generator)
    return TensorDataset(shapes[labels] + 0.1 * torch.randn(num_samples, 1, 28, 28, generator=generator), labels)


def train(model, device, train_loader, optimizer, epoch):
    model.train()
    optimizer.zero_grad()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss = F.cross_entropy(output, target)
        loss.backward()
        if (batch_idx + 1) % ACCUMULATION_STEPS == 0 or (batch_idx + 1) == len(train_loader):
            optimizer.step()
            optimizer.zero_grad()
    print(f"Train Epoch: {epoch} Loss: {loss.item():.6f}")


def test(model, device, test_loader):
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            correct += (model(data).argmax(dim=1) == target).sum().item()
    print(f"Test Accuracy: {correct}/{len(test_loader.dataset)}")


def main():
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader = DataLoader(digits(480), batch_size=BATCH_SIZE, shuffle=True)  # 30 batches: windows of 4, and 2
    test_loader = DataLoader(digits(64), batch_size=64)
    model = Perceptron().to(device)
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(1, EPOCHS + 1):
        train(model, device, train_loader, optimizer, epoch)
        test(model, device, test_loader)


if __name__ == "__main__":
    main()
