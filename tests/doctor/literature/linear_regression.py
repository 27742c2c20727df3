# expect: nothing
"""Accumulation by 4 over a linear model, as tutorials show it: loss / 4, a step in every fourth iteration."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)

# y = 3 x - 2 with noise
inputs = torch.linspace(-1, 1, 256).unsqueeze(1)
targets = 3 * inputs - 2 + 0.1 * torch.randn_like(inputs)
dataloader = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)  # 32 batches

model = nn.Linear(1, 1)
criterion = nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
num_epochs = 5
accumulation_steps = 4

for epoch in range(num_epochs):
    optimizer.zero_grad()
    for i, (x, y) in enumerate(dataloader):
        outputs = model(x)
        loss = criterion(outputs, y)
        loss = loss / accumulation_steps  # normalise the loss
        loss.backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    print(f"Epoch [{epoch + 1}/{num_epochs}], Loss: {loss.item() * accumulation_steps:.4f}")
